// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/maps"
)

// NAT is the output of "bpfnet nat -o json".
type NAT struct {
	Time         time.Time `json:"time"`
	Ranges       []string  `json:"ranges"`  // that masquerade ports are chosen from: first-last
	Ports        int       `json:"ports"`   // of them that may be used, towards each destination
	Refused      uint64    `json:"refused"` // packets that found no port, since the programs were first loaded
	Destinations []NATUse  `json:"destinations"`
}

// NATUse is how many ports are taken of one address of the host towards one destination.
type NATUse struct {
	Proto   string     `json:"proto"`
	From    netip.Addr `json:"from"` // the host's
	To      Party      `json:"to"`
	Taken   int        `json:"taken"`
	Room    int        `json:"room"`
	Full    float64    `json:"full"`    // 0 to 1
	Refusal float64    `json:"refusal"` // how likely it is that one more flow is refused, 0 to 1
	// Who holds the most of them.
	Most      string `json:"most,omitempty"`
	MostTaken int    `json:"most_taken"`
}

func (a *App) natCommand() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:   "nat",
		Short: "Show how many masquerade ports are taken",
		Long: `Show how many ports the flows hold that containers have to the world, for each
destination and address of the host that they leave with: each such pair has all
ports of the range to itself, but for published and reserved ones. The fullest
come first. A new flow tries 32 ports; REFUSAL is how likely it is that all of
them are taken, and the flow dropped as snat_exhausted. Ports on which sockets of
the host would get the answers are not counted. Echo requests have identifiers
in place of ports. Works with the daemon down.`,
		Example: `  bpfnet nat
  bpfnet nat --limit 10 -o json`,
		Args: exactArgs(),
	}
	asJSON := outputFlag(cmd)
	cmd.Flags().IntVar(&limit, "limit", 0, "show no more than this many destinations; 0: all")
	cmd.RunE = func(*cobra.Command, []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		if limit < 0 {
			return usagef("--limit %d: want a number of destinations, or 0", limit)
		}
		snap, c, err := a.openForReading()
		if err != nil {
			return err
		}
		defer c.Close()
		m, err := c.Masquerade()
		if err != nil {
			return err
		}
		nat := natOf(m, snap)
		nat.Time = a.Now()
		all := len(nat.Destinations)
		if limit > 0 {
			nat.Destinations = nat.Destinations[:min(limit, all)]
		}
		if wantJSON {
			return writeJSON(a.Stdout, nat)
		}
		return a.printNAT(nat, all)
	}
	return cmd
}

// natOf sums up by destination, the fullest first.
func natOf(m maps.Masquerade, snap *api.Snapshot) NAT {
	type key struct {
		proto uint8
		from  netip.Addr
		to    netip.AddrPort
	}
	names := newFlowNames(snap)
	total := 0
	out := NAT{Ranges: []string{}, Ports: m.Ports, Refused: m.Refused}
	for _, r := range m.Ranges {
		total += r.Count
		out.Ranges = append(out.Ranges, fmt.Sprintf("%d-%d", r.First, int(r.First)+r.Count-1))
	}
	uses := make(map[key]*NATUse)
	for _, u := range m.Used {
		k := key{u.Proto, u.From, u.To}
		use := uses[k]
		if use == nil {
			use = &NATUse{Proto: protoName(u.Proto), From: u.From, To: Party{Addr: u.To.Addr(), Port: u.To.Port()}}
			uses[k] = use
		}
		use.Taken += u.Ports
		if name := names.endpoint(u.Endpoint).Name; u.Ports > use.MostTaken || u.Ports == use.MostTaken && name < use.Most {
			use.Most, use.MostTaken = name, u.Ports
		}
	}
	out.Destinations = make([]NATUse, 0, len(uses))
	for k, use := range uses {
		tried := total
		use.Room = m.Ports
		if !hasPorts(k.proto) {
			use.Room, tried = maps.EchoIdentifiers, maps.EchoIdentifiers
		}
		use.Full, use.Refusal = 1, 1
		if use.Room > use.Taken {
			use.Full = float64(use.Taken) / float64(use.Room)
			// Candidates that must not be used are tried, too.
			use.Refusal = math.Pow(1-float64(use.Room-use.Taken)/float64(tried), float64(m.Tries))
		}
		out.Destinations = append(out.Destinations, *use)
	}
	slices.SortFunc(out.Destinations, func(a, b NATUse) int {
		return cmp.Or(cmp.Compare(b.Full, a.Full), cmp.Compare(b.Taken, a.Taken), cmp.Compare(a.Proto, b.Proto),
			a.To.Addr.Compare(b.To.Addr), cmp.Compare(a.To.Port, b.To.Port), a.From.Compare(b.From))
	})
	return out
}

func (a *App) printNAT(n NAT, all int) error {
	ranges := strings.Join(n.Ranges, ", ")
	if ranges == "" {
		ranges = "no range"
	}
	if _, err := fmt.Fprintf(a.Stdout, "Ports:     %d towards each destination (%s)\nRefused:   %s (snat_exhausted)\n\n",
		n.Ports, ranges, count(int(n.Refused), "packet")); err != nil {
		return err
	}
	var rows [][]string
	for _, u := range n.Destinations {
		most := "-"
		if u.Most != "" {
			most = fmt.Sprintf("%s (%d)", u.Most, u.MostTaken)
		}
		rows = append(rows, []string{u.Proto, u.From.String(), u.To.String(), strconv.Itoa(u.Taken), strconv.Itoa(u.Room),
			share(u.Full), share(u.Refusal), most})
	}
	if err := listing(a.Stdout, []string{"PROTO", "FROM", "TO", "TAKEN", "ROOM", "FULL", "REFUSAL", "MOST BY"}, rows); err != nil {
		return err
	}
	if rest := all - len(rows); rest > 0 {
		_, err := fmt.Fprintf(a.Stdout, "and %d more\n", rest)
		return err
	}
	return nil
}

func share(part float64) string { return fmt.Sprintf("%.1f %%", 100*part) }
