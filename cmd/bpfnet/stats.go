// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
)

// Stats is the output of "bpfnet stats -o json". All counters are monotonic while the maps are
// pinned, which is until cleanup or the host's end.
type Stats struct {
	Time time.Time `json:"time"`
	// Totals, Forwarded and Drops are of the whole host, and missing where a name was asked for.
	Totals     *Totals          `json:"totals,omitzero"`
	Forwarded  []maps.Fate      `json:"forwarded,omitzero"`
	Drops      []maps.Drop      `json:"drops,omitzero"`
	Networks   []NetworkStats   `json:"networks"`
	Containers []ContainerStats `json:"containers"`
	Ports      []PortStats      `json:"ports"`
}

// NetworkStats is the sum over the containers that a network has now.
type NetworkStats struct {
	Name       string `json:"name"`
	Bridge     string `json:"bridge"`
	Containers int    `json:"containers"`
	maps.EndpointCount
}

// ContainerStats is the traffic of one container in one network, as the container sees it.
type ContainerStats struct {
	Name      string   `json:"name"`
	Network   string   `json:"network"`
	Addresses []string `json:"addresses"`
	Ready     bool     `json:"ready"`
	maps.EndpointCount
}

// PortStats is the traffic of one published port; rx is towards the container.
type PortStats struct {
	Host      string `json:"host"` // address:port
	Proto     string `json:"proto"`
	Target    string `json:"target"` // address:port
	Container string `json:"container"`
	Network   string `json:"network"`
	maps.PortCount
}

func (a *App) statsCommand() *cobra.Command {
	var watch bool
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "stats [NAME]",
		Short: "Show traffic and drops",
		Long: `Show what became of all packets, drops by their reason, and the traffic of each
network, container and published port; with a NAME, of that network or container
only. RX is into a container, TX out of it. All numbers count from when the
programs were first loaded. Works with the daemon down.

With --watch, show rates per second, the largest first, until interrupted: on a
terminal over the same screen, else one block below the other.`,
		Example: `  bpfnet stats
  bpfnet stats web -o json
  bpfnet stats --watch --interval 5s`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef("unexpected argument %q", args[1])
			}
			return nil
		},
	}
	asJSON := outputFlag(cmd)
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show rates, again and again")
	cmd.Flags().DurationVar(&interval, "interval", watchInterval, "with --watch: the `time` between two readings")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		jsonWanted, err := asJSON()
		if err != nil {
			return err
		}
		if cmd.Flags().Changed("interval") && !watch {
			return usagef("--interval: add --watch, which reads more than once")
		}
		if err := checkInterval(interval); err != nil {
			return err
		}
		name := ""
		if len(args) == 1 {
			name = args[0]
		}
		if watch {
			return a.watchStats(cmd.Context(), name, interval, jsonWanted)
		}
		s, err := a.readStats(name)
		if err != nil {
			return err
		}
		if jsonWanted {
			return writeJSON(a.Stdout, s)
		}
		return a.printStats(s)
	}
	return cmd
}

func (a *App) readStats(name string) (*Stats, error) {
	snap, c, err := a.openForReading()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	// Never null in JSON.
	s := &Stats{Time: a.Now(), Networks: []NetworkStats{}, Containers: []ContainerStats{}, Ports: []PortStats{}}
	keep, err := filter(snap, name)
	if err != nil {
		return nil, err
	}
	if name == "" {
		if s.Forwarded, err = c.Fates(); err != nil {
			return nil, err
		}
		if s.Drops, err = c.Drops(); err != nil {
			return nil, err
		}
		slices.SortStableFunc(s.Drops, func(a, b maps.Drop) int { return cmp.Compare(b.Packets, a.Packets) })
		s.Forwarded, s.Drops = notNil(s.Forwarded), notNil(s.Drops)
		t := totals(s.Forwarded, s.Drops)
		s.Totals = &t
	}
	sums := make(map[string]*NetworkStats)
	for _, n := range snap.Networks {
		if keep(n.Name, "") {
			s.Networks = append(s.Networks, NetworkStats{Name: n.Name, Bridge: n.Bridge})
		}
	}
	for i := range s.Networks {
		sums[s.Networks[i].Name] = &s.Networks[i]
	}
	for _, e := range snap.Endpoints {
		inNetwork := sums[e.Network]
		if inNetwork == nil && !keep(e.Network, e.Name) {
			continue
		}
		// Slot 0 is nobody's: an endpoint that no slot was left for.
		var count maps.EndpointCount
		if e.Slot != 0 {
			if count, err = c.EndpointStats(e.Slot); err != nil {
				return nil, err
			}
		}
		if inNetwork != nil {
			inNetwork.Containers++
			addCount(&inNetwork.EndpointCount, count)
		}
		if keep(e.Network, e.Name) {
			s.Containers = append(s.Containers, ContainerStats{
				Name: e.Name, Network: e.Network, Addresses: e.Addresses, Ready: e.Ready, EndpointCount: count,
			})
		}
	}
	for _, p := range snap.Ports {
		if !keep(p.Network, p.Container) {
			continue
		}
		var count maps.PortCount
		if p.Slot != 0 {
			if count, err = c.PortStats(p.Slot); err != nil {
				return nil, err
			}
		}
		s.Ports = append(s.Ports, PortStats{
			Host: p.Host, Proto: p.Proto, Target: p.Target, Container: p.Container, Network: p.Network, PortCount: count,
		})
	}
	return s, nil
}

// filter returns whether a container in a network is wanted; an empty container asks for the network
// as such. It fails where nothing has the name.
func filter(snap *api.Snapshot, name string) (func(network, container string) bool, error) {
	if name == "" {
		return func(_, _ string) bool { return true }, nil
	}
	var names []string
	for _, n := range snap.Networks {
		names = append(names, n.Name)
	}
	for _, e := range snap.Endpoints {
		names = append(names, e.Name)
	}
	if !slices.Contains(names, name) {
		if len(names) == 0 {
			return nil, fmt.Errorf("%q: no such network or container; none is known yet", name)
		}
		return nil, fmt.Errorf("%q: no such network or container; the nearest names are %s", name, strings.Join(netdev.Nearest(name, names), ", "))
	}
	return func(network, container string) bool { return network == name || container == name }, nil
}

func addCount(to *maps.EndpointCount, c maps.EndpointCount) {
	to.RxPackets += c.RxPackets
	to.RxBytes += c.RxBytes
	to.TxPackets += c.TxPackets
	to.TxBytes += c.TxBytes
	to.DropPackets += c.DropPackets
	to.DropBytes += c.DropBytes
}

func portTitle(p PortStats) string { return p.Host + "->" + p.Target + "/" + p.Proto }

// fateTitles are the rows of the first table.
var fateTitles = []struct{ fate, title string }{
	{"container", "into containers (fast path)"},
	{"uplink", "out of uplinks (fast path)"},
	{"lo", "to the host's loopback"},
	{"stack", "left to the host's stack"},
	{"bridge", "left to the bridge"},
}

func (a *App) printStats(s *Stats) error {
	var blocks []func() error
	block := func(header []string, rows [][]string) {
		if len(rows) > 0 {
			blocks = append(blocks, func() error { return table(a.Stdout, header, rows) })
		}
	}
	var rows [][]string
	if s.Totals != nil {
		by := make(map[string]*Volume)
		for _, f := range s.Forwarded {
			if by[f.Fate] == nil {
				by[f.Fate] = new(Volume)
			}
			by[f.Fate].add(f.Packets, f.Bytes)
		}
		for _, t := range fateTitles {
			v := by[t.fate]
			if v == nil {
				v = new(Volume)
			}
			rows = append(rows, []string{t.title, strconv.FormatUint(v.Packets, 10), humanBytes(v.Bytes)})
		}
		d := s.Totals.Dropped
		rows = append(rows, []string{"dropped", strconv.FormatUint(d.Packets, 10), humanBytes(d.Bytes)})
		block([]string{"PATH", "PACKETS", "BYTES"}, rows)
	}
	block(dropHeader, dropRows(s.Drops))
	rows = nil
	for _, n := range s.Networks {
		rows = append(rows, []string{
			n.Name, n.Bridge, strconv.Itoa(n.Containers),
			traffic(n.RxPackets, n.RxBytes), traffic(n.TxPackets, n.TxBytes), traffic(n.DropPackets, n.DropBytes),
		})
	}
	block([]string{"NETWORK", "BRIDGE", "CONTAINERS", "RX", "TX", "TX DROPPED"}, rows)
	rows = nil
	for _, c := range s.Containers {
		rows = append(rows, []string{
			c.Name, c.Network, strings.Join(c.Addresses, ", "),
			traffic(c.RxPackets, c.RxBytes), traffic(c.TxPackets, c.TxBytes), traffic(c.DropPackets, c.DropBytes),
		})
	}
	block([]string{"CONTAINER", "NETWORK", "ADDRESSES", "RX", "TX", "TX DROPPED"}, rows)
	rows = nil
	for _, p := range s.Ports {
		rows = append(rows, []string{
			portTitle(p), p.Container, p.Network, strconv.FormatUint(p.Connections, 10),
			traffic(p.RxPackets, p.RxBytes), traffic(p.TxPackets, p.TxBytes), strconv.FormatUint(p.NotReady, 10),
		})
	}
	block([]string{"PORT", "CONTAINER", "NETWORK", "CONNECTIONS", "RX", "TX", "NOT READY"}, rows)
	return a.printBlocks(blocks)
}

// printBlocks writes blocks with an empty line between them.
func (a *App) printBlocks(blocks []func() error) error {
	for i, b := range blocks {
		if i > 0 {
			fmt.Fprintln(a.Stdout)
		}
		if err := b(); err != nil {
			return err
		}
	}
	return nil
}
