// SPDX-License-Identifier: Apache-2.0

// Package doctor judges whether a host lets bpfnet's data path do its work. It is given facts and says
// what they mean: which of them break traffic, which are only worth knowing, and what mends each. It
// gathers nothing, runs nothing and changes nothing.
//
// What counts as broken is measured by the packets that really meet an obstacle: those that the programs
// redirect pass neither netfilter, nor the host's routing, nor rp_filter. What Docker's own rules would
// have left to the operator (the INPUT chain for a container's way to the host) is no fault either.
package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// State is how bad a finding is.
type State string

// The states. Only Broken makes the exit status 1.
const (
	OK      State = "ok"
	Note    State = "note"    // worth knowing; all traffic flows
	Broken  State = "broken"  // some traffic does not, or will not
	Unknown State = "unknown" // it could not be looked at
)

// Finding is the outcome of one check, or of one part of it.
type Finding struct {
	Check  string `json:"check"`
	State  State  `json:"state"`
	Detail string `json:"detail"`
	// Fix is the command that mends it; empty where there is nothing to mend.
	Fix string `json:"fix"`
}

// Facts are what the checks look at.
type Facts struct {
	Now     time.Time
	Version string // of this binary
	Command string // that runs it, for fixes: "bpfnet"
	Flags   []string
	// Failed says what could not be gathered, by check.
	Failed map[string]error

	Release  string // of the kernel
	LoadErr  error  // of loading the programs
	Features []loader.Feature
	Memcg    bool   // memory of programs counts against cgroups
	Memlock  uint64 // this process's limit, bytes
	// DestroyErr says that the kernel cannot end the host's sockets to containers that are gone.
	DestroyErr error

	BPFFS        string // pin directory
	BPFFSNearest string // nearest directory to it that exists
	BPFFSMounted bool
	Cgroup       string
	CgroupErr    error // there is none
	IPv6         bool

	Daemon      Daemon
	Snapshot    *api.Snapshot // nil: no daemon has written one
	SnapshotErr error         // it cannot be read
	StateErr    error         // of the state file
	Fill        []maps.Fill

	Devices        []netdev.Device
	Seen           policy.Devices // as the daemon sorts them
	Told           []string       // the devices that --uplink names; none: uplinks are those found
	LeftOut        []policy.Uplink
	PeerMTU        map[int]int // of the far ends of bridge ports, by the near end's index; bytes
	Hooks          map[HookKey][]Entry
	Pins           []loader.Pin
	LinkPins       map[uint32]string  // of all links pinned on this host, by ID
	LinkHolders    map[uint32]Process // of foreign links that nothing pins
	CgroupPrograms []string
	XDP            map[uint32]loader.Program // by ID

	Sysctls  map[string]string // by path below /proc/sys
	Routes4  []string          // devices of IPv4 default routes
	Routes6  []netdev.DefaultRoute6
	Local    netdev.PortRange
	Reserved []netdev.PortRange
	SNAT     []netdev.PortRange // that the data path masquerades with; none: not loaded

	Rules   Ruleset
	Engines []Engine
	// EngineBridges are the bridges of the networks that Engines tell of.
	EngineBridges []string
	Proxies       []Process // docker-proxy of an Engine's own
	Sockets       []Socket
	// SocketsErr says why some of those that only hold a port could not be seen.
	SocketsErr error

	// Suspects are the things that an earlier look found amiss, as Judge left them in Suspected. Others
	// of what comes and goes with containers are then passed over: they are about to be something.
	// Nil: there was no earlier look.
	Suspects  map[string]bool
	Suspected map[string]bool
}

// Daemon is bpfnet's own.
type Daemon struct {
	Running bool
	Stopped int   // process ID, where a signal has stopped it
	Err     error // something is wrong with the socket; nil and not running: nothing listens there
	Status  api.Status
	Args    []string // its command line
	Unit    string   // of systemd that it runs in, or would run in
}

// Process is a running program.
type Process struct {
	PID  int
	Name string
}

// HookKey names a hook of a device.
type HookKey struct {
	Ifindex int
	Egress  bool
}

// Entry is a program or filter at a hook. Tcx comes before clsact.
type Entry struct {
	Program loader.Program
	Filter  *netdev.Filter // nil: tcx
	Own     bool           // this instance's: its pin is there
}

// Socket is one that is bound in the host's namespace.
type Socket struct {
	Proto   policy.Proto
	Addr    netip.AddrPort
	Process Process // zero: not known
}

// Judge runs all checks. It writes f.Suspected, and nothing else.
func Judge(f *Facts) []Finding {
	var out []Finding
	for _, check := range []struct {
		name string
		run  func(*Facts) []Finding
	}{
		{"kernel", checkKernel},
		{"bpffs", checkBPFFS},
		{"cgroup", checkCgroup},
		{"memlock", checkMemlock},
		{"ipv6", checkIPv6},
		{"daemon", checkDaemon},
		{"state", checkState},
		{"endpoints", checkEndpoints},
		{"maps", checkMaps},
		{"attached", checkAttached},
		{"unguarded", checkUnguarded},
		{"strays", checkStrays},
		{"foreign", checkForeign},
		{"xdp", checkXDP},
		{"shield", checkShield},
		{"uplinks", checkLeftOut},
		{"mtu", checkMTU},
		{"forwarding", checkForwarding},
		{"rp_filter", checkReversePath},
		{"accept_ra", checkRouterAdverts},
		{"loopback", checkLoopback},
		{"port range", checkPortRange},
		{"firewall", checkFirewall},
		{"bridge netfilter", checkBridgeNetfilter},
		{"engine", checkEngine},
		{"leftovers", checkLeftovers},
		{"docker-proxy", checkProxies},
		{"reservations", checkReservations},
		{"swarm", checkSwarm},
	} {
		list := []Finding{}
		if err := f.Failed[check.name]; err != nil {
			list = append(list, Finding{State: Unknown, Detail: oneLine(err.Error())})
		} else {
			list = check.run(f)
		}
		for _, x := range list {
			x.Check = check.name
			out = append(out, x)
		}
	}
	return out
}

// AnyBroken reports whether something would break traffic.
func AnyBroken(list []Finding) bool {
	return slices.ContainsFunc(list, func(x Finding) bool { return x.State == Broken })
}

func okf(format string, args ...any) Finding {
	return Finding{State: OK, Detail: fmt.Sprintf(format, args...)}
}

func notef(fix, format string, args ...any) Finding {
	return Finding{State: Note, Detail: fmt.Sprintf(format, args...), Fix: fix}
}

func brokenf(fix, format string, args ...any) Finding {
	return Finding{State: Broken, Detail: fmt.Sprintf(format, args...), Fix: fix}
}

func unknownf(format string, args ...any) Finding {
	return Finding{State: Unknown, Detail: fmt.Sprintf(format, args...)}
}

// one returns the findings, or that all is well if there are none.
func one(list []Finding, format string, args ...any) []Finding {
	if len(list) == 0 {
		return []Finding{okf(format, args...)}
	}
	return list
}

func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

// some lists a few names, and says how many more there are.
func some(names []string) string {
	const most = 4
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// Quote makes a word of the shell's.
func Quote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-+./:=@%,", r)
	}
	if s != "" && strings.TrimFunc(s, plain) == "" && !strings.ContainsFunc(s, func(r rune) bool { return !plain(r) }) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func commandLine(words ...string) string {
	quoted := make([]string, 0, len(words))
	for _, w := range words {
		quoted = append(quoted, Quote(w))
	}
	return strings.Join(quoted, " ")
}

// both joins commands that are to be run one after another, each once.
func both(commands []string) string {
	var out []string
	for _, c := range commands {
		if c != "" && !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	return strings.Join(out, " && ")
}

// ours is a command of this binary against this instance.
func (f *Facts) ours(words ...string) string {
	return commandLine(append(append([]string{f.Command}, words...), f.Flags...)...)
}

// startDaemon is the command that starts the daemon, or starts it anew. more are added to its options.
func (f *Facts) startDaemon(more ...string) string {
	switch d := f.Daemon; {
	case d.Stopped != 0:
		return commandLine("kill", "-CONT", fmt.Sprint(d.Stopped))
	case d.Unit != "" && d.Running && len(more) == 0:
		return commandLine("systemctl", "restart", d.Unit)
	case d.Unit != "" && !d.Running:
		return commandLine("systemctl", "start", d.Unit)
	case d.Running && len(d.Args) > 0:
		pid := fmt.Sprint(d.Status.PID)
		return both([]string{
			commandLine("kill", pid), commandLine("tail", "--pid="+pid, "-f", "/dev/null"), commandLine(append(d.Args[:len(d.Args):len(d.Args)], more...)...),
		})
	}
	words := append([]string{"daemon"}, more...)
	if s := f.Snapshot; s != nil && !slices.ContainsFunc(s.Sources, func(s api.Source) bool { return s.Name == "docker" }) {
		words = append(words, "--docker", "off")
	}
	return f.ours(words...)
}

// bridge is one that is served, or would be.
type bridge struct {
	name     string
	networks []string
	v4, v6   netip.Prefix // the host's address there; invalid: none
	internal bool
}

// bridges are those of the snapshot's networks; before any daemon has run, those that Docker made.
func (f *Facts) bridges() []bridge {
	var out []bridge
	for _, b := range f.Seen.Bridges {
		n := f.network(b.Name)
		if n == nil && (f.Snapshot != nil || !dockerDevice(b.Name)) {
			continue
		}
		row := bridge{name: b.Name}
		if n != nil {
			row.networks, row.internal = []string{n.Name}, n.Internal
		}
		for _, p := range b.Addrs {
			switch a := p.Addr(); {
			case a.Is4() && !row.v4.IsValid():
				row.v4 = p
			case a.Is6() && !a.IsLinkLocalUnicast() && !row.v6.IsValid():
				row.v6 = p
			}
		}
		out = append(out, row)
	}
	return out
}

func (f *Facts) network(bridge string) *api.Network {
	if f.Snapshot == nil {
		return nil
	}
	for i := range f.Snapshot.Networks {
		if n := &f.Snapshot.Networks[i]; n.Bridge == bridge {
			return n
		}
	}
	return nil
}

// endpoint is the one whose host side is this device.
func (f *Facts) endpoint(link string) *api.Endpoint {
	if f.Snapshot == nil {
		return nil
	}
	for i := range f.Snapshot.Endpoints {
		if e := &f.Snapshot.Endpoints[i]; e.Link == link {
			return e
		}
	}
	return nil
}

// dockerDevice reports whether a device has a name that the Engine gives to its bridges.
func dockerDevice(name string) bool {
	hex, ok := strings.CutPrefix(name, "br-")
	return name == "docker0" || name == "docker_gwbridge" ||
		ok && len(hex) == 12 && strings.Trim(hex, "0123456789abcdef") == ""
}

func names(list []bridge) []string {
	var out []string
	for _, b := range list {
		out = append(out, b.name)
	}
	return out
}

// device finds one by its name.
func (f *Facts) device(name string) *netdev.Device {
	for i := range f.Devices {
		if f.Devices[i].Name == name {
			return &f.Devices[i]
		}
	}
	return nil
}

// suspect notes that a thing is amiss, and reports whether to say so.
func (f *Facts) suspect(format string, args ...any) bool {
	key := fmt.Sprintf(format, args...)
	if f.Suspected == nil {
		f.Suspected = make(map[string]bool)
	}
	f.Suspected[key] = true
	return f.Suspects == nil || f.Suspects[key]
}
