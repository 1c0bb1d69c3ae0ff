// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/sandbox"
)

// SandboxRow is an entry of the output of "bpfnet ps -o json". Of Docker's containers, only what their
// networks tell is known.
type SandboxRow struct {
	ID       string          `json:"id"`
	Name     string          `json:"name"`
	Source   string          `json:"source"` // "bpfnet" or "docker"
	Status   string          `json:"status"` // "created", "running", "exited", "dead" or "unknown"
	Command  []string        `json:"command,omitempty"`
	Created  time.Time       `json:"created,omitzero"`
	Started  time.Time       `json:"started,omitzero"`
	Ended    time.Time       `json:"ended,omitzero"`
	PID      int             `json:"pid,omitempty"`
	ExitCode *int            `json:"exit_code,omitempty"` // missing: it has not ended, or nobody saw how
	Why      string          `json:"why,omitempty"`       // it ended otherwise than by itself
	Mode     string          `json:"mode,omitempty"`      // "host", "none" or "container"
	Networks []string        `json:"networks"`
	Ports    []PublishedPort `json:"ports"`

	dir string // of its files
}

// PublishedPort is an entry of the output of "bpfnet port -o json".
type PublishedPort struct {
	Port  uint16         `json:"port"` // in the sandbox
	Proto string         `json:"proto"`
	Host  netip.AddrPort `json:"host"`
}

func (p PublishedPort) target() string { return fmt.Sprintf("%d/%s", p.Port, p.Proto) }

// What ps finds out besides the states that the daemon knows.
const (
	statusDead    = "dead"    // the daemon, which is down, has not seen its end
	statusUnknown = "unknown" // Docker's, and its interfaces are gone
)

func alive(pid int, startTime uint64) bool {
	id, err := sandbox.Identify(pid)
	return err == nil && id.StartTime == startTime && id.Alive()
}

func hasLink(ifindex int) bool {
	_, err := net.InterfaceByIndex(ifindex)
	return err == nil
}

// sandboxes lists all that a name may mean: bpfnet's own, the newest first, then Docker's containers
// by name.
func (a *App) sandboxes(snap *api.Snapshot) ([]SandboxRow, error) {
	var own, docker []SandboxRow
	for _, s := range snap.Sandboxes {
		row := SandboxRow{
			ID: s.ID, Name: s.Name, Source: sourceOwn, Status: s.Status, Command: s.Command, Created: s.Created,
			Started: s.Started, Ended: s.Ended, PID: s.PID, ExitCode: s.ExitCode, Why: s.Why, Mode: s.Mode,
			Networks: notNil(s.Networks), dir: s.Dir,
		}
		if s.Status == api.StatusRunning && !a.Alive(s.PID, s.StartTime) {
			row.Status, row.PID = statusDead, 0
		}
		own = append(own, row)
	}
	slices.SortStableFunc(own, func(x, y SandboxRow) int { return y.Created.Compare(x.Created) })
	at := make(map[string]int)
	for _, e := range snap.Endpoints {
		if e.Source != sourceDocker {
			continue
		}
		i, known := at[e.SandboxID]
		if !known {
			i = len(docker)
			at[e.SandboxID] = i
			docker = append(docker, SandboxRow{ID: e.SandboxID, Name: e.Name, Source: sourceDocker, Status: statusUnknown})
		}
		docker[i].Networks = append(docker[i].Networks, e.Network)
		if e.Ready && a.HasLink(e.Ifindex) {
			docker[i].Status = api.StatusRunning
		}
	}
	slices.SortStableFunc(docker, func(x, y SandboxRow) int { return cmp.Compare(x.Name, y.Name) })
	all := append(own, docker...)
	for i := range all {
		var err error
		if all[i].Ports, err = portsOf(snap, all[i].ID); err != nil {
			return nil, err
		}
		if all[i].Status == statusDead {
			all[i].Ports = []PublishedPort{}
		}
	}
	return all, nil
}

// portsOf lists the published ports of a sandbox: by its port, then by the host's.
func portsOf(snap *api.Snapshot, id string) ([]PublishedPort, error) {
	out := []PublishedPort{}
	for _, p := range snap.Ports {
		if p.SandboxID != id {
			continue
		}
		target, err := netip.ParseAddrPort(p.Target)
		if err != nil {
			return nil, fmt.Errorf("port %s: read snapshot: %w", p.Host, err)
		}
		host, err := netip.ParseAddrPort(p.Host)
		if err != nil {
			return nil, fmt.Errorf("port %s: read snapshot: %w", p.Host, err)
		}
		out = append(out, PublishedPort{Port: target.Port(), Proto: p.Proto, Host: host})
	}
	slices.SortFunc(out, func(x, y PublishedPort) int {
		return cmp.Or(cmp.Compare(x.Port, y.Port), cmp.Compare(x.Proto, y.Proto),
			cmp.Compare(x.Host.Port(), y.Host.Port()), x.Host.Addr().Compare(y.Host.Addr()))
	})
	return slices.Compact(out), nil
}

// folded words ports as docker ps does: those that follow each other on both sides as one range.
func folded(ports []PublishedPort) string {
	ports = slices.Clone(ports)
	slices.SortStableFunc(ports, func(x, y PublishedPort) int {
		return cmp.Or(x.Host.Addr().Compare(y.Host.Addr()), cmp.Compare(x.Proto, y.Proto))
	})
	var words []string
	for len(ports) > 0 {
		first, n := ports[0], 1
		for n < len(ports) && ports[n].follows(first, n) {
			n++
		}
		host, target := first.Host.String(), strconv.Itoa(int(first.Port))
		if n > 1 {
			host += fmt.Sprintf("-%d", ports[n-1].Host.Port())
			target += fmt.Sprintf("-%d", ports[n-1].Port)
		}
		words = append(words, host+"->"+target+"/"+first.Proto)
		ports = ports[n:]
	}
	return strings.Join(words, ", ")
}

// follows says whether p is the nth after another.
func (p PublishedPort) follows(q PublishedPort, n int) bool {
	return p.Proto == q.Proto && p.Host.Addr() == q.Host.Addr() &&
		int(p.Port) == int(q.Port)+n && int(p.Host.Port()) == int(q.Host.Port())+n
}

func (a *App) findSandbox(rows []SandboxRow, word string) (SandboxRow, error) {
	var names []named
	for _, r := range rows {
		names = append(names, named{r.Source, r.Name, r.ID})
	}
	i, err := find("sandbox", word, names)
	if err != nil {
		return SandboxRow{}, err
	}
	return rows[i], nil
}

// readSandbox finds a sandbox by what the command line calls it.
func (a *App) readSandbox(word string) (SandboxRow, error) {
	snap, err := a.readSnapshot()
	if err != nil {
		return SandboxRow{}, err
	}
	rows, err := a.sandboxes(snap)
	if err != nil {
		return SandboxRow{}, err
	}
	return a.findSandbox(rows, word)
}

func (a *App) psCommand() *cobra.Command {
	var (
		list listFlags
		all  bool
	)
	cmd := &cobra.Command{
		Use:   "ps",
		Short: "List sandboxes",
		Long: `List the sandboxes that run, and the containers of Docker that are served; with -a,
those too that were created only or have ended. Works with the daemon down: one
whose process has ended meanwhile is dead.`,
		Example: `  bpfnet ps
  bpfnet ps -a -o json`,
		Args: exactArgs(),
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "list those that do not run, too")
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
		rows, err := a.sandboxes(snap)
		if err != nil {
			return err
		}
		if !all {
			rows = slices.DeleteFunc(rows, func(r SandboxRow) bool {
				return r.Status == api.StatusCreated || r.Status == api.StatusExited
			})
		}
		if wantJSON {
			return writeJSON(a.Stdout, notNil(rows))
		}
		return a.printSandboxes(rows, &list)
	}
	return cmd
}

func (a *App) printSandboxes(rows []SandboxRow, list *listFlags) error {
	header := []string{"SANDBOX ID", "NAME", "SOURCE", "COMMAND", "CREATED", "STATUS", "PORTS"}
	return printRows(a, list, header, rows, func(r SandboxRow) []string {
		return []string{
			list.id(r.ID), r.Name, r.Source, r.command(list.noTrunc), a.ago(r.Created), a.statusText(r), folded(r.Ports),
		}
	})
}

// commandWidth is what Docker shows of a command.
const commandWidth = 20

func (r SandboxRow) command(whole bool) string {
	if len(r.Command) == 0 {
		return ""
	}
	text := []rune(strings.Join(r.Command, " "))
	if !whole && len(text) > commandWidth {
		text = append(text[:commandWidth-1], '…')
	}
	return strconv.Quote(string(text))
}

// ago is empty for a time that is not known.
func (a *App) ago(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return units.HumanDuration(a.Now().Sub(t)) + " ago"
}

// statusText is the status as Docker words it.
func (a *App) statusText(r SandboxRow) string {
	switch r.Status {
	case api.StatusCreated:
		return "Created"
	case api.StatusRunning:
		if r.Started.IsZero() {
			return "Up"
		}
		return "Up " + units.HumanDuration(a.Now().Sub(r.Started))
	case api.StatusExited:
		code := "unknown"
		if r.ExitCode != nil {
			code = strconv.Itoa(*r.ExitCode)
		}
		text := strings.TrimSpace(fmt.Sprintf("Exited (%s) %s", code, a.ago(r.Ended)))
		if r.ExitCode == nil && r.Why != "" {
			text += ": " + r.Why
		}
		return text
	case statusDead:
		return "Dead"
	}
	return "Unknown"
}

func (a *App) portCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "port NAME [PORT[/PROTO]]",
		Short: "Show where the ports of a sandbox are published",
		Long: `Show where the ports of a sandbox, or of a container of Docker, are published on
this host; with a PORT, of that one only. Works with the daemon down.`,
		Example: `  bpfnet port web
  bpfnet port web 8000/tcp`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case len(args) == 0:
				return usagef("missing NAME")
			case len(args) > 2:
				return usagef("unexpected argument %q", args[2])
			}
			return nil
		},
	}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		wantJSON, err := asJSON()
		if err != nil {
			return err
		}
		r, err := a.readSandbox(args[0])
		if err != nil {
			return err
		}
		ports := r.Ports
		if len(args) == 2 {
			if ports, err = r.publishedAt(args[1]); err != nil {
				return err
			}
		}
		if wantJSON {
			return writeJSON(a.Stdout, ports)
		}
		for _, p := range ports {
			line := p.Host.String()
			if len(args) == 1 {
				line = p.target() + " -> " + line
			}
			if _, err := fmt.Fprintln(a.Stdout, line); err != nil {
				return err
			}
		}
		return nil
	}
	return cmd
}

// publishedAt picks the places of one port, written PORT or PORT/PROTO.
func (r SandboxRow) publishedAt(word string) ([]PublishedPort, error) {
	specs, err := parseExposed("port", []string{word})
	if err != nil {
		return nil, err
	}
	if len(specs) != 1 {
		return nil, fmt.Errorf("port %q: want one port", word)
	}
	wanted := PublishedPort{Port: specs[0].Target, Proto: specs[0].Proto}
	var out []PublishedPort
	var have []string
	for _, p := range r.Ports {
		if p.target() == wanted.target() {
			out = append(out, p)
		}
		have = append(have, p.target())
	}
	if len(out) > 0 {
		return out, nil
	}
	if len(have) == 0 {
		return nil, fmt.Errorf("sandbox %q: port %s is not published; none of its ports is", r.Name, wanted.target())
	}
	return nil, fmt.Errorf("sandbox %q: port %s is not published; published are %s", r.Name, wanted.target(), strings.Join(slices.Compact(have), ", "))
}
