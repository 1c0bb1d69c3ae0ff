// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// reachTarget is a line of what is to be reached: a ratio of two records, or one record alone.
type reachTarget struct {
	row    int    // lines of one row belong together
	what   string // in words
	today  string // what the Engine's own iptables rules gave in the first measurements
	of, by Key    // by without a mode: of alone, in its own unit
	want   float64
	most   bool // want must not be passed, instead of reached
	// unit is that of a target that is no ratio.
	unit string
	// or is another way to reach the line.
	or *reachTarget
}

// reachIPv6 is what IPv6 must reach, as a part of what IPv4 reached.
const reachIPv6 = 0.95

func reachKey(scenario, mode string, family int, metric string, at int) Key {
	return Key{Scenario: scenario, Mode: mode, Family: family, Metric: metric, At: at}
}

// reachNeeds reports whether the Reach table is made of a record of IPv6, or of the same thing by iptables.
func reachNeeds(k Key) bool {
	k.Family = 4
	bpfnet := k
	bpfnet.Mode = Bpfnet
	return slices.ContainsFunc(reachTargets, func(t reachTarget) bool {
		return t.row <= 5 && (t.of == k || t.by == k || t.of == bpfnet && k.Mode == DockerIPTables)
	})
}

func reachRatio(row int, scenario, limit, words, metric, today string, want float64) reachTarget {
	return reachTarget{row: row, what: words, today: today, want: want,
		of: reachKey(scenario, Bpfnet, 4, metric, 0), by: reachKey(scenario, limit, 4, metric, 0)}
}

// reachTargets are the lines of the Reach table, each below what it was decided by: median against median in
// one run; IPv4, then IPv6 within five percent of it.
var reachTargets = []reachTarget{
	// "container → container rr, crr ÷ loopback: 0.68, 0.65 today; reach ≥ 0.90, ≥ 0.92"
	reachRatio(1, "container-container", Loopback, "container → container rr ÷ loopback", "rr", "0.68", 0.90),
	reachRatio(1, "container-container", Loopback, "container → container crr ÷ loopback", "crr", "0.65", 0.92),
	// "remote → published rr, crr ÷ host: 0.66, 0.68 today; reach ≥ 0.86, ≥ 0.90 (uplink as found)"
	reachRatio(2, "published", Host, "remote → published rr ÷ host", "rr", "0.66", 0.86),
	reachRatio(2, "published", Host, "remote → published crr ÷ host", "crr", "0.68", 0.90),
	// "container → outside rr, crr ÷ host → outside: 0.66, 0.70 today; reach ≥ 0.86, ≥ 0.90"
	reachRatio(3, "egress", Host, "container → outside rr ÷ host → outside", "rr", "0.66", 0.86),
	reachRatio(3, "egress", Host, "container → outside crr ÷ host → outside", "crr", "0.70", 0.90),
	// "one TCP stream, container → container ÷ loopback: 0.77 today; reach ≥ 0.95"
	reachRatio(4, "container-container", Loopback, "one TCP stream, container → container ÷ loopback", "stream1", "0.77", 0.95),
	// "host → 127.0.0.1 published, rr and crr ÷ docker-proxy: 1 today (proxy off: 17, 12); reach ≥ 20, ≥ 15"
	reachRatio(5, "host-published", DockerProxy, "host → 127.0.0.1 published rr ÷ docker-proxy", "rr", "1", 20),
	reachRatio(5, "host-published", DockerProxy, "host → 127.0.0.1 published crr ÷ docker-proxy", "crr", "1", 15),
	// "crr with 10 000 published ports ÷ with one: 0.19 today; reach ≥ 0.97"
	{row: 6, what: "crr with 10 000 published ports ÷ with one", today: "0.19", want: 0.97,
		of: reachKey("ports", Bpfnet, 4, "crr", 10000), by: reachKey("ports", Bpfnet, 4, "crr", 1)},
	// "crr at 500 k live flows ÷ at 1 k: reach ≥ 0.90"
	{row: 7, what: "crr at 500 k live flows ÷ at 1 k", want: 0.90,
		of: reachKey("flows", Bpfnet, 4, "crr", 500000), by: reachKey("flows", Bpfnet, 4, "crr", 1000)},
	// "docker run with 1 000 published ports (recommended daemon.json): 69.7 s today; reach ≤ 1 s"
	{row: 8, what: "docker run with 1 000 published ports", today: "69.7 s", want: 1, most: true, unit: "s",
		of: reachKey("run-ports", Bpfnet, 0, "start", 1000)},
	// "link up to READY, p99, 1 000 endpoints present: reach ≤ 20 ms"
	{row: 9, what: "link up to READY, p99, 1 000 endpoints present", want: 0.020, most: true, unit: "s",
		of: reachKey("ready", Bpfnet, 0, "p99", 1000)},
	// "host-only rr, bpfnet attached ÷ detached: reach ≥ 0.98, or ≤ 40 ns a packet by BPF run-time statistics"
	{row: 10, what: "host-only rr, bpfnet attached ÷ detached", want: 0.98,
		of: reachKey("host-only", Bpfnet, 4, "rr", 0), by: reachKey("host-only", Host, 4, "rr", 0),
		or: &reachTarget{row: 10, what: "host-only, time in programs per packet", want: 40, most: true, unit: "ns",
			of: reachKey("host-only", Bpfnet, 4, "bpf-packet", 0)}},
	// "Daemon restart with 1 000 endpoints and 500 k flows: under 2 s to reconciled, no packet lost, data-path latency
	// p99 meanwhile within 2 × of quiet"
	{row: 11, what: "daemon restart with 1 000 endpoints and 500 k flows", want: 2, most: true, unit: "s",
		of: reachKey(Restart, Bpfnet, 0, "reconciled", 1000)},
	{row: 11, what: "latency p99 while the daemon restarts ÷ quiet", want: 2, most: true,
		of: reachKey(Restart, Bpfnet, 0, "p99", 1000), by: reachKey(Restart, Bpfnet, 0, "p99-quiet", 1000)},
	// "Shield drops per second per CPU against an nftables netdev-ingress drop and an iptables raw drop, one run: at
	// least 1.5 × the better one"
	{row: 12, what: "shield drops ÷ iptables raw", want: 1.5,
		of: reachKey(Drop, Bpfnet, 4, "drops", 0), by: reachKey(Drop, RawDrop, 4, "drops", 0)},
	{row: 12, what: "shield drops ÷ nftables at the device", want: 1.5,
		of: reachKey(Drop, Bpfnet, 4, "drops", 0), by: reachKey(Drop, NetdevDrop, 4, "drops", 0)},
	// "SYN flood on a published port at one offered rate for both modes: honest crr at least 3 × that of iptables mode,
	// and at least 0.3 of its own without the flood"
	{row: 13, what: "crr below a SYN flood ÷ iptables", want: 3,
		of: reachKey(Flood, Bpfnet, 4, "crr", floodRate), by: reachKey(Flood, DockerIPTables, 4, "crr", floodRate)},
	{row: 13, what: "crr below a SYN flood ÷ without", want: 0.3,
		of: reachKey(Flood, Bpfnet, 4, "crr", floodRate), by: reachKey(Flood, Bpfnet, 4, "crr-quiet", 0)},
	// "With drops -f, flows -f and /metrics scraped every second at 100 k packets per second: rr at least 0.97 of that
	// without"
	{row: 14, what: "rr with drops, flows and metrics watched ÷ without", want: 0.97,
		of: reachKey(Watched, Bpfnet, 4, "rr", len(watchers)+1), by: reachKey(Watched, Bpfnet, 4, "rr", 0)},
}

// Reached is a line of the Reach table with what a report says about it.
type Reached struct {
	Row           int
	What, Today   string
	Target        string // "≥ 0.9"
	Measured, Met bool
	Value         string // with its spread
	Ratio         Ratio  // Value, of a line that is not measured by a ratio: its samples' spread
	// Quoted is when it was measured, where this was in another run.
	Quoted time.Time
}

// Reach compares a report with what is to be reached.
func Reach(r Report) []Reached {
	var out []Reached
	for _, t := range reachTargets {
		out = append(out, t.judge(r))
		if t.row <= 5 {
			out = append(out, t.judge6(r))
		}
	}
	return out
}

// value is what a report has of a target, in short and in words.
func (t reachTarget) value(r Report) (Ratio, string, bool) {
	of, ok := r.find(t.of)
	if !ok {
		return Ratio{}, "", false
	}
	if t.by.Mode == "" {
		return Ratio{Value: of.Median, Min: of.Min, Max: of.Max}, of.Spread.in(of.Unit), of.Unit == t.unit
	}
	by, ok := r.find(t.by)
	if !ok {
		return Ratio{}, "", false
	}
	ratio, ok := divide(of, by)
	return ratio, ratio.String(), ok
}

func (t reachTarget) met(v float64) bool {
	if t.most {
		return v <= t.want
	}
	return v >= t.want
}

func (t reachTarget) goal() string {
	s := "≥"
	if t.most {
		s = "≤"
	}
	by, name := inUnit(t.unit, t.want)
	s = strings.TrimSpace(fmt.Sprintf("%s %.4g %s", s, t.want/by, name))
	if t.or != nil {
		s += ", or " + t.or.goal() + " a packet"
	}
	return s
}

func (t reachTarget) judge(r Report) Reached {
	out := Reached{Row: t.row, What: t.what, Today: t.today, Target: t.goal()}
	out.Ratio, out.Value, out.Measured = t.value(r)
	out.Met = out.Measured && t.met(out.Ratio.Value)
	if t.or == nil {
		return out
	}
	if _, words, ok := t.or.value(r); ok {
		other := t.or.judge(r)
		if out.Value != "" {
			words = out.Value + "; " + words
		}
		out.Value = words
		out.Measured, out.Met = true, out.Met || other.Met
	}
	return out
}

// judge6 is the IPv6 line of a target: its ratio as a part of that of IPv4.
func (t reachTarget) judge6(r Report) Reached {
	six := t
	six.of.Family, six.by.Family = 6, 6
	out := Reached{Row: t.row, What: t.what + ", IPv6 ÷ IPv4", Target: fmt.Sprintf("≥ %g", reachIPv6)}
	four, _, ok4 := t.value(r)
	ratio, _, ok6 := six.value(r)
	if ok4 && ok6 {
		out.Ratio = ratio.over(four)
		out.Measured = true
		out.Met = out.Ratio.Value >= reachIPv6
		out.Value = fmt.Sprintf("%s (%s of %s)", digits(out.Ratio.Value), digits(ratio.Value), digits(four.Value))
	}
	return out
}

// Quote fills in, from an earlier report, the lines that were not measured.
func Quote(lines []Reached, earlier Report) []Reached {
	out := Reach(earlier)
	for i, l := range lines {
		if l.Measured || !out[i].Measured {
			out[i] = l
			continue
		}
		out[i].Quoted = earlier.Header.Started
	}
	return out
}

// verdict is the last column.
func (l Reached) verdict() string {
	switch {
	case !l.Measured:
		return "not measured in this run"
	case l.Met:
		return "yes"
	}
	return "NO"
}

// WriteReach writes the Reach table.
func WriteReach(w io.Writer, lines []Reached) error {
	fmt.Fprintln(w, "Reach: ratios are medians of those within a round, in brackets with their range")
	fmt.Fprintln(w)
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "\tiptables, first measured\ttarget\tbpfnet\treached")
	for _, l := range lines {
		verdict := l.verdict()
		if !l.Quoted.IsZero() {
			verdict += ", in the full run of " + l.Quoted.UTC().Format(time.DateOnly)
		}
		fmt.Fprintf(tab, "%s\t%s\t%s\t%s\t%s\n", l.What, cmp.Or(l.Today, "–"), l.Target, cmp.Or(l.Value, "–"), verdict)
	}
	return tab.Flush()
}
