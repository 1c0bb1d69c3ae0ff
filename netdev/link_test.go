// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Needs root. What parseLink reads is what the netlink package reads, and a message that was cut
// anywhere is refused or read in part, never followed beyond its end.
func TestParseLink(t *testing.T) {
	_, other := enterNS(t)
	bridge := addBridge(t, "br0", "192.0.2.1/24")
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex = "v0", 1400, bridge.Attrs().Index
	require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "p0", PeerNamespace: netlink.NsFd(other)}))
	v0, err := netlink.LinkByName("v0")
	require.NoError(t, err)
	require.NoError(t, netlink.LinkSetAlias(v0, Alias))
	require.NoError(t, netlink.LinkSetUp(v0))

	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	require.NoError(t, err)
	seen := make(map[string]device)
	for _, m := range msgs {
		l, err := netlink.LinkDeserialize(nil, m)
		require.NoError(t, err)
		got, err := parseLink(m)
		require.NoError(t, err)
		require.Equal(t, deviceOf(l), got)
		seen[got.name] = got
		for cut := range m {
			_, _ = parseLink(m[:cut])
		}
		_, err = parseLink(m[:unix.SizeofIfInfomsg-1])
		require.ErrorIs(t, err, errShort)
		broken := append([]byte{}, m...)
		broken[unix.SizeofIfInfomsg] = 0xff // the first attribute's length
		broken[unix.SizeofIfInfomsg+1] = 0xff
		_, err = parseLink(broken)
		require.ErrorIs(t, err, errShort)
	}
	port := seen["v0"]
	require.True(t, port.own && port.up && port.hasPeer())
	require.GreaterOrEqual(t, port.peerNS, 0)
	require.Equal(t, seen["br0"].index, port.master)
	require.True(t, seen["lo"].loopback)
}
