// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"time"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/metrics"
	"github.com/bpfnet/bpfnet/relay"
)

func (d *Daemon) metricsOptions() metrics.Options {
	return metrics.Options{
		Version: d.cfg.Version, Counters: d.loader.Maps(), Rounds: d.rounds, Limit: d.cfg.MetricsLimit, Log: d.log,
		Snapshot: d.liveSnapshot,
		Relay:    func() (*metrics.Relay, error) { return relayMetrics(d.cfg.State) },
	}
}

// liveSnapshot is the last snapshot with what the sources say now: one that is lost makes no round.
func (d *Daemon) liveSnapshot() *api.Snapshot {
	d.mu.Lock()
	s := d.snapshot
	d.mu.Unlock()
	if s == nil {
		return nil
	}
	live := *s
	live.Sources = d.sources(s.Written)
	return &live
}

// relayWithin is how long a scrape waits for the relay: whoever scrapes waits for ten seconds at most, and
// all else is to be shown.
const relayWithin = time.Second

// relayMetrics asks the relay itself: it outlives daemons.
func relayMetrics(dir string) (*metrics.Relay, error) {
	st, err := relay.AskWithin(dir, relayWithin)
	if st == nil || err != nil {
		return nil, err
	}
	out := &metrics.Relay{Active: st.Active}
	for _, p := range st.Ports {
		out.Ports = append(out.Ports, metrics.RelayPort{
			Host: p.Host.String(), Proto: p.Proto.String(), Clients: p.Clients, Dropped: p.Dropped, Failed: p.Failed,
		})
	}
	return out, nil
}

func (d *Daemon) expire() error {
	began := time.Now()
	swept, err := d.loader.Expire()
	if err != nil {
		return err
	}
	d.rounds.Expired(time.Since(began))
	d.rounds.Swept("expired", swept.Deleted[0], swept.Deleted[1])
	return nil
}

func (d *Daemon) purge() error {
	swept, err := d.loader.Purge()
	if err != nil {
		return err
	}
	d.rounds.Swept("purged", swept.Deleted[0], swept.Deleted[1])
	return nil
}
