// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
)

// NetworkRow is an entry of the output of "bpfnet network ls -o json".
type NetworkRow struct {
	ID       string   `json:"id"`
	Name     string   `json:"name"`
	Driver   string   `json:"driver"`
	Scope    string   `json:"scope"`
	Source   string   `json:"source"` // "bpfnet" or "docker"
	Bridge   string   `json:"bridge"` // device name
	Subnets  []string `json:"subnets"`
	Internal bool     `json:"internal"`
}

// What every network here is, in Docker's words.
const (
	driverBridge = "bridge"
	scopeLocal   = "local"
)

// listFlags are those of the commands that list.
type listFlags struct {
	quiet, noTrunc bool
	asJSON         func() (bool, error)
}

func (f *listFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "print IDs only")
	cmd.Flags().BoolVar(&f.noTrunc, "no-trunc", false, "shorten nothing")
	f.asJSON = outputFlag(cmd)
}

func (f *listFlags) wantsJSON() (bool, error) {
	j, err := f.asJSON()
	if err == nil && j && f.quiet {
		return false, usagef("--quiet and --output json: want one of them")
	}
	return j, err
}

func (f *listFlags) id(id string) string {
	if f.noTrunc {
		return id
	}
	return shortID(id)
}

func (a *App) networkListCommand() *cobra.Command {
	var list listFlags
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List networks",
		Long: `List the networks that are served: those of bpfnet, and Docker's. Works with the
daemon down.`,
		Example: `  bpfnet network ls
  bpfnet network ls -q --no-trunc`,
		Args: exactArgs(),
	}
	list.add(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		wantJSON, err := list.wantsJSON()
		if err != nil {
			return err
		}
		snap, err := a.readSnapshot()
		if err != nil {
			return err
		}
		rows := make([]NetworkRow, 0, len(snap.Networks))
		for _, n := range snap.Networks {
			rows = append(rows, NetworkRow{
				ID: n.ID, Name: n.Name, Driver: driverBridge, Scope: scopeLocal, Source: n.Source,
				Bridge: n.Bridge, Subnets: notNil(n.Subnets), Internal: n.Internal,
			})
		}
		if wantJSON {
			return writeJSON(a.Stdout, rows)
		}
		return a.printNetworks(rows, &list)
	}
	return cmd
}

func (a *App) printNetworks(rows []NetworkRow, list *listFlags) error {
	header := []string{"NETWORK ID", "NAME", "DRIVER", "SCOPE", "SOURCE"}
	return printRows(a, list, header, rows, func(r NetworkRow) []string {
		return []string{list.id(r.ID), r.Name, r.Driver, r.Scope, r.Source}
	})
}

// printRows prints a list, or with --quiet its first column alone.
func printRows[R any](a *App, list *listFlags, header []string, rows []R, columns func(R) []string) error {
	var lines [][]string
	for _, r := range rows {
		line := columns(r)
		if list.quiet {
			fmt.Fprintln(a.Stdout, line[0])
			continue
		}
		lines = append(lines, line)
	}
	if list.quiet {
		return nil
	}
	return listing(a.Stdout, header, lines)
}

// The output of "docker network inspect" of Docker Engine 20.10: its keys, their order and types.
type (
	networkInspect struct {
		Name       string
		ID         string `json:"Id"`
		Created    time.Time
		Scope      string
		Driver     string
		EnableIPv6 bool
		IPAM       inspectIPAM
		Internal   bool
		Attachable bool
		Ingress    bool
		ConfigFrom struct{ Network string }
		ConfigOnly bool
		Containers map[string]inspectEndpoint // by the container's ID
		Options    map[string]string
		Labels     map[string]string
	}
	inspectIPAM struct {
		Driver  string
		Options map[string]string
		Config  []inspectSubnet
	}
	inspectSubnet struct {
		Subnet  string `json:",omitempty"`
		IPRange string `json:",omitempty"`
		Gateway string `json:",omitempty"`
	}
	inspectEndpoint struct {
		Name        string
		EndpointID  string
		MacAddress  string
		IPv4Address string // with the subnet's length
		IPv6Address string
	}
)

func (a *App) networkInspectCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "inspect NAME...",
		Short: "Show networks in detail",
		Long: `Show networks in detail, in the JSON shape of "docker network inspect". Of Docker's
networks, the time of creation, options and labels are Docker's to tell. Works
with the daemon down.`,
		Example: "  bpfnet network inspect backend",
		Args:    atLeastArgs("NAME"),
		RunE: func(_ *cobra.Command, args []string) error {
			snap, err := a.readSnapshot()
			if err != nil {
				return err
			}
			out := make([]networkInspect, 0, len(args))
			for _, word := range args {
				i, err := find("network", word, networkNames(snap))
				if err != nil {
					return err
				}
				n, err := inspectNetwork(snap, snap.Networks[i])
				if err != nil {
					return err
				}
				out = append(out, n)
			}
			raw, err := json.MarshalIndent(out, "", "    ")
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.Stdout, "%s\n", raw)
			return err
		},
	}
}

func networkNames(snap *api.Snapshot) []named {
	var out []named
	for _, n := range snap.Networks {
		out = append(out, named{n.Source, n.Name, n.ID})
	}
	return out
}

func inspectNetwork(snap *api.Snapshot, n api.Network) (networkInspect, error) {
	out := networkInspect{
		Name: n.Name, ID: n.ID, Created: n.Created, Scope: scopeLocal, Driver: driverBridge, Internal: n.Internal,
		IPAM:       inspectIPAM{Driver: "default", Config: []inspectSubnet{}},
		Containers: make(map[string]inspectEndpoint),
		Options:    n.Options, Labels: n.Labels,
	}
	if n.Source == sourceOwn { // of Docker's, null says that they are not known
		out.IPAM.Options = map[string]string{}
		out.Options, out.Labels = notNilMap(n.Options), notNilMap(n.Labels)
	}
	var subnets []netip.Prefix
	for _, s := range n.Subnets {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return out, fmt.Errorf("network %q: read snapshot: %w", n.Name, err)
		}
		subnets = append(subnets, p)
		out.EnableIPv6 = out.EnableIPv6 || p.Addr().Is6()
		row := inspectSubnet{Subnet: s}
		for _, r := range n.Ranges {
			if p.Overlaps(r) {
				row.IPRange = r.String()
			}
		}
		for _, gw := range n.Gateways {
			if p.Contains(gw) {
				row.Gateway = gw.String()
			}
		}
		out.IPAM.Config = append(out.IPAM.Config, row)
	}
	for _, e := range snap.Endpoints {
		if e.NetworkID != n.ID {
			continue
		}
		row := inspectEndpoint{Name: e.Name, EndpointID: e.ID, MacAddress: e.MAC}
		for _, s := range e.Addresses {
			addr, err := netip.ParseAddr(s)
			if err != nil {
				return out, fmt.Errorf("network %q: read snapshot: %w", n.Name, err)
			}
			if addr.Is4() {
				row.IPv4Address = withLength(addr, subnets)
			} else {
				row.IPv6Address = withLength(addr, subnets)
			}
		}
		out.Containers[e.SandboxID] = row
	}
	return out, nil
}

func notNilMap(m map[string]string) map[string]string {
	if m == nil {
		return map[string]string{}
	}
	return m
}

func withLength(a netip.Addr, subnets []netip.Prefix) string {
	for _, p := range subnets {
		if p.Contains(a) {
			return netip.PrefixFrom(a, p.Bits()).String()
		}
	}
	return netip.PrefixFrom(a, a.BitLen()).String()
}
