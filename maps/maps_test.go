// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/policy"
)

func TestAddressesSurvive(t *testing.T) {
	for _, s := range []string{"0.0.0.0", "172.17.0.2", "255.255.255.255", "::", "::1", "fd00::1:2", "2001:db8::ffff"} {
		a := netip.MustParseAddr(s)
		require.Equal(t, a, fromAddr(addr(a)), s)
		if a.Is4() && s != "0.0.0.0" {
			require.Equal(t, a, fromAddr4(addr4(a)))
		}
	}
	require.Equal(t, uint32(0x0100007f), addr4(netip.MustParseAddr("127.0.0.1")), "network byte order in memory")
	require.Equal(t, uint16(0x5000), port16(80))
}

// Every address of a prefix must have its bit: a missing one opens the host.
func TestSubnetBits(t *testing.T) {
	for _, s := range []string{"172.17.0.0/16", "172.16.0.0/12", "10.0.0.0/8", "192.168.7.0/24", "fd00:1:2::/64", "fd00::/16", "2001:db8::/32", "0.0.0.0/0"} {
		p := netip.MustParsePrefix(s)
		bits, all := subnetBits(p)
		have := make(map[uint16]bool)
		for _, b := range bits {
			have[b] = true
		}
		first, last := p.Masked().Addr(), lastAddr(p)
		for _, a := range []netip.Addr{first, first.Next(), last} {
			require.True(t, all || have[subnetBit(a)], "%s in %s", a, s)
		}
	}
	bits, all := subnetBits(netip.MustParsePrefix("10.0.0.0/8"))
	require.False(t, all)
	require.Len(t, bits, 256)
}

func lastAddr(p netip.Prefix) netip.Addr {
	raw := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(raw)*8; i++ {
		raw[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(raw)
	return a
}

func TestNames(t *testing.T) {
	reasons := reasonNames()
	require.Equal(t, "not_ready", reasons[bpf.DatapathReasonREASON_NOT_READY])
	require.Equal(t, "direct_access", reasons[bpf.DatapathReasonREASON_DIRECT_ACCESS])
	require.Len(t, reasons, int(bpf.DatapathReasonREASON_COUNT)+1)
	require.Equal(t, "to_container", hookNames()[bpf.DatapathHookHOOK_TO_CONTAINER])
	require.Equal(t, "uplink", fateNames()[bpf.DatapathFateFATE_UPLINK])
}

func TestLimitsAgree(t *testing.T) {
	s := spec()
	require.EqualValues(t, policy.MaxEndpoints, s.Maps["endpoint_slots"].MaxEntries)
	require.EqualValues(t, policy.MaxNetworks, s.Maps["network_slots"].MaxEntries)
	require.EqualValues(t, policy.MaxPorts, s.Maps["port_slots"].MaxEntries)
	require.EqualValues(t, classSize, s.Maps["port_class"].ValueSize)
}

// Needs root: makes the maps, unpinned.
func newMaps(t *testing.T) *Maps {
	t.Helper()
	m := &Maps{m: make(map[string]*ebpf.Map)}
	for name, ms := range spec().Copy().Maps {
		if ms.Pinning != ebpf.PinByName || name == "gc" { // gc holds a timer: only a program can
			continue
		}
		ms.Pinning = ebpf.PinNone
		made, err := ebpf.NewMap(ms)
		require.NoError(t, err, name)
		m.m[name] = made
	}
	t.Cleanup(m.Close)
	return m
}

func tables() policy.Tables {
	return policy.Tables{
		Networks:  map[uint16]policy.NetworkRow{1: {Ifindex: 10, MTU: 1500, Masquerade: true, Gateway4: netip.MustParseAddr("172.17.0.1")}},
		Endpoints: map[uint16]policy.EndpointRow{1: {Ifindex: 20, Sandbox: 1, Network: 1, Addr4: netip.MustParseAddr("172.17.0.2")}},
		Addrs:     map[netip.Addr]uint16{netip.MustParseAddr("172.17.0.2"): 1},
		Links:     map[int]uint16{20: 1},
		Subnets:   map[netip.Prefix]uint16{netip.MustParsePrefix("172.17.0.0/16"): 1},
		HostAddrs: map[netip.Addr]int{netip.MustParseAddr("192.0.2.1"): 2},
		Pairs:     map[[2]uint16]struct{}{{1, 2}: {}},
		Ports: map[policy.PortKey]policy.PortRow{
			{Proto: policy.TCP, Host: netip.MustParseAddrPort("0.0.0.0:8080")}: {Target: netip.MustParseAddrPort("172.17.0.2:80"), Endpoint: 1, Slot: 1},
		},
		Sources: map[policy.SourceKey]struct{}{{Endpoint: 1, Prefix: netip.MustParsePrefix("10.9.0.0/24")}: {}},
	}
}

func settings() Settings {
	return Settings{
		NetnsCookie: 7, SNAT: []PortRange{{First: 1024, Count: 31744}, {First: 61000, Count: 4536}},
		Reserved: map[uint16]struct{}{5000: {}}, HashSeed: 9,
	}
}

// Needs root.
func TestApply(t *testing.T) {
	m := newMaps(t)
	w, err := NewWriter(m)
	require.NoError(t, err)
	res, err := w.Apply(tables(), settings())
	require.NoError(t, err)
	require.Positive(t, res.Changed)
	require.False(t, res.Removed)

	var class bpf.DatapathPortClass
	require.NoError(t, m.m["port_class"].Lookup(uint32(0), &class))
	require.Equal(t, bpf.DatapathPortBitsPORT_TCP, class.Ports[8080], "published: no longer for masquerading")
	require.Equal(t, bpf.DatapathPortBitsPORT_SNAT, class.Ports[8081])
	require.Zero(t, class.Ports[5000], "reserved by others")
	require.Zero(t, class.Ports[40000], "the host's own")
	require.Equal(t, bpf.DatapathPortBitsPORT_SNAT, class.Ports[65535])
	looked := func(a string) bool {
		bit := subnetBit(netip.MustParseAddr(a))
		var class bpf.DatapathPortClass
		require.NoError(t, m.m["port_class"].Lookup(uint32(0), &class))
		return class.Subnets[bit>>3]&(1<<(bit&7)) != 0
	}
	require.True(t, looked("172.17.0.2"))
	require.False(t, looked("10.9.0.1"), "masqueraded: the world does not see it")
	bare := tables()
	row := bare.Networks[1]
	row.Masquerade = false
	bare.Networks[1] = row
	_, err = w.Apply(bare, settings())
	require.NoError(t, err)
	require.True(t, looked("10.9.0.1"), "answers to an allowed address")
	_, err = w.Apply(tables(), settings())
	require.NoError(t, err)
	bit := subnetBit(netip.MustParseAddr("172.17.200.1"))
	require.NotZero(t, class.Subnets[bit>>3]&(1<<(bit&7)))

	t.Run("idempotent", func(t *testing.T) {
		res, err := w.Apply(tables(), settings())
		require.NoError(t, err)
		require.Zero(t, res.Changed)
	})
	t.Run("a new writer finds it done", func(t *testing.T) {
		again, err := NewWriter(m)
		require.NoError(t, err)
		require.EqualValues(t, 9, again.HashSeed())
		res, err := again.Apply(tables(), settings())
		require.NoError(t, err)
		require.Zero(t, res.Changed)
	})
	t.Run("what others changed is mended", func(t *testing.T) {
		require.NoError(t, m.m["links"].Delete(uint32(20)))
		require.NoError(t, m.m["links"].Put(uint32(99), uint32(1)))
		require.NoError(t, w.Resync())
		res, err := w.Apply(tables(), settings())
		require.NoError(t, err)
		require.Equal(t, 2, res.Changed)
		require.ErrorIs(t, m.m["links"].Lookup(uint32(99), new(uint32)), ebpf.ErrKeyNotExist)
	})
	t.Run("the engine's bytes are not ours", func(t *testing.T) {
		require.NoError(t, m.m["port_class"].Lookup(uint32(0), &class))
		class.Engine[8080] = bpf.DatapathPortBitsPORT_TCP
		require.NoError(t, m.m["port_class"].Put(uint32(0), &class))
		next := tables()
		next.Ports = nil
		require.NoError(t, w.Resync())
		res, err := w.Apply(next, settings())
		require.NoError(t, err)
		require.True(t, res.Removed, "its flows must go before the slot is used again")
		require.NoError(t, m.m["port_class"].Lookup(uint32(0), &class))
		require.Equal(t, bpf.DatapathPortBitsPORT_TCP, class.Engine[8080])
		require.Equal(t, bpf.DatapathPortBitsPORT_SNAT, class.Ports[8080])
	})
	t.Run("empty again", func(t *testing.T) {
		res, err := w.Apply(policy.Tables{}, settings())
		require.NoError(t, err)
		require.True(t, res.Removed)
		fill, err := m.Fill()
		require.NoError(t, err)
		for _, f := range fill {
			require.Zero(t, f.Entries, f.Map)
		}
	})
}

// Needs root. Who takes a slot up begins to count at zero; who has it goes on, over restarts too.
func TestCountersRestart(t *testing.T) {
	m := newMaps(t)
	w, err := NewWriter(m)
	require.NoError(t, err)
	count := func() {
		endpoint := make([]bpf.DatapathEndpointCount, ebpf.MustPossibleCPU())
		endpoint[0].Rx.Packets = 7
		require.NoError(t, m.m["endpoint_stats"].Put(uint32(1), endpoint))
		port := make([]bpf.DatapathPortCount, ebpf.MustPossibleCPU())
		port[0].Connections = 7
		require.NoError(t, m.m["port_stats"].Put(uint32(1), port))
	}
	counted := func() (packets, connections uint64) {
		e, err := m.EndpointStats(1)
		require.NoError(t, err)
		p, err := m.PortStats(1)
		require.NoError(t, err)
		return e.RxPackets, p.Connections
	}
	count()
	_, err = w.Apply(tables(), settings())
	require.NoError(t, err)
	packets, connections := counted()
	require.Zero(t, packets)
	require.Zero(t, connections)

	count()
	next := tables()
	next.Endpoints[1] = policy.EndpointRow{Ifindex: 20, Sandbox: 1, Network: 1, Addr4: netip.MustParseAddr("172.17.0.2"), MAC: policy.MAC{2}}
	_, err = w.Apply(next, settings())
	require.NoError(t, err)
	again, err := NewWriter(m)
	require.NoError(t, err)
	_, err = again.Apply(next, settings())
	require.NoError(t, err)
	packets, connections = counted()
	require.EqualValues(t, 7, packets)
	require.EqualValues(t, 7, connections)
}

// Needs root. Every change of the tables has each flow judged again.
func TestGeneration(t *testing.T) {
	m := newMaps(t)
	w, err := NewWriter(m)
	require.NoError(t, err)
	generation := func() uint32 {
		var cfg bpf.DatapathConfig
		require.NoError(t, m.m["config"].Lookup(uint32(0), &cfg))
		return cfg.Generation
	}
	_, err = w.Apply(tables(), settings())
	require.NoError(t, err)
	first := generation()
	_, err = w.Apply(tables(), settings())
	require.NoError(t, err)
	require.Equal(t, first, generation())
	require.NoError(t, w.Renew())
	require.Equal(t, first+1, generation())
	next := tables()
	next.Pairs = nil
	_, err = w.Apply(next, settings())
	require.NoError(t, err)
	require.Equal(t, first+2, generation())
}

func TestOpenNothing(t *testing.T) {
	_, err := Open(t.TempDir())
	require.ErrorIs(t, err, ErrNotLoaded)
}

// Needs root. What is gone is buried when it is out of the maps and before anything new is in; while that
// fails, nothing new is written, and nothing of it is forgotten.
func TestBury(t *testing.T) {
	m := newMaps(t)
	w, err := NewWriter(m)
	require.NoError(t, err)
	var calls []Gone
	var fail error
	w.Bury = func(g Gone) error {
		calls = append(calls, g)
		var e bpf.DatapathEndpoint
		require.NoError(t, m.m["endpoint_slots"].Lookup(uint32(1), &e))
		require.Zero(t, e, "neither the old nor the new")
		require.ErrorIs(t, m.m["links"].Lookup(uint32(21), new(uint32)), ebpf.ErrKeyNotExist)
		return fail
	}
	_, err = w.Apply(tables(), settings())
	require.NoError(t, err)
	require.Empty(t, calls, "nothing has gone")

	// A neighbour's other network changes the sandbox's number only.
	next := tables()
	next.Endpoints[1] = policy.EndpointRow{Ifindex: 20, Sandbox: 2, Network: 1, Addr4: netip.MustParseAddr("172.17.0.2")}
	_, err = w.Apply(next, settings())
	require.NoError(t, err)
	require.Empty(t, calls)

	// The address changes hands.
	next.Endpoints[1] = policy.EndpointRow{Ifindex: 21, Sandbox: 3, Network: 1, Addr4: netip.MustParseAddr("172.17.0.2")}
	next.Links = map[int]uint16{21: 1}
	next.Ports = nil
	want := Gone{
		Any: true, Addrs: []netip.Addr{netip.MustParseAddr("172.17.0.2")},
		Ports: []GonePort{{
			PortKey: policy.PortKey{Proto: policy.TCP, Host: netip.MustParseAddrPort("0.0.0.0:8080")},
			Target:  netip.MustParseAddrPort("172.17.0.2:80"),
		}},
	}
	fail = errors.New("not now")
	for range 2 {
		_, err = w.Apply(next, settings())
		require.ErrorIs(t, err, fail)
	}
	require.NoError(t, w.Resync())
	fail = nil
	_, err = w.Apply(next, settings())
	require.NoError(t, err)
	require.Equal(t, []Gone{want, want, want}, calls)
	var e bpf.DatapathEndpoint
	require.NoError(t, m.m["endpoint_slots"].Lookup(uint32(1), &e))
	require.EqualValues(t, 21, e.Ifindex)
	_, err = w.Apply(next, settings())
	require.NoError(t, err)
	require.Len(t, calls, 3)
}

// Needs root. Of what gives way by itself, only what is fresh counts; of slots, those that somebody has.
func TestFill(t *testing.T) {
	m := newMaps(t)
	w, err := NewWriter(m)
	require.NoError(t, err)
	s := settings()
	s.Timeouts.TCPSyn = 60
	_, err = w.Apply(tables(), s)
	require.NoError(t, err)
	now := monotonicTicks()
	c, err := m.config()
	require.NoError(t, err)
	require.NotZero(t, c.Timeouts.TcpSyn)
	for i := range uint32(300) {
		seen := now
		if i >= 200 {
			seen = now - max(c.Timeouts.TcpSyn, fragmentTicks) - 2
		}
		syn4, syn6 := bpf.DatapathSyn4{}, bpf.DatapathSyn6{}
		syn4.Answer.F.LastSeen, syn6.Answer.F.LastSeen = seen, seen
		require.NoError(t, m.m["syns4"].Put(bpf.DatapathFlow4Key{Saddr: i}, syn4))
		require.NoError(t, m.m["syns6"].Put(bpf.DatapathFlow6Key{Sport: uint16(i)}, syn6))
		require.NoError(t, m.m["frags"].Put(bpf.DatapathFragKey{Id: i}, bpf.DatapathFrag{Seen: seen}))
	}
	fill, err := m.Fill()
	require.NoError(t, err)
	got := map[string]Fill{}
	for _, f := range fill {
		got[f.Map] = f
	}
	for _, name := range []string{"syns4", "syns6", "frags"} {
		require.Equal(t, Fill{Map: name, Entries: 200, Max: int(m.m[name].MaxEntries())}, got[name])
	}
	require.Equal(t, Fill{Map: "endpoint_slots", Entries: len(tables().Endpoints), Max: maxEndpoints - 1}, got["endpoint_slots"])
	require.Equal(t, Fill{Map: "network_slots", Entries: len(tables().Networks), Max: maxNetworks - 1}, got["network_slots"])
	require.NotZero(t, got["port_slots"].Entries)
	require.Equal(t, maxPorts-1, got["port_slots"].Max)
}

// Needs root. The destination with the most masqueraded flows, if it has its share of the ports.
func TestBusiestDestination(t *testing.T) {
	m := newMaps(t)
	w, err := NewWriter(m)
	require.NoError(t, err)
	s := settings()
	s.SNAT, s.Reserved = []PortRange{{First: 30000, Count: 10}}, nil
	_, err = w.Apply(policy.Tables{}, s)
	require.NoError(t, err)
	busy, quiet := netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("203.0.113.10")
	entries := int64(0)
	open := func(n int, to netip.Addr, flags bpf.DatapathFlowFlags) {
		for range n {
			entries++
			v := bpf.DatapathFlow4{Daddr: addr4(to)}
			v.F.Dport, v.F.Flags = port16(443), flags
			k := bpf.DatapathFlow4Key{Saddr: uint32(entries), Proto: unix.IPPROTO_TCP, Hook: bpf.DatapathHookHOOK_CONTAINER}
			require.NoError(t, m.m["flows4"].Put(k, v))
		}
		require.NoError(t, m.m["flow_gauge"].Put(uint32(0), bpf.DatapathFlowGauge{Entries: [2]int64{2 * entries, 0}}))
	}
	const masqueraded = bpf.DatapathFlowFlagsFLOW_ORIGIN | bpf.DatapathFlowFlagsFLOW_SNAT | bpf.DatapathFlowFlags(bpf.DatapathHookHOOK_UPLINK)
	open(7, busy, masqueraded)
	open(3, quiet, masqueraded)
	open(20, busy, masqueraded&^bpf.DatapathFlowFlagsFLOW_ORIGIN)
	open(20, busy, masqueraded&^bpf.DatapathFlowFlagsFLOW_SNAT)
	got, err := m.BusiestDestination(0.8)
	require.NoError(t, err)
	require.Zero(t, got)
	open(1, busy, masqueraded)
	got, err = m.BusiestDestination(0.8)
	require.NoError(t, err)
	require.Equal(t, Busiest{Proto: "tcp", To: netip.AddrPortFrom(busy, 443), Ports: 8, Max: 10}, got)
}
