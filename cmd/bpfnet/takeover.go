// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/doctor"
	"github.com/bpfnet/bpfnet/loader"
)

// takeoverResult is what "takeover -o json" prints.
type takeoverResult struct {
	DryRun  bool              `json:"dry_run"`
	Removed []doctor.Leftover `json:"removed"`
	Left    []string          `json:"left"`
}

func (a *App) takeoverCommand() *cobra.Command {
	var dryRun, dropUser bool
	cmd := &cobra.Command{
		Use:   "takeover",
		Short: "Remove the rules that an Engine left which made its own",
		Long: `Remove the rules that a Docker Engine left which made its own: an Engine that
is restarted with "iptables": false leaves its chains where they are. They take no
packet from bpfnet, but cost each of the host's own. The flows that they translated
go on: the daemon took them over when it began to serve their networks.

Only what is the Engine's beyond doubt goes: its chains, what jumps to them, and
rules of its forms about its bridges, of iptables and ip6tables, in nft's place and
the old one, and its nft tables. What stays is named. It can be repeated.

Refused, with nothing changed: while an Engine runs that makes such rules; while
no daemon runs; while a network of Docker's is not served; and where DOCKER-USER
holds rules. No packet of a container meets those any more: put what the host
itself needs of them elsewhere, and drop them with --drop-docker-user.`,
		Example: `  bpfnet takeover --dry-run
  bpfnet takeover`,
		Args: exactArgs(),
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would be removed")
	cmd.Flags().BoolVar(&dropUser, "drop-docker-user", false, "remove the chain DOCKER-USER and the rules in it too")
	asJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		jsonWanted, err := asJSON()
		if err != nil {
			return err
		}
		if err := a.checkPrivilege(); err != nil {
			return err
		}
		return a.takeover(cmd.Context(), dryRun, dropUser, jsonWanted)
	}
	return cmd
}

// gatherEngine looks at what the Engine's rules are about, and at nothing else.
func (a *App) gatherEngine(ctx context.Context) (*doctor.Facts, error) {
	g := &gatherer{a: a, ctx: ctx, f: &doctor.Facts{
		Now: a.Now(), Command: ownCommand(), Flags: a.flagsInUse(), Failed: make(map[string]error), BPFFS: a.paths.BPFFS,
	}}
	g.state()
	if err := g.devices(); err != nil {
		return nil, err
	}
	var err error
	if g.f.Pins, err = loader.Pins(g.f.BPFFS); err != nil {
		return nil, err
	}
	g.processes()
	if err := g.f.Failed["engine"]; err != nil {
		return nil, err
	}
	if g.rules(); !g.f.Rules.Read {
		return nil, errors.New(g.f.Rules.Why)
	}
	return g.f, ctx.Err()
}

func (a *App) takeover(ctx context.Context, dryRun, dropUser, asJSON bool) error {
	f, err := a.gatherEngine(ctx)
	if err != nil {
		return err
	}
	list := f.Leftovers(dropUser)
	if err := takeoverAllowed(f, list); err != nil {
		return err
	}
	for _, l := range list {
		if asJSON {
			continue
		}
		verb := "removed"
		if dryRun {
			verb = "would remove"
		}
		if !dryRun {
			if err := removeLeftover(ctx, l); err != nil {
				return err
			}
		}
		fmt.Fprintf(a.Stdout, "%s: %s %d rules and %d chains of the Engine's\n", l.Tool, verb, l.Rules, l.Chains)
		table := ""
		for _, line := range l.Remove {
			switch {
			case strings.HasPrefix(line, "*"):
				table = line[1:]
			case l.Tool == "nft":
				fmt.Fprintf(a.Stdout, "  %s %s\n", l.Tool, line)
			case line != "COMMIT":
				fmt.Fprintf(a.Stdout, "  %s -t %s %s\n", l.Tool, table, line)
			}
		}
	}
	if asJSON && !dryRun {
		for _, l := range list {
			if err := removeLeftover(ctx, l); err != nil {
				return err
			}
		}
	}
	left := f.Stays()
	if asJSON {
		return writeJSON(a.Stdout, takeoverResult{DryRun: dryRun, Removed: notNil(list), Left: notNil(left)})
	}
	if len(list) == 0 {
		fmt.Fprintln(a.Stdout, "nothing is left of an Engine that made rules")
	}
	for _, s := range left {
		fmt.Fprintln(a.Stdout, "left alone:", s)
	}
	return nil
}

// takeoverAllowed refuses what would open a network, or take the operator's own rules away.
func takeoverAllowed(f *doctor.Facts, list []doctor.Leftover) error {
	var bridges, own []string
	for _, l := range list {
		if l.InUse {
			who := strings.Join(f.Running(), ", ")
			return fmt.Errorf(`%s makes %s rules; give it "iptables": false and "ip6tables": false in /etc/docker/daemon.json, restart it, and try again`, who, l.Tool)
		}
		bridges = append(bridges, l.Bridges...)
		for _, rule := range l.Own {
			own = append(own, l.Tool+" "+rule)
		}
	}
	if len(list) == 0 {
		return nil
	}
	if !f.Daemon.Running {
		return errors.New("no daemon runs; what these rules close would be open where bpfnet does not serve; start it, and try again")
	}
	if open := f.Unserved(bridges); len(open) > 0 {
		return fmt.Errorf("not served, and without these rules open: %s; see %s status", strings.Join(open, ", "), f.Command)
	}
	if len(own) > 0 {
		return fmt.Errorf("DOCKER-USER has rules of your own, which no packet of a container meets: %s; nothing was changed; move what the host itself needs, and drop them with --drop-docker-user", strings.Join(own, "; "))
	}
	return nil
}

// removeLeftover takes rules away: those of one table all at once.
func removeLeftover(ctx context.Context, l doctor.Leftover) error {
	name, args := l.Tool+"-restore", []string{"--noflush", "--wait=5"}
	if l.Tool == "nft" {
		name, args = "nft", []string{"-f", "-"}
	}
	path := findTool(name)
	if path == "" {
		return fmt.Errorf("%s is not there to remove the rules with", name)
	}
	ctx, cancel := context.WithTimeout(ctx, commandsTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdin = strings.NewReader(strings.Join(l.Remove, "\n") + "\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, oneLine(strings.TrimSpace(string(out))))
	}
	return nil
}
