// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"text/tabwriter"

	"github.com/docker/go-units"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/maps"
)

// readSnapshot reads what the daemon last told of. The reading commands ask no daemon.
func (a *App) readSnapshot() (*api.Snapshot, error) {
	snap, err := api.ReadSnapshot(a.paths.State)
	switch {
	case errors.Is(err, api.ErrNoSnapshot):
		return nil, fmt.Errorf("state %s: no daemon has run there; start one with \"bpfnet daemon\", or name its directory with --state", a.paths.State)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w; run this as root", err)
	case err != nil:
		return nil, fmt.Errorf("%w; the daemon writes it anew: restart it", err)
	}
	return snap, nil
}

// openForReading opens what the readers of traffic read. Close the counters.
func (a *App) openForReading() (*api.Snapshot, counters, error) {
	snap, err := a.readSnapshot()
	if err != nil {
		return nil, nil, err
	}
	c, err := a.OpenCounters(a.paths.BPFFS)
	if err != nil {
		return nil, nil, cannotRead(err)
	}
	return snap, c, nil
}

// cannotRead says how pinned maps that cannot be opened can be.
func cannotRead(err error) error {
	switch {
	case errors.Is(err, maps.ErrNotLoaded):
		return fmt.Errorf("%w; start the daemon with \"bpfnet daemon\", or name its pins with --bpffs", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; run this as root", err)
	}
	return err
}

// trouble tells of readings that fail while a command goes on: each error once, until the next reading has another or none.
type trouble struct {
	w    io.Writer
	last string
}

func (t *trouble) tell(err error) {
	text := ""
	if err != nil {
		text = oneLine(err.Error())
	}
	if text != "" && text != t.last {
		fmt.Fprintf(t.w, "bpfnet: %s; trying again\n", text)
	}
	t.last = text
}

// Volume is an amount of traffic.
type Volume struct {
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

func (v *Volume) add(packets, bytes uint64) {
	v.Packets += packets
	v.Bytes += bytes
}

// Totals is what became of all packets that the programs saw.
type Totals struct {
	Redirected Volume `json:"redirected"` // the fast path: into containers, out of uplinks, to loopback
	Stack      Volume `json:"stack"`      // left to the host's stack
	Bridge     Volume `json:"bridge"`     // left to the bridge
	Dropped    Volume `json:"dropped"`
}

func totals(fates []maps.Fate, drops []maps.Drop) Totals {
	var t Totals
	for _, f := range fates {
		switch f.Fate {
		case "stack":
			t.Stack.add(f.Packets, f.Bytes)
		case "bridge":
			t.Bridge.add(f.Packets, f.Bytes)
		default:
			t.Redirected.add(f.Packets, f.Bytes)
		}
	}
	for _, d := range drops {
		t.Dropped.add(d.Packets, d.Bytes)
	}
	return t
}

// fastShare is the part of the forwarded packets that went the fast path; 0 where there were none.
func (t Totals) fastShare() float64 {
	all := t.Redirected.Packets + t.Stack.Packets + t.Bridge.Packets
	if all == 0 {
		return 0
	}
	return float64(t.Redirected.Packets) / float64(all)
}

func writeJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// table writes rows under a header, in columns. It writes nothing if there are no rows.
func table(w io.Writer, header []string, rows [][]string) error {
	if len(rows) == 0 {
		return nil
	}
	return listing(w, header, rows)
}

// listing writes rows under a header, in columns; the header also when there are no rows.
func listing(w io.Writer, header []string, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, row := range append([][]string{header}, rows...) {
		for i, cell := range row {
			if i > 0 {
				fmt.Fprint(tw, "\t")
			}
			fmt.Fprint(tw, cmp.Or(cell, "-"))
		}
		fmt.Fprintln(tw)
	}
	return tw.Flush()
}

// traffic is a pair of counters in the form of docker stats.
func traffic(packets, bytes uint64) string {
	return fmt.Sprintf("%d / %s", packets, humanBytes(bytes))
}

// humanBytes is an amount in three digits, as docker stats has it.
func humanBytes(n uint64) string {
	if n < 1000 {
		return strconv.FormatUint(n, 10) + "B"
	}
	return units.HumanSizeWithPrecision(float64(n), 3)
}
