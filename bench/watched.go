// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// Watched is traffic while everything looks on.
const Watched = "watched"

// watchers are who looks on: what follows the rings of events, and what reads the counters.
var watchers = [][]string{{"drops", "-f"}, {"flows", "-f"}}

// scrapes is how often /metrics is read.
const scrapes = time.Second

// watchedGroup asks between two containers of a host that nobody watches, and of one that all watchers do.
func watchedGroup() Group {
	return Group{
		Name: Watched, Scenarios: []string{Watched}, Modes: []string{Bpfnet}, Warm: true, Quick: true, Labs: 20 * time.Second, Round: 5 * time.Second,
		Build: func(t testing.TB, o Options) []Probe {
			var probes []Probe
			for _, n := range []int{0, len(watchers) + 1} {
				o.Step("%s: build a lab with %d watchers", Watched, n)
				s := newSpot(t, Bpfnet, spotOpts{})
				note := "between two containers; each request is two packets"
				stands := func() error { return nil }
				if n > 0 {
					note += `, while "bpfnet drops -f" and "bpfnet flows -f" run and /metrics is read every second`
					stands = s.watch(t)
				}
				probes = append(probes, s.scaled(t, o, Key{Scenario: Watched, At: n}, "container-container", note, stands, "rr", "crr")...)
			}
			return probes
		},
	}
}

// watch starts all watchers, which end with t. It returns what fails where one of them sees nothing any more.
func (s *site) watch(t testing.TB) (stands func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var ended atomic.Pointer[error]
	end := func(who string, err error) {
		if ctx.Err() == nil {
			err = fmt.Errorf("%s has ended: %w", who, err)
			ended.CompareAndSwap(nil, &err)
		}
	}
	done := make(chan struct{}, len(watchers)+1)
	for _, args := range watchers {
		cmd := s.bpfnet.Command(ctx, args...)
		var said strings.Builder
		cmd.Stdout, cmd.Stderr = io.Discard, &said // a writer that takes as fast as it can
		if err := cmd.Start(); err != nil {
			t.Fatalf("%s: %v", Watched, err)
		}
		go func() {
			err := cmd.Wait()
			end("bpfnet "+strings.Join(args, " "), errors.Join(err, errors.New(strings.TrimSpace(said.String()))))
			done <- struct{}{}
		}()
	}
	var scraped atomic.Int64
	go func() {
		defer func() { done <- struct{}{} }()
		tick := time.NewTicker(scrapes)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if err := s.scrape(ctx); err != nil {
				end("reading /metrics", err)
				return
			}
			scraped.Add(1)
		}
	}()
	t.Cleanup(func() {
		cancel()
		for range cap(done) {
			<-done
		}
	})
	waitUntil(t, patience, func() error {
		if scraped.Load() == 0 {
			return errors.New("/metrics was not read")
		}
		return nil
	})
	return func() error {
		if err := ended.Load(); err != nil {
			return *err
		}
		return nil
	}
}

// scrape reads /metrics once, as Prometheus does.
func (s *site) scrape(ctx context.Context) error {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.bpfnet.Socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://bpfnet/metrics", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || n == 0) {
		err = fmt.Errorf("%s, %d bytes", resp.Status, n)
	}
	return err
}
