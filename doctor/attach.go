// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/netdev"
)

// What programs return to TC and XDP (linux/pkt_cls.h, linux/bpf.h).
const (
	tcPass     = 0
	tcDrop     = 2
	tcStolen   = 4
	tcRedirect = 7
	tcTrap     = 8

	xdpPass = 2
)

func direction(egress bool) string {
	if egress {
		return "egress"
	}
	return "ingress"
}

func hookOf(attachment string) bool { return attachment == "egress" }

// findOurs looks for a program of ours at a hook; the index is the place in the order, -1 if it is
// not there.
func findOurs(list []Entry, program string) int {
	return slices.IndexFunc(list, func(e Entry) bool { return e.Program.Ours == program })
}

func checkAttached(f *Facts) []Finding {
	s := f.Snapshot
	if s == nil {
		return []Finding{okf("nothing is attached yet")}
	}
	missing := make(map[string][]string) // devices by program
	var order []string
	var loose []string
	count := 0
	for _, a := range s.Attachments {
		if a.Hook == "cgroup" {
			count++
			if !slices.Contains(f.CgroupPrograms, a.Program) {
				missing[a.Program] = append(missing[a.Program], a.Device)
				order = append(order, a.Program)
			}
			continue
		}
		if a.Hook == "xdp" {
			continue // see checkShield
		}
		dev := f.device(a.Device)
		if dev == nil {
			continue // gone with its container
		}
		count++
		list := f.Hooks[HookKey{dev.Ifindex, hookOf(a.Hook)}]
		switch i := findOurs(list, a.Program); {
		case i < 0 && !f.suspect("%s %d", a.Program, dev.Ifindex):
		case i < 0:
			missing[a.Program] = append(missing[a.Program], a.Device)
			order = append(order, a.Program)
		case !list[i].Own:
			loose = append(loose, a.Program+" on "+a.Device)
		}
	}
	var out []Finding
	slices.Sort(order)
	for _, program := range slices.Compact(order) {
		out = append(out, brokenf(f.startDaemon(), "%s is missing on %s", program, some(missing[program])))
	}
	var bare []string
	for _, l := range f.Seen.Links {
		named := slices.ContainsFunc(missing[loader.FromContainer], func(d string) bool { return d == l.Name })
		if !named && findOurs(f.Hooks[HookKey{l.Ifindex, false}], loader.FromContainer) < 0 && f.suspect("bare %d", l.Ifindex) {
			bare = append(bare, fmt.Sprintf("%s of %s", l.Name, l.Bridge))
		}
	}
	if len(bare) > 0 {
		out = append(out, brokenf(f.startDaemon(), "no program on %s: what is connected there has no network beyond its bridge", some(bare)))
	}
	if len(loose) > 0 {
		out = append(out, notef(f.startDaemon(), "not pinned: %s; they end with the process that holds them", some(loose)))
	}
	return one(out, "%d programs are where they should be, by %s", count, s.Attach)
}

// checkUnguarded finds the networks of the Engine that were made while no daemon looked.
func checkUnguarded(f *Facts) []Finding {
	if s := f.Snapshot; s != nil && !slices.ContainsFunc(s.Sources, func(s api.Source) bool { return s.Name == "docker" }) {
		return []Finding{okf("no Engine is served")}
	}
	var out []Finding
	for _, b := range f.Seen.Bridges {
		if f.network(b.Name) != nil {
			continue // whether its programs are there is said with those
		}
		known := slices.Contains(f.EngineBridges, b.Name)
		// Of what only bears such a name, a daemon that is there has asked the Engine.
		if !known && (f.Daemon.Running || !dockerDevice(b.Name)) {
			continue
		}
		if findOurs(f.Hooks[HookKey{b.Ifindex, false}], loader.FromBridge) < 0 && f.suspect("unguarded %d", b.Ifindex) {
			out = append(out, brokenf(f.startDaemon(), "%s is guarded by nothing: a network of the Engine that was made while no daemon ran; where the host forwards, its containers send by their own addresses and can be reached by them", b.Name))
		}
	}
	return one(out, "every bridge of the Engine has its program")
}

// checkStrays finds what is ours and belongs to nothing: programs on devices that no snapshot names,
// and devices.
func checkStrays(f *Facts) []Finding {
	var out []Finding
	known := make(map[string]bool)
	devices := make(map[string]bool)
	if s := f.Snapshot; s != nil {
		for _, a := range s.Attachments {
			known[a.Device+" "+a.Program] = true
		}
		for _, n := range s.Networks {
			devices[n.Bridge] = true
		}
		for _, e := range s.Endpoints {
			devices[e.Link] = true
		}
	}
	for _, dev := range f.Devices {
		for _, egress := range []bool{false, true} {
			for _, e := range f.Hooks[HookKey{dev.Ifindex, egress}] {
				p := e.Program.Ours
				if p == "" || known[dev.Name+" "+p] || f.Snapshot == nil && e.Own {
					continue // without a snapshot, what is pinned is told of with the state
				}
				if !f.suspect("stray %s %d", p, dev.Ifindex) {
					continue
				}
				fix := f.removal(dev.Name, egress, e)
				switch p {
				case loader.FromContainer, loader.ToContainer, loader.FromBridge:
					out = append(out, brokenf(fix, "%s of bpfnet is left on %s, which no network has: it drops all that it does not know", p, dev.Name))
				default:
					out = append(out, notef(fix, "%s of bpfnet is left on %s", p, dev.Name))
				}
			}
		}
	}
	for _, dev := range f.Devices {
		if dev.Alias == netdev.Alias && !devices[dev.Name] && f.suspect("device %d", dev.Ifindex) {
			out = append(out, notef(commandLine("ip", "link", "delete", dev.Name), "%s was made by bpfnet, but belongs to no network or sandbox that it knows", dev.Name))
		}
	}
	return one(out, "none")
}

// removal is the command that takes a program or filter off a hook.
func (f *Facts) removal(device string, egress bool, e Entry) string {
	hook := direction(egress)
	if x := e.Filter; x != nil {
		return commandLine("tc", "filter", "del", "dev", device, hook, "pref", fmt.Sprint(x.Pref), "handle", fmt.Sprintf("%#x", x.Handle), x.Kind)
	}
	holder, held := f.LinkHolders[e.Program.Link]
	pin := f.LinkPins[e.Program.Link]
	switch {
	case pin != "" && held:
		return both([]string{commandLine("rm", pin), commandLine("kill", fmt.Sprint(holder.PID))})
	case pin != "":
		return commandLine("rm", pin)
	case held:
		return commandLine("kill", fmt.Sprint(holder.PID))
	case e.Program.Link != 0:
		return commandLine("bpftool", "link", "detach", "id", fmt.Sprint(e.Program.Link))
	}
	return commandLine("bpftool", "net", "detach", "tcx_"+hook, "dev", device)
}

// effect is what a program or filter does to packets that others behind it should see.
type effect int

const (
	lets  effect = iota // all go on
	could               // some do not, or it cannot be told
	takes               // all end there: passed on to the stack, or elsewhere
	drops               // all are dropped
)

func effectOf(e Entry) effect {
	r := e.Program.Returns
	if x := e.Filter; x != nil {
		switch {
		case x.Kind == "matchall" && x.Drops:
			return drops
		case x.Kind == "matchall" && x.Takes:
			return takes
		case x.Kind != "bpf" || !x.Direct:
			return could
		case r.Always(tcDrop):
			return drops
		case r.Always(tcPass, tcDrop, tcStolen, tcRedirect, tcTrap):
			return takes
		case r.Never(tcPass, tcDrop, tcStolen, tcRedirect, tcTrap):
			return lets
		}
		return could
	}
	switch {
	case r.Always(tcDrop):
		return drops
	case r.Always(tcPass, tcDrop, tcRedirect):
		return takes
	case r.Never(tcPass, tcDrop, tcRedirect): // tcx goes on with all others
		return lets
	}
	return could
}

func describe(f *Facts, e Entry) string {
	var by string
	if h, ok := f.LinkHolders[e.Program.Link]; ok {
		by = fmt.Sprintf(", of process %d (%s)", h.PID, h.Name)
	} else if p := f.LinkPins[e.Program.Link]; p != "" {
		by = ", pinned at " + p
	}
	if x := e.Filter; x != nil {
		if x.Kind != "bpf" {
			return fmt.Sprintf("the %s filter of priority %d", x.Kind, x.Pref)
		}
		return fmt.Sprintf("the filter %q of priority %d (program %d)", x.Name, x.Pref, e.Program.ID)
	}
	return fmt.Sprintf("the program %q (id %d%s)", e.Program.Name, e.Program.ID, by)
}

// checkForeign: what runs before ours on the same hook can keep packets from it. What it can do is read
// from its instructions, so that one that only watches is none to report. What runs behind ours sees
// what ours left to the stack: that is its business.
func checkForeign(f *Facts) []Finding {
	var out []Finding
	watchers := 0
	for _, dev := range f.Devices {
		for _, egress := range []bool{false, true} {
			list := f.Hooks[HookKey{dev.Ifindex, egress}]
			ours := slices.IndexFunc(list, func(e Entry) bool { return e.Program.Ours != "" })
			for i := 0; i < ours; i++ {
				e := list[i]
				who, fix := describe(f, e), f.removal(dev.Name, egress, e)
				where := fmt.Sprintf("on %s %s", dev.Name, direction(egress))
				uplinkEgress := strings.HasPrefix(list[ours].Program.Ours, loader.ToUplink)
				switch effectOf(e) {
				case lets:
					watchers++
				case drops:
					out = append(out, brokenf(fix, "%s %s runs before bpfnet's and drops all packets", who, where))
				case takes:
					if uplinkEgress {
						out = append(out, notef(fix, "%s %s runs before bpfnet's and keeps all packets from it: errors about translated packets go out with the wrong addresses", who, where))
					} else {
						out = append(out, brokenf(fix, "%s %s runs before bpfnet's and keeps all packets from it", who, where))
					}
				case could:
					out = append(out, notef(fix, "%s %s runs before bpfnet's and can keep packets from it", who, where))
				}
			}
		}
	}
	if watchers > 0 {
		return one(out, "%d run before ours and let every packet on", watchers)
	}
	return one(out, "none runs before ours")
}

// checkXDP: it sees an uplink's packets before all others.
func checkXDP(f *Facts) []Finding {
	var out []Finding
	for _, u := range f.Seen.Uplinks {
		dev := f.device(u.Name)
		if dev == nil || dev.XDP == 0 {
			continue
		}
		p, mode, off := f.XDP[dev.XDP], "", "xdp"
		if p.Ours != "" {
			continue // see checkShield
		}
		if dev.Generic {
			mode, off = "generic ", "xdpgeneric"
		}
		fix := commandLine("ip", "link", "set", "dev", u.Name, off, "off")
		if p.Link != 0 {
			fix = f.removal(u.Name, false, Entry{Program: p})
		}
		switch {
		case p.Returns.Always(xdpPass):
		case p.Returns.Never(xdpPass):
			out = append(out, brokenf(fix, "the %sXDP program %q (id %d) on %s lets no packet pass", mode, p.Name, dev.XDP, u.Name))
		default:
			out = append(out, notef(fix, "the %sXDP program %q (id %d) on %s sees packets first and can drop or redirect them", mode, p.Name, dev.XDP, u.Name))
		}
	}
	return one(out, "none stands in the way on the uplinks")
}

// checkShield: an operator who asked for it relies on it, though no traffic needs it.
func checkShield(f *Facts) []Finding {
	if f.Snapshot == nil || f.Snapshot.Shield == nil {
		return []Finding{okf("off")}
	}
	var out []Finding
	for _, d := range f.Snapshot.Shield.Devices {
		dev := f.device(d.Device)
		switch {
		case d.Why != "":
			out = append(out, notef("", "not on %s: %s", d.Device, d.Why))
		case dev != nil && f.XDP[dev.XDP].Ours == "":
			out = append(out, notef("", "not on %s any more: the daemon puts it back within a minute", d.Device))
		}
	}
	return one(out, "on all uplinks, %s", f.Snapshot.Shield.Mode)
}
