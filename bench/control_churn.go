// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"os/exec"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// churnProbes count the containers that are started, run "true" and are gone again, in a second.
func churnProbes(mode string, window time.Duration, command func(context.Context) *exec.Cmd) []Probe {
	var probes []Probe
	for _, parallel := range []int{1, 4} {
		probes = append(probes, Probe{
			Key: Key{Scenario: Churn, Mode: mode, Metric: "run-rm", At: parallel}, Unit: "1/s",
			Note:    fmt.Sprintf("run --rm true, %d at a time", parallel),
			Measure: func(ctx context.Context) (Sample, error) { return churn(ctx, window, parallel, command) },
		})
	}
	return probes
}

// churn runs a command again and again, so many at a time, for a window and until the last has ended.
func churn(ctx context.Context, window time.Duration, parallel int, command func(context.Context) *exec.Cmd) (Sample, error) {
	var mu sync.Mutex
	n := 0
	begin := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for range parallel {
		group.Go(func() error {
			for time.Since(begin) < window && ctx.Err() == nil {
				if out, err := command(ctx).CombinedOutput(); err != nil {
					return fmt.Errorf("run: %w: %s", err, out)
				}
				mu.Lock()
				n++
				mu.Unlock()
			}
			return ctx.Err()
		})
	}
	if err := group.Wait(); err != nil {
		return Sample{}, err
	}
	return Sample{Value: float64(n) / time.Since(begin).Seconds()}, nil
}
