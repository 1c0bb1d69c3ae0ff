// SPDX-License-Identifier: Apache-2.0

// Package explain asks the data path itself what it would do with a packet, and holds that against what policy says of the
// same tables. It knows how a packet looks at each hook, and neither names nor where the tables come from.
package explain

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/policy"
)

// Runner is a loader.Dry.
type Runner interface {
	Run(s loader.Shot) (loader.Landing, error)
}

// Outcome is what the programs do with a packet that belongs to no flow.
type Outcome struct {
	Path   policy.Path
	Reason string // of a drop, by the name of its counter
	Hook   string // that dropped it, or that let it go
	// Programs that have seen it, in order.
	Programs []string
	Endpoint uint16 // slot of the receiver, 0: none
	Port     uint16 // slot of the published port, 0: none
	// Src and Dst are those that the packet leaves with; an echo has its identifier as source port.
	Src, Dst netip.AddrPort
	SNAT     bool
	Uplink   int // index of the one that it leaves by; 0: none
}

// Place is where a packet is put before the programs.
type Place struct {
	Link
	// Bridge is the index of the bridge that its sender is behind; 0: none.
	Bridge int
}

// programOf is the one that sees a packet first, by where that comes from.
var programOf = map[policy.Origin]string{
	policy.FromContainer: loader.FromContainer, policy.FromUplink: loader.FromUplink, policy.FromHost: loader.FromHost,
}

var pathOf = map[string]policy.Path{
	"container": policy.PathContainer, "uplink": policy.PathUplink, "lo": policy.PathHost, "stack": policy.PathStack, "bridge": policy.PathBridge,
}

// Ask follows a packet from the hook where it comes up as far as a program is next.
func Ask(r Runner, p policy.Packet, at Place) (Outcome, error) {
	first, ok := programOf[p.From]
	if !ok {
		return Outcome{}, fmt.Errorf("a packet of origin %d", p.From)
	}
	o := Outcome{Src: p.Tuple.Src, Dst: p.Tuple.Dst}
	l, err := o.pass(r, loader.Shot{Program: first, Ifindex: p.Device, Mark: p.Mark, Frame: Frame(p, at.Link)})
	if err != nil || o.Path == policy.PathNone {
		return o, err
	}
	if l.Opened != nil && o.Path != policy.PathStack {
		o.Endpoint, o.Port, o.SNAT = l.Opened.Peer, l.Opened.Port, l.Opened.SNAT
		o.Src, o.Dst = l.Opened.Src, l.Opened.Dst
		if o.Path == policy.PathUplink {
			o.Uplink = l.Opened.Ifindex
		}
	}
	// The next hook sees what the first has left, and has to let it pass.
	next := loader.Shot{Ingress: p.Device, Mark: l.Mark, Frame: l.Frame}
	switch {
	// A packet of lo, or of a netkit, is sent by the receiver's device; others enter it past all hooks.
	case o.Path == policy.PathContainer && l.Mark != p.Mark && l.Opened != nil && l.Opened.Ifindex != 0:
		next.Program, next.Ifindex = loader.ToContainer, l.Opened.Ifindex
	case o.Path == policy.PathUplink && o.Uplink != 0:
		next.Program, next.Ifindex = loader.ToUplink, o.Uplink
	case o.Path == policy.PathStack && p.From == policy.FromContainer && at.Bridge != 0:
		next.Program, next.Ifindex = loader.FromBridge, at.Bridge
	default:
		return o, nil
	}
	then := o
	if _, err := then.pass(r, next); err != nil {
		return o, err
	}
	o.Programs = then.Programs
	if then.Path == policy.PathNone {
		return then, nil
	}
	return o, nil
}

// AskToContainer has the host's stack send a packet to the container behind the device ifindex.
func AskToContainer(r Runner, p policy.Packet, l Link, ifindex int) (Outcome, error) {
	o := Outcome{Src: p.Tuple.Src, Dst: p.Tuple.Dst}
	_, err := o.pass(r, loader.Shot{Program: loader.ToContainer, Ifindex: ifindex, Frame: Frame(p, l)})
	return o, err
}

// pass shows a frame to one program.
func (o *Outcome) pass(r Runner, s loader.Shot) (loader.Landing, error) {
	l, err := r.Run(s)
	if err != nil {
		return l, err
	}
	o.Programs = append(slices.Clip(o.Programs), s.Program)
	o.Reason, o.Hook = l.Reason, l.Hook
	switch path, told := pathOf[l.Fate]; {
	case l.Action == loader.ActionDrop:
		o.Path = policy.PathNone
		if l.Reason == "" {
			return l, errors.New(s.Program + " drops it under no reason")
		}
	case told:
		o.Path = path
	case l.Action == loader.ActionPass || l.Action == 0:
		o.Path = policy.PathHost
	default:
		return l, fmt.Errorf("%s ends with action %d and counts nothing", s.Program, l.Action)
	}
	return l, nil
}

// byState are the reasons that no table tells of: what flows there are, and what sockets the host has.
var byState = []string{"flow_table_full", "snat_exhausted", "flow_collision", "flow_cap", "tables_moving", "no_memory"}

// ByState reports whether the packet is dropped because of what the host is busy with just now, though policy would let it
// go: v and o do not contradict each other then.
func ByState(v policy.Verdict, o Outcome) bool {
	if o.Path != policy.PathNone || v.Path == policy.PathNone {
		return false
	}
	// A port that the Engine's own socket holds, and that is not published yet.
	reserved := o.Reason == "port_not_ready" && (v.Path == policy.PathHost || v.Path == policy.PathStack)
	return reserved || slices.Contains(byState, o.Reason)
}

// Differ says in what the two accounts of a packet that belongs to no flow contradict each other; empty: in nothing.
func Differ(v policy.Verdict, o Outcome) string {
	if ByState(v, o) {
		return ""
	}
	said := func(path policy.Path, reason string) string {
		if path == policy.PathNone {
			return "dropped as " + reason
		}
		return path.String()
	}
	switch {
	case v.Path != o.Path || v.Reason != o.Reason:
		return fmt.Sprintf("policy says %s, the data path %s", said(v.Path, v.Reason), said(o.Path, o.Reason))
	case v.Path != policy.PathContainer && v.Path != policy.PathUplink:
		return ""
	case v.Endpoint != o.Endpoint:
		return fmt.Sprintf("policy says that endpoint %d gets it, the data path %d", v.Endpoint, o.Endpoint)
	case v.Port != o.Port:
		return fmt.Sprintf("policy says that it is of published port %d, the data path %d", v.Port, o.Port)
	case v.To != o.Dst:
		return fmt.Sprintf("policy says that it arrives at %s, the data path %s", v.To, o.Dst)
	case v.SNAT != o.SNAT:
		return fmt.Sprintf("policy says that its sender is hidden: %v, the data path %v", v.SNAT, o.SNAT)
	case v.SNAT && v.Source.IsValid() && v.Source != o.Src.Addr():
		return fmt.Sprintf("policy says that it leaves as %s, the data path %s", v.Source, o.Src.Addr())
	}
	return ""
}
