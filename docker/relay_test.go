// SPDX-License-Identifier: Apache-2.0

package docker

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/policy"
)

// What a container with IPv4 only has published on IPv6 addresses beyond what the Engine has: what was asked
// for and the userland proxy would hold.
func TestRelayPorts(t *testing.T) {
	at := func(host string, port uint16) binding {
		return binding{proto: policy.TCP, target: 80, hostIP: netip.MustParseAddr(host), hostPort: port}
	}
	sctp := at("0.0.0.0", 8080)
	sctp.proto = policy.SCTP
	for _, c := range []struct {
		name     string
		asked    string // the bindings of 80/tcp
		has      []binding
		narrowed bool
		want     string
	}{
		{"no address", `{"HostPort":"8080"}`, []binding{at("0.0.0.0", 8080)}, false, "[::]:8080->80/tcp"},
		{"-P", ``, []binding{at("0.0.0.0", 32768)}, false, "[::]:32768->80/tcp"},
		{"a range", `{"HostPort":"8000-8010"}`, []binding{at("0.0.0.0", 8003)}, false, "[::]:8003->80/tcp"},
		{"IPv4 asked for", `{"HostIp":"0.0.0.0","HostPort":"8080"}`, []binding{at("0.0.0.0", 8080)}, false, ""},
		{"IPv4 asked for, any port", `{"HostIp":"0.0.0.0","HostPort":""}`, []binding{at("0.0.0.0", 32768)}, false, ""},
		{"one of each", `{"HostIp":"0.0.0.0","HostPort":"81"},{"HostPort":"82"}`, []binding{at("0.0.0.0", 81), at("0.0.0.0", 82)}, false, "[::]:82->80/tcp"},
		{"one address", `{"HostIp":"127.0.0.1","HostPort":"8080"}`, []binding{at("127.0.0.1", 8080)}, false, ""},
		{"another default address", `{"HostPort":"8080"}`, []binding{at("0.0.0.0", 8080)}, true, ""},
		{"IPv6 asked for", `{"HostIp":"::1","HostPort":"8080"}`, nil, false, "[::1]:8080->80/tcp"},
		{"all of IPv6 asked for", `{"HostIp":"::","HostPort":"8080"}`, nil, false, "[::]:8080->80/tcp"},
		{"IPv6 with no port to know", `{"HostIp":"::1","HostPort":""}`, nil, false, ""},
		{"one link's address", `{"HostIp":"fe80::1","HostPort":"8080"}`, nil, false, ""},
		{"the proxy has it", `{"HostPort":"8080"}`, []binding{at("0.0.0.0", 8080), at("::", 8080)}, false, ""},
		{"SCTP", ``, []binding{sctp}, false, ""},
	} {
		var hc hostConfig
		text := `{}`
		if c.asked != "" {
			text = `{"PortBindings":{"80/tcp":[` + c.asked + `]}}`
		}
		require.NoError(t, json.Unmarshal([]byte(text), &hc), c.name)
		w := wish{known: true, fixed: fixedBindings(hc), asked: askedBindings(hc)}
		var got []string
		for _, p := range relayPorts(c.has, w, c.narrowed) {
			require.True(t, p.Relay, c.name)
			got = append(got, p.String())
		}
		require.Equal(t, c.want, strings.Join(got, " "), c.name)
		w.known = false
		require.Empty(t, relayPorts(c.has, w, c.narrowed), "%s: nothing is guessed", c.name)
	}
}
