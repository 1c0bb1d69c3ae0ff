// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

// The data path's own tests hold Explain against the programs; here is what it tells a reader.
func TestExplain(t *testing.T) {
	in := sample()
	tables, _ := Compile(in, Slots{})
	ask := func(from Origin, device int, src, dst string) Verdict {
		return tables.Explain(Host{}, Packet{
			From: from, Device: device, Proto: TCP, Gateway: true,
			Tuple: Tuple{Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)},
		})
	}
	v := ask(FromUplink, 2, "203.0.113.9:5000", "192.0.2.1:8080")
	require.Equal(t, PathContainer, v.Path)
	require.Equal(t, netip.MustParseAddrPort("172.17.0.2:80"), v.To)
	require.Equal(t, []string{"published: 192.0.2.1:8080 leads to 172.17.0.2:80", "straight to the receiver"}, v.Steps)

	v = ask(FromUplink, 2, "203.0.113.9:5000", "172.17.0.2:80")
	require.Equal(t, "direct_access", v.Reason)
	require.Equal(t, PathNone, v.Path)

	v = ask(FromContainer, 22, "172.17.0.3:5000", "172.18.0.2:80")
	require.Equal(t, "internal", v.Reason)

	v = ask(FromContainer, 22, "172.17.0.3:5000", "203.0.113.9:443")
	require.Equal(t, PathUplink, v.Path)
	require.True(t, v.SNAT)
	require.False(t, v.Source.IsValid(), "the route's")

	v = ask(FromContainer, 22, "172.17.0.2:5000", "203.0.113.9:443")
	require.Equal(t, "spoofed_address", v.Reason)
	require.True(t, v.Early)

	v = tables.Explain(Host{Route: func(_, _ netip.Addr) Way { return WayStack }}, Packet{
		From: FromContainer, Device: 22, Proto: TCP, Gateway: true,
		Tuple: Tuple{Src: netip.MustParseAddrPort("172.17.0.3:5000"), Dst: netip.MustParseAddrPort("203.0.113.9:443")},
	})
	require.Equal(t, PathStack, v.Path)
}
