// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/maps"
)

// dryPrograms are those that can be asked: a frame without a link layer cannot be put before a program by hand.
var dryPrograms = map[string]bool{
	FromContainer: true, ToContainer: true, FromBridge: true, FromUplink: true, FromHost: true, ToUplink: true,
}

// Dry is the data path's programs loaded once more, on no device, to be asked what they would do. They are the same
// instructions, and read the live tables; all that they write (flows, counters, events) is theirs alone, and they find
// there what they would find in the live maps. So a run changes nothing, whatever it does.
type Dry struct {
	mu     sync.Mutex
	c      *ebpf.Collection // nil: closed
	shadow *maps.Shadow
}

// Shot is a frame at a hook.
type Shot struct {
	Program string
	// Ifindex is that of the device at whose hook it is, in the calling thread's network namespace.
	Ifindex int
	// Ingress is that of the device by which it came in before, for programs at an egress. 0: it is the host's own.
	Ingress int
	Mark    uint32
	Frame   []byte // from the Ethernet header
}

// The actions of TC that the programs end with.
const (
	ActionPass     = -1
	ActionDrop     = 2
	ActionRedirect = 7
)

// Landing is what became of it.
type Landing struct {
	Action int32
	maps.Judged
	Opened *maps.Opened // nil: no flow
	Frame  []byte       // as it leaves
	Mark   uint32
}

var errClosed = errors.New("the programs to ask are closed")

// dryRuns is how often a packet is run that meets something new in the live flow tables each time: at each of the tries
// for a masquerade port, and some more.
const dryRuns = 64

// NewDry loads the programs on live, the maps of the attached ones by name, of which it writes none.
func NewDry(live map[string]*ebpf.Map) (*Dry, error) {
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read the data path object: %w", err)
	}
	used := make(map[string]bool)
	for name, p := range spec.Programs {
		if !dryPrograms[name] {
			delete(spec.Programs, name)
			continue
		}
		for _, ins := range p.Instructions {
			if ins.IsLoadFromMap() {
				used[ins.Reference()] = true
			}
		}
	}
	shared := make(map[string]*ebpf.Map)
	for name, m := range spec.Maps {
		if !used[name] {
			delete(spec.Maps, name)
			continue
		}
		m.Pinning = ebpf.PinNone
		if !maps.ReadOnly(name) {
			m.MaxEntries = maps.ShadowEntries(name, m.MaxEntries)
			continue
		}
		if live[name] == nil {
			return nil, fmt.Errorf("ask the data path: no map %s", name)
		}
		shared[name] = live[name]
	}
	c, err := newCollection(spec, "", shared, shelf{})
	if err != nil {
		return nil, explainLoad(err)
	}
	return &Dry{c: c, shadow: maps.NewShadow(maps.Use(c.Maps), maps.Use(live))}, nil
}

// Dry is the data path's programs to be asked. They are loaded when that is first called, which takes a second, and closed
// with the loader.
func (l *Loader) Dry() (*Dry, error) {
	l.dryMu.Lock()
	defer l.dryMu.Unlock()
	if l.dry == nil {
		d, err := NewDry(l.tc.Maps)
		if err != nil {
			return nil, err
		}
		l.dry = d
	}
	return l.dry, nil
}

// Close unloads the programs; nobody has seen them.
func (d *Dry) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.c != nil {
		d.c.Close()
		d.c = nil
	}
}

// Run says what the data path would do with a frame. It may be called concurrently.
func (d *Dry) Run(s Shot) (Landing, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.c == nil {
		return Landing{}, errClosed
	}
	prog := d.c.Programs[s.Program]
	if prog == nil {
		return Landing{}, fmt.Errorf("ask %s: no such program", s.Program)
	}
	if err := d.shadow.Begin(); err != nil {
		return Landing{}, fmt.Errorf("ask %s: %w", s.Program, err)
	}
	for range dryRuns {
		l, again, err := d.try(prog, s)
		if err != nil {
			return Landing{}, fmt.Errorf("ask %s: %w", s.Program, err)
		}
		if !again {
			return l, nil
		}
	}
	return Landing{}, fmt.Errorf("ask %s: the flow tables change faster than they are read; try again", s.Program)
}

func (d *Dry) try(prog *ebpf.Program, s Shot) (l Landing, again bool, err error) {
	if err := d.shadow.Reset(); err != nil {
		return l, false, err
	}
	if l, err = shoot(prog, s); err != nil {
		return l, false, err
	}
	if l.Judged, err = d.shadow.Judged(); err != nil {
		return l, false, err
	}
	if again, err = d.shadow.Fetch(); err != nil || again {
		return l, again, err
	}
	opened, found, err := d.shadow.Opened()
	if found {
		l.Opened = &opened
	}
	return l, false, err
}

// skb is struct __sk_buff with room for what later kernels add, in words; the fields that are set.
type skb [64]uint32

const (
	skbMark           = 2
	skbIngressIfindex = 9
	skbIfindex        = 10
	// headroom is how many bytes a program may make a frame longer by.
	headroom = 64
)

func shoot(prog *ebpf.Program, s Shot) (Landing, error) {
	var in, out skb
	in[skbMark], in[skbIfindex], in[skbIngressIfindex] = s.Mark, uint32(s.Ifindex), uint32(s.Ingress)
	// What a veth's peer sends has been received; a netkit's program runs while it is being sent.
	if s.Program == FromContainer && !isNetkit(s.Ifindex) {
		in[skbIngressIfindex] = uint32(s.Ifindex)
	}
	opts := &ebpf.RunOptions{Data: s.Frame, DataOut: make([]byte, len(s.Frame)+headroom), Context: in, ContextOut: &out}
	action, err := prog.Run(opts)
	if err != nil {
		return Landing{}, err
	}
	return Landing{Action: int32(action), Frame: opts.DataOut, Mark: out[skbMark]}, nil
}

// FlowKnown reports whether the data path knows a flow whose packets look so at the hook: "container", "uplink" or "host".
func (d *Dry) FlowKnown(hook string, proto uint8, src, dst netip.AddrPort) (bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.c == nil {
		return false, errClosed
	}
	return d.shadow.FlowKnown(hook, proto, src, dst)
}
