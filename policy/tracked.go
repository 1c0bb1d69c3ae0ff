// SPDX-License-Identifier: Apache-2.0

package policy

import "net/netip"

// Tuple is a packet's source and destination. An echo request has its identifier as source port and 0 as
// destination port, an echo reply the other way round.
type Tuple struct {
	Src, Dst netip.AddrPort
}

// Inverse is the tuple of the answer.
func (t Tuple) Inverse() Tuple { return Tuple{Src: t.Dst, Dst: t.Src} }

// Tracked is a flow as netfilter's connection tracking knows it: how its first packet looked when it came in,
// and how answers do. Without translation, Reply is Orig's inverse.
type Tracked struct {
	Proto       uint8
	Orig, Reply Tuple
	Answered    bool // packets went both ways
}

// Adopted is a tracked flow in the data path's terms. Of opener and target one is a container at least.
type Adopted struct {
	Tracked
	Opener, Target uint16 // slots of endpoints; 0: outside, beyond an uplink
	Port           uint16 // slot of the published port; 0: none
	SNAT           bool   // the opener's address is hidden behind another
}

// Protocols that are adopted beside the published ones.
const (
	icmp4 = 1
	icmp6 = 58
)

// Adopt says what the data path has to know to go on with a flow that the host's stack has forwarded so
// far. ok is false for one that is not the data path's, or that the tables would not let begin: nobody
// keeps by an old flow what a new one is refused.
func (t Tables) Adopt(k Tracked) (a Adopted, ok bool) {
	o, r := k.Orig, k.Reply
	switch k.Proto {
	case uint8(TCP), uint8(UDP), uint8(SCTP):
	case icmp4, icmp6:
		if o.Dst.Port() != 0 { // an answer, or no echo
			return a, false
		}
	default:
		return a, false
	}
	a = Adopted{Tracked: k}
	a.Opener, a.Target = t.Addrs[o.Src.Addr()], t.Addrs[r.Src.Addr()]
	opener, from := t.Endpoints[a.Opener]
	target, to := t.Endpoints[a.Target]
	a.SNAT = r.Dst != o.Src
	switch {
	case a.Opener != 0 && !from || a.Target != 0 && !to || !from && !to:
		return a, false
	case from && t.Networks[opener.Network].Internal, to && t.Networks[target.Network].Internal:
		return a, false
	case to:
		// Only by a published port, which has to lead there still.
		if r.Src == o.Dst || t.outside(o.Dst.Addr()) || !from && (a.SNAT || !t.outside(o.Src.Addr())) {
			return a, false
		}
		row, found := t.Ports[PortKey{Proto: Proto(k.Proto), Host: o.Dst}]
		if !found {
			any := netip.IPv4Unspecified()
			if o.Dst.Addr().Is6() {
				any = netip.IPv6Unspecified()
			}
			row, found = t.Ports[PortKey{Proto: Proto(k.Proto), Host: netip.AddrPortFrom(any, o.Dst.Port())}]
		}
		a.Port = row.Slot
		return a, found && row.Target == r.Src && row.Endpoint == a.Target
	}
	// To the world: by a masquerade address that is still the host's, or by its own where that is wanted.
	if r.Src != o.Dst || !t.outside(o.Dst.Addr()) {
		return a, false
	}
	if !a.SNAT {
		return a, !t.Networks[opener.Network].Masquerade
	}
	_, own := t.HostAddrs[r.Dst.Addr()]
	return a, own
}

// outside reports whether an address is beyond the host and its containers, and of one machine.
func (t Tables) outside(a netip.Addr) bool {
	if _, host := t.HostAddrs[a]; host || a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() || a.IsLinkLocalUnicast() {
		return false
	}
	for p := range t.Subnets {
		if p.Contains(a) {
			return false
		}
	}
	return a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}
