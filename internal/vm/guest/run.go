// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

const (
	// large makes UDP datagrams that are sent in fragments.
	large = 4000
	// small ones are for lo, whose MTU is no hint at a container's: what does not fit is lost.
	small = 1000
	// bulk makes TCP segments that are offloaded, by the hundred.
	bulk = 8 << 20
)

var protocols = []string{"tcp", "udp"}

// run makes all checks. Its error is one that leaves nothing to check.
func run(p plan) error {
	attach := p.Attach
	s, err := build()
	if err != nil {
		return fmt.Errorf("build the scene: %w", err)
	}
	if err := s.forward(); err != nil {
		return fmt.Errorf("turn forwarding on: %w", err)
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"load", s.load},
		{"attach", s.attach},
		{"tables", func() error { _, err := s.apply(); return err }},
		{"attached by " + attach, func() error { return s.attachedBy(attach) }},
	} {
		err := step.do()
		check(step.name, err)
		if err != nil {
			return fmt.Errorf("no use to go on without: %s", step.name)
		}
	}
	s.reachable()
	s.guarded()
	check("fast path", s.fast())

	// The host's own sockets: by the program on lo while no sock program stands in their way.
	s.hostOwn("by lo", small)
	check("attach to cgroup", s.loader.AttachCgroup())
	before, err := s.atLo()
	s.hostOwn("by cgroup", large)
	after, err2 := s.atLo()
	err = errors.Join(err, err2)
	if err == nil && (before == 0 || before != after) {
		err = fmt.Errorf("the program on lo redirected %d packets without the cgroup programs, %d more with them", before, after-before)
	}
	check("cgroup programs spare lo", err)

	check("expire", s.expire())
	check("restart", s.restart(attach))
	check("purge", s.purge())
	check("cleanup", s.cleanup())
	return s.own(p.Link, p.Lacks)
}

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// reachable is all that must work.
func (s *scene) reachable() {
	for _, f := range families {
		for _, proto := range protocols {
			name := f.name + " " + proto + " "
			check(name+"container to container", s.b.exchange(proto, at(f.a, target), large, f.b))
			check(name+"container to its neighbour's published port", s.b.published(proto, at(f.host, published), large))
			check(name+"world to published port", s.world.exchange(proto, at(f.host, published), large, f.world))
			check(name+"container to world, masqueraded", s.b.exchange(proto, at(f.world, target), large, f.host))
			check(name+"second network to world, masqueraded", s.other.exchange(proto, at(f.world, target), large, f.host))
			check(name+"refusal from world", s.b.refused(proto, at(f.world, closed)))
			check(name+"refusal from a container", s.b.refused(proto, at(f.a, closed)))
		}
		check(f.name+" ping container to container", s.b.ping(f.a))
		check(f.name+" ping container to world", s.b.ping(f.world))
		check(f.name+" ping container to gateway", s.b.ping(f.gatewayOne))
	}
}

// published is an exchange by way of a published port, whoever the server sees.
func (s *space) published(proto string, to netip.AddrPort, size int) error {
	c, err := s.ask(proto, to, size)
	if err != nil {
		return err
	}
	return c.Close()
}

// guarded is all that must not.
func (s *scene) guarded() {
	for _, f := range families {
		check(f.name+" networks are isolated", s.dropped(s.other, at(f.a, target), "isolated"))
		check(f.name+" world cannot reach in", s.dropped(s.world, at(f.a, target), "direct_access"))
	}
}

// dropped sends a datagram, which must be counted as dropped for that reason.
func (s *scene) dropped(from *space, to netip.AddrPort, reason string) error {
	before, err := s.drops(reason)
	if err != nil {
		return err
	}
	if err := from.send(to); err != nil {
		return err
	}
	return eventually(func() error {
		after, err := s.drops(reason)
		if err == nil && after == before {
			err = fmt.Errorf("nothing dropped for being %s", reason)
		}
		return err
	})
}

// fast sends a lot both ways through a published port: next to nothing of it may go by the stack.
func (s *scene) fast() error {
	return s.byFates([]way{
		{hook: "uplink", fate: "container", least: 100, most: math.MaxUint64},
		{hook: "container", fate: "uplink", least: 100, most: math.MaxUint64},
		{hook: "uplink", fate: "stack", most: 10}, // ARP is
		{hook: "container", fate: "stack", most: 10},
	}, func(f family) error { return s.world.exchange("tcp", at(f.host, published), bulk, f.world) })
}

// way is one that packets may go, and how many should.
type way struct {
	hook, fate  string
	least, most uint64
}

// byFates has a lot sent, by each family, and counts which ways it goes.
func (s *scene) byFates(ways []way, send func(family) error) error {
	for _, f := range families {
		var before []uint64
		for _, w := range ways {
			n, err := s.fate(w.hook, w.fate)
			if err != nil {
				return err
			}
			before = append(before, n)
		}
		if err := send(f); err != nil {
			return err
		}
		for i, w := range ways {
			n, err := s.fate(w.hook, w.fate)
			if err != nil {
				return err
			}
			if n -= before[i]; n < w.least || n > w.most {
				return fmt.Errorf("%s: %d packets from %s to %s", f.name, n, w.hook, w.fate)
			}
		}
	}
	return nil
}

// hostOwn are the host's own clients of published ports.
func (s *scene) hostOwn(how string, size int) {
	for _, f := range families {
		for _, proto := range protocols {
			name := f.name + " " + proto + " host to "
			check(name+"loopback's published port "+how, s.host.published(proto, at(f.loopback, published), size))
			check(name+"its own published port "+how, s.host.published(proto, at(f.host, published), size))
		}
	}
}

// atLo counts what the program on lo took out of the stack's hands.
func (s *scene) atLo() (uint64, error) { return s.fate("host", "container") }

func (s *scene) expire() error {
	swept, err := s.loader.Expire()
	if err == nil && (swept.Live[0] == 0 || swept.Live[1] == 0) {
		err = fmt.Errorf("no live flows: %+v", swept)
	}
	return err
}

// restart has a conversation go on while the programs are without their loader, and under the next.
func (s *scene) restart(attach string) error {
	f := families[0]
	c, err := s.world.ask("tcp", at(f.host, published), large)
	if err != nil {
		return err
	}
	defer c.Close()
	s.loader.Close()
	if err := errors.Join(c.echo(large), s.world.exchange("udp", at(f.host, published), large, f.world)); err != nil {
		return fmt.Errorf("without the loader: %w", err)
	}
	if err := s.load(); err != nil {
		return err
	}
	res, err := s.apply()
	if err == nil && (res.Changed != 0 || res.Removed) {
		err = fmt.Errorf("the tables were not taken over: %+v", res)
	}
	if err = errors.Join(err, s.attach(), s.loader.AttachCgroup(), s.attachedBy(attach)); err != nil {
		return err
	}
	if err := errors.Join(c.echo(large), s.world.exchange("tcp", at(f.host, published), large, f.world)); err != nil {
		return fmt.Errorf("with the next loader: %w", err)
	}
	return s.host.published("tcp", at(f.loopback, published), large)
}

// purge takes the published ports away, and their flows go.
func (s *scene) purge() error {
	var ports []policy.Port
	ports, s.state.Ports = s.state.Ports, nil
	defer func() { s.state.Ports = ports }()
	res, err := s.apply()
	if err == nil && !res.Removed {
		err = errors.New("no port was removed")
	}
	if err != nil {
		return err
	}
	swept, err := s.loader.Purge()
	if err == nil && (swept.Deleted[0] == 0 || swept.Deleted[1] == 0) {
		err = fmt.Errorf("no flows deleted: %+v", swept)
	}
	return errors.Join(err, s.world.refused("tcp", at(families[0].host, published)))
}

// cleanup must leave nothing of ours in the kernel.
func (s *scene) cleanup() error {
	s.loader.Close()
	if err := loader.Cleanup(paths, netdev.Clsact{}); err != nil {
		return err
	}
	if err := s.attachedBy(""); err != nil {
		return err
	}
	s.loader, s.maps, s.writer = nil, nil, nil // with them goes memory shared with a map, once that is collected
	return nothingLoaded()
}

// nothingLoaded finds no program or map in the kernel, and no pins.
func nothingLoaded() error {
	if _, err := os.Stat(pins); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("pins are left: %w", err)
	}
	return eventually(func() error {
		runtime.GC()
		if id, err := ebpf.ProgramGetNextID(0); !errors.Is(err, fs.ErrNotExist) {
			return errors.Join(fmt.Errorf("program %d is left", id), err)
		}
		if id, err := ebpf.MapGetNextID(0); !errors.Is(err, fs.ErrNotExist) {
			m, err2 := ebpf.NewMapFromID(id)
			if err2 == nil {
				defer m.Close()
			}
			return errors.Join(fmt.Errorf("map %d is left: %v", id, m), err, err2)
		}
		return nil
	})
}

// attachedBy looks at the devices: one program where there should be one, by that way only.
// By none, there must be no programs.
func (s *scene) attachedBy(attach string) error {
	for _, d := range []struct {
		name            string
		ingress, egress int
	}{
		{"lo", 1, 0},
		{"br-one", 1, 0},
		{"br-two", 1, 0},
		{"veth-a", 1, 1},
		{"veth-b", 1, 1},
		{"veth-other", 1, 1},
		{"up0", 1, 1},
	} {
		l, err := s.host.h.LinkByName(d.name)
		if err != nil {
			return err
		}
		for _, side := range []struct {
			want   int
			parent uint32
			attach ebpf.AttachType
		}{
			{d.ingress, netlink.HANDLE_MIN_INGRESS, ebpf.AttachTCXIngress},
			{d.egress, netlink.HANDLE_MIN_EGRESS, ebpf.AttachTCXEgress},
		} {
			have := make(map[string]int)
			if res, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: side.attach}); err == nil {
				have["tcx"] = len(res.Programs)
			} else if attach == "tcx" {
				return err
			}
			filters, err := s.host.h.FilterList(l, side.parent)
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return err
			}
			have["clsact"] = len(filters)
			for way, n := range have {
				want := 0
				if way == attach {
					want = side.want
				}
				if n != want {
					return fmt.Errorf("%s, %v: %d programs by %s, not %d", d.name, side.attach, n, way, want)
				}
			}
		}
	}
	return nil
}
