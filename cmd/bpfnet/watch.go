// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Rates is a line of the output of "bpfnet stats --watch -o json": what two readings of the counters differ by, per second.
type Rates struct {
	Time    time.Time `json:"time"`    // of the second reading
	Seconds float64   `json:"seconds"` // between the two
	// Of the whole host, and missing where a name was asked for.
	Paths []PathRate `json:"paths,omitzero"`
	Drops []DropRate `json:"drops,omitzero"`

	Networks   []TrafficRate `json:"networks"`
	Containers []TrafficRate `json:"containers"`
	Ports      []TrafficRate `json:"ports"`
}

// Rate is traffic per second.
type Rate struct {
	Packets float64 `json:"packets"`
	Bytes   float64 `json:"bytes"`
}

// PathRate is a row of the first table of "bpfnet stats": container, uplink, lo, stack, bridge or dropped.
type PathRate struct {
	Path string `json:"path"`
	Rate
}

// DropRate is what was dropped for a reason at a hook.
type DropRate struct {
	Reason string `json:"reason"`
	Hook   string `json:"hook"`
	Rate
}

// TrafficRate is the traffic of a network, a container in a network, or a published port. Rx is into the container.
type TrafficRate struct {
	Name      string `json:"name"`
	Container string `json:"container,omitempty"` // of a port
	Network   string `json:"network,omitempty"`   // of a container and a port
	Rx        Rate   `json:"rx"`
	Tx        Rate   `json:"tx"`
	Dropped   Rate   `json:"dropped"` // sent and dropped
	// Of a port: flows opened, and first packets dropped before it was known.
	Connections float64 `json:"connections"`
	NotReady    float64 `json:"not_ready"`
}

func (t *TrafficRate) bytes() float64   { return t.Rx.Bytes + t.Tx.Bytes }
func (t *TrafficRate) packets() float64 { return t.Rx.Packets + t.Tx.Packets }

// fast is how many packets per second took the fast path, and how many were forwarded at all.
func (r *Rates) fast() (fast, all float64) {
	for _, p := range r.Paths {
		switch p.Path {
		case "stack", "bridge":
			all += p.Packets
		case "dropped":
		default:
			fast += p.Packets
			all += p.Packets
		}
	}
	return fast, all
}

// forwarded is the rate of all that was not dropped, and dropped of what was.
func (r *Rates) forwarded() (all, dropped Rate) {
	for _, p := range r.Paths {
		if p.Path == "dropped" {
			dropped = p.Rate
			continue
		}
		all.Packets += p.Packets
		all.Bytes += p.Bytes
	}
	return all, dropped
}

// ratesOf compares two readings. Who was not there at the first has counted from zero, and so has whoever counts less now:
// another has taken the place.
func ratesOf(before, now *Stats) Rates {
	seconds := now.Time.Sub(before.Time).Seconds()
	r := Rates{Time: now.Time, Seconds: seconds, Networks: []TrafficRate{}, Containers: []TrafficRate{}, Ports: []TrafficRate{}}
	per := func(now, before uint64) float64 {
		if now < before {
			before = 0
		}
		return float64(now-before) / max(seconds, 1e-3)
	}
	rate := func(packets, bytes, packetsBefore, bytesBefore uint64) Rate {
		return Rate{per(packets, packetsBefore), per(bytes, bytesBefore)}
	}
	if now.Totals != nil {
		paths := func(s *Stats) map[string]Volume {
			out := make(map[string]Volume)
			for _, f := range s.Forwarded {
				v := out[f.Fate]
				v.add(f.Packets, f.Bytes)
				out[f.Fate] = v
			}
			if s.Totals != nil {
				out["dropped"] = s.Totals.Dropped
			}
			return out
		}
		was, is := paths(before), paths(now)
		for _, path := range append(fatePaths(), "dropped") {
			r.Paths = append(r.Paths, PathRate{path, rate(is[path].Packets, is[path].Bytes, was[path].Packets, was[path].Bytes)})
		}
		r.Drops = []DropRate{}
		dropped := make(map[[2]string]Volume)
		for _, d := range before.Drops {
			dropped[[2]string{d.Reason, d.Hook}] = Volume{d.Packets, d.Bytes}
		}
		for _, d := range now.Drops {
			was := dropped[[2]string{d.Reason, d.Hook}]
			if dr := (DropRate{d.Reason, d.Hook, rate(d.Packets, d.Bytes, was.Packets, was.Bytes)}); dr.Packets > 0 {
				r.Drops = append(r.Drops, dr)
			}
		}
		slices.SortStableFunc(r.Drops, func(a, b DropRate) int { return cmp.Compare(b.Packets, a.Packets) })
	}
	networks := make(map[string]NetworkStats)
	for _, n := range before.Networks {
		networks[n.Name] = n
	}
	for _, n := range now.Networks {
		was := networks[n.Name].EndpointCount
		r.Networks = append(r.Networks, TrafficRate{
			Name: n.Name, Rx: rate(n.RxPackets, n.RxBytes, was.RxPackets, was.RxBytes),
			Tx:      rate(n.TxPackets, n.TxBytes, was.TxPackets, was.TxBytes),
			Dropped: rate(n.DropPackets, n.DropBytes, was.DropPackets, was.DropBytes),
		})
	}
	containers := make(map[[2]string]ContainerStats)
	for _, c := range before.Containers {
		containers[[2]string{c.Name, c.Network}] = c
	}
	for _, c := range now.Containers {
		was := containers[[2]string{c.Name, c.Network}].EndpointCount
		r.Containers = append(r.Containers, TrafficRate{
			Name: c.Name, Network: c.Network, Rx: rate(c.RxPackets, c.RxBytes, was.RxPackets, was.RxBytes),
			Tx:      rate(c.TxPackets, c.TxBytes, was.TxPackets, was.TxBytes),
			Dropped: rate(c.DropPackets, c.DropBytes, was.DropPackets, was.DropBytes),
		})
	}
	ports := make(map[string]PortStats)
	for _, p := range before.Ports {
		ports[portTitle(p)] = p
	}
	for _, p := range now.Ports {
		was := ports[portTitle(p)].PortCount
		r.Ports = append(r.Ports, TrafficRate{
			Name: portTitle(p), Container: p.Container, Network: p.Network,
			Rx:          rate(p.RxPackets, p.RxBytes, was.RxPackets, was.RxBytes),
			Tx:          rate(p.TxPackets, p.TxBytes, was.TxPackets, was.TxBytes),
			Connections: per(p.Connections, was.Connections), NotReady: per(p.NotReady, was.NotReady),
		})
	}
	for _, list := range [][]TrafficRate{r.Networks, r.Containers, r.Ports} {
		slices.SortStableFunc(list, func(a, b TrafficRate) int {
			return cmp.Or(cmp.Compare(b.bytes(), a.bytes()), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Network, b.Network))
		})
	}
	return r
}

func fatePaths() []string {
	var out []string
	for _, t := range fateTitles {
		out = append(out, t.fate)
	}
	return out
}

// number is a rate in three digits.
func number(x float64) string {
	units := []string{"", "k", "M", "G", "T"}
	i := 0
	for ; x >= 999.5 && i < len(units)-1; i++ {
		x /= 1000
	}
	digits := 0
	if x < 99.95 && x != float64(int(x)) {
		digits = 1
	}
	return strconv.FormatFloat(x, 'f', digits, 64) + units[i]
}

func (r Rate) String() string { return number(r.Packets) + " / " + number(r.Bytes) + "B" }

// printRates writes tables as "bpfnet stats" does.
func printRates(w io.Writer, r *Rates) error {
	if _, err := fmt.Fprintf(w, "%s   per second, over %.1f s\n", r.Time.Local().Format(time.DateTime), r.Seconds); err != nil {
		return err
	}
	titles := make(map[string]string)
	for _, t := range fateTitles {
		titles[t.fate] = t.title
	}
	var paths, drops [][]string
	for _, p := range r.Paths {
		paths = append(paths, []string{cmp.Or(titles[p.Path], p.Path), number(p.Packets), number(p.Bytes) + "B"})
	}
	for _, d := range r.Drops {
		drops = append(drops, []string{d.Reason, d.Hook, number(d.Packets), number(d.Bytes) + "B"})
	}
	rows := func(list []TrafficRate, cells func(t TrafficRate) []string) (out [][]string) {
		for _, t := range list {
			out = append(out, cells(t))
		}
		return out
	}
	for _, b := range []struct {
		header []string
		rows   [][]string
	}{
		{[]string{"PATH", "PACKETS", "BYTES"}, paths},
		{dropHeader, drops},
		{[]string{"NETWORK", "RX", "TX", "TX DROPPED"}, rows(r.Networks, func(t TrafficRate) []string {
			return []string{t.Name, t.Rx.String(), t.Tx.String(), t.Dropped.String()}
		})},
		{[]string{"CONTAINER", "NETWORK", "RX", "TX", "TX DROPPED"}, rows(r.Containers, func(t TrafficRate) []string {
			return []string{t.Name, t.Network, t.Rx.String(), t.Tx.String(), t.Dropped.String()}
		})},
		{[]string{"PORT", "CONTAINER", "NETWORK", "CONNECTIONS", "RX", "TX", "NOT READY"}, rows(r.Ports, func(t TrafficRate) []string {
			return []string{t.Name, t.Container, t.Network, number(t.Connections), t.Rx.String(), t.Tx.String(), number(t.NotReady)}
		})},
	} {
		if len(b.rows) == 0 {
			continue
		}
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
		if err := table(w, b.header, b.rows); err != nil {
			return err
		}
	}
	return nil
}

// watchInterval is between two readings where nobody says otherwise.
const watchInterval = 2 * time.Second

// leastInterval keeps the reading of the counters from being a load of its own.
const leastInterval = 100 * time.Millisecond

func checkInterval(d time.Duration) error {
	if d < leastInterval {
		return usagef("--interval %v: want %v or more", d, leastInterval)
	}
	return nil
}

// watchStats writes rates until the context ends, which is no error: over the same screen on a terminal, else one block
// below the other. Nor is a reading that fails behind the first: a container may be gone for the time of its restart.
func (a *App) watchStats(ctx context.Context, name string, interval time.Duration, wantJSON bool) error {
	before, err := a.readStats(name)
	if err != nil {
		return err
	}
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	first, failed := true, trouble{w: a.Stderr}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		now, err := a.readStats(name)
		failed.tell(err)
		if err != nil {
			continue
		}
		r := ratesOf(before, now)
		before = now
		if err := a.writeRates(&r, first, wantJSON); err != nil {
			return err
		}
		first = false
	}
}

func (a *App) writeRates(r *Rates, first, wantJSON bool) error {
	if wantJSON {
		return json.NewEncoder(a.Stdout).Encode(r)
	}
	var text bytes.Buffer
	if err := printRates(&text, r); err != nil {
		return err
	}
	if columns, lines, ok := a.screen(); ok {
		return redraw(a.Stdout, text.String(), columns, lines, first)
	}
	if !first {
		fmt.Fprintln(a.Stdout)
	}
	_, err := text.WriteTo(a.Stdout)
	return err
}

// screen is the size of the terminal that is written to; false where it is none, or cannot move its cursor.
func (a *App) screen() (columns, lines int, ok bool) {
	f, isFile := a.Stdout.(*os.File)
	if !isFile || slices.Contains(a.Environ(), "TERM=dumb") {
		return 0, 0, false
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, 0, false
	}
	return int(size.Col), int(size.Row), true
}

// redraw writes the text from the screen's first line on (ECMA-48: CUP, EL, ED), and says how much of it finds no room. No
// colours: nothing to switch off by NO_COLOR.
func redraw(w io.Writer, text string, columns, lines int, first bool) error {
	rows := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if room := lines - 1; lines > 1 && len(rows) > room { // the last line is the cursor's
		rest := len(rows) - room + 1
		rows = append(rows[:room-1], fmt.Sprintf("and %d more lines; a taller terminal shows them", rest))
	}
	var out strings.Builder
	if first {
		out.WriteString("\x1b[2J")
	}
	out.WriteString("\x1b[H")
	for _, row := range rows {
		if columns > 0 {
			row = cut(row, columns)
		}
		out.WriteString(row + "\x1b[K\n")
	}
	out.WriteString("\x1b[J")
	_, err := io.WriteString(w, out.String())
	return err
}
