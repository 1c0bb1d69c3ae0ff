// SPDX-License-Identifier: Apache-2.0

package policy_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/policy"
)

func TestGatewayEndpoints(t *testing.T) {
	br := func(name string, v4, v6 bool) policy.Candidate {
		return policy.Candidate{Endpoint: "e-" + name, Network: name, Bridge: true, V4: v4, V6: v6}
	}
	internal := func(c policy.Candidate) policy.Candidate { c.Internal = true; return c }
	prio := func(c policy.Candidate, p int) policy.Candidate { c.Priority = p; return c }
	other := func(c policy.Candidate) policy.Candidate { c.Bridge = false; return c }
	type list = []policy.Candidate
	for _, c := range []struct {
		name   string
		list   list
		v4, v6 string
	}{
		{"none", nil, "", ""},
		{"one", list{br("a", true, false)}, "e-a", ""},
		{"by name", list{br("b", true, false), br("a", true, false)}, "e-a", ""},
		{"more families before name", list{br("a", true, false), br("b", true, true)}, "e-b", "e-b"},
		{"internal never", list{internal(br("a", true, true)), br("b", true, false)}, "e-b", ""},
		{"only internal", list{internal(br("a", true, true))}, "", ""},
		{"gwbridge last", list{br("docker_gwbridge", true, true), br("z", true, false)}, "e-z", "e-docker_gwbridge"},
		{"only gwbridge", list{br("docker_gwbridge", true, false)}, "e-docker_gwbridge", ""},
		{"priority before all", list{br("a", true, true), prio(br("b", true, false), 1)}, "e-b", "e-a"},
		{"one for each family", list{br("a", true, false), br("b", false, true)}, "e-a", "e-b"},
		{"macvlan is the way out", list{other(br("a", true, false)), br("b", true, false)}, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			v4, v6 := policy.GatewayEndpoints(c.list)
			require.Equal(t, [2]string{c.v4, c.v6}, [2]string{v4, v6})
		})
	}
}

func TestExpandHost(t *testing.T) {
	for _, c := range []struct {
		host, binding string
		has6          bool
		want          string
	}{
		{"", "", false, "0.0.0.0:80"},
		{"", "", true, "0.0.0.0:80 [::]:80"},
		{"0.0.0.0", "", true, "0.0.0.0:80"},
		{"::", "", false, "[::]:80"},
		{"::", "", true, "[::]:80"},
		{"127.0.0.1", "192.0.2.1", true, "127.0.0.1:80"},
		{"::ffff:127.0.0.1", "", true, "127.0.0.1:80"},
		{"", "192.0.2.1", true, "192.0.2.1:80"},
		{"", "2001:db8::1", true, "[2001:db8::1]:80"},
	} {
		var host, binding netip.Addr
		if c.host != "" {
			host = netip.MustParseAddr(c.host)
		}
		if c.binding != "" {
			binding = netip.MustParseAddr(c.binding)
		}
		var got []string
		for _, ap := range policy.ExpandHost(host, 80, binding, c.has6) {
			got = append(got, ap.String())
		}
		require.Equal(t, c.want, strings.Join(got, " "), "%+v", c)
	}
}

func TestTaken(t *testing.T) {
	at := netip.MustParseAddrPort
	ports := []policy.Port{
		{Proto: policy.TCP, Host: at("127.0.0.1:80"), EndpointID: "one"},
		{Proto: policy.TCP, Host: at("0.0.0.0:81"), EndpointID: "any"},
		{Proto: policy.TCP, Host: at("[::]:82"), EndpointID: "any6"},
		{Proto: policy.TCP, Host: at("[fd00::1]:83"), EndpointID: "one6"},
		{Proto: policy.UDP, Host: at("0.0.0.0:84"), EndpointID: "udp"},
	}
	for _, c := range []struct {
		proto policy.Proto
		host  string
		by    string // endpoint
	}{
		{policy.TCP, "127.0.0.1:80", "one"},
		{policy.TCP, "0.0.0.0:80", "one"},
		{policy.TCP, "127.0.0.2:80", ""},
		{policy.TCP, "[::]:80", ""},
		{policy.UDP, "127.0.0.1:80", ""},
		{policy.TCP, "127.0.0.1:81", "any"},
		{policy.TCP, "0.0.0.0:81", "any"},
		{policy.TCP, "[::1]:81", ""},
		{policy.TCP, "[::1]:82", "any6"},
		{policy.TCP, "127.0.0.1:82", ""},
		{policy.TCP, "[::]:83", "one6"},
		{policy.TCP, "[fd00::2]:83", ""},
		{policy.UDP, "192.0.2.1:84", "udp"},
		{policy.TCP, "192.0.2.1:84", ""},
	} {
		p, ok := policy.Taken(ports, c.proto, at(c.host))
		require.Equal(t, c.by != "", ok, "%+v", c)
		require.Equal(t, c.by, p.EndpointID, "%+v", c)
	}
}
