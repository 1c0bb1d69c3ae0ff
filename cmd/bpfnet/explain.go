// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/loader"
)

func (a *App) explainCommand() *cobra.Command {
	var q api.Question
	var source string
	cmd := &cobra.Command{
		Use:   "explain --from WHO --to WHO [--port PORT] [flags]",
		Short: "Say what becomes of a connection, and why, without making one",
		Long: `Say what becomes of the first packet of a connection, and why: which networks,
published port and translation apply, which path it takes, and under which reason it
is dropped. WHO is a container (CONTAINER:NETWORK where it has several), an address,
or "host". Without --port it is a ping.

There are two accounts. Policy is what the daemon has compiled from what it was told.
The data path is the programs that are on the devices: they are run on a made-up
packet and on the live maps, which are only read; nothing is sent or counted. Where
the two contradict each other, one of them is wrong: that is said, with exit status 3.
What sockets of the host dial is explained by policy alone.`,
		Example: `  bpfnet explain --from web --to db --port 5432
  bpfnet explain --from 203.0.113.9 --to 192.0.2.1 --port 8080
  bpfnet explain --from web:frontend --to 203.0.113.9 --proto udp --port 53 -o json`,
		Args: exactArgs(),
	}
	asJSON := outputFlag(cmd)
	flags := cmd.Flags()
	flags.StringVar(&q.From, "from", "", "`who` sends: a container, an address, or host")
	flags.StringVar(&q.To, "to", "", "`whom`: a container, an address, or host")
	flags.StringVar(&q.Proto, "proto", "", "`protocol`: tcp, udp, sctp or icmp (default: tcp with --port, else icmp)")
	flags.Uint16Var(&q.Port, "port", 0, "`port` that is dialled")
	flags.StringVar(&source, "source", "", "`address` that the container claims to send from (default: its own)")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		if err := checkQuestion(&q, source, flags.Changed("port")); err != nil {
			return err
		}
		client, err := api.Dial(cmd.Context(), a.paths.Socket)
		if err != nil {
			return err
		}
		e, err := client.Explain(cmd.Context(), q)
		if err != nil {
			return err
		}
		if wantJSON {
			err = writeJSON(a.Stdout, e)
		} else {
			err = a.printExplanation(e)
		}
		if err == nil && e.Disagree != "" {
			err = &exitError{statusDisagree, fmt.Errorf("the two accounts contradict each other: %s; please report it with this output by -o json and that of \"bpfnet status\"", e.Disagree)}
		}
		return err
	}
	return cmd
}

// checkQuestion refuses what needs no daemon to be seen to be wrong.
func checkQuestion(q *api.Question, source string, hasPort bool) error {
	var missing []string
	if q.From == "" {
		missing = append(missing, "--from")
	}
	if q.To == "" {
		missing = append(missing, "--to")
	}
	if len(missing) > 0 {
		return usagef("missing %s: a container, an address, or \"host\"", strings.Join(missing, " and "))
	}
	if hasPort && q.Port == 0 {
		return usagef("--port 0: want one from 1 to 65535")
	}
	switch q.Proto {
	case "", "icmp":
		if q.Proto == "icmp" && hasPort {
			return usagef("--port: icmp has none; leave it out, or say --proto tcp")
		}
	case "tcp", "udp", "sctp":
		if !hasPort {
			return usagef("--proto %s: which port? Say it with --port", q.Proto)
		}
	default:
		return usagef("--proto %q: want tcp, udp, sctp or icmp", q.Proto)
	}
	if source == "" {
		return nil
	}
	addr, err := netip.ParseAddr(source)
	if err != nil {
		return usagef("--source %q: want an address", source)
	}
	q.Source = addr
	return nil
}

func (a *App) printExplanation(e api.Explanation) error {
	var out strings.Builder
	line := func(label, format string, args ...any) {
		fmt.Fprintf(&out, "%-10s %s\n", label, fmt.Sprintf(format, args...))
	}
	line("From", "%s", sideText(e.From))
	line("To", "%s", sideText(e.To))
	line("Packet", "%s %s > %s", e.Proto, e.Sent.From, e.Sent.To)
	if p := e.Port; p != nil {
		line("Port", "%s->%s/%s of %s in network %s", p.Host, p.Target, p.Proto, p.Container, p.Network)
	}
	fmt.Fprintln(&out)
	for i, step := range e.Policy.Steps {
		line(map[bool]string{true: "Policy"}[i == 0], "%s", step)
	}
	switch d := e.DataPath; {
	case d == nil:
		line("Data path", "not asked: %s", e.Why)
	case slices.Equal(d.Programs, []string{loader.ToContainer}) && d.Path != "dropped":
		line("Data path", "%s: let in", strings.Join(d.Programs, ", "))
	default:
		line("Data path", "%s: %s", strings.Join(d.Programs, ", "), pathText(d.Path, d.Reason))
	}
	fmt.Fprintln(&out)
	line("Verdict", "%s", verdictText(e))
	if e.Disagree != "" {
		line("", "CONTRADICTION: %s", e.Disagree)
	}
	_, err := a.Stdout.Write([]byte(out.String()))
	return err
}

func sideText(s api.Side) string {
	var text string
	switch s.Kind {
	case "container":
		text = fmt.Sprintf("%s (%s) in network %s", s.Name, s.Addr, s.Network)
	case "host":
		text = fmt.Sprintf("the host (%s)", s.Addr)
	case "nobody":
		text = fmt.Sprintf("%s in network %s, which no container has", s.Addr, s.Network)
	default:
		text = fmt.Sprintf("%s, outside", s.Addr)
	}
	if s.Device != "" {
		text += ", by " + s.Device
	}
	return text
}

var pathTexts = map[string]string{
	"container": "straight to the container", "uplink": "straight out of the uplink", "stack": "left to the host's stack",
	"bridge": "left to the bridge", "host": "none of bpfnet's",
}

func pathText(path, reason string) string {
	if path == "dropped" {
		return "dropped as " + reason
	}
	return cmp.Or(pathTexts[path], path)
}

func verdictText(e api.Explanation) string {
	receiver := e.Received.To
	switch {
	case e.Port != nil:
		receiver = e.Port.Container + " at " + receiver
	case e.To.Kind == "container":
		receiver = e.To.Name + " at " + receiver
	}
	as := ""
	if e.Received.From != e.Sent.From && e.Received.From != "" {
		as = "; the sender it sees is " + e.Received.From
	}
	switch e.Path {
	case "dropped":
		if e.DataPath != nil && e.DataPath.ByState {
			return "dropped as " + e.Reason + ", just now: policy would let it go"
		}
		return "dropped as " + e.Reason
	case "container":
		return "reaches " + receiver + " by the fast path" + as
	case "uplink":
		if as != "" {
			as = ", as " + e.Received.From
		}
		return fmt.Sprintf("leaves for %s by %s by the fast path%s", receiver, cmp.Or(e.To.Device, "an uplink"), as)
	case "socket":
		return "reaches " + receiver + " by the host's stack" + as
	case "stack":
		if e.To.Kind == "container" {
			return "goes to " + receiver + " by the host's stack"
		}
		return "is left to the host's stack: whether anybody answers is the host's business"
	case "bridge":
		return "is left to the bridge, which looks for " + receiver
	}
	return "is none of bpfnet's: the host's stack has it"
}
