// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// flowFlags are the flags of all directions, by the hook that sees them.
func (h *host) flowFlags(f family) map[bpf.DatapathHook]bpf.DatapathFlowFlags {
	all := make(map[bpf.DatapathHook]bpf.DatapathFlowFlags)
	if f.index() == 0 {
		for k, v := range h.flows4() {
			all[k.Hook] = v.F.Flags
		}
	} else {
		for k, v := range h.flows6() {
			all[bpf.DatapathHook(k.Hook)] = v.F.Flags
		}
	}
	return all
}

// Only the first FIN says who closed first: a SYN with an ACK does not, nor does the second FIN, and a
// SYN that opens the connection anew takes it back. On the straight way and, with options, on the long.
func TestTurns(t *testing.T) {
	h := newHost(t, 1024)
	const first = bpf.DatapathFlowFlagsFLOW_CLOSED_FIRST
	forFamilies(t, func(t *testing.T, f family) {
		for _, c := range []struct {
			name string
			more packet.Option
		}{
			{"straight", packet.TTL(64)},
			{"long", packet.IPOptions(1, 1, 1, 0)},
		} {
			if c.name == "long" && f.index() == 1 {
				c.more = packet.HopByHop()
			}
			t.Run(c.name, func(t *testing.T) {
				h.t = t
				h.reset()
				a, server := at(f.addr(alice), 40000), at(f.client2, 443)
				tcp := func(flags string) {
					h.expect(flags, actRedirect, toUplink, func() result {
						return h.from(alice, packet.TCP(a, server, toGateway(alice), packet.Flags(flags), c.more))
					})
				}
				tcp("S")
				outer := at(f.host, h.outer(f, alice, 40000, f.client2, 443))
				answer := func(flags string) {
					h.expect(flags, actRedirect, published, func() result {
						return h.uplink(packet.TCP(server, outer, fromOutside, packet.Flags(flags), c.more))
					})
				}
				closed := func(what string, container, uplink bool) {
					flags := h.flowFlags(f)
					require.Equal(t, container, flags[bpf.DatapathHookHOOK_CONTAINER]&first != 0, "%s: container", what)
					require.Equal(t, uplink, flags[bpf.DatapathHookHOOK_UPLINK]&first != 0, "%s: world", what)
				}
				answer("SA")
				tcp("A")
				closed("open", false, false)
				answer("FA")
				closed("the world has closed", false, true)
				tcp("FA")
				closed("both have", false, true)
				tcp("S")
				closed("opened anew", false, false)
				answer("SA")
				tcp("FA")
				answer("FA")
				closed("the container has closed first", true, false)
			})
		}
	})
}
