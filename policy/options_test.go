// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// What is made of options: never more open than asked for, and every wrong one told of once.
func TestParseOptions(t *testing.T) {
	a := netip.MustParseAddr
	for name, c := range map[string]struct {
		given    map[string]string
		internal bool
		want     Options
		wrong    []string // settings
	}{
		"none":  {},
		"empty": {given: map[string]string{OptMode4: "", OptICC: "", OptSource4: ""}},
		"all of them": {
			given: map[string]string{
				OptBridge: "br", OptICC: "false", OptMasquerade: "true", OptHostBinding: "192.0.2.1", OptMode4: "nat-unprotected", OptMode6: "routed",
				OptTrusted: "eth0:eth1: :eth0", OptSource4: "192.0.2.9", OptMTU: "1400", "com.example": "of no concern",
			},
			want: Options{
				NoICC: true, HostBinding: a("192.0.2.1"), Mode4: ModeNATUnprotected, Mode6: ModeRouted,
				Trusted: []string{"eth0", "eth1"}, Source4: a("192.0.2.9"), MTU: 1400,
			},
		},
		"every address":        {given: map[string]string{OptHostBinding: "0.0.0.0"}},
		"no such mode":         {given: map[string]string{OptMode4: "Routed"}, wrong: []string{OptMode4}},
		"isolated":             {given: map[string]string{OptMode4: "isolated"}, internal: true, want: Options{Mode4: ModeIsolated}},
		"isolated, not so":     {given: map[string]string{OptMode6: "isolated"}, want: Options{Mode6: ModeIsolated}, wrong: []string{OptMode6}},
		"routed and internal":  {given: map[string]string{OptMode4: "routed"}, internal: true, wrong: []string{OptMode4}},
		"open and internal":    {given: map[string]string{OptMode6: "nat-unprotected"}, internal: true, wrong: []string{OptMode6}},
		"trusted and internal": {given: map[string]string{OptTrusted: "eth0"}, internal: true, want: Options{Trusted: []string{"eth0"}}, wrong: []string{OptTrusted}},
		"source and routed": {
			given: map[string]string{OptMode4: "routed", OptSource4: "192.0.2.9"},
			want:  Options{Mode4: ModeRouted, Source4: a("192.0.2.9")}, wrong: []string{OptSource4},
		},
		"source of the other family, routed": {
			given: map[string]string{OptMode4: "routed", OptSource6: "2001:db8::9"}, want: Options{Mode4: ModeRouted, Source6: a("2001:db8::9")},
		},
		"source and no masquerade": {
			given: map[string]string{OptMasquerade: "0", OptSource6: "2001:db8::9"},
			want:  Options{NoMasquerade: true, Source6: a("2001:db8::9")}, wrong: []string{OptSource6},
		},
		"source and internal": {
			given: map[string]string{OptSource4: "192.0.2.9"}, internal: true, want: Options{Source4: a("192.0.2.9")}, wrong: []string{OptSource4},
		},
		"wrong families": {
			given: map[string]string{OptSource4: "2001:db8::9", OptSource6: "192.0.2.9"}, wrong: []string{OptSource4, OptSource6},
		},
		"no addresses": {
			given: map[string]string{OptSource4: "eth0", OptSource6: "::1", OptHostBinding: "eth0"},
			want:  Options{HostBinding: a("127.0.0.1")}, wrong: []string{OptHostBinding, OptSource4, OptSource6},
		},
		"neither true nor false": {
			given: map[string]string{OptICC: "perhaps", OptMasquerade: "perhaps"}, want: Options{NoICC: true}, wrong: []string{OptICC, OptMasquerade},
		},
		"no MTU": {given: map[string]string{OptMTU: "67"}, wrong: []string{OptMTU}},
	} {
		t.Run(name, func(t *testing.T) {
			got, problems := ParseOptions(c.given, c.internal)
			require.Equal(t, c.want, got)
			var settings []string
			for _, p := range problems {
				require.NotEmpty(t, p.Text)
				require.NotEmpty(t, p.Instead)
				settings = append(settings, p.Setting)
			}
			require.ElementsMatch(t, c.wrong, settings)
		})
	}
}

// Which ports are open by the container's own address, and which host ports are there, by mode.
func TestCompileModes(t *testing.T) {
	const web, other = "172.17.0.2", "172.19.0.2"
	for name, c := range map[string]struct {
		change func(*Intents)
		ports  []string // host side
		closed []string
		open   []string
	}{
		"nat": {ports: []string{"0.0.0.0:8080", "[::]:8080"}},
		"unprotected": {
			change: func(in *Intents) { in.State.Networks[0].Mode4 = ModeNATUnprotected },
			ports:  []string{"0.0.0.0:8080", "[::]:8080"},
		},
		"routed": {
			change: func(in *Intents) { in.State.Networks[0].Mode4 = ModeRouted },
			closed: []string{"0.0.0.0:8080", "[::]:8080"}, open: []string{web + ":80"},
		},
		"routed, the other family": {
			change: func(in *Intents) { in.State.Networks[0].Mode6 = ModeRouted },
			ports:  []string{"0.0.0.0:8080", "[::]:8080"},
		},
		"trusted": {
			change: func(in *Intents) { in.State.Networks[0].Trusted = []string{"eth0"} },
			ports:  []string{"0.0.0.0:8080", "[::]:8080"}, open: []string{web + ":80"},
		},
		"direct routing": {
			change: func(in *Intents) { in.DirectRouting = true },
			ports:  []string{"0.0.0.0:8080", "[::]:8080"}, open: []string{web + ":80"},
		},
		"a routed network that is not the gateway": {
			change: func(in *Intents) {
				in.State.Networks[1].Internal, in.State.Networks[1].Mode4, in.State.Networks[1].Mode6 = false, ModeRouted, ModeRouted
			},
			ports: []string{"0.0.0.0:8080", "[::]:8080"}, open: []string{"172.18.0.2:80", "[fd00:18::2]:80"},
		},
		"internal wins": {
			change: func(in *Intents) {
				in.State.Networks[0].Internal, in.State.Networks[0].Mode4, in.DirectRouting = true, ModeRouted, true
			},
			closed: []string{"0.0.0.0:8080", "[::]:8080"},
		},
		"on one address": {
			change: func(in *Intents) { in.State.Ports = in.State.Ports[0].Narrow(netip.MustParseAddr("192.0.2.1")) },
			ports:  []string{"192.0.2.1:8080"}, closed: []string{"0.0.0.0:8080"},
		},
		"on an address of the other family": {
			change: func(in *Intents) { in.State.Ports = in.State.Ports[0].Narrow(netip.MustParseAddr("2001:db8::1")) },
			closed: []string{"0.0.0.0:8080"},
		},
		"linked": {
			change: func(in *Intents) {
				in.State.Networks[0].NoICC = true
				in.State.Openings = []Opening{{From: "e3", To: "e1", Proto: TCP, Port: 5432}}
				for i, own := range map[int]string{0: "fd00::31", 2: "fd00::33"} { // for which the Engine opens no link
					e := &in.State.Endpoints[i]
					e.Addrs = append(slices.Clone(e.Addrs), netip.MustParseAddr(own))
				}
			},
			ports: []string{"0.0.0.0:8080", "[::]:8080"}, open: []string{"172.17.0.3 " + web + ":5432"},
		},
		"linked across networks": {
			change: func(in *Intents) { in.State.Openings = []Opening{{From: "e3", To: "e2", Proto: TCP, Port: 5432}} },
			ports:  []string{"0.0.0.0:8080", "[::]:8080"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			in := sample()
			if c.change != nil {
				c.change(&in)
			}
			in.Devices.Uplinks = []Uplink{{Ifindex: 2, Name: "eth0"}}
			tables, slots := Compile(in, Slots{})
			var ports, closed, open []string
			for k := range tables.Ports {
				ports = append(ports, k.Host.String())
			}
			for k, r := range tables.Closed {
				require.Zero(t, r.Endpoint)
				require.True(t, r.Target.IsValid())
				closed = append(closed, k.Host.String())
			}
			for k, slot := range tables.Open {
				if k.From.IsValid() {
					open = append(open, k.From.String()+" "+k.To.String())
					continue
				}
				require.NotZero(t, slot, "its flows go with the port")
				open = append(open, k.To.String())
			}
			require.ElementsMatch(t, c.ports, ports)
			require.ElementsMatch(t, c.closed, closed)
			require.ElementsMatch(t, c.open, open)
			require.Empty(t, tables.Problems)
			again, _ := Compile(in, slots)
			require.True(t, tables.Equal(again))
		})
	}
}

// What only the host's devices can tell is told of once, and the rest is served.
func TestCompileProblems(t *testing.T) {
	a := netip.MustParseAddr
	for name, c := range map[string]struct {
		change  func(*Intents)
		setting string
	}{
		"no trusted device": {func(in *Intents) { in.State.Networks[0].Trusted = []string{"eth0", "eth7"} }, OptTrusted},
		"foreign source":    {func(in *Intents) { in.State.Networks[0].Source4 = a("192.0.2.9") }, OptSource4},
		"foreign source 6":  {func(in *Intents) { in.State.Networks[0].Source6 = a("2001:db8::9") }, OptSource6},
		"foreign binding":   {func(in *Intents) { in.State.Networks[0].HostBinding = a("192.0.2.9") }, OptHostBinding},
		"foreign binding with ports": {func(in *Intents) {
			in.State.Networks[0].HostBinding = a("192.0.2.9")
			in.State.Ports[0].Host = netip.MustParseAddrPort("192.0.2.9:8080")
		}, OptHostBinding},
		"foreign address":      {func(in *Intents) { in.State.Ports[0].Host = netip.MustParseAddrPort("192.0.2.9:8080") }, "port 192.0.2.9:8080->80/tcp of web"},
		"SCTP, another number": {func(in *Intents) { in.State.Ports[0].Proto = SCTP }, "port 0.0.0.0:8080->80/sctp of web"},
		"an address in vain": {func(in *Intents) {
			in.State.Networks[0].Mode4 = ModeRouted
			in.State.Ports[0].Host = netip.MustParseAddrPort("127.0.0.1:8080")
		}, "port 127.0.0.1:8080->80/tcp of web"},
		"the source's own": {func(in *Intents) {
			p := Problem{Network: "docker/bridge", Setting: OptMode4, Text: "odd", Instead: "nat"}
			in.State.Problems = []Problem{p, p}
		}, OptMode4},
	} {
		t.Run(name, func(t *testing.T) {
			in := sample()
			in.Devices.Uplinks = []Uplink{{Ifindex: 2, Name: "eth0"}}
			c.change(&in)
			tables, _ := Compile(in, Slots{})
			require.Len(t, tables.Problems, 1)
			require.Equal(t, "docker/bridge", tables.Problems[0].Network)
			require.Equal(t, c.setting, tables.Problems[0].Setting)
			require.Len(t, tables.Endpoints, 3)
		})
	}
	in := sample()
	in.State.Networks[0].Trusted = []string{"eth0", "docker0", "eth7"}
	in.Devices.Uplinks = []Uplink{{Ifindex: 2, Name: "eth0"}}
	tables, _ := Compile(in, Slots{})
	require.Equal(t, map[TrustedKey]struct{}{{1, 0}: {}, {1, 2}: {}, {1, 10}: {}}, tables.Trusted)
}
