// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/loader"
	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
)

// DropEvent is a line of the output of "bpfnet drops -f -o json": a dropped packet, or what of a second is not told.
type DropEvent struct {
	Time      time.Time `json:"time"`
	Reason    string    `json:"reason,omitempty"`
	Hook      string    `json:"hook,omitempty"`
	Direction string    `json:"direction,omitempty"` // "from container", "to container", "from outside", "to outside", "from host"
	Device    string    `json:"device,omitempty"`
	Network   string    `json:"network,omitempty"`
	From      *Party    `json:"from,omitempty"`
	To        *Party    `json:"to,omitempty"`
	Proto     string    `json:"proto,omitempty"`
	Detail    string    `json:"detail,omitempty"` // flags of TCP as tcpdump writes them, type and code of ICMP
	Length    int       `json:"length,omitempty"` // bytes, of the whole packet

	// Drops since the last such line that were counted and are not told, by reason.
	Suppressed map[string]uint64 `json:"suppressed,omitempty"` // over the rate of a reason
	Lost       map[string]uint64 `json:"lost,omitempty"`       // this command did not keep up
}

// Party is one end of a dropped packet.
type Party struct {
	Addr      netip.Addr `json:"addr"`
	Port      uint16     `json:"port,omitempty"`
	Container string     `json:"container,omitempty"`
}

func (p *Party) String() string {
	if p == nil || !p.Addr.IsValid() {
		return "?"
	}
	b := make([]byte, 0, 64)
	if p.Port != 0 {
		b = netip.AddrPortFrom(p.Addr, p.Port).AppendTo(b)
	} else {
		b = p.Addr.AppendTo(b)
	}
	if p.Container != "" {
		b = append(append(append(b, " ("...), p.Container...), ')')
	}
	return string(b)
}

// events is where drops come from as they happen.
type events interface {
	Next(deadline time.Time) (bpfmaps.Event, error)
	Missed() (bpfmaps.Missed, error)
	Close() error
}

// openEvents begins to listen at an instance's pins.
func openEvents(bpffs string) (events, error) {
	m, err := bpfmaps.Open(bpffs)
	if err != nil {
		return nil, err
	}
	l, err := m.Listen()
	if err != nil {
		m.Close()
		return nil, err
	}
	return &listening{l, m}, nil
}

// listening closes the maps with the listener.
type listening struct {
	*bpfmaps.Listener
	m *bpfmaps.Maps
}

func (l *listening) Close() error {
	defer l.m.Close()
	return l.Listener.Close()
}

// directions words the hooks.
var directions = map[string]string{
	"container": "from container", "to_container": "to container", "uplink": "from outside", "to_uplink": "to outside",
	"host": "from host", "bridge": "from bridge", "strict": "of container",
}

type dropFilter struct {
	container, network, reason string
	port                       uint16
}

// check refuses names that nothing has.
func (f dropFilter) check(snap *api.Snapshot) error { return checkNames(snap, f.container, f.network) }

// checkNames refuses the names of a container and of a network that nothing has. Empty ones ask for none.
func checkNames(snap *api.Snapshot, container, network string) error {
	var containers, networks []string
	for _, e := range snap.Endpoints {
		containers = append(containers, e.Name)
	}
	for _, n := range snap.Networks {
		networks = append(networks, n.Name)
	}
	for _, c := range []struct {
		what, name string
		all        []string
	}{{"container", container, containers}, {"network", network, networks}} {
		if c.name != "" && !slices.Contains(c.all, c.name) {
			return &api.UnknownError{What: c.what, Name: c.name, Nearest: netdev.Nearest(c.name, c.all)}
		}
	}
	return nil
}

func (a *App) dropsCommand() *cobra.Command {
	var f dropFilter
	var follow bool
	cmd := &cobra.Command{
		Use:   "drops",
		Short: "Show dropped packets and why",
		Long: `Show how many packets were dropped, by reason and hook; with -f, each packet as it
is dropped, until interrupted. Of one reason, about a hundred packets a second and
processor are told; how many more there were is said once a second. What a reason
means and what to do about it: docs/generated/reasons.md. Works with the
daemon down, then with the names that it knew.`,
		Example: `  bpfnet drops
  bpfnet drops -f --container web
  bpfnet drops -f --reason isolated --port 5432 -o json`,
		Args: exactArgs(),
	}
	asJSON := outputFlag(cmd)
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "show packets as they are dropped")
	cmd.Flags().StringVar(&f.container, "container", "", "only packets from or to this container (with -f)")
	cmd.Flags().StringVar(&f.network, "network", "", "only packets from or to containers in this network (with -f)")
	cmd.Flags().StringVar(&f.reason, "reason", "", "only packets that were dropped for this reason")
	cmd.Flags().Uint16Var(&f.port, "port", 0, "only packets from or to this port (with -f)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		if !follow {
			for _, name := range []string{"container", "network", "port"} {
				if cmd.Flags().Changed(name) {
					return usagef("--%s: drops are counted by reason only; add -f to see packets, or ask \"bpfnet stats NAME\"", name)
				}
			}
		}
		if err := checkPort(cmd.Flags(), f.port); err != nil {
			return err
		}
		if f.reason != "" && !slices.Contains(bpfmaps.ReasonNames(), f.reason) {
			return usagef("--reason %q: no such reason; the nearest are %s", f.reason,
				strings.Join(netdev.Nearest(f.reason, bpfmaps.ReasonNames()), ", "))
		}
		if follow {
			return a.followDrops(cmd.Context(), f, wantJSON)
		}
		return a.listDrops(f.reason, wantJSON)
	}
	return cmd
}

func (a *App) listDrops(reason string, wantJSON bool) error {
	_, c, err := a.openForReading()
	if err != nil {
		return err
	}
	defer c.Close()
	drops, err := c.Drops()
	if err != nil {
		return err
	}
	drops = slices.DeleteFunc(drops, func(d bpfmaps.Drop) bool { return reason != "" && d.Reason != reason })
	slices.SortStableFunc(drops, func(a, b bpfmaps.Drop) int { return cmp.Compare(b.Packets, a.Packets) })
	if wantJSON {
		return writeJSON(a.Stdout, notNil(drops))
	}
	return listing(a.Stdout, dropHeader, dropRows(drops))
}

var dropHeader = []string{"DROP REASON", "HOOK", "PACKETS", "BYTES"}

func dropRows(drops []bpfmaps.Drop) [][]string {
	var rows [][]string
	for _, d := range drops {
		rows = append(rows, []string{d.Reason, d.Hook, strconv.FormatUint(d.Packets, 10), humanBytes(d.Bytes)})
	}
	return rows
}

// followDrops writes drops until the context ends, which is no error.
func (a *App) followDrops(ctx context.Context, f dropFilter, wantJSON bool) error {
	snap, err := a.readSnapshot()
	if err != nil {
		return err
	}
	if err := f.check(snap); err != nil {
		return err
	}
	ev, err := a.OpenEvents(a.paths.BPFFS)
	if err != nil {
		return cannotRead(err)
	}
	defer ev.Close()
	write := func(e DropEvent) error { return printDrop(a, e) }
	if wantJSON {
		write = func(e DropEvent) error { return json.NewEncoder(a.Stdout).Encode(e) }
	}
	names, told := newDropNames(snap), time.Now()
	var before bpfmaps.Missed
	for ctx.Err() == nil {
		e, err := ev.Next(time.Now().Add(200 * time.Millisecond))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, bpfmaps.ErrGone):
			return fmt.Errorf("%w (bpfnet cleanup): nothing is dropped by it any more; ask again once a daemon runs", err)
		case err != nil:
			return fmt.Errorf("read drops: %w", err)
		default:
			if d, wanted := names.event(e, f); wanted {
				if err := write(d); err != nil {
					return err
				}
			}
		}
		if time.Since(told) < time.Second {
			continue
		}
		told = time.Now()
		if before, err = a.tellMissed(ev, before, f.reason, write); err != nil {
			return err
		}
		// Names come and go; where they cannot be read just now, the old ones serve.
		if snap, err := a.readSnapshot(); err == nil {
			names = newDropNames(snap)
		}
	}
	_, err = a.tellMissed(ev, before, f.reason, write)
	return err
}

// tellMissed says what was not told since before.
func (a *App) tellMissed(ev events, before bpfmaps.Missed, reason string, write func(DropEvent) error) (bpfmaps.Missed, error) {
	missed, err := ev.Missed()
	if err != nil {
		return before, err
	}
	line := DropEvent{Time: a.Now(), Suppressed: more(missed.Suppressed, before.Suppressed), Lost: more(missed.Lost, before.Lost)}
	if reason != "" {
		other := func(r string, _ uint64) bool { return r != reason }
		maps.DeleteFunc(line.Suppressed, other)
		maps.DeleteFunc(line.Lost, other)
	}
	if len(line.Suppressed)+len(line.Lost) == 0 {
		return missed, nil
	}
	return missed, write(line)
}

// more is by how much the counters have grown.
func more(now, before map[string]uint64) map[string]uint64 {
	out := make(map[string]uint64)
	for reason, n := range now {
		if d := n - before[reason]; d != 0 {
			out[reason] = d
		}
	}
	return out
}

func printDrop(a *App, e DropEvent) error {
	at := e.Time.Local().Format("15:04:05.000000")
	for _, part := range []struct {
		why  string
		what map[string]uint64
	}{{"over the rate", e.Suppressed}, {"not read in time", e.Lost}} {
		for _, reason := range slices.Sorted(maps.Keys(part.what)) {
			if _, err := fmt.Fprintf(a.Stdout, "%s  %-18s %d more, %s\n", at, reason, part.what[reason], part.why); err != nil {
				return err
			}
		}
	}
	if e.Reason == "" {
		return nil
	}
	words := []string{e.Proto, e.Detail, strconv.Itoa(e.Length) + " bytes"}
	words = slices.DeleteFunc(words, func(w string) bool { return w == "" })
	_, err := fmt.Fprintf(a.Stdout, "%s  %-18s %-14s %-12s %s > %s  %s\n", at, e.Reason, e.Direction,
		cmp.Or(e.Network, e.Device, "-"), e.From, e.To, strings.Join(words, " "))
	return err
}

// dropNames are the names by which addresses and devices are told.
type dropNames struct {
	byAddr map[netip.Addr]api.Endpoint
	byLink map[int]api.Endpoint
	bridge map[string]string // the network's name by that of its bridge
	l3     map[string]bool   // devices without a link layer
	device map[int]string    // other devices that were asked for, by index; the kernel tells all of them at once
}

func newDropNames(s *api.Snapshot) *dropNames {
	n := &dropNames{
		byAddr: make(map[netip.Addr]api.Endpoint), byLink: make(map[int]api.Endpoint),
		bridge: make(map[string]string), l3: make(map[string]bool), device: make(map[int]string),
	}
	for _, e := range s.Endpoints {
		for _, text := range e.Addresses {
			if addr, err := netip.ParseAddr(text); err == nil {
				n.byAddr[addr] = e
			}
		}
		if e.Ifindex != 0 {
			n.byLink[e.Ifindex] = e
		}
	}
	for _, net := range s.Networks {
		n.bridge[net.Bridge] = net.Name
	}
	for _, at := range s.Attachments {
		if at.Program == loader.FromUplinkL3 || at.Program == loader.ToUplinkL3 {
			n.l3[at.Device] = true
		}
	}
	return n
}

func (n *dropNames) deviceName(ifindex int) string {
	name, known := n.device[ifindex]
	if !known {
		if dev, err := net.InterfaceByIndex(ifindex); err == nil {
			name = dev.Name
		}
		n.device[ifindex] = name
	}
	return name
}

// event names a drop, and says whether it is wanted.
func (n *dropNames) event(e bpfmaps.Event, f dropFilter) (DropEvent, bool) {
	d := DropEvent{Time: e.Time, Reason: e.Reason, Hook: e.Hook, Direction: directions[e.Hook], Length: e.Length}
	networks, containers := []string{}, []string{}
	if at, ok := n.byLink[e.Ifindex]; ok {
		d.Device, d.Network = at.Link, at.Network
		networks, containers = append(networks, at.Network), append(containers, at.Name)
	} else {
		d.Device = n.deviceName(e.Ifindex)
	}
	d.Network = cmp.Or(d.Network, n.bridge[d.Device])
	// At the cgroup of strict mode there is no link layer.
	head := decodeHead(e.Head, e.Hook != "strict" && !n.l3[d.Device])
	d.Proto, d.Detail = head.Proto, head.Detail
	party := func(addr netip.Addr, port uint16) *Party {
		if !addr.IsValid() {
			return nil
		}
		p := &Party{Addr: addr, Port: port}
		if of, ok := n.byAddr[addr]; ok {
			p.Container = of.Name
			d.Network = cmp.Or(d.Network, of.Network)
			networks, containers = append(networks, of.Network), append(containers, of.Name)
		}
		return p
	}
	d.From, d.To = party(head.From, head.FromPort), party(head.To, head.ToPort)
	networks = append(networks, d.Network)
	wanted := (f.reason == "" || f.reason == d.Reason) &&
		(f.container == "" || slices.Contains(containers, f.container)) &&
		(f.network == "" || slices.Contains(networks, f.network)) &&
		(f.port == 0 || head.HasPorts && (head.FromPort == f.port || head.ToPort == f.port))
	return d, wanted
}
