// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
)

// Origin is where a packet comes up to the data path.
type Origin uint8

// The origins.
const (
	FromContainer Origin = iota // by the host's end of its interface
	FromUplink                  // from the world
	FromHost                    // by lo: of the host's own sockets, what the sock programs leave alone
)

// Packet is a well-formed one that belongs to no flow yet. An echo has its identifier in the Tuple as told
// there; protocols without ports have 0.
type Packet struct {
	From    Origin
	Device  int // index of the interface that it comes by
	Proto   Proto
	Tuple   Tuple
	Reset   bool   // a TCP reset
	Answer  bool   // a TCP SYN-ACK
	Gateway bool   // a container's: it is sent to the gateway's MAC, not to a neighbour's
	Mark    uint32 // by the host's packet filter
}

// Way is what the host's routes have for a destination.
type Way uint8

// The ways.
const (
	WayOut   Way = iota // there is a device that leads there
	WayStack            // only the stack has an answer: no route, prohibited, or it is the host's own
	WayNone             // only the stack could send it, and would do so untranslated
)

// Host is what beside the tables decides.
type Host struct {
	DirectRouting          bool
	AcceptMark, AcceptMask uint32
	// Route asks the host's routes. Optional: there is a way to everywhere.
	Route func(from, to netip.Addr) Way
}

func (h Host) way(from, to netip.Addr) Way {
	if h.Route == nil {
		return WayOut
	}
	return h.Route(from, to)
}

// Path is where a packet goes that is not dropped.
type Path uint8

// The paths.
const (
	PathNone      Path = iota // it is dropped
	PathContainer             // straight into a container
	PathUplink                // out of an uplink
	PathStack                 // to the host's stack, as the data path's business
	PathBridge                // to the bridge: a neighbour's or the link's
	PathHost                  // to the host, of which it is none of the data path's business
)

var pathNames = []string{"dropped", "container", "uplink", "stack", "bridge", "host"}

// String names the path.
func (p Path) String() string {
	if int(p) < len(pathNames) {
		return pathNames[p]
	}
	return fmt.Sprintf("path-%d", uint8(p))
}

// Verdict is what becomes of a packet, and why.
type Verdict struct {
	Path   Path
	Reason string // of a drop, by the name of its counter
	// Early: its sender and its link decided, before any flow is asked for.
	Early    bool
	Endpoint uint16 // slot of the receiver, 0: none
	Port     uint16 // slot of the published port, 0: none
	To       netip.AddrPort
	// SNAT hides the sender behind Source; where that is invalid, behind the address of the route.
	SNAT   bool
	Source netip.Addr
	Routed bool // a hop: the TTL goes down
	Steps  []string
}

// explainer puts a verdict together.
type explainer struct {
	t *Tables
	h Host
	p Packet
	v Verdict
}

// Explain says what the data path does with a packet by these tables. It is a second, independent account of
// what the programs do: tests hold the two against each other.
func (t Tables) Explain(h Host, p Packet) Verdict {
	x := &explainer{t: &t, h: h, p: p}
	x.v.To = p.Tuple.Dst
	switch p.From {
	case FromContainer:
		x.container()
	case FromUplink, FromHost:
		x.uplink()
	}
	return x.v
}

func (x *explainer) step(format string, args ...any) {
	x.v.Steps = append(x.v.Steps, fmt.Sprintf(format, args...))
}

func (x *explainer) drop(reason, format string, args ...any) {
	x.step(format, args...)
	x.v.Path, x.v.Reason = PathNone, reason
}

func (x *explainer) pass(path Path, format string, args ...any) {
	x.step(format, args...)
	x.v.Path = path
}

func loopback(a netip.Addr) bool { return a.IsLoopback() }

// thisNetwork reports whether the address means no host: 0/8 or ::.
func thisNetwork(a netip.Addr) bool { return a.Is4() && a.As4()[0] == 0 || a.IsUnspecified() }

// linkLocal is IPv6's only: 169.254/16 is like any other to the data path.
func linkLocal(a netip.Addr) bool { return a.Is6() && a.IsLinkLocalUnicast() }

func multicast(a netip.Addr) bool {
	return a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

func (x *explainer) icmp() bool {
	if x.p.Tuple.Dst.Addr().Is4() {
		return x.p.Proto == icmp4
	}
	return x.p.Proto == icmp6
}

func (x *explainer) hostAddr(a netip.Addr) bool {
	_, ok := x.t.HostAddrs[a]
	return ok
}

// subnet is the network in whose subnet the address lies; the narrowest counts.
func (x *explainer) subnet(a netip.Addr) uint16 {
	slot, bits := uint16(0), -1
	for p, n := range x.t.Subnets {
		if p.Contains(a) && p.Bits() > bits {
			slot, bits = n, p.Bits()
		}
	}
	return slot
}

// at is the endpoint with the address, where it is READY.
func (x *explainer) at(a netip.Addr) (EndpointRow, uint16, bool) {
	slot := x.t.Addrs[a]
	row, ok := x.t.Endpoints[slot]
	return row, slot, ok && slot != 0
}

func (n NetworkRow) mode(is4 bool) GatewayMode {
	if is4 {
		return n.Mode4
	}
	return n.Mode6
}

func (n NetworkRow) gateway(is4 bool) netip.Addr {
	if is4 {
		return n.Gateway4
	}
	return n.Gateway6
}

// owns reports whether an endpoint may send from the address.
func (x *explainer) owns(slot uint16, e EndpointRow, a netip.Addr) bool {
	if a == e.Addr4 || a == e.Addr6 || linkLocal(a) && a == eui64(e.MAC) {
		return true
	}
	if other, _, ok := x.at(a); ok && other.Sandbox == e.Sandbox {
		return true
	}
	for s := range x.t.Sources {
		if s.Endpoint == slot && s.Prefix.Contains(a) {
			return true
		}
	}
	return false
}

// eui64 is the link-local address that a MAC gives (RFC 4291, appendix A).
func eui64(m MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// linked reports whether a link opens what goes from src to dst within a network that keeps containers
// apart, in either direction.
func (x *explainer) linked() bool {
	src, dst := x.p.Tuple.Src, x.p.Tuple.Dst
	_, there := x.t.Open[OpenKey{From: src.Addr(), To: dst, Proto: x.p.Proto}]
	_, back := x.t.Open[OpenKey{From: dst.Addr(), To: src, Proto: x.p.Proto}]
	return there || back
}

// letsIn reports whether a network lets in who dials a container's own address from beyond it, and by which
// published port.
func (x *explainer) letsIn(net uint16, device int, mark uint32) (port uint16, ok bool) {
	row, found := x.t.Networks[net]
	if !found || row.Internal {
		return 0, false
	}
	mode := row.mode(x.p.Tuple.Dst.Addr().Is4())
	if mode == ModeNATUnprotected || x.h.AcceptMask != 0 && mark&x.h.AcceptMask == x.h.AcceptMark {
		return 0, true
	}
	_, trusted := x.t.Trusted[TrustedKey{Network: net, Ifindex: device}]
	switch {
	case mode == ModeRouted && x.icmp():
		return 0, true
	case mode != ModeRouted && !x.h.DirectRouting && !trusted:
		return 0, false
	}
	port, ok = x.t.Open[OpenKey{To: x.p.Tuple.Dst, Proto: x.p.Proto}]
	return port, ok
}

// isolation reports why one container may not open a flow to another's own address; empty: it may.
func (x *explainer) isolation(a, b EndpointRow, self bool) (reason, why string) {
	netA, netB := x.t.Networks[a.Network], x.t.Networks[b.Network]
	if a.Network == b.Network {
		if netA.NoICC && !self && !x.linked() {
			return "icc_disabled", "their network keeps its containers apart, and no link opens this port"
		}
		return "", "they share a network"
	}
	if netA.Internal || netB.Internal {
		return "internal", "one of their networks is internal"
	}
	if _, ok := x.t.Pairs[[2]uint16{min(a.Network, b.Network), max(a.Network, b.Network)}]; ok {
		return "", "their networks are allowed to talk"
	}
	if _, ok := x.letsIn(b.Network, netA.Ifindex, 0); ok {
		return "", "the receiver's network lets others dial this port"
	}
	return "isolated", "they are in different networks, which are not allowed to talk"
}

// Published is the port that who dials an address of the host finds there: an exact address comes first.
func (t Tables) Published(proto Proto, dst netip.AddrPort) (PortRow, bool) {
	any := netip.IPv4Unspecified()
	if dst.Addr().Is6() {
		any = netip.IPv6Unspecified()
	}
	for _, host := range []netip.AddrPort{dst, netip.AddrPortFrom(any, dst.Port())} {
		key := PortKey{Proto: proto, Host: host}
		if row, ok := t.Ports[key]; ok {
			return row, true
		}
		if row, ok := t.Closed[key]; ok {
			return row, true
		}
	}
	return PortRow{}, false
}

func (x *explainer) published() (PortRow, bool) { return x.t.Published(x.p.Proto, x.p.Tuple.Dst) }

// serves reports whether packets of the family can be sent where the port leads.
func (x *explainer) serves(row PortRow) bool {
	return row.Endpoint == 0 || row.Target.Addr().Is4() == x.p.Tuple.Dst.Addr().Is4()
}

// container judges what a container sends.
func (x *explainer) container() {
	src, dst := x.p.Tuple.Src.Addr(), x.p.Tuple.Dst.Addr()
	slot := x.t.Links[x.p.Device]
	ep, ok := x.t.Endpoints[slot]
	x.v.Early = true
	if !ok || slot == 0 {
		x.drop("not_ready", "its interface has no endpoint that is ready")
		return
	}
	net := x.t.Networks[ep.Network]
	switch {
	case loopback(src) || thisNetwork(src):
		x.drop("loopback_address", "%s does not leave a container", src)
		return
	case !x.owns(slot, ep, src):
		x.drop("spoofed_address", "%s is not the container's to send from", src)
		return
	case loopback(dst) || thisNetwork(dst):
		x.drop("loopback_address", "%s is nobody's beyond the container itself", dst)
		return
	}
	x.step("the sender may send from %s", src)
	isolated := net.mode(dst.Is4()) == ModeIsolated
	switch {
	case multicast(dst):
		x.pass(PathBridge, "%s is for its link", dst)
		return
	case isolated && x.p.Gateway:
		x.drop("internal", "the network's gateway mode is isolated: not even the host is reached")
		return
	case linkLocal(dst) && net.NoICC && !x.p.Gateway:
		x.drop("icc_disabled", "the network keeps its containers apart")
		return
	case linkLocal(dst):
		x.pass(PathBridge, "%s is for its link", dst)
		return
	}
	x.v.Early = false
	if !x.p.Gateway {
		x.neighbour(slot, ep, net)
		return
	}
	x.v.Routed = true
	if x.hostAddr(dst) {
		x.dialHost(slot, ep, net)
		return
	}
	if x.t.Addrs[dst] != 0 {
		peer, peerSlot, ready := x.at(dst)
		if !ready {
			x.drop("not_ready", "%s is a container's that is not ready", dst)
			return
		}
		reason, why := x.isolation(ep, peer, peerSlot == slot)
		if reason != "" {
			x.drop(reason, "%s", why)
			return
		}
		x.step("%s", why)
		if linkLocal(src) {
			x.pass(PathStack, "%s does not leave its link: the host answers", src)
			return
		}
		x.v.Endpoint = peerSlot
		x.pass(PathContainer, "by its gateway, straight to the receiver")
		return
	}
	switch in := x.subnet(dst); {
	case in != 0 && in == ep.Network:
		x.drop("unknown_endpoint", "%s lies in its own network, and nobody has it", dst)
	case in != 0:
		x.drop("isolated", "%s lies in another network, and nobody has it", dst)
	case net.Internal:
		x.drop("internal", "its network is internal")
	case linkLocal(src):
		x.pass(PathStack, "%s does not leave its link: the host answers", src)
	default:
		x.egress(net)
	}
}

// neighbour judges what a container sends on its own link.
func (x *explainer) neighbour(slot uint16, ep EndpointRow, net NetworkRow) {
	dst := x.p.Tuple.Dst.Addr()
	peer, peerSlot, ready := x.at(dst)
	switch {
	case net.NoICC && !x.linked():
		x.drop("icc_disabled", "its network keeps its containers apart, and no link opens this port")
	case !ready || peer.Network != ep.Network:
		x.pass(PathBridge, "%s is no container that is known to be on its link: the bridge finds who has it", dst)
	default:
		x.v.Endpoint = peerSlot
		x.pass(PathContainer, "a neighbour's: straight to the receiver")
	}
}

// dialHost judges what a container sends to an address of the host.
func (x *explainer) dialHost(slot uint16, ep EndpointRow, net NetworkRow) {
	src, dst := x.p.Tuple.Src.Addr(), x.p.Tuple.Dst
	var row PortRow
	found := false
	if !linkLocal(src) {
		row, found = x.published()
	}
	switch {
	case !found:
		x.pass(PathStack, "%s is the host's own, and no such port is published", dst)
		return
	case !x.serves(row) && net.Internal:
		x.drop("internal", "its network is internal")
		return
	case !x.serves(row):
		x.pass(PathStack, "the port leads to a container without such an address: whoever holds the host's socket relays")
		return
	}
	target, ok := x.publishedTo(row)
	switch {
	case !ok:
	case net.Internal:
		x.drop("internal", "its network is internal")
	case ep.Sandbox == target.Sandbox:
		x.hairpin(target)
	default:
		x.pass(PathContainer, "straight to the receiver")
	}
}

// publishedTo follows a published port; false: it is dropped.
func (x *explainer) publishedTo(row PortRow) (EndpointRow, bool) {
	target, ready := x.t.Endpoints[row.Endpoint]
	switch {
	case row.Endpoint == 0:
		x.drop("not_published", "the host's port is held, but leads nowhere there")
	case !ready:
		x.drop("port_not_ready", "the port is published, but its container is not ready")
	case x.p.Proto == SCTP && row.Target.Port() != x.p.Tuple.Dst.Port():
		x.drop("unsupported", "SCTP keeps its port numbers: it is published under another")
	case x.p.Reset && x.p.From != FromUplink: // the world's is asked about at the end
		x.drop("no_flow", "a reset opens no flow")
	default:
		x.step("published: %s leads to %s", x.p.Tuple.Dst, row.Target)
		x.v.To, x.v.Endpoint, x.v.Port = row.Target, row.Endpoint, row.Slot
		return target, true
	}
	return target, false
}

// hairpin has the receiver see its gateway as the sender.
func (x *explainer) hairpin(target EndpointRow) {
	gateway := x.t.Networks[target.Network].gateway(x.p.Tuple.Dst.Addr().Is4())
	if !gateway.IsValid() {
		x.v.To, x.v.Endpoint, x.v.Port = x.p.Tuple.Dst, 0, 0
		x.drop("no_route", "the receiver has no gateway that could stand for the sender")
		return
	}
	x.v.SNAT, x.v.Source = true, gateway
	x.pass(PathContainer, "the receiver sees its gateway %s as the sender", gateway)
}

// egress judges what a container sends to the world.
func (x *explainer) egress(net NetworkRow) {
	src, dst := x.p.Tuple.Src, x.p.Tuple.Dst
	switch x.h.way(src.Addr(), dst.Addr()) {
	case WayStack:
		x.v.Routed = false
		x.pass(PathStack, "the host has no route to %s, and says so", dst.Addr())
		return
	case WayNone:
		x.drop("no_route", "only the host's stack could send it to %s, and would do so untranslated", dst.Addr())
		return
	}
	is4 := dst.Addr().Is4()
	masquerade := net.Masquerades(is4)
	switch {
	case x.p.Reset || x.p.Answer:
		x.drop("no_flow", "neither a reset nor an answer opens a flow")
		return
	case masquerade && x.icmp() && dst.Port() != 0:
		x.drop("no_flow", "an echo reply that nobody asked for")
		return
	case masquerade:
		x.v.SNAT, x.v.Source = true, net.Source6
		if is4 {
			x.v.Source = net.Source4
		}
		if x.v.Source.IsValid() {
			x.step("masqueraded with %s, as the network asks for", x.v.Source)
		} else {
			x.step("masqueraded with the address of the route")
		}
	default:
		x.step("not masqueraded")
	}
	x.pass(PathUplink, "out by the host's route to %s", dst.Addr())
}

// uplink judges what comes from the world or from the host's own sockets by lo.
func (x *explainer) uplink() {
	src, dst := x.p.Tuple.Src.Addr(), x.p.Tuple.Dst.Addr()
	if !x.hostAddr(dst) && !loopback(dst) {
		if x.p.From != FromUplink || x.subnet(dst) == 0 {
			x.pass(PathHost, "%s is neither the host's nor a container's", dst)
			return
		}
		x.direct()
		return
	}
	row, found := x.published()
	if linkLocal(src) || !found || !x.serves(row) {
		x.pass(PathHost, "no such port is published on %s: it is the host's own", dst)
		return
	}
	if x.p.From == FromUplink && !x.fromWorld() {
		return
	}
	target, ok := x.publishedTo(row)
	if !ok {
		return
	}
	switch {
	case x.p.From == FromUplink:
		x.enter(target)
	case loopback(src):
		x.hairpin(target)
	default:
		x.pass(PathContainer, "from the host itself, straight to the receiver")
	}
}

// fromWorld reports whether the addresses may come by an uplink.
func (x *explainer) fromWorld() bool {
	src, dst := x.p.Tuple.Src.Addr(), x.p.Tuple.Dst.Addr()
	switch {
	case loopback(dst) || loopback(src) || thisNetwork(src):
		x.drop("loopback_address", "%s does not come from outside", src)
		return false
	case x.hostAddr(src) || x.subnet(src) != 0:
		x.drop("martian", "%s is one of our own: it does not come from outside", src)
		return false
	}
	return true
}

// direct judges what the world sends to a container's own address.
func (x *explainer) direct() {
	src, dst := x.p.Tuple.Src.Addr(), x.p.Tuple.Dst
	target, slot, ready := x.at(dst.Addr())
	port, ok := uint16(0), false
	if ready {
		port, ok = x.letsIn(target.Network, x.p.Device, x.p.Mark)
	}
	switch {
	case !ok && x.h.AcceptMask != 0:
		x.pass(PathStack, "a container's own address: the host's packet filter may still mark it to be let in")
		return
	case !ok:
		x.drop("direct_access", "%s is a container's own address, which its network opens to nobody outside", dst)
		return
	}
	x.step("the container's network lets the world dial %s", dst)
	switch {
	case loopback(src) || thisNetwork(src):
		x.drop("loopback_address", "%s does not come from outside", src)
	case x.hostAddr(src) || x.subnet(src) != 0 || linkLocal(src):
		x.drop("martian", "%s is one of our own: it does not come from outside", src)
	default:
		x.v.Endpoint, x.v.Port = slot, port
		x.enter(target)
	}
}

// enter sends what comes from outside on to its receiver, where there is a way back.
func (x *explainer) enter(target EndpointRow) {
	if x.h.way(x.p.Tuple.Dst.Addr(), x.p.Tuple.Src.Addr()) != WayOut {
		x.v.Endpoint, x.v.Port, x.v.To = 0, 0, x.p.Tuple.Dst
		x.drop("no_route", "the host has no way back to %s", x.p.Tuple.Src.Addr())
		return
	}
	if x.p.Reset {
		x.v.Endpoint, x.v.Port, x.v.To = 0, 0, x.p.Tuple.Dst
		x.drop("no_flow", "a reset opens no flow")
		return
	}
	x.v.Routed = true
	x.pass(PathContainer, "straight to the receiver")
}
