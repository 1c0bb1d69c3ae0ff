// SPDX-License-Identifier: Apache-2.0

package docker

import (
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/policy"
)

var update = flag.Bool("update", false, "rewrite golden files")

// recorded is where answers of a real Engine 20.10.24 are kept (iptables and proxy off; default
// bridge with fixed-cidr-v6 fd00:d0::/64; four containers, "side" sharing "web"'s namespace).
const recorded = "testdata/engine-20.10"

func load[T any](t *testing.T, name string) T {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(recorded, name))
	require.NoError(t, err)
	var v T
	require.NoError(t, json.Unmarshal(b, &v))
	return v
}

// format shows a state one thing a line.
func format(st policy.State) string {
	var b strings.Builder
	for _, n := range st.Networks {
		fmt.Fprintf(&b, "network %s %s subnets=%v gateways=%v noicc=%t nomasq=%t internal=%t host=%v mtu=%d\n",
			n.Name, n.Bridge, n.Subnets, n.Gateways, n.NoICC, n.NoMasquerade, n.Internal, n.HostBinding, n.MTU)
	}
	nets := make(map[string]string)
	for _, n := range st.Networks {
		nets[n.ID] = n.Name
	}
	eps := make(map[string]string)
	for _, e := range st.Endpoints {
		eps[e.ID] = e.Name + "@" + nets[e.NetworkID]
		fmt.Fprintf(&b, "endpoint %s sandbox=%.12s %v %v allowed=%v\n", eps[e.ID], e.SandboxID, e.MAC, e.Addrs, e.Allowed)
	}
	for _, p := range st.Ports {
		fmt.Fprintf(&b, "port %v %s\n", p, eps[p.EndpointID])
	}
	return b.String()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join(recorded, name)
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), got)
}

func recordedState(t *testing.T) (networks []network.Inspect, wishes map[string]wish, listed, inspected map[string]run) {
	t.Helper()
	for _, n := range []string{"bridge", "fe", "back", "local"} {
		networks = append(networks, load[network.Inspect](t, "network-"+n+".json"))
	}
	wishes, listed, inspected = make(map[string]wish), make(map[string]run), make(map[string]run)
	for _, c := range load[[]container.Summary](t, "containers.json") {
		listed[c.ID] = run{summaryBindings(c.Ports), runEndpoints(c.NetworkSettings.Networks)}
	}
	for _, name := range []string{"web", "def", "loc"} {
		c := load[container.InspectResponse](t, "container-"+name+".json")
		inspected[c.ID] = run{actualBindings(c.NetworkSettings.Ports), runEndpoints(c.NetworkSettings.Networks)}
		wishes[c.ID] = wish{
			fixed:   fixedBindings(load[hostConfig](t, "hostconfig-"+name+".json")),
			allowed: parseAllowed(c.Config.Labels[labelAllowed]),
		}
	}
	return
}

func TestRecordedEngine(t *testing.T) {
	networks, wishes, listed, inspected := recordedState(t)
	def := DefaultBridgeSettings{}
	golden(t, "started.golden", format(buildState(networks, wishes, listed, def)))
	// A container's inspect and its entry in the list say the same.
	require.Equal(t, buildState(networks, wishes, listed, def), buildState(networks, wishes, inspected, def))
	// Before the start only fixed ports are known.
	golden(t, "starting.golden", format(buildState(networks, wishes, nil, def)))
	// What a former run was given says nothing about this one.
	old := make(map[string]run)
	for id, r := range listed {
		old[id] = run{r.bindings, map[string]int{"another": 0}}
	}
	require.Equal(t, buildState(networks, wishes, nil, def), buildState(networks, wishes, old, def))
}

func mustNet(t *testing.T, text string) network.Inspect {
	t.Helper()
	var n network.Inspect
	require.NoError(t, json.Unmarshal([]byte(text), &n))
	return n
}

func TestTranslateNetwork(t *testing.T) {
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	for _, c := range []struct {
		name  string
		json  string
		def   DefaultBridgeSettings
		want  policy.Network // ID, Source filled in
		wrong []string       // settings that are reported
		no    bool
	}{
		{name: "plain", json: `{"Name":"n","Id":"0123456789abcdef","Driver":"bridge","IPAM":{"Config":[{"Subnet":"172.18.0.0/16","Gateway":"172.18.0.1"}]}}`,
			want: policy.Network{Name: "n", Bridge: "br-0123456789ab", Subnets: []netip.Prefix{p("172.18.0.0/16")}, Gateways: []netip.Addr{a("172.18.0.1")}}},
		{name: "no gateway, unmasked subnet", json: `{"Name":"n","Id":"01","Driver":"bridge","IPAM":{"Config":[{"Subnet":"10.1.2.3/24"}]}}`,
			want: policy.Network{Name: "n", Bridge: "br-01", Subnets: []netip.Prefix{p("10.1.2.0/24")}, Gateways: []netip.Addr{a("10.1.2.1")}}},
		{name: "IPv6 off in spite of a subnet", json: `{"Name":"n","Id":"01","Driver":"bridge","IPAM":{"Config":[{"Subnet":"fd00::/64"},{"Subnet":"10.0.0.0/24"}]}}`,
			want: policy.Network{Name: "n", Bridge: "br-01", Subnets: []netip.Prefix{p("10.0.0.0/24")}, Gateways: []netip.Addr{a("10.0.0.1")}}},
		{name: "dual stack, all options", json: `{"Name":"n","Id":"01","Driver":"bridge","Internal":true,"EnableIPv6":true,
			"IPAM":{"Config":[{"Subnet":"10.0.0.0/24","Gateway":"10.0.0.254"},{"Subnet":"fd00::/64","Gateway":"fd00::9"}]},
			"Options":{"com.docker.network.bridge.name":"lan0","com.docker.network.bridge.enable_icc":"false",
			"com.docker.network.bridge.enable_ip_masquerade":"0","com.docker.network.bridge.host_binding_ipv4":"192.0.2.1",
			"com.docker.network.driver.mtu":"9000"}}`,
			want: policy.Network{Name: "n", Bridge: "lan0", Internal: true, NoICC: true, NoMasquerade: true, MTU: 9000, HostBinding: a("192.0.2.1"),
				Subnets: []netip.Prefix{p("10.0.0.0/24"), p("fd00::/64")}, Gateways: []netip.Addr{a("10.0.0.254"), a("fd00::9")}}},
		{name: "nonsense in options", json: `{"Name":"n","Id":"01","Driver":"bridge","IPAM":{"Config":[{"Subnet":"10.0.0.0/24"}]},
			"Options":{"com.docker.network.bridge.enable_icc":"maybe","com.docker.network.bridge.host_binding_ipv4":"here","com.docker.network.driver.mtu":"-1"}}`,
			want:  policy.Network{Name: "n", Bridge: "br-01", NoICC: true, HostBinding: a("127.0.0.1"), Subnets: []netip.Prefix{p("10.0.0.0/24")}, Gateways: []netip.Addr{a("10.0.0.1")}},
			wrong: []string{policy.OptICC, policy.OptHostBinding, policy.OptMTU}},
		{name: "options of Engine 29", json: `{"Name":"n","Id":"01","Driver":"bridge","IPAM":{"Config":[{"Subnet":"10.0.0.0/24"}]},
			"Options":{"com.docker.network.bridge.gateway_mode_ipv4":"routed","com.docker.network.bridge.gateway_mode_ipv6":"nat-unprotected",
			"com.docker.network.bridge.trusted_host_interfaces":"eth0:eth1","com.docker.network.host_ipv6":"2001:db8::9"}}`,
			want: policy.Network{Name: "n", Bridge: "br-01", Mode4: policy.ModeRouted, Mode6: policy.ModeNATUnprotected, Trusted: []string{"eth0", "eth1"},
				Source6: a("2001:db8::9"), Subnets: []netip.Prefix{p("10.0.0.0/24")}, Gateways: []netip.Addr{a("10.0.0.1")}}},
		{name: "isolated, and not internal", json: `{"Name":"n","Id":"01","Driver":"bridge","IPAM":{"Config":[{"Subnet":"10.0.0.0/24"}]},
			"Options":{"com.docker.network.bridge.gateway_mode_ipv4":"isolated"}}`,
			want:  policy.Network{Name: "n", Bridge: "br-01", Mode4: policy.ModeIsolated, Internal: true, Subnets: []netip.Prefix{p("10.0.0.0/24")}, Gateways: []netip.Addr{a("10.0.0.1")}},
			wrong: []string{policy.OptMode4}},
		{name: "default bridge: its masquerade label lies", json: `{"Name":"bridge","Id":"01","Driver":"bridge","IPAM":{"Config":[{"Subnet":"172.17.0.0/16"}]},
			"Options":{"com.docker.network.bridge.default_bridge":"true","com.docker.network.bridge.name":"docker0","com.docker.network.bridge.enable_ip_masquerade":"false",
			"com.docker.network.bridge.host_binding_ipv4":"0.0.0.0"}}`,
			want: policy.Network{Name: "bridge", Bridge: "docker0", Subnets: []netip.Prefix{p("172.17.0.0/16")}, Gateways: []netip.Addr{a("172.17.0.1")}}},
		{name: "default bridge: our settings", json: `{"Name":"bridge","Id":"01","Driver":"bridge","IPAM":{"Config":[{"Subnet":"172.17.0.0/16"}]},
			"Options":{"com.docker.network.bridge.default_bridge":"true","com.docker.network.bridge.name":"docker0"}}`,
			def:  DefaultBridgeSettings{NoMasquerade: true, NoICC: true, HostBinding: a("192.0.2.1")},
			want: policy.Network{Name: "bridge", Bridge: "docker0", NoICC: true, NoMasquerade: true, HostBinding: a("192.0.2.1"), Subnets: []netip.Prefix{p("172.17.0.0/16")}, Gateways: []netip.Addr{a("172.17.0.1")}}},
		{name: "another driver", json: `{"Name":"n","Id":"01","Driver":"macvlan","IPAM":{"Config":[{"Subnet":"10.0.0.0/24"}]}}`, no: true},
		{name: "a template for networks", json: `{"Name":"n","Id":"01","Driver":"bridge","ConfigOnly":true,"IPAM":{"Config":[{"Subnet":"10.0.0.0/24"}]}}`, no: true},
		{name: "no subnet", json: `{"Name":"n","Id":"01","Driver":"bridge","IPAM":{"Config":[]}}`, no: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := mustNet(t, c.json)
			got, eps, problems, ok := translateNetwork(in, c.def)
			require.Equal(t, !c.no, ok)
			require.Empty(t, eps)
			if ok {
				c.want.ID, c.want.Source = in.ID, policy.SourceDocker
				require.Equal(t, c.want, got)
				var settings []string
				for _, p := range problems {
					require.Equal(t, "docker/n", p.Network)
					settings = append(settings, p.Setting)
				}
				require.Equal(t, c.wrong, settings)
			}
		})
	}
}

func TestTranslateEndpoints(t *testing.T) {
	_, eps, _, ok := translateNetwork(mustNet(t, `{"Name":"n","Id":"01","Driver":"bridge","IPAM":{"Config":[{"Subnet":"172.18.0.0/16"}]},"Containers":{
		"c2":{"Name":"web","EndpointID":"e2","MacAddress":"02:42:ac:12:00:02","IPv4Address":"172.18.0.2/16","IPv6Address":"fd00::2/64"},
		"ep-e1":{"Name":"build","EndpointID":"e1","MacAddress":"","IPv4Address":"172.18.0.3/16","IPv6Address":""}}}`), DefaultBridgeSettings{})
	require.True(t, ok)
	require.Equal(t, []policy.Endpoint{
		{ID: "e2", NetworkID: "01", SandboxID: "c2", Name: "web", Source: policy.SourceDocker, MAC: policy.MAC{2, 0x42, 0xac, 0x12, 0, 2},
			Addrs: []netip.Addr{netip.MustParseAddr("172.18.0.2"), netip.MustParseAddr("fd00::2")}},
		{ID: "e1", NetworkID: "01", SandboxID: "ep-e1", Name: "build", Source: policy.SourceDocker,
			Addrs: []netip.Addr{netip.MustParseAddr("172.18.0.3")}},
	}, eps)
}

func TestFixedBindings(t *testing.T) {
	for text, want := range map[string][]binding{
		`{}`: nil,
		`{"PortBindings":{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}}`: {{policy.TCP, 80, netip.Addr{}, 8080}},
		`{"PortBindings":{"80":[{"HostPort":"8080"}]}}`:                 {{policy.TCP, 80, netip.Addr{}, 8080}},
		`{"PortBindings":{"53/udp":[{"HostIp":"::1","HostPort":"53"},{"HostIp":"127.0.0.1","HostPort":"54-54"}]}}`: {
			{policy.UDP, 53, netip.MustParseAddr("::1"), 53}, {policy.UDP, 53, netip.MustParseAddr("127.0.0.1"), 54}},
		`{"PortBindings":{"9/sctp":[{"HostPort":"9"}]}}`: {{policy.SCTP, 9, netip.Addr{}, 9}},
		// Not fixed, or not to be understood.
		`{"PortBindings":{"80/tcp":[{"HostPort":""},{"HostPort":"0"},{"HostPort":"8000-8010"},{"HostPort":"x"},{"HostPort":"70000"}]}}`: nil,
		`{"PortBindings":{"80/dccp":[{"HostPort":"80"}],"x/tcp":[{"HostPort":"81"}],"0/tcp":[{"HostPort":"82"}],"1/tcp":null}}`:         nil,
		`{"PortBindings":{"80/tcp":[{"HostIp":"nowhere","HostPort":"80"}]},"PublishAllPorts":true}`:                                     nil,
	} {
		var hc hostConfig
		require.NoError(t, json.Unmarshal([]byte(text), &hc))
		require.Equal(t, want, fixedBindings(hc), text)
	}
}

func TestParseAllowed(t *testing.T) {
	require.Empty(t, parseAllowed(""))
	require.Equal(t, []netip.Prefix{
		netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("2001:db8::/32"),
	}, parseAllowed(" 10.9.3.0/16, 192.0.2.7,nonsense,,2001:db8::/32"))
}

// A container that asks for a port that another one has does not get it while its start fails.
func TestTakenPort(t *testing.T) {
	n := mustNet(t, `{"Name":"n","Id":"01","Driver":"bridge","IPAM":{"Config":[{"Subnet":"172.18.0.0/16"}]},"Containers":{
		"new":{"Name":"new","EndpointID":"e-new","IPv4Address":"172.18.0.2/16"},
		"old":{"Name":"old","EndpointID":"e-old","IPv4Address":"172.18.0.3/16"}}}`)
	lo, any4 := netip.MustParseAddr("127.0.0.1"), netip.IPv4Unspecified()
	st := buildState([]network.Inspect{n},
		map[string]wish{"new": {fixed: []binding{
			{policy.TCP, 80, netip.Addr{}, 80}, {policy.UDP, 80, netip.Addr{}, 80},
			{policy.TCP, 81, lo, 81}, {policy.TCP, 82, lo, 82},
		}}},
		map[string]run{"old": {[]binding{{policy.TCP, 1, lo, 80}, {policy.TCP, 1, any4, 81}, {policy.TCP, 1, netip.IPv6Unspecified(), 82}}, map[string]int{"e-old": 0}}},
		DefaultBridgeSettings{})
	var got []string
	for _, p := range st.Ports {
		got = append(got, p.EndpointID+" "+p.String())
	}
	require.Equal(t, []string{
		"e-old 0.0.0.0:81->1/tcp", "e-old 127.0.0.1:80->1/tcp", "e-new 127.0.0.1:82->82/tcp", "e-old [::]:82->1/tcp",
		"e-new 0.0.0.0:80->80/udp",
	}, got)
}

// The Engine lets a network be called anything.
func TestNamesArePrintable(t *testing.T) {
	for name, want := range map[string]string{
		"web": "web", "проект_default": "проект_default", "a b": "a b", `a"b\`: `a"b\`,
		"a\x1b[2Jb\r\n": `a\x1b[2Jb\r\n`, "a\xffb": `a\xffb`, "a\u202eb": `a\u202eb`,
	} {
		n, _, _, ok := translateNetwork(network.Inspect{Network: network.Network{ID: "1", Name: name, Driver: "bridge", IPAM: network.IPAM{
			Config: []network.IPAMConfig{{Subnet: netip.MustParsePrefix("172.18.0.0/16")}},
		}}}, DefaultBridgeSettings{})
		require.True(t, ok)
		require.Equal(t, want, n.Name)
	}
}
