// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

const (
	bpffsRoot  = "/sys/fs/bpf"
	cgroupRoot = "/sys/fs/cgroup"
	pins       = bpffsRoot + "/bpfnet"

	target    = 80   // what a serves
	published = 8080 // where it is published, on every address
	closed    = 9    // where nobody listens
)

// family has the addresses of one IP version.
type family struct {
	name                            string
	a, b, other                     netip.Addr // containers, other of the second network
	gatewayOne, gatewayTwo          netip.Addr
	host, world, loopback, anything netip.Addr
}

var families = []family{
	{
		name: "IPv4", a: ip("10.1.0.2"), b: ip("10.1.0.3"), other: ip("10.2.0.2"),
		gatewayOne: ip("10.1.0.1"), gatewayTwo: ip("10.2.0.1"),
		host: ip("192.0.2.1"), world: ip("192.0.2.100"), loopback: ip("127.0.0.1"), anything: ip("0.0.0.0"),
	},
	{
		name: "IPv6", a: ip("fd01::2"), b: ip("fd01::3"), other: ip("fd02::2"),
		gatewayOne: ip("fd01::1"), gatewayTwo: ip("fd02::1"),
		host: ip("2001:db8::1"), world: ip("2001:db8::100"), loopback: ip("::1"), anything: ip("::"),
	},
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// each is one address of every family.
func each(of func(family) netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, f := range families {
		out = append(out, of(f))
	}
	return out
}

// scene is a host with two networks and an uplink:
//
//	world ── up0 host br-one ── a, b
//	              br-two ── other
type scene struct {
	host, world, a, b, other *space

	state   policy.State
	slots   policy.Slots
	devices *netdev.Devices
	loader  *loader.Loader
	maps    *maps.Maps
	writer  *maps.Writer
}

var served = map[string]bool{"br-one": true, "br-two": true}

// build makes the namespaces and what the container engine would tell of them.
func build() (*scene, error) {
	s := &scene{}
	var err error
	if s.host, err = hostSpace(); err != nil {
		return nil, err
	}
	for _, n := range []struct {
		id       string
		gateways []netip.Addr
	}{
		{"one", each(func(f family) netip.Addr { return f.gatewayOne })},
		{"two", each(func(f family) netip.Addr { return f.gatewayTwo })},
	} {
		var own []netip.Prefix
		network := policy.Network{ID: n.id, Name: n.id, Source: policy.SourceDocker, Bridge: "br-" + n.id, Gateways: n.gateways}
		for _, g := range n.gateways {
			own = append(own, prefix(g))
			network.Subnets = append(network.Subnets, prefix(g).Masked())
		}
		if err := s.host.bridge(network.Bridge, own...); err != nil {
			return nil, err
		}
		s.state.Networks = append(s.state.Networks, network)
	}
	for _, c := range []struct {
		into    **space
		name    string
		network policy.Network
		addrs   []netip.Addr
	}{
		{&s.a, "a", s.state.Networks[0], each(func(f family) netip.Addr { return f.a })},
		{&s.b, "b", s.state.Networks[0], each(func(f family) netip.Addr { return f.b })},
		{&s.other, "other", s.state.Networks[1], each(func(f family) netip.Addr { return f.other })},
	} {
		if *c.into, err = s.container(c.name, c.network, c.addrs); err != nil {
			return nil, fmt.Errorf("container %s: %w", c.name, err)
		}
	}
	for _, f := range families {
		for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
			s.state.Ports = append(s.state.Ports, policy.Port{
				Proto: proto, Host: netip.AddrPortFrom(f.anything, published), EndpointID: "a", Target: target,
			})
		}
	}

	if s.world, err = newSpace(); err != nil {
		return nil, err
	}
	if err := s.host.wire("up0", "", s.world); err != nil {
		return nil, err
	}
	for _, f := range families {
		err := errors.Join(
			s.host.up("up0", prefix(f.host)), s.world.up("eth0", prefix(f.world)),
			s.world.via(prefix(f.a).Masked(), f.host), // nothing stops the world from trying
		)
		if err != nil {
			return nil, err
		}
	}
	return s, errors.Join(s.a.serve(target), s.world.serve(target))
}

func (s *scene) container(name string, n policy.Network, addrs []netip.Addr) (*space, error) {
	c, err := newSpace()
	if err != nil {
		return nil, err
	}
	if err := s.host.wire("veth-"+name, n.Bridge, c); err != nil {
		return nil, err
	}
	if err := c.join(addrs, n.Gateways); err != nil {
		return nil, err
	}
	l, err := c.h.LinkByName("eth0")
	if err != nil {
		return nil, err
	}
	s.state.Endpoints = append(s.state.Endpoints, policy.Endpoint{
		ID: name, NetworkID: n.ID, SandboxID: name, Name: name, Source: policy.SourceDocker,
		Addrs: addrs, MAC: policy.MAC(l.Attrs().HardwareAddr),
	})
	return c, nil
}

// forward sets the sysctls that the daemon would set.
func (s *scene) forward() error {
	plan, err := netdev.PlanForwarding(netdev.ReadSysctl, []string{"up0"}, nil)
	if err != nil {
		return err
	}
	_, err = netdev.Apply(plan)
	return err
}

var paths = loader.Paths{BPFFS: pins, Cgroup: cgroupRoot}

// load is the daemon's start.
func (s *scene) load() error {
	var err error
	if s.devices == nil {
		if s.devices, err = netdev.Open(netdev.Options{}); err != nil {
			return err
		}
	}
	s.loader, err = loader.Load(loader.Options{Paths: paths, Flows: 1024, Classifier: netdev.Clsact{}})
	if err != nil {
		return err
	}
	s.maps = s.loader.Maps()
	s.writer, err = maps.NewWriter(s.maps)
	return err
}

// attach puts the programs on every device.
func (s *scene) attach() error {
	d, err := s.devices.Snapshot(served, nil)
	errs := []error{err, s.loader.Attach(loader.FromHost, 1)}
	if len(d.Uplinks) != 1 || len(d.Bridges) != 2 || len(d.Links) != 3 {
		errs = append(errs, fmt.Errorf("devices: %+v", d))
	}
	for _, b := range d.Bridges {
		errs = append(errs, s.loader.Attach(loader.FromBridge, b.Ifindex))
	}
	for _, l := range d.Links {
		errs = append(errs, s.loader.Attach(loader.FromContainer, l.Ifindex), s.loader.Attach(loader.ToContainer, l.Ifindex))
	}
	for _, u := range d.Uplinks {
		errs = append(errs, s.loader.Attach(loader.FromUplink, u.Ifindex), s.loader.Attach(loader.ToUplink, u.Ifindex))
	}
	return errors.Join(errs...)
}

// apply fills the tables.
func (s *scene) apply() (maps.Result, error) {
	d, err := s.devices.Snapshot(served, nil)
	if err != nil {
		return maps.Result{}, err
	}
	in := policy.Intents{State: s.state, Devices: d, Attached: make(map[int]bool)}
	for _, l := range d.Links {
		in.Attached[l.Ifindex] = true
	}
	tables, slots := policy.Compile(in, s.slots)
	if len(tables.Waiting) > 0 || len(tables.Problems) > 0 {
		return maps.Result{}, fmt.Errorf("waiting %v, problems %v", tables.Waiting, tables.Problems)
	}
	s.slots = slots
	cookie, err := netdev.NetnsCookie()
	if err != nil {
		return maps.Result{}, err
	}
	const minutes = 60 // about, in ticks
	return s.writer.Apply(tables, maps.Settings{
		NetnsCookie: cookie, SNAT: []maps.PortRange{{First: 1024, Count: 20000}}, HashSeed: 9,
		Timeouts: maps.Timeouts{
			TCPSyn: minutes, TCPEstablished: minutes, TCPFin: minutes, TCPClosed: minutes,
			UDPNew: minutes, UDP: minutes, ICMP: minutes, Other: minutes,
		},
	})
}

// fate counts packets that went one way at one hook.
func (s *scene) fate(hook, fate string) (uint64, error) {
	all, err := s.maps.Fates()
	for _, f := range all {
		if f.Hook == hook && f.Fate == fate {
			return f.Packets, err
		}
	}
	return 0, err
}

// drops counts packets dropped for one reason.
func (s *scene) drops(reason string) (uint64, error) {
	all, err := s.maps.Drops()
	var n uint64
	for _, d := range all {
		if d.Reason == reason {
			n += d.Packets
		}
	}
	return n, err
}
