// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"net/netip"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/policy"
)

// Dialled is a socket of the host that dialled a published port and was sent to a container.
type Dialled struct {
	Cookie uint64
	Proto  policy.Proto
	To     netip.AddrPort // what it dialled
	Target netip.AddrPort // where it was sent
}

// EachDialled calls f for what sockets of the host have dialled lately.
func (m *Maps) EachDialled(f func(Dialled)) error {
	var k bpf.DatapathSockPeerKey
	var v bpf.DatapathSockPeer
	it := m.m["sock_peers"].Iterate()
	for it.Next(&k, &v) {
		f(Dialled{
			Cookie: k.Cookie, Proto: policy.Proto(k.Proto),
			To: addrPort(v.Addr, v.Port), Target: addrPort(k.Addr, k.Port),
		})
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read sock_peers: %w", err)
	}
	return nil
}
