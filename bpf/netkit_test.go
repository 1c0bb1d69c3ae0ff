// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// Needs root. What a netkit's program sees has not been received by any device: a neighbour gets it by the
// egress of its device, where nobody judges it again.
func TestNetkit(t *testing.T) {
	h := newHost(t, 1024)
	forFamilies(t, func(t *testing.T, f family) {
		h.t = t
		h.reset()
		in := packet.TCP(at(f.addr(alice), 40000), at(f.addr(bob), 80), toNeighbour(alice, bob))
		byNetkit := h.sentBy(alice)
		byNetkit.IngressIfindex = 0
		for _, how := range []string{"opens a flow", "straight on"} {
			r := h.expect(how, actRedirect, toContainer, func() result { return h.run("from_container", in, byNetkit) })
			require.NotZero(t, r.mark, how)
			r = h.expect(how+", at the neighbour", actPass, "", func() result {
				return h.run("to_container", r.out, skb{Ifindex: uint32(h.links[bob]), Mark: r.mark})
			})
			require.Zero(t, r.mark, how)
			same(t, how, in, r.out)
		}
		r := h.expect("by a veth", actRedirect, toContainer, func() result { return h.from(alice, in) })
		require.Zero(t, r.mark)
	})
}
