// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/promise"
)

func mac(last byte) MAC { return MAC{2, 0x42, 0xac, 0x11, 0, last} }

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// sample is two networks with two containers, the first of which is in both and publishes.
func sample() Intents {
	return Intents{
		State: State{
			Networks: []Network{
				{ID: "n1", Name: "bridge", Source: SourceDocker, Bridge: "docker0", Subnets: []netip.Prefix{netip.MustParsePrefix("172.17.0.0/16")}, Gateways: addrs("172.17.0.1")},
				{
					ID: "n2", Name: "back", Source: SourceStore, Bridge: "br-2", Internal: true, NoICC: true,
					Subnets:  []netip.Prefix{netip.MustParsePrefix("172.18.0.0/16"), netip.MustParsePrefix("fd00:18::/64")},
					Gateways: addrs("172.18.0.1", "fd00:18::1"),
				},
			},
			Endpoints: []Endpoint{
				{ID: "e1", NetworkID: "n1", SandboxID: "c1", Name: "web", Addrs: addrs("172.17.0.2"), MAC: mac(2)},
				{ID: "e2", NetworkID: "n2", SandboxID: "c1", Name: "web", Addrs: addrs("172.18.0.2", "fd00:18::2"), MAC: mac(3)},
				{ID: "e3", NetworkID: "n1", SandboxID: "c2", Name: "db", Addrs: addrs("172.17.0.3"), MAC: mac(4)},
			},
			Ports: []Port{
				{Proto: TCP, Host: netip.MustParseAddrPort("0.0.0.0:8080"), EndpointID: "e1", Target: 80},
				{Proto: TCP, Host: netip.MustParseAddrPort("[::]:8080"), EndpointID: "e1", Target: 80},
			},
		},
		Devices: Devices{
			Bridges: []Bridge{
				{Ifindex: 10, Name: "docker0", MAC: mac(100), MTU: 1500},
				{Ifindex: 11, Name: "br-2", MAC: mac(101), MTU: 1400},
			},
			Links: []Link{
				{Ifindex: 20, Name: "veth1", Bridge: "docker0", PeerMAC: mac(2)},
				{Ifindex: 21, Name: "veth2", Bridge: "br-2", PeerMAC: mac(3)},
				{Ifindex: 22, Name: "veth3", Bridge: "docker0", PeerMAC: mac(4)},
			},
			HostAddrs: []HostAddr{{Addr: netip.MustParseAddr("192.0.2.1"), Ifindex: 2}, {Addr: netip.MustParseAddr("127.0.0.1"), Ifindex: 1}},
		},
		Attached: map[int]bool{20: true, 21: true, 22: true},
	}
}

func TestCompile(t *testing.T) {
	tables, slots := Compile(sample(), Slots{})
	require.Equal(t, map[string]uint16{"n1": 1, "n2": 2}, slots.Networks)
	require.Equal(t, map[string]uint16{"e1": 1, "e2": 2, "e3": 3}, slots.Endpoints)
	require.Empty(t, tables.Waiting)
	require.Empty(t, tables.Problems)
	require.Equal(t, NetworkRow{Ifindex: 10, MAC: mac(100), MTU: 1500, Masquerade: true, Gateway4: netip.MustParseAddr("172.17.0.1")}, tables.Networks[1])
	require.Equal(t, NetworkRow{
		Ifindex: 11, MAC: mac(101), MTU: 1400, NoICC: true, Internal: true,
		Gateway4: netip.MustParseAddr("172.18.0.1"), Gateway6: netip.MustParseAddr("fd00:18::1"),
	}, tables.Networks[2], "an internal network is not masqueraded")
	require.Equal(t, tables.Endpoints[1].Sandbox, tables.Endpoints[2].Sandbox, "one container, two networks")
	require.NotEqual(t, tables.Endpoints[1].Sandbox, tables.Endpoints[3].Sandbox)
	require.Equal(t, map[int]uint16{20: 1, 21: 2, 22: 3}, tables.Links)
	require.Equal(t, map[netip.Addr]int{netip.MustParseAddr("192.0.2.1"): 2}, tables.HostAddrs, "127/8 needs no entry")
	v6 := tables.Ports[PortKey{TCP, netip.MustParseAddrPort("[::]:8080")}]
	require.Equal(t, netip.MustParseAddrPort("172.17.0.2:80"), v6.Target, "over IPv6 to a container without: by its IPv4 address")
}

// What is not READY must have no row and no link: the data path denies by their absence.
func TestCompileNotReady(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(*Intents)
		why   string
	}{
		"no link":        {func(in *Intents) { in.Devices.Links = in.Devices.Links[1:] }, "no port of docker0 has 02:42:ac:11:00:02 behind it"},
		"not guarded":    {func(in *Intents) { in.Attached[20] = false }, "no programs on veth1 yet"},
		"no bridge":      {func(in *Intents) { in.Devices.Bridges = in.Devices.Bridges[1:] }, "there is no bridge docker0"},
		"other bridge":   {func(in *Intents) { in.Devices.Links[0].Bridge = "br-2" }, "no port of docker0 has 02:42:ac:11:00:02 behind it"},
		"unknown MAC":    {func(in *Intents) { in.State.Endpoints[0].MAC = MAC{}; in.Devices.Links[0].PeerMAC = MAC{} }, "no port of docker0 has 00:00:00:00:00:00 behind it"},
		"network gone":   {func(in *Intents) { in.State.Networks = in.State.Networks[1:] }, "its network is not served"},
		"nothing broken": {func(*Intents) {}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			in := sample()
			tc.spoil(&in)
			tables, slots := Compile(in, Slots{})
			require.Equal(t, tc.why, tables.Waiting["e1"])
			_, row := tables.Endpoints[slots.Endpoints["e1"]]
			require.Equal(t, tc.why == "", row)
			for ifindex, slot := range tables.Links {
				require.Contains(t, tables.Endpoints, slot, "link %d", ifindex)
			}
		})
	}
}

func TestCompilePorts(t *testing.T) {
	in := sample()
	in.State.Ports = []Port{
		{Proto: TCP, Host: netip.MustParseAddrPort("0.0.0.0:1"), EndpointID: "e1", Target: 80},
		{Proto: TCP, Host: netip.MustParseAddrPort("0.0.0.0:1"), EndpointID: "e3", Target: 80},
		{Proto: UDP, Host: netip.MustParseAddrPort("0.0.0.0:1"), EndpointID: "e3", Target: 80},
		{Proto: TCP, Host: netip.MustParseAddrPort("0.0.0.0:2"), EndpointID: "e2", Target: 80}, // internal
		{Proto: TCP, Host: netip.MustParseAddrPort("0.0.0.0:3"), EndpointID: "gone", Target: 80},
		{Proto: TCP, Host: netip.MustParseAddrPort("0.0.0.0:0"), EndpointID: "e1", Target: 80},
	}
	tables, _ := Compile(in, Slots{})
	require.Equal(t, []PortKey{
		{TCP, netip.MustParseAddrPort("0.0.0.0:1")}, {UDP, netip.MustParseAddrPort("0.0.0.0:1")},
	}, tables.SortedPorts())
	require.Len(t, tables.Problems, 2)
	require.Contains(t, tables.Problems[0].Setting, "0.0.0.0:0->80/tcp of web")
	require.Contains(t, tables.Problems[1].Text, "already leads to 172.17.0.2:80")
}

func TestCompileAllowed(t *testing.T) {
	in := sample()
	in.Allowed = [][2]string{
		{"bpfnet/back", "docker/bridge"}, {"docker/bridge", "docker/bridge"}, {"docker/bridge", "docker/gone"},
	}
	tables, _ := Compile(in, Slots{})
	require.Equal(t, map[[2]uint16]struct{}{{1, 2}: {}}, tables.Pairs)

	in.Allowed = [][2]string{{"back", "bridge"}, {"docker/back", "docker/bridge"}}
	tables, _ = Compile(in, Slots{})
	require.Empty(t, tables.Pairs, "another source's network of that name is another network")
}

// A thing keeps its slot while it lives, and a slot freed in one round is not used in the same: its
// flows are purged in between.
func TestSlotsAreKept(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	var slots Slots
	alive := make(map[string]bool)
	for range 300 {
		for i := range 20 {
			alive[fmt.Sprintf("e%d", i)] = r.IntN(2) == 0
		}
		var in Intents
		in.State.Networks = []Network{{ID: "n1"}}
		for id, ok := range alive {
			if ok {
				in.State.Endpoints = append(in.State.Endpoints, Endpoint{ID: id, NetworkID: "n1"})
			}
		}
		_, next := Compile(in, slots)
		taken := make(map[uint16]string)
		before := make(map[uint16]string)
		for id, slot := range slots.Endpoints {
			before[slot] = id
		}
		for id, slot := range next.Endpoints {
			require.NotZero(t, slot)
			require.Empty(t, taken[slot], "two in one slot")
			taken[slot] = id
			if old, ok := before[slot]; ok {
				require.Equal(t, old, id, "a slot changed hands in one round")
			}
		}
		slots = next
	}
}

// The order of the lists, which sources do not promise, changes nothing.
func TestCompileIsPure(t *testing.T) {
	want, wantSlots := Compile(sample(), Slots{})
	for range 50 {
		in := sample()
		rand.Shuffle(len(in.State.Endpoints), func(i, j int) {
			in.State.Endpoints[i], in.State.Endpoints[j] = in.State.Endpoints[j], in.State.Endpoints[i]
		})
		slices.Reverse(in.State.Networks)
		slices.Reverse(in.State.Ports)
		slices.Reverse(in.Devices.Links)
		got, slots := Compile(in, Slots{})
		require.True(t, want.Equal(got))
		require.True(t, maps.Equal(wantSlots.Endpoints, slots.Endpoints))
	}
}

func TestCompileLimits(t *testing.T) {
	var in Intents
	in.State.Networks = []Network{{ID: "n1", Name: "n1"}}
	for i := range MaxEndpoints + 10 {
		in.State.Endpoints = append(in.State.Endpoints, Endpoint{ID: fmt.Sprintf("e%05d", i), NetworkID: "n1"})
	}
	tables, slots := Compile(in, Slots{})
	require.Len(t, slots.Endpoints, MaxEndpoints-1)
	require.Equal(t, "more than 4095 endpoints", tables.Waiting["e04105"])
}

// More ports than there is room for: what was served is served on, and the others are named.
func TestCompilePortLimit(t *testing.T) {
	const surplus = 7
	in := Intents{}
	in.State.Networks = []Network{{ID: "n1", Name: "n1", Source: "docker"}}
	in.State.Endpoints = []Endpoint{
		{ID: "e1", NetworkID: "n1", Name: "web", Addrs: []netip.Addr{netip.MustParseAddr("172.20.0.2")}},
		{ID: "e0", NetworkID: "n1", Name: "late", Addrs: []netip.Addr{netip.MustParseAddr("172.20.0.3")}},
	}
	port := func(endpoint string, n int) Port {
		return Port{Proto: TCP, Host: netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(n)), EndpointID: endpoint, Target: 80}
	}
	for n := range MaxPorts - 1 {
		in.State.Ports = append(in.State.Ports, port("e1", 1024+n))
	}
	before, slots := Compile(in, Slots{})
	require.Empty(t, before.Problems)
	require.Len(t, before.Ports, MaxPorts-1)
	for n := range surplus {
		in.State.Ports = append(in.State.Ports, port("e0", 40000+n))
	}
	after, _ := Compile(in, slots)
	require.Equal(t, before.Ports, after.Ports, "what was served is served on, by its slots")
	require.Len(t, after.Problems, surplus)
	for n, p := range after.Problems {
		require.Equal(t, Problem{
			Network: "docker/n1", Setting: fmt.Sprintf("port 0.0.0.0:%d/tcp of late", 40000+n),
			Text: "more than 16383 published ports", Instead: "not served",
		}, p)
	}
	promise.Kept(t, promise.Pressure, "More published ports than there is room for: those that were served are served on, and each of the others is named with its container.",
		"%d served, %d named", len(after.Ports), surplus)
}
