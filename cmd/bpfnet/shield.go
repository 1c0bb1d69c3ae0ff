// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/maps"
)

// Shield is the output of "bpfnet shield -o json".
type Shield struct {
	Time    time.Time          `json:"time"`
	On      bool               `json:"on"`       // the daemon was started with --shield
	Mode    string             `json:"mode"`     // "native" or "generic"; empty: off
	SynRate int                `json:"syn_rate"` // connections a second and source to published ports; 0: any number
	Devices []api.ShieldDevice `json:"devices"`  // uplinks
	Drops   []maps.Drop        `json:"drops"`    // by reason
	Denied  []maps.Denied      `json:"denied"`   // the deny list, the busiest first
}

// deniedShown is how many prefixes the text shows.
const deniedShown = 10

func (a *App) shieldCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "shield",
		Short: "Show what the shield has dropped",
		Long: `Show on which uplinks the shield is, and what it has dropped there before the kernel
had made a packet of it: by reason, and by prefix of the deny list. The numbers of
a prefix count from when it was denied. Works with the daemon down.

The shield is on with "bpfnet daemon --shield"; "bpfnet deny" says whom it keeps
out.`,
		Args: exactArgs(),
	}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		jsonWanted, err := asJSON()
		if err != nil {
			return err
		}
		s, err := a.readShield()
		if err != nil {
			return err
		}
		if jsonWanted {
			return writeJSON(a.Stdout, s)
		}
		return a.printShield(s)
	}
	return cmd
}

func (a *App) readShield() (*Shield, error) {
	snap, c, err := a.openForReading()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	s := &Shield{Time: a.Now(), Devices: []api.ShieldDevice{}, Drops: []maps.Drop{}}
	if snap.Shield != nil {
		s.On, s.Mode, s.SynRate, s.Devices = true, snap.Shield.Mode, snap.Shield.SynRate, notNil(snap.Shield.Devices)
	}
	drops, err := c.Drops()
	if err != nil {
		return nil, err
	}
	for _, d := range drops {
		if d.Hook == "shield" {
			s.Drops = append(s.Drops, d)
		}
	}
	s.Denied, err = c.Denied()
	s.Denied = notNil(s.Denied)
	return s, err
}

// shieldLine says in one line how the shield is.
func shieldLine(s *api.Shield) string {
	on := 0
	for _, d := range s.Devices {
		if d.Why == "" {
			on++
		}
	}
	rate := ""
	if s.SynRate > 0 {
		rate = fmt.Sprintf(", %d new connections a second and source", s.SynRate)
	}
	return fmt.Sprintf("%s, on %d of %s, %d denied%s", s.Mode, on, count(len(s.Devices), "uplink"), s.Denied, rate)
}

// shieldRows are the uplinks and how the shield is on each.
func shieldRows(devices []api.ShieldDevice) (rows [][]string) {
	for _, d := range devices {
		state := "on"
		if d.Why != "" {
			state = "off: " + d.Why
		}
		rows = append(rows, []string{d.Device, state})
	}
	return rows
}

func (a *App) printShield(s *Shield) error {
	text := "off; it is on with \"bpfnet daemon --shield\""
	if s.On {
		text = shieldLine(&api.Shield{Mode: s.Mode, SynRate: s.SynRate, Denied: len(s.Denied), Devices: s.Devices})
	}
	blocks := []func() error{func() error {
		_, err := fmt.Fprintln(a.Stdout, "Shield: "+text)
		return err
	}}
	var drops, denied [][]string
	for _, d := range s.Drops {
		drops = append(drops, []string{d.Reason, strconv.FormatUint(d.Packets, 10), humanBytes(d.Bytes)})
	}
	for i, d := range s.Denied {
		if i == deniedShown {
			denied = append(denied, []string{fmt.Sprintf("and %d more", len(s.Denied)-i), ""})
			break
		}
		denied = append(denied, []string{d.Prefix.String(), strconv.FormatUint(d.Packets, 10)})
	}
	for _, b := range []struct {
		header []string
		rows   [][]string
	}{
		{[]string{"UPLINK", "SHIELD"}, shieldRows(s.Devices)},
		{[]string{"DROP REASON", "PACKETS", "BYTES"}, drops},
		{[]string{"DENIED", "PACKETS"}, denied},
	} {
		if len(b.rows) > 0 {
			blocks = append(blocks, func() error { return table(a.Stdout, b.header, b.rows) })
		}
	}
	return a.printBlocks(blocks)
}

func (a *App) denyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:                   "deny",
		DisableFlagsInUseLine: true,
		Short:                 "Say whom the shield keeps out",
		Args:                  noSuchCommand,
		RunE:                  showHelp,
	}
	cmd.AddCommand(a.denyAddCommand(), a.denyRmCommand(), a.denyLsCommand())
	return cmd
}

func (a *App) denyAddCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "add PREFIX...",
		Short: "Keep packets of these sources out",
		Long: `Keep packets of these sources out, by dropping them at the uplinks before all else.

What is established goes on until it ends: connections of containers and of the
host's own sockets, and answers to what they ask. PREFIX is an address or a subnet.
The list is kept over restarts of the daemon and of the host; it is in force while
the daemon's shield is on ("bpfnet daemon --shield").

A prefix with everybody in it, with an address of this host, or with the client of
this SSH session is refused without --force.`,
		Example: "  bpfnet deny add 203.0.113.0/24 2001:db8:bad::/48\n  xargs bpfnet deny add <drop.txt",
		Args:    atLeastArgs("PREFIX"),
	}
	cmd.Flags().BoolVar(&force, "force", false, "also what would cut this host off")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		list, err := parseDenied(args)
		if err != nil {
			return err
		}
		if caller := a.sshClient(); !force && caller.IsValid() {
			for _, p := range list {
				if p.Contains(caller) {
					return fmt.Errorf("prefix %s: has %s in it, from where you are logged in; if that is meant, say --force", p, caller)
				}
			}
		}
		client, err := api.Dial(cmd.Context(), a.paths.Socket)
		if err != nil {
			return err
		}
		res, err := client.Deny(cmd.Context(), api.DenySpec{Prefixes: list, Force: force})
		if err != nil {
			return err
		}
		return a.printDenied(res, len(list), "denied now", "denied already")
	}
	return cmd
}

func (a *App) denyRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "rm PREFIX...",
		Short:   "Let these sources in again",
		Long:    "Take prefixes off the deny list, each as it was added.",
		Example: "  bpfnet deny rm 203.0.113.0/24",
		Args:    atLeastArgs("PREFIX"),
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := parseDenied(args)
			if err != nil {
				return err
			}
			client, err := api.Dial(cmd.Context(), a.paths.Socket)
			if err != nil {
				return err
			}
			res, err := client.Undeny(cmd.Context(), api.DenySpec{Prefixes: list})
			if err != nil {
				return err
			}
			return a.printDenied(res, len(list), "let in again", "not denied")
		},
	}
}

func (a *App) denyLsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List whom the shield keeps out",
		Long:  "List the prefixes of the deny list. \"bpfnet shield\" says what each has kept out.",
		Args:  exactArgs(),
	}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		jsonWanted, err := asJSON()
		if err != nil {
			return err
		}
		client, err := api.Dial(cmd.Context(), a.paths.Socket)
		if err != nil {
			return err
		}
		list, err := client.Denied(cmd.Context())
		if err != nil {
			return err
		}
		list.Prefixes = notNil(list.Prefixes)
		if jsonWanted {
			return writeJSON(a.Stdout, list)
		}
		for _, p := range list.Prefixes {
			fmt.Fprintln(a.Stdout, p)
		}
		return nil
	}
	return cmd
}

// printDenied says what became of n prefixes.
func (a *App) printDenied(res api.DenyResult, n int, changed, same string) error {
	text := ""
	if res.Changed > 0 {
		text = fmt.Sprintf("%s %s", plural(res.Changed, "prefix", "prefixes"), changed)
	}
	if rest := n - res.Changed; rest > 0 {
		if text != "" {
			text += ", "
		}
		text += fmt.Sprintf("%s %s", plural(rest, "prefix", "prefixes"), same)
	}
	if !res.Shield {
		text += "; the shield is off, so nobody is kept out: start the daemon with --shield"
	}
	_, err := fmt.Fprintln(a.Stdout, text)
	return err
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

// parseDenied reads addresses and subnets. One that is given twice counts once.
func parseDenied(args []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	seen := make(map[netip.Prefix]bool)
	for _, s := range args {
		p, err := netip.ParsePrefix(s)
		if a, aerr := netip.ParseAddr(s); aerr == nil && a.Zone() == "" {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil || p.Addr().Is4In6() {
			return nil, usagef("PREFIX %q: want an address or a subnet, like 203.0.113.0/24 or 2001:db8::7", s)
		}
		if m := p.Masked(); m != p {
			return nil, usagef("PREFIX %s: has host bits set; write %s", p, m)
		}
		if !seen[p] {
			seen[p] = true
			out = append(out, p)
		}
	}
	return out, nil
}

// sshClient is where the user of this terminal is logged in from; not valid: here, or it is not known.
func (a *App) sshClient() netip.Addr {
	for _, e := range a.Environ() {
		if value, ok := strings.CutPrefix(e, "SSH_CONNECTION="); ok {
			client, _, _ := strings.Cut(value, " ")
			addr, _ := netip.ParseAddr(client)
			return addr.Unmap()
		}
	}
	return netip.Addr{}
}
