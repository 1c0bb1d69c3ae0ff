// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/relay"
)

// Status is the output of "bpfnet status -o json".
type Status struct {
	Time        time.Time        `json:"time"`
	Daemon      DaemonStatus     `json:"daemon"`
	Attach      string           `json:"attach"`           // tcx or clsact
	FastPath    float64          `json:"fast_path_share"`  // redirected of all that was not dropped, 0 to 1
	Totals      Totals           `json:"totals"`           // packets since the programs were first loaded
	Networks    int              `json:"networks"`         // served
	Containers  int              `json:"containers"`       // endpoints: one container in one network
	Ports       int              `json:"ports"`            // published
	NotReady    []NotReady       `json:"not_ready"`        // endpoints that nothing reaches yet
	Problems    []api.Problem    `json:"problems"`         // settings that are not served as asked for
	Allowed     []api.Pair       `json:"allowed"`          // networks that may talk
	Relay       *RelayStatus     `json:"relay,omitempty"`  // none: there is nothing to relay
	Shield      *api.Shield      `json:"shield,omitempty"` // none: off
	Sources     []api.Source     `json:"sources"`          // as of the last write of the daemon
	Attachments []api.Attachment `json:"attachments"`      // likewise
	Maps        []maps.Fill      `json:"maps"`             // fill
	// Busiest is the destination towards which most of the masquerade ports are taken; none: no destination is near.
	Busiest  *maps.Busiest `json:"busiest_destination,omitempty"`
	Warnings []string      `json:"warnings"` // what has 80 % of its room taken
}

// DaemonStatus is about the process. A daemon that is down leaves the data path at work.
type DaemonStatus struct {
	Running bool      `json:"running"`
	Error   string    `json:"error,omitempty"` // why it could not be asked
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Written time.Time `json:"written"` // when it last told what it knows
}

// RelayStatus is about the process that serves containers with IPv4 only on IPv6 addresses.
type RelayStatus struct {
	Error   string      `json:"error,omitempty"` // why it could not be asked
	Version string      `json:"version"`
	PID     int         `json:"pid"`
	Active  int         `json:"active"` // clients at work now
	Ports   []RelayPort `json:"ports"`
}

// RelayPort is a port that it serves, with its counters since its socket was bound.
type RelayPort struct {
	Host    string `json:"host"`
	Proto   string `json:"proto"`
	Target  string `json:"target"`
	Active  int    `json:"active"`
	Clients uint64 `json:"clients"`
	Dropped uint64 `json:"dropped"` // beyond a limit
	Failed  uint64 `json:"failed"`  // the container did not answer, or refused
}

// NotReady is an endpoint that the data path does not serve yet.
type NotReady struct {
	Container string `json:"container"`
	Network   string `json:"network"`
	Why       string `json:"why"`
}

func (a *App) statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the daemon, the attached programs and the fill of the maps",
		Long: `Show whether the daemon runs, where its state comes from, how much of the traffic
takes the fast path, what the programs are attached to, and how full their maps
are. Works with the daemon down.`,
		Args: exactArgs(),
	}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		jsonWanted, err := asJSON()
		if err != nil {
			return err
		}
		s, err := a.readStatus(cmd.Context())
		if err != nil {
			return err
		}
		if jsonWanted {
			return writeJSON(a.Stdout, s)
		}
		return a.printStatus(s)
	}
	return cmd
}

// askTimeout: status is asked when something is wrong, and does not wait for a daemon that hangs.
const askTimeout = 2 * time.Second

func (a *App) readStatus(ctx context.Context) (*Status, error) {
	snap, c, err := a.openForReading()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	s := &Status{
		Time: a.Now(), Attach: snap.Attach,
		Networks: len(snap.Networks), Containers: len(snap.Endpoints), Ports: len(snap.Ports),
		NotReady: []NotReady{}, Problems: notNil(snap.Problems), Allowed: notNil(snap.Allowed), Sources: notNil(snap.Sources), Attachments: notNil(snap.Attachments),
		Shield: snap.Shield,
		Daemon: DaemonStatus{Version: snap.Version, PID: snap.PID, Started: snap.Started, Written: snap.Written},
	}
	a.askDaemon(ctx, &s.Daemon)
	s.Relay = a.askRelay()
	fates, err := c.Fates()
	if err != nil {
		return nil, err
	}
	drops, err := c.Drops()
	if err != nil {
		return nil, err
	}
	s.Totals = totals(fates, drops)
	s.FastPath = s.Totals.fastShare()
	if s.Maps, err = c.Fill(); err != nil {
		return nil, err
	}
	s.Maps = notNil(s.Maps)
	busiest, err := c.BusiestDestination(fillWarning)
	if err != nil {
		return nil, err
	}
	if busiest.Ports > 0 {
		s.Busiest = &busiest
	}
	s.Warnings = s.warnings()
	for _, e := range snap.Endpoints {
		if !e.Ready {
			s.NotReady = append(s.NotReady, NotReady{Container: e.Name, Network: e.Network, Why: e.Why})
		}
	}
	return s, nil
}

const fillWarning = 0.80

// consequences are what happens to what comes on top, by map.
var consequences = map[string]string{
	"flows4": "timeouts are shortened, and new flows find no room (flow_table_full); raise --flows",
	"flows6": "timeouts are shortened, and new flows find no room (flow_table_full); raise --flows",
	"syns4":  "connections that their clients have not confirmed push out the oldest of them: a flood?",
	"syns6":  "connections that their clients have not confirmed push out the oldest of them: a flood?",
	"frags":  "fragments push out the oldest, whose datagrams are lost (fragment_not_found): a flood?",
}

// warnings are about all that has fillWarning of its room taken, in the order of the maps.
func (s *Status) warnings() []string {
	out := []string{}
	for _, m := range s.Maps {
		if m.Max > 0 && float64(m.Entries) >= fillWarning*float64(m.Max) {
			what := cmp.Or(consequences[m.Map], "what comes on top is not served")
			out = append(out, fmt.Sprintf("%s: %s taken (%d of %d); from there on %s", m.Map, percent(m.Entries, m.Max), m.Entries, m.Max, what))
		}
	}
	if b := s.Busiest; b != nil {
		out = append(out, fmt.Sprintf("masquerade ports towards %s %s: %s taken (%d of %d); from there on new flows to it are refused (snat_exhausted)",
			b.Proto, b.To, percent(b.Ports, b.Max), b.Ports, b.Max))
	}
	return out
}

// notNil makes an empty list of nil, which JSON would show as null.
func notNil[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// askDaemon asks who listens on the socket.
func (a *App) askDaemon(ctx context.Context, d *DaemonStatus) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	client, err := api.Dial(ctx, a.paths.Socket)
	if errors.Is(err, api.ErrNotRunning) {
		return
	}
	var st api.Status
	if err == nil {
		st, err = client.Status(ctx)
	}
	switch {
	case err != nil:
		d.Error = oneLine(err.Error())
	case st.PID != d.PID:
		d.Error = fmt.Sprintf("process %d listens on %s, but process %d wrote %s; do --socket and --state belong together?",
			st.PID, a.paths.Socket, d.PID, a.paths.State)
	default:
		d.Running = true
	}
}

// askRelay asks the relay itself: it runs on without the daemon.
func (a *App) askRelay() *RelayStatus {
	st, err := relay.Ask(a.paths.State)
	if err != nil {
		return &RelayStatus{Error: oneLine(err.Error()), Ports: []RelayPort{}}
	}
	if st == nil {
		return nil
	}
	out := &RelayStatus{Version: st.Version, PID: st.PID, Active: st.Active, Ports: []RelayPort{}}
	for _, p := range st.Ports {
		out.Ports = append(out.Ports, RelayPort{
			Host: p.Host.String(), Proto: p.Proto.String(), Target: p.Target.String(),
			Active: p.Active, Clients: p.Clients, Dropped: p.Dropped, Failed: p.Failed,
		})
	}
	return out
}

func (a *App) printStatus(s *Status) error {
	var lines [][2]string
	line := func(title, format string, args ...any) {
		lines = append(lines, [2]string{title, fmt.Sprintf(format, args...)})
	}
	switch {
	case s.Daemon.Running:
		line("Daemon", "running for %s, version %s, process %d", s.since(s.Daemon.Started), s.Daemon.Version, s.Daemon.PID)
	case s.Daemon.Error != "":
		line("Daemon", "unknown: %s", s.Daemon.Error)
	default:
		line("Daemon", "not running, last news %s ago; the network runs on without it", s.since(s.Daemon.Written))
	}
	for _, src := range s.Sources {
		text := "connected"
		if !src.Connected {
			text = "not connected"
		}
		if !s.Daemon.Running {
			text = "was " + text
		}
		if src.Detail != "" {
			text += ", " + src.Detail
		}
		if !src.LastSync.IsZero() {
			text += ", read " + s.since(src.LastSync) + " ago"
		}
		line("Source "+src.Name, "%s", text)
	}
	for _, w := range s.Warnings {
		line("Warning", "%s", w)
	}
	line("Serves", "%s, %s, %s", count(s.Networks, "network"), count(s.Containers, "endpoint"), count(s.Ports, "published port"))
	t := s.Totals
	line("Fast path", "%.1f %% of the packets (redirected %d, stack %d, bridge %d), dropped %d",
		100*s.FastPath, t.Redirected.Packets, t.Stack.Packets, t.Bridge.Packets, t.Dropped.Packets)
	for _, p := range s.Allowed {
		line("Allowed", "%s and %s", p.A, p.B)
	}
	line("Attached by", "%s", s.Attach)
	if r := s.Relay; r != nil && r.Error != "" {
		line("Relay", "unknown: %s", r.Error)
	} else if r != nil {
		line("Relay", "%s, %s, process %d", count(len(r.Ports), "port"), count(r.Active, "client"), r.PID)
	}

	if s.Shield != nil {
		line("Shield", "%s", shieldLine(s.Shield))
	}

	width := 0
	for _, l := range lines {
		width = max(width, len(l[0]))
	}
	for _, l := range lines {
		fmt.Fprintf(a.Stdout, "%-*s   %s\n", width+1, l[0]+":", l[1])
	}

	var shield [][]string
	if s.Shield != nil {
		shield = shieldRows(s.Shield.Devices)
	}
	var notReady, problems, attachments, fill, relays [][]string
	if s.Relay != nil {
		for _, p := range s.Relay.Ports {
			relays = append(relays, []string{p.Host + "/" + p.Proto, p.Target, strconv.Itoa(p.Active),
				strconv.FormatUint(p.Clients, 10), strconv.FormatUint(p.Dropped, 10), strconv.FormatUint(p.Failed, 10)})
		}
	}
	for _, p := range s.Problems {
		problems = append(problems, []string{p.Setting, cmp.Or(p.Network, "-"), p.Problem + "; " + p.Instead})
	}
	for _, n := range s.NotReady {
		notReady = append(notReady, []string{n.Container, n.Network, n.Why})
	}
	for _, at := range s.Attachments {
		attachments = append(attachments, []string{at.Device, at.Hook, at.Program})
	}
	for _, m := range s.Maps {
		fill = append(fill, []string{m.Map, strconv.Itoa(m.Entries), strconv.Itoa(m.Max), percent(m.Entries, m.Max)})
	}
	for _, b := range []struct {
		header []string
		rows   [][]string
	}{
		{[]string{"NOT READY", "NETWORK", "WHY"}, notReady},
		{[]string{"PROBLEM WITH", "NETWORK", "WHAT"}, problems},
		{[]string{"RELAYED", "TO", "ACTIVE", "CLIENTS", "DROPPED", "FAILED"}, relays},
		{[]string{"UPLINK", "SHIELD"}, shield},
		{[]string{"DEVICE", "HOOK", "PROGRAM"}, attachments},
		{[]string{"MAP", "ENTRIES", "ROOM", "FILL"}, fill},
	} {
		if len(b.rows) == 0 {
			continue
		}
		fmt.Fprintln(a.Stdout)
		if err := table(a.Stdout, b.header, b.rows); err != nil {
			return err
		}
	}
	return nil
}

// since is the age of t in words: "5 minutes".
func (s *Status) since(t time.Time) string {
	return strings.ToLower(units.HumanDuration(s.Time.Sub(t)))
}

func count(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

func percent(n, of int) string {
	if of == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f %%", 100*float64(n)/float64(of))
}
