// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A port whose socket nobody holds is in the tables only while the relay holds it.
func TestRelays(t *testing.T) {
	in := sample()
	in.State.Ports[1].Relay = true
	key := PortKey{Proto: TCP, Host: netip.MustParseAddrPort("[::]:8080")}
	target := netip.MustParseAddrPort("172.17.0.2:80")

	tables, _ := Compile(in, Slots{})
	require.Equal(t, map[PortKey]netip.AddrPort{key: target}, tables.Relays)
	require.NotContains(t, tables.Ports, key)
	require.Len(t, tables.Ports, 1, "that of IPv4")

	in.Relayed = map[PortKey]bool{key: true}
	tables, _ = Compile(in, Slots{})
	require.Equal(t, target, tables.Ports[key].Target)

	in.Relayed, in.Unrelayed = nil, map[PortKey]string{key: "in use by nginx"}
	tables, _ = Compile(in, Slots{})
	require.NotContains(t, tables.Ports, key)
	require.Len(t, tables.Problems, 1)
	require.True(t, strings.Contains(tables.Problems[0].Text, "nginx"))

	// With IPv6 of its own, or held by the source, a port needs no relay.
	in.Unrelayed = nil
	in.State.Ports[1].Relay = false
	tables, _ = Compile(in, Slots{})
	require.Empty(t, tables.Relays)
	require.Contains(t, tables.Ports, key)
	in.State.Ports[1].Relay = true
	in.State.Endpoints[0].Addrs = addrs("172.17.0.2", "fd00:17::2")
	tables, _ = Compile(in, Slots{})
	require.Empty(t, tables.Relays)
	require.Equal(t, netip.MustParseAddrPort("[fd00:17::2]:80"), tables.Ports[key].Target)
}
