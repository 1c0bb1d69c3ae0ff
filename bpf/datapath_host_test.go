// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes a network namespace and loads BPF programs.
//
// The namespace stands for the host. The programs are not attached: every test hands one of them a
// packet, as if it had come by one of these devices, and looks at what became of it.
//
//	up0 192.0.2.1 2001:db8::1 (default route by 192.0.2.254, 2001:db8::fe; MTU 1400)
//	up1 198.51.100.1 2001:db8:1::1
//	net "one"      10.1.0.0/16 fd01::/64   masquerades    alice .2, bob .3, late .4 (not READY)
//	net "two"      10.2.0.0/16 fd02::/64   masquerades    carol .2, alice's second interface .9
//	net "internal" 10.3.0.0/16 fd03::/64   internal       ian .2
//	net "quiet"    10.4.0.0/16 fd04::/64   icc off        quinn .2, rita .3
//	net "routed"   10.5.0.0/16 fd05::/64   no masquerade  peggy .2; may talk with "one"
package bpf_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// Slots.
const (
	netOne, netTwo, netInternal, netQuiet, netRouted = 1, 2, 3, 4, 5

	alice, bob, late, carol, alice2, ian, quinn, rita, peggy = 1, 2, 3, 4, 5, 6, 7, 8, 9
)

// What is published, by host port, on both families.
const (
	pubAlice     = 8080 // TCP and UDP, every address → alice:80
	pubBob       = 8081 // TCP, 192.0.2.1 and 2001:db8::1 only → bob:8081
	pubLate      = 8082 // TCP → late:80
	pubSCTP      = 8083 // SCTP → alice:8083
	pubSCTPOther = 8084 // SCTP → alice:80
	pubQuiet     = 8085 // TCP → rita:80
	pubAlice2nd  = 8086 // TCP → alice:80, a second way to it
	reserved     = 8090 // TCP and UDP: bound by the engine, not published

	snatFirst, snatCount   = 20000, 200
	snatFirst2, snatCount2 = 30000, 100
	snatHole               = 20007 // within the range, not to be used
)

const (
	actOK       = 0
	actShot     = 2
	actRedirect = 7
	actPass     = -1 // TC_ACT_UNSPEC

	markJudged = 0xb9f00000

	uplinkMTU  = 1400
	timeout    = 100 // ticks, every one of them but the two below
	timeoutUp  = 200 // established TCP
	timeoutFin = 150

	testSKBChecksumComplete = 1 << 2 // BPF_F_TEST_SKB_CHECKSUM_COMPLETE
)

// skb is struct __sk_buff.
type skb struct {
	Len, PktType, Mark, QueueMapping, Protocol     uint32
	VlanPresent, VlanTCI, VlanProto, Priority      uint32
	IngressIfindex, Ifindex, TCIndex               uint32
	CB                                             [5]uint32
	Hash, TCClassID, Data, DataEnd, NapiID, Family uint32
	RemoteIP4, LocalIP4                            uint32
	RemoteIP6, LocalIP6                            [4]uint32
	RemotePort, LocalPort, DataMeta                uint32
	FlowKeys, Tstamp                               uint64
	WireLen, GSOSegs                               uint32
	SK                                             uint64
	GSOSize                                        uint32
	TstampType                                     uint32
	Hwtstamp                                       uint64
}

// family has the addresses of one IP version.
type family struct {
	v6              bool
	client, client2 netip.Addr // outside, by up0
	host, host1     netip.Addr // of up0 and up1
	foreign         netip.Addr // outside, nobody
	loopback        netip.Addr
	unspecified     netip.Addr
	unreach         uint8 // ICMP types
	timeExceeded    uint8
	tooBig          uint8
	tooBigCode      uint8
	icmp            uint8
	name            string
}

var families = []family{
	{
		name: "IPv4", client: ip("192.0.2.100"), client2: ip("203.0.113.9"), host: ip("192.0.2.1"), host1: ip("198.51.100.1"),
		foreign: ip("203.0.113.77"), loopback: ip("127.0.0.1"), unspecified: ip("0.0.0.0"),
		unreach: 3, timeExceeded: 11, tooBig: 3, tooBigCode: 4, icmp: unix.IPPROTO_ICMP,
	},
	{
		name: "IPv6", v6: true, client: ip("2001:db8::100"), client2: ip("2001:db8:f::9"), host: ip("2001:db8::1"), host1: ip("2001:db8:1::1"),
		foreign: ip("2001:db8:f::77"), loopback: ip("::1"), unspecified: ip("::"),
		unreach: 1, timeExceeded: 3, tooBig: 2, icmp: unix.IPPROTO_ICMPV6,
	},
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// in is the address of host number n in a network.
func (f family) in(network, n int) netip.Addr {
	if f.v6 {
		return netip.AddrFrom16([16]byte{0: 0xfd, 1: byte(network), 15: byte(n)})
	}
	return netip.AddrFrom4([4]byte{10, byte(network), 0, byte(n)})
}

func (f family) gateway(network int) netip.Addr { return f.in(network, 1) }

// addr is the address of an endpoint.
func (f family) addr(slot int) netip.Addr { return f.in(places[slot].network, places[slot].host) }

// noRoute is a destination that the host has no route to.
func (f family) noRoute() netip.Addr {
	if f.v6 {
		return ip("2001:db8:dead::1")
	}
	return ip("203.0.113.200")
}

func (f family) index() int {
	if f.v6 {
		return 1
	}
	return 0
}

// places are the endpoints by slot.
var places = map[int]struct {
	network, host int
	sandbox       uint32
	unready       bool
}{
	alice: {netOne, 2, 1, false}, bob: {netOne, 3, 2, false}, late: {netOne, 4, 3, true},
	carol: {netTwo, 2, 4, false}, alice2: {netTwo, 9, 1, false}, ian: {netInternal, 2, 5, false},
	quinn: {netQuiet, 2, 6, false}, rita: {netQuiet, 3, 7, false}, peggy: {netRouted, 2, 8, false},
}

var networkFlags = map[int]bpf.DatapathNetworkFlags{
	netOne:      bpf.DatapathNetworkFlagsNETWORK_MASQUERADE,
	netTwo:      bpf.DatapathNetworkFlagsNETWORK_MASQUERADE,
	netInternal: bpf.DatapathNetworkFlagsNETWORK_INTERNAL,
	netQuiet:    bpf.DatapathNetworkFlagsNETWORK_NO_ICC | bpf.DatapathNetworkFlagsNETWORK_MASQUERADE,
	netRouted:   0,
}

func macOf(slot int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x42, 0xac, 0, 1, byte(slot)}
}

func bridgeMAC(network int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x42, 0xac, 0, 2, byte(network)}
}

var (
	upMAC      = net.HardwareAddr{0x02, 0x42, 0xac, 0, 3, 1}
	up1MAC     = net.HardwareAddr{0x02, 0x42, 0xac, 0, 3, 2}
	outsideMAC = net.HardwareAddr{0x02, 0x42, 0xac, 0, 3, 3}
	hostEndMAC = net.HardwareAddr{0x02, 0x42, 0xac, 0, 4, 0} // of host-side interfaces, the slot in the last byte
	zeroMAC    = make(net.HardwareAddr, 6)
	broadcast  = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// host is the namespace with the programs and their filled maps.
type host struct {
	t       testing.TB
	coll    *ebpf.Collection     // has the maps, and those programs that were run
	spec    *ebpf.CollectionSpec // of all programs
	work    chan func()
	links   map[int]int // endpoint slot → index of the host-side interface
	bridges map[int]int
	up, up1 int
	class   *ebpf.Memory
	flags   uint32 // of the test run
}

// datapath parses the object once: that takes longer than to copy it.
var datapath = sync.OnceValues(bpf.LoadDatapath)

// newHost makes the host. Tables hold the given number of entries.
func newHost(t testing.TB, entries uint32) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces and load BPF programs")
	}
	h := &host{t: t, work: make(chan func()), links: make(map[int]int), bridges: make(map[int]int)}
	ready := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		// Never unlocked: the thread, and with it the namespace, ends with the goroutine.
		runtime.LockOSThread()
		defer close(done)
		ns, err := netns.New()
		if err == nil {
			defer ns.Close()
			err = h.makeDevices()
		}
		ready <- err
		for f := range h.work {
			f()
		}
	}()
	t.Cleanup(func() {
		close(h.work)
		<-done
	})
	require.NoError(t, <-ready)

	parsed, err := datapath()
	require.NoError(t, err)
	h.spec = parsed.Copy()
	spec := *h.spec
	spec.Programs = nil
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	spec.Maps["flows4"].MaxEntries = entries
	spec.Maps["flows6"].MaxEntries = entries
	spec.Maps["syns4"].MaxEntries = waiting
	spec.Maps["syns6"].MaxEntries = waiting
	h.coll, err = ebpf.NewCollection(&spec)
	require.NoError(t, err)
	t.Cleanup(h.coll.Close)
	h.class, err = h.coll.Maps["port_class"].Memory()
	require.NoError(t, err)
	h.fill()
	h.probeFlags()
	return h
}

// program loads a program when it is first asked for: all of them take an emulated machine's verifier ten seconds, and most
// tests run two or three.
func (h *host) program(name string) *ebpf.Program {
	h.t.Helper()
	if p := h.coll.Programs[name]; p != nil {
		return p
	}
	spec := *h.spec
	spec.Programs = map[string]*ebpf.ProgramSpec{name: h.spec.Programs[name]}
	loaded, err := ebpf.NewCollectionWithOptions(&spec, ebpf.CollectionOptions{MapReplacements: h.coll.Maps})
	var verifier *ebpf.VerifierError
	if errors.As(err, &verifier) {
		h.t.Fatalf("%+v", verifier)
	}
	require.NoError(h.t, err)
	defer loaded.Close()
	p := loaded.DetachProgram(name)
	h.coll.Programs[name] = p
	return p
}

// do runs f in the host's namespace.
func (h *host) do(f func()) {
	done := make(chan struct{})
	h.work <- func() {
		defer close(done)
		f()
	}
	<-done
}

func (h *host) makeDevices() error {
	for _, key := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+key, []byte("1"), 0); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	addVeth := func(name string, mac net.HardwareAddr, mtu, master int) (int, error) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr, attrs.MTU, attrs.MasterIndex = name, mac, mtu, master
		v := netlink.NewVeth(attrs)
		v.PeerName = name + "p"
		if err := netlink.LinkAdd(v); err != nil {
			return 0, fmt.Errorf("add %s: %w", name, err)
		}
		for _, n := range []string{name, name + "p"} {
			l, err := netlink.LinkByName(n)
			if err != nil {
				return 0, err
			}
			if err := netlink.LinkSetUp(l); err != nil {
				return 0, err
			}
		}
		l, err := netlink.LinkByName(name)
		if err != nil {
			return 0, err
		}
		return l.Attrs().Index, nil
	}
	addAddr := func(index int, prefix netip.Prefix) error {
		l, err := netlink.LinkByIndex(index)
		if err != nil {
			return err
		}
		bits := 32
		if prefix.Addr().Is6() {
			bits = 128
		}
		return netlink.AddrAdd(l, &netlink.Addr{
			IPNet: &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), bits)},
			Flags: unix.IFA_F_NODAD,
		})
	}
	for n := range networkFlags {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.HardwareAddr = fmt.Sprintf("br%d", n), bridgeMAC(n)
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return err
		}
		l, err := netlink.LinkByName(attrs.Name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		h.bridges[n] = l.Attrs().Index
		for i, f := range families {
			if err := addAddr(l.Attrs().Index, netip.PrefixFrom(f.gateway(n), []int{16, 64}[i])); err != nil {
				return err
			}
		}
	}
	for slot, p := range places {
		mac := bytes.Clone(hostEndMAC)
		mac[5] = byte(slot)
		if h.links[slot], err = addVeth(fmt.Sprintf("ep%d", slot), mac, 1500, h.bridges[p.network]); err != nil {
			return err
		}
	}
	if h.up, err = addVeth("up0", upMAC, uplinkMTU, 0); err != nil {
		return err
	}
	if h.up1, err = addVeth("up1", up1MAC, 1500, 0); err != nil {
		return err
	}
	for index, prefixes := range map[int][]string{h.up: {"192.0.2.1/24", "2001:db8::1/64"}, h.up1: {"198.51.100.1/24", "2001:db8:1::1/64"}} {
		for _, p := range prefixes {
			if err := addAddr(index, netip.MustParsePrefix(p)); err != nil {
				return err
			}
		}
	}
	for dst, gw := range map[string]string{"0.0.0.0/0": "192.0.2.254", "::/0": "2001:db8::fe"} {
		_, n, err := net.ParseCIDR(dst)
		if err != nil {
			return err
		}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: h.up, Dst: n, Gw: net.ParseIP(gw)}); err != nil {
			return fmt.Errorf("add route by %s: %w", gw, err)
		}
	}
	for _, f := range families {
		bits := f.noRoute().BitLen()
		if err := netlink.RouteAdd(&netlink.Route{
			Dst: &net.IPNet{IP: f.noRoute().AsSlice(), Mask: net.CIDRMask(bits, bits)}, Type: unix.RTN_UNREACHABLE,
		}); err != nil {
			return fmt.Errorf("add unreachable route: %w", err)
		}
	}
	return nil
}

func mapAddr(a netip.Addr) bpf.DatapathAddr {
	var out bpf.DatapathAddr
	raw := a.As16()
	for i := range out.W {
		out.W[i] = binary.LittleEndian.Uint32(raw[4*i:])
	}
	return out
}

func addr32(a netip.Addr) uint32 {
	raw := a.As4()
	return binary.LittleEndian.Uint32(raw[:])
}

func swap16(p uint16) uint16 { return p>>8 | p<<8 }

func (h *host) put(name string, key, value any) {
	h.t.Helper()
	require.NoError(h.t, h.coll.Maps[name].Put(key, value), "put into %s", name)
}

func (h *host) config() bpf.DatapathConfig {
	h.t.Helper()
	var c bpf.DatapathConfig
	require.NoError(h.t, h.coll.Maps["config"].Lookup(uint32(0), &c))
	return c
}

// setConfig changes the config.
func (h *host) setConfig(change func(*bpf.DatapathConfig)) {
	h.t.Helper()
	c := h.config()
	change(&c)
	h.put("config", uint32(0), c)
}

// bump raises the generation, as every change of policy does.
func (h *host) bump() { h.setConfig(func(c *bpf.DatapathConfig) { c.Generation++ }) }

// setEndpoint changes an endpoint's slot.
func (h *host) setEndpoint(slot int, change func(*bpf.DatapathEndpoint)) {
	h.t.Helper()
	var e bpf.DatapathEndpoint
	require.NoError(h.t, h.coll.Maps["endpoint_slots"].Lookup(uint32(slot), &e))
	change(&e)
	h.put("endpoint_slots", uint32(slot), e)
}

func (h *host) setNetwork(slot int, change func(*bpf.DatapathNetwork)) {
	h.t.Helper()
	var n bpf.DatapathNetwork
	require.NoError(h.t, h.coll.Maps["network_slots"].Lookup(uint32(slot), &n))
	change(&n)
	h.put("network_slots", uint32(slot), n)
}

func (h *host) setClass(offset int, set, clear byte) {
	h.t.Helper()
	var b [1]byte
	_, err := h.class.ReadAt(b[:], int64(offset))
	require.NoError(h.t, err)
	b[0] = b[0]&^clear | set
	_, err = h.class.WriteAt(b[:], int64(offset))
	require.NoError(h.t, err)
}

// publish makes a published port. An invalid hostAddr stands for every address of the family.
func (h *host) publish(f family, hostAddr netip.Addr, proto uint8, port uint16, slot int, target uint16, counters uint16) {
	h.t.Helper()
	if !hostAddr.IsValid() {
		hostAddr = f.unspecified
	}
	h.put("ports", bpf.DatapathPortKey{Addr: mapAddr(hostAddr), Port: swap16(port), Proto: proto}, bpf.DatapathPort{
		Addr: mapAddr(f.addr(slot)), Port: swap16(target), Endpoint: uint16(slot), Slot: counters,
	})
	h.put("port_slots", uint32(counters), bpf.DatapathPortSlot{Live: 1})
	bit := map[uint8]bpf.DatapathPortBits{
		unix.IPPROTO_TCP: bpf.DatapathPortBitsPORT_TCP, unix.IPPROTO_UDP: bpf.DatapathPortBitsPORT_UDP,
		unix.IPPROTO_SCTP: bpf.DatapathPortBitsPORT_SCTP,
	}[proto]
	h.setClass(int(port), byte(bit), byte(bpf.DatapathPortBitsPORT_SNAT))
}

// setSNAT sets the masquerade ports to one range.
func (h *host) setSNAT(first uint16, count uint32) {
	h.t.Helper()
	h.setConfig(func(c *bpf.DatapathConfig) {
		c.Snat[0].First, c.Snat[0].Count = first, count
		c.Snat[1].First, c.Snat[1].Count = 0, 0
	})
	for p := range 65536 {
		var b [1]byte
		_, err := h.class.ReadAt(b[:], int64(p))
		require.NoError(h.t, err)
		want := b[0] &^ byte(bpf.DatapathPortBitsPORT_SNAT)
		if p >= int(first) && p < int(first)+int(count) {
			want = b[0] | byte(bpf.DatapathPortBitsPORT_SNAT)
		}
		if want != b[0] {
			h.setClass(p, want, 0xff)
		}
	}
}

func (h *host) fill() {
	h.t.Helper()
	c := bpf.DatapathConfig{
		Generation: 0x10007, HashSeed: 12345, ReservationWait: timeout,
		MaxFlows: [2]uint32{h.coll.Maps["flows4"].MaxEntries(), h.coll.Maps["flows6"].MaxEntries()},
	}
	c.Timeouts.TcpSyn, c.Timeouts.TcpClosed, c.Timeouts.UdpNew, c.Timeouts.Udp = timeout, timeout, timeout, timeout
	c.Timeouts.Icmp, c.Timeouts.Other = timeout, timeout
	c.Timeouts.TcpEstablished, c.Timeouts.TcpFin = timeoutUp, timeoutFin
	c.Snat[0].First, c.Snat[0].Count = snatFirst, snatCount
	c.Snat[1].First, c.Snat[1].Count = snatFirst2, snatCount2
	h.put("config", uint32(0), c)
	for p := snatFirst; p < snatFirst+snatCount; p++ {
		if p != snatHole {
			h.setClass(p, byte(bpf.DatapathPortBitsPORT_SNAT), 0)
		}
	}
	for p := snatFirst2; p < snatFirst2+snatCount2; p++ {
		h.setClass(p, byte(bpf.DatapathPortBitsPORT_SNAT), 0)
	}
	for n, flags := range networkFlags {
		h.put("network_slots", uint32(n), bpf.DatapathNetwork{
			Ifindex: uint32(h.bridges[n]), Mac: [6]byte(bridgeMAC(n)), Flags: flags, Mtu: 1500,
			Gateway4: addr32(families[0].gateway(n)), Gateway6: mapAddr(families[1].gateway(n)),
		})
		for i, bits := range []uint32{96 + 16, 64} {
			net := families[i].in(n, 0)
			h.put("subnets", bpf.DatapathSubnetKey{Prefixlen: bits, Addr: mapAddr(net)}, uint32(n))
			w := mapAddr(net).W
			bit := w[3] & 0xffff
			if families[i].v6 {
				bit = w[0]>>16 ^ w[0]&0xffff
			}
			h.setClass(131072+int(bit>>3), 1<<(bit&7), 0)
			h.put("host_addrs", mapAddr(families[i].gateway(n)), bpf.DatapathHostAddr{Ifindex: uint32(h.bridges[n])})
		}
	}
	h.put("pairs", bpf.DatapathPair{A: netOne, B: netRouted}, uint8(1))
	for slot, p := range places {
		flags := bpf.DatapathEndpointFlagsENDPOINT_READY
		if p.unready {
			flags = 0
		}
		h.put("endpoint_slots", uint32(slot), bpf.DatapathEndpoint{
			Ifindex: uint32(h.links[slot]), Sandbox: p.sandbox, Net: uint16(p.network), Flags: flags,
			Mac: [6]byte(macOf(slot)), Addr4: addr32(families[0].addr(slot)), Addr6: mapAddr(families[1].addr(slot)),
		})
		h.put("links", uint32(h.links[slot]), uint32(slot))
		for _, f := range families {
			h.put("endpoints", mapAddr(f.addr(slot)), uint32(slot))
		}
	}
	slot := uint16(0)
	for _, f := range families {
		for _, a := range []netip.Addr{f.host, f.host1} {
			h.put("host_addrs", mapAddr(a), bpf.DatapathHostAddr{Ifindex: uint32(h.up)})
		}
		none := netip.Addr{}
		for _, p := range []struct {
			host     netip.Addr
			proto    uint8
			port     uint16
			endpoint int
			target   uint16
		}{
			{none, unix.IPPROTO_TCP, pubAlice, alice, 80}, {none, unix.IPPROTO_UDP, pubAlice, alice, 80},
			{f.host, unix.IPPROTO_TCP, pubBob, bob, 8081}, {none, unix.IPPROTO_TCP, pubLate, late, 80},
			{none, unix.IPPROTO_SCTP, pubSCTP, alice, pubSCTP}, {none, unix.IPPROTO_SCTP, pubSCTPOther, alice, 80},
			{none, unix.IPPROTO_TCP, pubQuiet, rita, 80}, {none, unix.IPPROTO_TCP, pubAlice2nd, alice, 80},
		} {
			slot++
			h.publish(f, p.host, p.proto, p.port, p.endpoint, p.target, slot)
		}
	}
	h.reserve(reserved, unix.IPPROTO_TCP, bpf.DatapathPortBitsPORT_TCP)
	h.reserve(reserved, unix.IPPROTO_UDP, bpf.DatapathPortBitsPORT_UDP)
}

// reserve is what the engine's binding of a port leaves, just now.
func (h *host) reserve(port uint16, proto uint8, bit bpf.DatapathPortBits) {
	h.t.Helper()
	var now unix.Timespec
	require.NoError(h.t, unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &now))
	// The value has a spin lock; it is not written with the rest.
	h.put("reservations", bpf.DatapathReservationKey{Port: swap16(port), Proto: proto},
		bpf.DatapathReservation{Bound: [2]uint64{uint64(now.Nano()), uint64(now.Nano())}, Sockets: 1})
	h.setClass(65536+int(port), byte(bit), 0)
}

// now is the data path's clock in its ticks.
func (h *host) now() uint32 {
	h.t.Helper()
	var now unix.Timespec
	require.NoError(h.t, unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &now))
	return uint32(now.Nano() >> 30)
}

const waiting = 1024 // entries of syns4 and syns6

// reset empties the flow tables.
func (h *host) reset() {
	h.t.Helper()
	clearMap[bpf.DatapathFlow4Key, bpf.DatapathFlow4](h, "flows4")
	clearMap[bpf.DatapathFlow6Key, bpf.DatapathFlow6](h, "flows6")
	clearMap[bpf.DatapathFlow4Key, bpf.DatapathSyn4](h, "syns4")
	clearMap[bpf.DatapathFlow6Key, bpf.DatapathSyn6](h, "syns6")
	clearMap[bpf.DatapathFragKey, bpf.DatapathFrag](h, "frags")
	h.put("flow_gauge", uint32(0), bpf.DatapathFlowGauge{})
	for slot := range places {
		h.put("endpoint_flows", uint32(slot), bpf.DatapathEndpointFlows{})
	}
}

func clearMap[K comparable, V any](h *host, name string) {
	h.t.Helper()
	for k := range readMap[K, V](h, name) {
		require.NoError(h.t, h.coll.Maps[name].Delete(k))
	}
}

func readMap[K comparable, V any](h *host, name string) map[K]V {
	h.t.Helper()
	out := make(map[K]V)
	var k K
	var v V
	it := h.coll.Maps[name].Iterate()
	for it.Next(&k, &v) {
		out[k] = v
	}
	require.NoError(h.t, it.Err())
	return out
}

func (h *host) flows4() map[bpf.DatapathFlow4Key]bpf.DatapathFlow4 {
	h.t.Helper()
	return readMap[bpf.DatapathFlow4Key, bpf.DatapathFlow4](h, "flows4")
}

func (h *host) flows6() map[bpf.DatapathFlow6Key]bpf.DatapathFlow6 {
	h.t.Helper()
	return readMap[bpf.DatapathFlow6Key, bpf.DatapathFlow6](h, "flows6")
}

func (h *host) entries(f family) int {
	h.t.Helper()
	if f.v6 {
		return len(h.flows6())
	}
	return len(h.flows4())
}

func (h *host) gauge() [2]int64 {
	h.t.Helper()
	var g bpf.DatapathFlowGauge
	require.NoError(h.t, h.coll.Maps["flow_gauge"].Lookup(uint32(0), &g))
	return g.Entries
}

// age makes every flow entry look as if its last packet was so many ticks ago. What looks at that first is loaded before,
// for an emulated machine may need a tick for it.
func (h *host) age(ticks uint32) {
	h.t.Helper()
	h.program("expire")
	for k, v := range h.flows4() {
		v.F.LastSeen -= ticks
		h.put("flows4", k, v)
	}
	for k, v := range h.flows6() {
		v.F.LastSeen -= ticks
		h.put("flows6", k, v)
	}
}

// counters are packets by what became of them: "drop isolated container", "fate uplink container".
type counters map[string]uint64

var (
	hookNames = []string{"none", "container", "uplink", "host", "to_container", "to_uplink", "bridge", "strict", "shield"}
	fateNames = []string{"container", "uplink", "lo", "stack", "bridge"}
)

func reasonName(r bpf.DatapathReason) string { return fmt.Sprintf("drop %d", r) }

func (h *host) counters() counters {
	h.t.Helper()
	out := make(counters)
	add := func(name string, kinds int, label func(int) string) {
		cpus := ebpf.MustPossibleCPU()
		keys := make([]uint32, kinds*len(hookNames))
		values := make([]bpf.DatapathCount, len(keys)*cpus)
		var cursor ebpf.MapBatchCursor
		if _, err := h.coll.Maps[name].BatchLookup(&cursor, keys, values, nil); !errors.Is(err, ebpf.ErrKeyNotExist) {
			require.NoError(h.t, err)
		}
		for k := range kinds {
			for hook, hookName := range hookNames {
				i := (k*len(hookNames) + hook) * cpus
				for _, v := range values[i : i+cpus] {
					if v.Packets > 0 {
						out[label(k)+" "+hookName] += v.Packets
					}
				}
			}
		}
	}
	add("drops", int(bpf.DatapathReasonREASON_COUNT), func(k int) string { return reasonName(bpf.DatapathReason(k)) })
	add("fates", int(bpf.DatapathFateFATE_COUNT), func(k int) string { return "fate " + fateNames[k] })
	return out
}

func (c counters) since(old counters) counters {
	out := make(counters)
	for k, v := range c {
		if v != old[k] {
			out[k] = v - old[k]
		}
	}
	return out
}

// result is what a program made of a packet.
type result struct {
	action int32
	out    []byte
	mark   uint32
}

// probeFlags has every test run verify that the packet's checksum complete, as network cards deliver
// it, was kept right, where the kernel can (since Linux 6.17).
func (h *host) probeFlags() {
	h.t.Helper()
	frame := packet.ARP(ip("192.0.2.2"), ip("192.0.2.1"), false, packet.MAC(outsideMAC, broadcast))
	h.flags = testSKBChecksumComplete
	if _, err := h.tryRun("to_uplink", frame, skb{Ifindex: uint32(h.up)}); err != nil {
		h.flags = 0
		h.t.Logf("the kernel does not verify checksums in test runs: %v", err)
	}
}

func (h *host) tryRun(program string, frame []byte, ctx skb) (result, error) {
	var ret uint32
	var err error
	out := make([]byte, len(frame)+64)
	after := skb{}
	opts := &ebpf.RunOptions{Data: frame, DataOut: out, Context: ctx, ContextOut: &after, Flags: h.flags}
	p := h.program(program)
	h.do(func() { ret, err = p.Run(opts) })
	if err != nil {
		return result{}, err
	}
	return result{action: int32(ret), out: opts.DataOut, mark: after.Mark}, nil
}

func (h *host) run(program string, frame []byte, ctx skb) result {
	h.t.Helper()
	r, err := h.tryRun(program, frame, ctx)
	require.NoError(h.t, err, "run %s on\n%s", program, hex.Dump(frame))
	return r
}

// from has a container send the frame.
func (h *host) from(slot int, frame []byte) result {
	h.t.Helper()
	return h.run("from_container", frame, h.sentBy(slot))
}

// sentBy is how from_container sees what comes by a veth: received.
func (h *host) sentBy(slot int) skb {
	return skb{Ifindex: uint32(h.links[slot]), IngressIfindex: uint32(h.links[slot])}
}

// uplink has the frame come in by up0.
func (h *host) uplink(frame []byte) result {
	h.t.Helper()
	return h.run("from_uplink", frame, skb{Ifindex: uint32(h.up)})
}

// onLo has the host send itself the frame.
func (h *host) onLo(frame []byte) result {
	h.t.Helper()
	return h.run("from_host", frame, skb{Ifindex: 1})
}

// connect has a client of the world shake hands with a container by what it dials: the first packet of the
// flow, which the last of the three opens.
func (h *host) connect(f family, client, dialled netip.AddrPort, slot int, port uint16) {
	h.t.Helper()
	in := h.uplink(packet.TCP(client, dialled, fromOutside))
	require.EqualValues(h.t, actRedirect, in.action, "SYN")
	out := h.from(slot, packet.TCP(at(f.addr(slot), port), client, toGateway(slot), packet.Flags("SA"), packet.Seq(7000, 1)))
	require.EqualValues(h.t, actRedirect, out.action, "SYN-ACK")
	in = h.uplink(packet.TCP(client, dialled, fromOutside, packet.Flags("A"), packet.Seq(1, 7001)))
	require.EqualValues(h.t, actRedirect, in.action, "ACK")
}

// to has stack or bridge send the frame, which came in by the device in (0: the host's own), to a
// container.
func (h *host) to(slot, in int, frame []byte) result {
	h.t.Helper()
	return h.run("to_container", frame, skb{Ifindex: uint32(h.links[slot]), IngressIfindex: uint32(in)})
}

// expect asserts the action and the counters that one packet moved.
func (h *host) expect(what string, action int32, count string, run func() result) result {
	h.t.Helper()
	before := h.counters()
	r := run()
	moved := h.counters().since(before)
	want := counters{}
	if count != "" {
		want[count] = 1
	}
	require.Equal(h.t, want, moved, "%s: counters", what)
	require.Equal(h.t, action, r.action, "%s: action", what)
	return r
}

// drops asserts that the packet is dropped for the reason.
func (h *host) drops(what string, reason bpf.DatapathReason, hook string, run func() result) {
	h.t.Helper()
	h.expect(what, actShot, reasonName(reason)+" "+hook, run)
}

// same asserts that a packet is as wanted, and right in its checksums.
func same(t testing.TB, what string, want, got []byte) {
	t.Helper()
	if !bytes.Equal(want, got) {
		require.Fail(t, what, "want\n%s\ngot\n%s", hex.Dump(want), hex.Dump(got))
	}
}

// right asserts that all checksums of a frame are right.
func right(t testing.TB, what string, frame []byte) {
	t.Helper()
	require.NoError(t, packet.VerifyChecksums(frame), "%s\n%s", what, hex.Dump(frame))
}

// ports are those of a TCP or UDP packet without options or extension headers.
func ports(frame []byte) (src, dst uint16) {
	off := 34
	if frame[14]>>4 == 6 {
		off = 54
	}
	return binary.BigEndian.Uint16(frame[off:]), binary.BigEndian.Uint16(frame[off+2:])
}

// echoID is the identifier of an ICMP echo.
func echoID(frame []byte) uint16 {
	off := 34
	if frame[14]>>4 == 6 {
		off = 54
	}
	return binary.BigEndian.Uint16(frame[off+4:])
}
