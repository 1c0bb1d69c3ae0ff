// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdmaps "maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/maps"
)

// FlowLine is an element of the output of "bpfnet flows -o json", and a line of that of "bpfnet flows -f -o json".
type FlowLine struct {
	Time  time.Time `json:"time,omitzero"`   // with -f
	Event string    `json:"event,omitempty"` // with -f: "opened", "closed", "expired"

	Proto string `json:"proto"`
	State string `json:"state"` // of maps.FlowStates
	Path  string `json:"path"`  // "fast", "stack"
	From  Party  `json:"from"`  // who opened it
	To    Party  `json:"to"`    // as it was dialled
	// What the two become where the flow is translated.
	NATFrom *Party `json:"nat_from,omitempty"`
	NATTo   *Party `json:"nat_to,omitempty"`

	Networks  []string `json:"networks"`            // of the containers at its ends
	Published string   `json:"published,omitempty"` // the port that it came by, as address:port
	Sent      Volume   `json:"sent"`                // by who opened it
	Answered  Volume   `json:"answered"`
	Age       int64    `json:"age_seconds"`  // since its first packet
	Idle      int64    `json:"idle_seconds"` // since its last
}

// FlowGroup is an element of the output of "bpfnet flows --by … -o json".
type FlowGroup struct {
	Name    string  `json:"name"`
	Flows   int     `json:"flows"`
	Share   float64 `json:"share"` // of the flows that were asked for, 0 to 1
	Packets uint64  `json:"packets"`
	Bytes   uint64  `json:"bytes"`
}

// flowFilter chooses flows; its zero value takes all.
type flowFilter struct {
	container, network, proto, state, path, address string
	port                                            uint16
	prefix                                          netip.Prefix // address
}

var flowPaths = []string{"fast", "stack"}

// parse refuses values that no flow has.
func (f *flowFilter) parse() error {
	if err := cmp.Or(oneOf("--flow-state", f.state, maps.FlowStates()), oneOf("--path", f.path, flowPaths)); err != nil {
		return err
	}
	number, err := strconv.ParseUint(f.proto, 10, 8)
	if err == nil {
		f.proto = protoName(uint8(number))
	} else if err := oneOf("--proto", f.proto, slices.Sorted(stdmaps.Values(protoNames))); err != nil {
		return err
	}
	if f.address == "" {
		return nil
	}
	if f.prefix, err = netip.ParsePrefix(f.address); err != nil {
		addr, err := netip.ParseAddr(f.address)
		if err != nil || addr.Zone() != "" {
			return usagef("--address %q: want an address or a prefix", f.address)
		}
		f.prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	return nil
}

// oneOf refuses a value that is none of all; the empty one asks for nothing.
func oneOf(flag, value string, all []string) error {
	if value == "" || slices.Contains(all, value) {
		return nil
	}
	return usagef("%s %q: want one of %s", flag, value, strings.Join(all, ", "))
}

// hasPorts: what stands for a port of other protocols is none.
func hasPorts(proto uint8) bool { return proto == protoTCP || proto == protoUDP || proto == protoSCTP }

func flowPath(f *maps.Flow) string {
	if f.Fast {
		return "fast"
	}
	return "stack"
}

// wants says whether the flow is one of those that are asked for.
func (f *flowFilter) wants(w *maps.Flow, names *flowNames) bool {
	if f.state != "" && w.State != f.state || f.path != "" && flowPath(w) != f.path || f.proto != "" && protoName(w.Proto) != f.proto {
		return false
	}
	ends := [4]netip.AddrPort{w.From, w.To, w.SentFrom, w.SentTo}
	if f.port != 0 && (!hasPorts(w.Proto) || !slices.ContainsFunc(ends[:], func(a netip.AddrPort) bool { return a.Port() == f.port })) {
		return false
	}
	if f.prefix.IsValid() && !slices.ContainsFunc(ends[:], func(a netip.AddrPort) bool { return f.prefix.Contains(a.Addr()) }) {
		return false
	}
	opener, target := names.endpoint(w.Opener), names.endpoint(w.Target)
	return (f.container == "" || opener.Name == f.container || target.Name == f.container) &&
		(f.network == "" || opener.Network == f.network || target.Network == f.network)
}

// flowOrders are the values of --sort: what comes first is the largest.
var flowOrders = map[string]func(f *maps.Flow) uint64{
	"bytes":   func(f *maps.Flow) uint64 { return f.Sent.Bytes + f.Answered.Bytes },
	"packets": func(f *maps.Flow) uint64 { return f.Sent.Packets + f.Answered.Packets },
	"age":     func(f *maps.Flow) uint64 { return uint64(f.Age) },
	"idle":    func(f *maps.Flow) uint64 { return uint64(f.Idle) },
}

// flowGroups are the values of --by.
var flowGroups = map[string]func(f *maps.Flow, names *flowNames) string{
	// As flows are counted for --endpoint-flows: who opened it, else whom it reaches.
	"container": func(f *maps.Flow, names *flowNames) string {
		return cmp.Or(names.endpoint(f.Opener).Name, names.endpoint(f.Target).Name, "-")
	},
	"network": func(f *maps.Flow, names *flowNames) string {
		return cmp.Or(names.endpoint(f.Opener).Network, names.endpoint(f.Target).Network, "-")
	},
	"source": func(f *maps.Flow, names *flowNames) string {
		p := names.party(f.From.Addr(), f.Opener)
		return p.String()
	},
	"destination": func(f *maps.Flow, names *flowNames) string {
		p := names.end(f, f.To, f.Target)
		return protoName(f.Proto) + " " + p.String()
	},
	"proto": func(f *maps.Flow, _ *flowNames) string { return protoName(f.Proto) },
	"state": func(f *maps.Flow, _ *flowNames) string { return protoName(f.Proto) + " " + f.State },
	"path":  func(f *maps.Flow, _ *flowNames) string { return flowPath(f) },
}

func (a *App) flowsCommand() *cobra.Command {
	var f flowFilter
	var follow bool
	var order, by string
	var limit int
	orders, groups := slices.Sorted(stdmaps.Keys(flowOrders)), slices.Sorted(stdmaps.Keys(flowGroups))
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "Show the flow table",
		Long: `Show the flows that are remembered: their ends with names, as they were dialled,
what they are translated to, packets and bytes (sent / answered), and the time
since the first and the last packet, to about a second. A flow stays for a while
after its end: see --timeout of "bpfnet daemon". Its PATH is fast where the
programs forward its packets, and stack where they leave them to the host: of
such a flow only one direction is remembered (one-sided). Connections between
the host and a container that the socket programs dialled need no translation
and are among the latter. TCP connections from outside that their clients have
not confirmed are no flows yet. For echo requests, identifiers stand for ports.

With --by, count the flows of each container (that opened it, or that it came
to), network, source, destination, protocol, state or path. With -f, show flows
as they are opened, closed (TCP) and forgotten, until interrupted; the table is
read once a second, less often where it is large.

It reads the maps and asks no daemon.`,
		Example: `  bpfnet flows --container web
  bpfnet flows --sort bytes --limit 20
  bpfnet flows --by container
  bpfnet flows -f --network frontend --proto tcp -o json`,
		Args: exactArgs(),
	}
	asJSON := outputFlag(cmd)
	flags := cmd.Flags()
	flags.BoolVarP(&follow, "follow", "f", false, "show flows as they come and go")
	flags.StringVar(&f.container, "container", "", "only flows from or to this container")
	flags.StringVar(&f.network, "network", "", "only flows from or to containers in this network")
	flags.StringVar(&f.proto, "proto", "", "only this protocol: tcp, udp, icmp, icmp6, sctp, or its number")
	flags.Uint16Var(&f.port, "port", 0, "only flows from or to this port, before translation or behind it")
	flags.StringVar(&f.address, "address", "", "only flows from or to this `address` or prefix, before translation or behind it")
	flags.StringVar(&f.state, "flow-state", "", "only flows in this state: "+strings.Join(maps.FlowStates(), ", "))
	flags.StringVar(&f.path, "path", "", "only flows on this path (with -f: opened on it): "+strings.Join(flowPaths, ", "))
	flags.StringVar(&order, "sort", "", "largest first by `what`: "+strings.Join(orders, ", ")+" (default: as they stand in the table)")
	flags.StringVar(&by, "by", "", "count flows by `what`: "+strings.Join(groups, ", "))
	flags.IntVar(&limit, "limit", 0, "show no more than this many; 0: all")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		if err := cmp.Or(f.parse(), oneOf("--sort", order, orders), oneOf("--by", by, groups)); err != nil {
			return err
		}
		if limit < 0 {
			return usagef("--limit %d: want a number of flows, or 0", limit)
		}
		if follow {
			for _, name := range []string{"sort", "by", "limit", "flow-state"} {
				if flags.Changed(name) {
					return usagef("--%s: not with -f, which shows flows as they come and go", name)
				}
			}
		}
		if by != "" && order != "" {
			return usagef("--sort: not with --by, whose largest groups come first")
		}
		if err := checkPort(flags, f.port); err != nil {
			return err
		}
		if follow {
			return a.followFlows(cmd.Context(), f, wantJSON)
		}
		snap, c, err := a.openForReading()
		if err != nil {
			return err
		}
		defer c.Close()
		if err := checkNames(snap, f.container, f.network); err != nil {
			return err
		}
		if by != "" {
			return a.groupFlows(cmd.Context(), snap, c, f, by, limit, wantJSON)
		}
		return a.listFlows(cmd.Context(), snap, c, f, order, limit, wantJSON)
	}
	return cmd
}

// checkPort refuses 0 where it was asked for: it would ask for nothing.
func checkPort(flags *pflag.FlagSet, port uint16) error {
	if flags.Changed("port") && port == 0 {
		return usagef("--port 0: want a port from 1 to 65535")
	}
	return nil
}

// errInterrupted ends a list that is not whole.
var errInterrupted = errors.New("interrupted")

// eachFlow reads flows until the context ends, which is errInterrupted.
func eachFlow(ctx context.Context, c counters, each func(*maps.Flow) error) error {
	return c.EachFlow(func(w *maps.Flow) error {
		if ctx.Err() != nil {
			return errInterrupted
		}
		return each(w)
	})
}

// listFlows writes flows while it reads them, unless they are to be sorted.
func (a *App) listFlows(ctx context.Context, snap *api.Snapshot, c counters, f flowFilter, order string, limit int, wantJSON bool) error {
	names := newFlowNames(snap)
	out := bufio.NewWriterSize(a.Stdout, 1<<16)
	var write func(*maps.Flow) error
	var end func(rest int) error
	if wantJSON {
		list := jsonList{w: out}
		write = func(w *maps.Flow) error { return list.add(names.line(w)) }
		end = func(int) error { return list.end() }
	} else {
		rows := newColumns(out, "PROTO", "STATE", "PATH", "FROM", "TO", "TRANSLATED", "NETWORK", "PACKETS", "BYTES", "AGE", "IDLE")
		write = func(w *maps.Flow) error { names.row(rows, w); return rows.end() }
		end = func(rest int) error {
			if err := rows.flush(); err != nil || rest == 0 {
				return err
			}
			_, err := fmt.Fprintf(out, "and %d more\n", rest)
			return err
		}
	}
	var sorted []maps.Flow
	wanted := 0
	size := flowOrders[order]
	first := func() {
		slices.SortStableFunc(sorted, func(a, b maps.Flow) int { return cmp.Compare(size(&b), size(&a)) })
		if limit > 0 && len(sorted) > limit {
			sorted = sorted[:limit]
		}
	}
	err := eachFlow(ctx, c, func(w *maps.Flow) error {
		if !f.wants(w, names) {
			return nil
		}
		wanted++
		switch {
		case size != nil:
			sorted = append(sorted, *w)
			if limit > 0 && len(sorted) >= 2*limit+1024 {
				first()
			}
		case limit == 0 || wanted <= limit:
			return write(w)
		}
		return nil
	})
	if err != nil {
		return err
	}
	shown := wanted
	if limit > 0 {
		shown = min(wanted, limit)
	}
	if size != nil {
		first()
		for i := range sorted {
			if ctx.Err() != nil {
				return errInterrupted
			}
			if err := write(&sorted[i]); err != nil {
				return err
			}
		}
	}
	if err := end(wanted - shown); err != nil {
		return err
	}
	return out.Flush()
}

func (a *App) groupFlows(ctx context.Context, snap *api.Snapshot, c counters, f flowFilter, by string, limit int, wantJSON bool) error {
	names := newFlowNames(snap)
	groups := make(map[string]*FlowGroup)
	key, all := flowGroups[by], 0
	err := eachFlow(ctx, c, func(w *maps.Flow) error {
		if !f.wants(w, names) {
			return nil
		}
		all++
		name := key(w, names)
		g := groups[name]
		if g == nil {
			g = &FlowGroup{Name: name}
			groups[name] = g
		}
		g.Flows++
		g.Packets += w.Sent.Packets + w.Answered.Packets
		g.Bytes += w.Sent.Bytes + w.Answered.Bytes
		return nil
	})
	if err != nil {
		return err
	}
	list := slices.SortedFunc(stdmaps.Values(groups), func(a, b *FlowGroup) int {
		return cmp.Or(cmp.Compare(b.Flows, a.Flows), cmp.Compare(a.Name, b.Name))
	})
	found := len(list)
	if limit > 0 {
		list = list[:min(limit, found)]
	}
	var rows [][]string
	for _, g := range list {
		g.Share = float64(g.Flows) / float64(all)
		rows = append(rows, []string{g.Name, strconv.Itoa(g.Flows), percent(g.Flows, all), strconv.FormatUint(g.Packets, 10), humanBytes(g.Bytes)})
	}
	if wantJSON {
		return writeJSON(a.Stdout, notNil(list))
	}
	if err := listing(a.Stdout, []string{strings.ToUpper(by), "FLOWS", "SHARE", "PACKETS", "BYTES"}, rows); err != nil {
		return err
	}
	if rest := found - len(list); rest > 0 {
		_, err = fmt.Fprintf(a.Stdout, "and %d more\n", rest)
	}
	return err
}

// flowID is what tells two flows apart.
type flowID struct {
	proto    uint8
	hook     string
	from, to netip.AddrPort
}

// knownFlow is a flow as it was last seen.
type knownFlow struct {
	maps.Flow
	round int
	told  bool // it was opened on the path that is asked for
}

// followFlows writes what has changed between two looks at the table, until the context ends, which is no error. Nor is a look
// that fails behind the first.
func (a *App) followFlows(ctx context.Context, f flowFilter, wantJSON bool) error {
	snap, err := a.readSnapshot()
	if err != nil {
		return err
	}
	if err := checkNames(snap, f.container, f.network); err != nil {
		return err
	}
	write := func(l FlowLine) error { return printFlowEvent(a.Stdout, l) }
	if wantJSON {
		write = func(l FlowLine) error { return json.NewEncoder(a.Stdout).Encode(l) }
	}
	names := newFlowNames(snap)
	known := make(map[flowID]knownFlow)
	failed := trouble{w: a.Stderr}
	for round := 1; ; round++ {
		begun := time.Now()
		lines, err := a.lookAtFlows(ctx, f, names, known, round)
		if round == 1 && err == nil && !wantJSON {
			if _, err := fmt.Fprintf(a.Stdout, flowEventFormat, "TIME", "EVENT", "PROTO", "NETWORK", "FROM > TO"); err != nil {
				return err
			}
		}
		for _, l := range lines {
			if err := write(l); err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if round == 1 && err != nil {
			return err
		}
		failed.tell(err)
		select {
		case <-ctx.Done():
			return nil
		// A large table takes no more than a tenth of a processor.
		case <-time.After(max(time.Second, 10*time.Since(begun))):
		}
		// Names come and go; where they cannot be read just now, the old ones serve.
		if snap, err := a.readSnapshot(); err == nil {
			names.update(snap)
		}
	}
}

// lookAtFlows is changedFlows of the table that is pinned now: another daemon may have put one of another size in its place,
// and cleanup may have taken it away.
func (a *App) lookAtFlows(ctx context.Context, f flowFilter, names *flowNames, known map[flowID]knownFlow, round int) ([]FlowLine, error) {
	c, err := a.OpenCounters(a.paths.BPFFS)
	if err != nil {
		return nil, cannotRead(err)
	}
	defer c.Close()
	return a.changedFlows(ctx, c, f, names, known, round)
}

// changedFlows brings known up to date, and returns what has come and gone, in the order of time: nothing in the first round,
// of which all is new. With an error, it returns what was seen until then; the rest is told the next time.
func (a *App) changedFlows(ctx context.Context, c counters, f flowFilter, names *flowNames, known map[flowID]knownFlow, round int) ([]FlowLine, error) {
	var lines []FlowLine
	now := a.Now()
	add := func(event string, at time.Time, k *knownFlow) {
		if !k.told || round == 1 {
			return
		}
		l := names.line(&k.Flow)
		l.Event, l.Time = event, at
		lines = append(lines, l)
	}
	over := func(w *maps.Flow) bool { return w.State == maps.FlowClosed || w.State == maps.FlowReset }
	// A flow that changes its path has neither come nor gone.
	path := f.path
	f.path = ""
	err := eachFlow(ctx, c, func(w *maps.Flow) error {
		if !f.wants(w, names) {
			return nil
		}
		id := flowID{w.Proto, w.Hook, w.From, w.To}
		before, ok := known[id]
		k := knownFlow{*w, round, before.told}
		fresh := !ok || w.Age < before.Age // a younger one has taken its place
		if fresh {
			k.told = path == "" || flowPath(w) == path
			add("opened", now.Add(-w.Age), &k)
		}
		if over(w) && (fresh || !over(&before.Flow)) {
			add("closed", now.Add(-w.Idle), &k)
		}
		known[id] = k
		return nil
	})
	if err == nil {
		for id, k := range known {
			if k.round == round {
				continue
			}
			if !over(&k.Flow) {
				add("expired", now, &k)
			}
			delete(known, id)
		}
	}
	slices.SortStableFunc(lines, func(a, b FlowLine) int { return a.Time.Compare(b.Time) })
	return lines, err
}

const flowEventFormat = "%-8s  %-8s %-6s %-12s %s\n"

func printFlowEvent(w io.Writer, l FlowLine) error {
	text := l.From.String() + " > " + l.To.String()
	if t := l.translated(); t != "" {
		text += "  " + t
	}
	text += "  " + l.Path
	if l.Event != "opened" {
		text += fmt.Sprintf(", %s, %d / %d packets, %s / %s in %s", l.State, l.Sent.Packets, l.Answered.Packets,
			humanBytes(l.Sent.Bytes), humanBytes(l.Answered.Bytes), briefly(time.Duration(l.Age)*time.Second))
	}
	_, err := fmt.Fprintf(w, flowEventFormat, l.Time.Local().Format("15:04:05"), l.Event, l.Proto, cmp.Or(strings.Join(l.Networks, ","), "-"), text)
	return err
}

// translated says what the ends of a flow become; empty: they stay.
func (l *FlowLine) translated() string {
	var parts []string
	if l.NATFrom != nil {
		parts = append(parts, "from "+l.NATFrom.String())
	}
	if l.NATTo != nil {
		parts = append(parts, "to "+l.NATTo.String())
	}
	return strings.Join(parts, " ")
}

// briefly is a duration in its largest unit that tells enough.
func briefly(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return strconv.Itoa(int(d/time.Second)) + "s"
	case d < 2*time.Hour:
		return strconv.Itoa(int(d/time.Minute)) + "m"
	case d < 48*time.Hour:
		return strconv.Itoa(int(d/time.Hour)) + "h"
	}
	return strconv.Itoa(int(d/(24*time.Hour))) + "d"
}

// flowNames are the names of slots and addresses.
type flowNames struct {
	slots  map[uint16]api.Endpoint
	byAddr map[netip.Addr]api.Endpoint
	ports  map[uint16]string
}

func newFlowNames(snap *api.Snapshot) *flowNames {
	n := &flowNames{slots: make(map[uint16]api.Endpoint), byAddr: make(map[netip.Addr]api.Endpoint), ports: make(map[uint16]string)}
	n.update(snap)
	return n
}

// update takes up the names of now. Those that are gone stay until others have their places: flows go later.
func (n *flowNames) update(snap *api.Snapshot) {
	for _, e := range snap.Endpoints {
		if e.Slot != 0 {
			n.slots[e.Slot] = e
		}
		for _, text := range e.Addresses {
			if addr, err := netip.ParseAddr(text); err == nil {
				n.byAddr[addr] = e
			}
		}
	}
	for _, p := range snap.Ports {
		if p.Slot != 0 {
			n.ports[p.Slot] = p.Host
		}
	}
}

func (n *flowNames) endpoint(slot uint16) api.Endpoint {
	if slot == 0 {
		return api.Endpoint{}
	}
	return n.slots[slot]
}

// party is an address with the name of the endpoint in the slot, or of whoever has the address.
func (n *flowNames) party(a netip.Addr, slot uint16) Party {
	return Party{Addr: a, Container: cmp.Or(n.endpoint(slot).Name, n.byAddr[a].Name)}
}

// end is one end of a flow. The address that was dialled of a translated one is nobody's but the host's.
func (n *flowNames) end(f *maps.Flow, at netip.AddrPort, slot uint16) Party {
	p := Party{Addr: at.Addr()}
	if at == f.From || at == f.To && f.To == f.SentTo || at == f.SentTo {
		p = n.party(at.Addr(), slot)
	}
	if hasPorts(f.Proto) || f.Proto == protoICMP || f.Proto == protoICMPv6 {
		p.Port = at.Port()
	}
	return p
}

func (n *flowNames) line(f *maps.Flow) FlowLine {
	l := FlowLine{
		Proto: protoName(f.Proto), State: f.State, Path: flowPath(f), Networks: n.networks(f), Published: n.ports[f.Port],
		From: n.end(f, f.From, f.Opener), To: n.end(f, f.To, f.Target),
		Sent: Volume(f.Sent), Answered: Volume(f.Answered), Age: int64(f.Age / time.Second), Idle: int64(f.Idle / time.Second),
	}
	if f.SentFrom != f.From {
		l.NATFrom = &Party{Addr: f.SentFrom.Addr(), Port: f.SentFrom.Port()}
	}
	if f.SentTo != f.To {
		p := n.end(f, f.SentTo, f.Target)
		l.NATTo = &p
	}
	return l
}

func (n *flowNames) networks(f *maps.Flow) []string {
	out := []string{}
	for _, slot := range []uint16{f.Opener, f.Target} {
		if name := n.endpoint(slot).Network; name != "" && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

// row writes the cells of a flow.
func (n *flowNames) row(c *columns, f *maps.Flow) {
	l := n.line(f)
	c.cell(l.Proto)
	c.cell(l.State)
	c.cell(l.Path)
	c.cell(l.From.String())
	c.cell(l.To.String())
	c.cell(l.translated())
	c.cell(strings.Join(l.Networks, ","))
	c.cell(strconv.FormatUint(l.Sent.Packets, 10) + " / " + strconv.FormatUint(l.Answered.Packets, 10))
	c.cell(humanBytes(l.Sent.Bytes) + " / " + humanBytes(l.Answered.Bytes))
	c.cell(briefly(f.Age))
	c.cell(briefly(f.Idle))
}

// columns writes rows under a header as they come. How wide columns are, the first rows say.
type columns struct {
	w       *bufio.Writer
	width   []int
	cells   []string // of the row that is being written
	first   [][]string
	settled bool
}

const columnsFrom = 1000 // rows

func newColumns(w *bufio.Writer, header ...string) *columns {
	return &columns{w: w, width: make([]int, len(header)), first: [][]string{header}}
}

func (c *columns) cell(text string) { c.cells = append(c.cells, cmp.Or(text, "-")) }

// end ends a row.
func (c *columns) end() error {
	if !c.settled {
		c.first = append(c.first, slices.Clone(c.cells))
		c.cells = c.cells[:0]
		if len(c.first) > columnsFrom {
			return c.flush()
		}
		return nil
	}
	err := c.row(c.cells)
	c.cells = c.cells[:0]
	return err
}

// flush writes what was kept back.
func (c *columns) flush() error {
	c.settled = true
	for _, row := range c.first {
		for i, cell := range row {
			c.width[i] = max(c.width[i], len(cell))
		}
	}
	for _, row := range c.first {
		if err := c.row(row); err != nil {
			return err
		}
	}
	c.first = nil
	return nil
}

var blanks = strings.Repeat(" ", 64)

func (c *columns) row(cells []string) error {
	for i, cell := range cells {
		if _, err := c.w.WriteString(cell); err != nil {
			return err
		}
		for pad := max(c.width[i]-len(cell), 0) + 3; i < len(cells)-1 && pad > 0; pad -= len(blanks) {
			if _, err := c.w.WriteString(blanks[:min(pad, len(blanks))]); err != nil {
				return err
			}
		}
	}
	return c.w.WriteByte('\n')
}

// jsonList writes a list of flows one by one.
type jsonList struct {
	w   *bufio.Writer
	n   int
	buf []byte
}

func (l *jsonList) add(line FlowLine) error {
	before := "[\n  "
	if l.n > 0 {
		before = ",\n  "
	}
	l.n++
	l.buf = line.appendJSON(append(l.buf[:0], before...))
	_, err := l.w.Write(l.buf)
	return err
}

func (l *jsonList) end() error {
	text := "\n]\n"
	if l.n == 0 {
		text = "[]\n"
	}
	_, err := l.w.WriteString(text)
	return err
}

// appendJSON is what json.Marshal makes of a flow without an event, in a fifth of the time: there may be a million.
func (l *FlowLine) appendJSON(b []byte) []byte {
	text := func(name, value string) {
		b = append(append(append(b, '"'), name...), `":`...)
		b = appendJSONString(b, value)
		b = append(b, ',')
	}
	party := func(name string, p *Party) {
		if p == nil {
			return
		}
		b = append(append(append(b, '"'), name...), `":{"addr":"`...)
		b = append(p.Addr.AppendTo(b), '"')
		if p.Port != 0 {
			b = strconv.AppendUint(append(b, `,"port":`...), uint64(p.Port), 10)
		}
		if p.Container != "" {
			b = appendJSONString(append(b, `,"container":`...), p.Container)
		}
		b = append(b, "},"...)
	}
	volume := func(name string, v Volume) {
		b = append(append(append(b, '"'), name...), `":{"packets":`...)
		b = strconv.AppendUint(b, v.Packets, 10)
		b = strconv.AppendUint(append(b, `,"bytes":`...), v.Bytes, 10)
		b = append(b, "},"...)
	}
	b = append(b, '{')
	text("proto", l.Proto)
	text("state", l.State)
	text("path", l.Path)
	party("from", &l.From)
	party("to", &l.To)
	party("nat_from", l.NATFrom)
	party("nat_to", l.NATTo)
	b = append(b, `"networks":[`...)
	for i, name := range l.Networks {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendJSONString(b, name)
	}
	b = append(b, "],"...)
	if l.Published != "" {
		text("published", l.Published)
	}
	volume("sent", l.Sent)
	volume("answered", l.Answered)
	b = strconv.AppendInt(append(b, `"age_seconds":`...), l.Age, 10)
	b = strconv.AppendInt(append(b, `,"idle_seconds":`...), l.Idle, 10)
	return append(b, '}')
}

// appendJSONString quotes as json.Marshal does; names are plain as a rule.
func appendJSONString(b []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' || c == '<' || c == '>' || c == '&' {
			quoted, _ := json.Marshal(s) // a string always can be
			return append(b, quoted...)
		}
	}
	return append(append(append(b, '"'), s...), '"')
}
