// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/loader"
)

// A verb that waits for a round while the daemon stops is told so: one that takes its steps back waits
// without an end of its own.
func TestFlushEndsWithTheDaemon(t *testing.T) {
	d := &Daemon{kick: make(chan struct{}, 1), urgent: make(chan struct{}, 1), over: make(chan struct{}), news: make(chan struct{})}
	flushed := make(chan error, 1)
	go func() { flushed <- d.Flush(context.Background()) }()
	<-d.urgent // it waits
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.NoError(t, d.reconcileLoop(ctx))
	require.ErrorIs(t, <-flushed, errStopping)
	require.ErrorIs(t, d.Flush(context.Background()), errStopping)
}

// Needs root. However much news there is, readers see what came of it in the end.
func TestSnapshotUnderSteadyNews(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	var d *Daemon
	require.NoError(t, l.Host.Do(func() (err error) {
		d, err = open(Config{Docker: "off", Flows: 1024, Paths: Paths{
			State: filepath.Join(l.Dir, "state"), Socket: filepath.Join(l.Dir, "s.sock"), BPFFS: l.BPFFS, Cgroup: l.Cgroup,
		}})
		return err
	}))
	t.Cleanup(d.close)
	require.NoError(t, l.Host.Do(d.reconcile))
	first := d.snapshot
	shown := func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.snapshot != first
	}
	ctx, cancel := context.WithCancel(t.Context())
	var group errgroup.Group
	group.Go(func() error { return l.Host.Do(func() error { return d.reconcileLoop(ctx) }) })
	news := time.NewTicker(time.Millisecond)
	defer news.Stop()
	deadline := time.After(5 * time.Second)
	for late := false; !late && !shown(); {
		select {
		case <-deadline:
			late = true
		case <-news.C:
			d.wake()
		}
	}
	cancel()
	require.NoError(t, group.Wait())
	assert.True(t, shown())
}

// Needs root. A link that is guarded while a round is under way keeps its guards: that round began
// without knowing it.
func TestGuardDuringRounds(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	links := 50
	if os.Getenv("BPFNET_FULL") != "" {
		links = 250 // a round looks at all of them, and there are as many rounds
	}
	var d *Daemon
	require.NoError(t, l.Host.Do(func() (err error) {
		d, err = open(Config{Docker: "off", Flows: 1024, Paths: Paths{
			State: filepath.Join(l.Dir, "state"), Socket: filepath.Join(l.Dir, "s.sock"), BPFFS: l.BPFFS, Cgroup: l.Cgroup,
		}})
		return err
	}))
	t.Cleanup(d.close)
	var index []int
	for i := range links {
		name := fmt.Sprintf("v%d", i)
		l.Host.MustRun(t, "ip", "link", "add", name, "type", "veth", "peer", "name", "p"+name)
		index = append(index, l.Host.Ifindex(t, name))
	}
	guarded := make(chan int, links)
	var group errgroup.Group
	group.Go(func() error {
		defer close(guarded)
		return l.Host.Do(func() error {
			for _, ifindex := range index {
				if err := d.guard(ifindex); err != nil {
					return err
				}
				guarded <- ifindex
			}
			return nil
		})
	})
	// Between two rounds: the next would mend what the last one did.
	require.NoError(t, l.Host.Do(func() error {
		for more := true; more && !t.Failed(); {
			if err := d.reconcile(); err != nil {
				return err
			}
			for looking := true; looking && more; {
				var ifindex int
				select {
				case ifindex, more = <-guarded:
				default:
					looking = false
				}
				for _, program := range []string{loader.FromContainer, loader.ToContainer} {
					if ifindex != 0 {
						assert.FileExists(t, filepath.Join(l.BPFFS, "links", fmt.Sprintf("%s-%d", program, ifindex)))
					}
				}
			}
		}
		return nil
	}))
	require.NoError(t, group.Wait())
}
