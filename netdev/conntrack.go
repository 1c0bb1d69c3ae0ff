// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// What package nl lacks of linux/netfilter/nfnetlink_conntrack.h and nf_conntrack_common.h.
const (
	ctTable = 1 // NFNL_SUBSYS_CTNETLINK

	ctaNATSrc = 6
	ctaNATDst = 13
	ctaZone   = 18

	ctaNATv4MinIP  = 1
	ctaNATv4MaxIP  = 2
	ctaNATProto    = 3
	ctaNATv6MinIP  = 4
	ctaNATv6MaxIP  = 5
	ctaProtoNATMin = 1
	ctaProtoNATMax = 2

	ctaProtoICMPID     = 4
	ctaProtoICMPType   = 5
	ctaProtoICMPCode   = 6
	ctaProtoICMPv6ID   = 7
	ctaProtoICMPv6Type = 8
	ctaProtoICMPv6Code = 9

	statusSeenReply = 1 << 1
	statusAssured   = 1 << 2
	statusConfirmed = 1 << 3
	statusDying     = 1 << 9

	tcpEstablished = 3
	tcpLastAck     = 6
	tcpBeLiberal   = 0x08 // IP_CT_TCP_FLAG_BE_LIBERAL
)

// TrackedCount is how many connections the host's netfilter tracks. 0, also where it tracks none at all.
func TrackedCount() int {
	raw, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	if err != nil {
		return 0
	}
	n := 0
	_, _ = fmt.Sscan(strings.TrimSpace(string(raw)), &n)
	return n
}

// Tracked lists the flows that the host's netfilter tracks: TCP from the handshake to its end, UDP, SCTP
// and echo requests. Where none is tracked, nothing is asked: asking could load a module.
func Tracked() ([]policy.Tracked, error) {
	if TrackedCount() == 0 {
		return nil, nil
	}
	var out []policy.Tracked
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := ctRequest(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, family)
		list, err := req.Execute(unix.NETLINK_NETFILTER, 0)
		// Entries that come or go meanwhile may be missing: what is to be adopted does neither.
		if err != nil && !errors.Is(err, nl.ErrDumpInterrupted) {
			return nil, fmt.Errorf("list tracked connections: %w", err)
		}
		for _, raw := range list {
			if k, ok := parseTracked(raw); ok {
				out = append(out, k)
			}
		}
	}
	return out, nil
}

func ctRequest(operation, flags int, family uint8) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(ctTable<<8|operation, flags)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	return req
}

// parseTracked reads one entry behind its netlink header.
func parseTracked(raw []byte) (k policy.Tracked, ok bool) {
	if len(raw) < nl.SizeofNfgenmsg {
		return k, false
	}
	a, err := ctAttributes(raw[nl.SizeofNfgenmsg:])
	if err != nil {
		return k, false
	}
	if zone := a[ctaZone]; len(zone) == 2 && binary.BigEndian.Uint16(zone) != 0 {
		return k, false
	}
	var status uint32
	if s := a[nl.CTA_STATUS]; len(s) == 4 {
		status = binary.BigEndian.Uint32(s)
	}
	k.Answered = status&statusSeenReply != 0
	if status&statusDying != 0 {
		return k, false
	}
	var ok1, ok2 bool
	k.Proto, k.Orig, ok1 = parseTuple(a[nl.CTA_TUPLE_ORIG], false)
	_, k.Reply, ok2 = parseTuple(a[nl.CTA_TUPLE_REPLY], true)
	if k.Proto == unix.IPPROTO_TCP {
		info, _ := ctAttributes(a[nl.CTA_PROTOINFO])
		tcp, _ := ctAttributes(info[nl.CTA_PROTOINFO_TCP])
		if s := tcp[nl.CTA_PROTOINFO_TCP_STATE]; len(s) != 1 || s[0] > tcpLastAck {
			return k, false // over
		}
	}
	return k, ok1 && ok2
}

// ctAttributes are those of one level by type; flags are left out.
func ctAttributes(raw []byte) (map[int][]byte, error) {
	list, err := nl.ParseRouteAttr(raw)
	if err != nil {
		return nil, err
	}
	out := make(map[int][]byte, len(list))
	for _, a := range list {
		out[int(a.Attr.Type&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER))] = a.Value
	}
	return out, nil
}

// parseTuple reads a tuple. answer says that an echo's identifier stands for the destination port.
func parseTuple(raw []byte, answer bool) (proto uint8, t policy.Tuple, ok bool) {
	a, err := ctAttributes(raw)
	if err != nil {
		return 0, t, false
	}
	ip, err1 := ctAttributes(a[nl.CTA_TUPLE_IP])
	l4, err2 := ctAttributes(a[nl.CTA_TUPLE_PROTO])
	if err1 != nil || err2 != nil || len(l4[nl.CTA_PROTO_NUM]) != 1 {
		return 0, t, false
	}
	src, ok1 := netip.AddrFromSlice(first(ip, nl.CTA_IP_V4_SRC, nl.CTA_IP_V6_SRC))
	dst, ok2 := netip.AddrFromSlice(first(ip, nl.CTA_IP_V4_DST, nl.CTA_IP_V6_DST))
	number := func(types ...int) (uint16, bool) {
		v := first(l4, types...)
		if len(v) != 2 {
			return 0, false
		}
		return binary.BigEndian.Uint16(v), true
	}
	var sport, dport uint16
	ok = true
	switch proto = l4[nl.CTA_PROTO_NUM][0]; proto {
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		kind := first(l4, ctaProtoICMPType, ctaProtoICMPv6Type)
		echo := map[bool]map[uint8]byte{
			false: {unix.IPPROTO_ICMP: 8, unix.IPPROTO_ICMPV6: 128}, true: {unix.IPPROTO_ICMP: 0, unix.IPPROTO_ICMPV6: 129},
		}[answer][proto]
		if len(kind) != 1 || kind[0] != echo {
			return proto, t, false
		}
		sport, ok = number(ctaProtoICMPID, ctaProtoICMPv6ID)
		if answer {
			sport, dport = 0, sport
		}
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP:
		var ok3 bool
		sport, ok = number(nl.CTA_PROTO_SRC_PORT)
		dport, ok3 = number(nl.CTA_PROTO_DST_PORT)
		ok = ok && ok3
	default:
		return proto, t, false
	}
	t = policy.Tuple{Src: netip.AddrPortFrom(src, sport), Dst: netip.AddrPortFrom(dst, dport)}
	return proto, t, ok && ok1 && ok2
}

func first(m map[int][]byte, types ...int) []byte {
	for _, t := range types {
		if v, ok := m[t]; ok {
			return v
		}
	}
	return nil
}

// Lifetimes of entries that Track makes: what netfilter itself would give, but for TCP, whose five
// days are for connections that it watched all along.
const (
	trackTCP   = 2 * time.Hour
	trackUDP   = 2 * time.Minute
	trackOther = 30 * time.Second
)

// Track has the host's netfilter know flows that it has not seen, translation and all, so that the stack
// can go on with them. One that it remembers under the same tuples is replaced: what it knows of it is
// old. TCP is taken as established, and its windows are not checked. It returns how many there are.
func Track(list []policy.Tracked) (int, error) {
	n := 0
	var errs []error
	for _, k := range list {
		if !trackable(k.Proto) {
			continue
		}
		if err := track(k); err != nil {
			errs = append(errs, fmt.Errorf("track %v → %v: %w", k.Orig.Src, k.Orig.Dst, err))
			continue
		}
		n++
	}
	return n, errors.Join(errs...)
}

func trackable(proto uint8) bool {
	return proto == unix.IPPROTO_TCP || proto == unix.IPPROTO_UDP || proto == unix.IPPROTO_ICMP || proto == unix.IPPROTO_ICMPV6
}

func track(k policy.Tracked) error {
	family := uint8(unix.AF_INET)
	if k.Orig.Src.Addr().Is6() {
		family = unix.AF_INET6
	}
	// Both tuples: a stale entry may hold either.
	for _, dir := range []struct {
		kind int
		t    policy.Tuple
	}{{nl.CTA_TUPLE_ORIG, k.Orig}, {nl.CTA_TUPLE_REPLY, k.Reply}} {
		req := ctRequest(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, family)
		req.AddData(tupleAttr(dir.kind, k.Proto, dir.t))
		if _, err := req.Execute(unix.NETLINK_NETFILTER, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	req := ctRequest(nl.IPCTNL_MSG_CT_NEW, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL, family)
	req.AddData(tupleAttr(nl.CTA_TUPLE_ORIG, k.Proto, k.Orig))
	// As if untranslated: the kernel translates it by what is said below.
	req.AddData(tupleAttr(nl.CTA_TUPLE_REPLY, k.Proto, k.Orig.Inverse()))
	if k.Reply.Src != k.Orig.Dst {
		req.AddData(natAttr(ctaNATDst, k.Reply.Src))
	}
	if k.Reply.Dst != k.Orig.Src {
		req.AddData(natAttr(ctaNATSrc, k.Reply.Dst))
	}
	status, life := uint32(statusConfirmed), trackOther
	if k.Answered {
		status |= statusSeenReply
	}
	switch k.Proto {
	case unix.IPPROTO_TCP:
		life = trackTCP
		if k.Answered {
			status |= statusAssured
		}
		info := nl.NewRtAttr(unix.NLA_F_NESTED|nl.CTA_PROTOINFO, nil)
		tcp := info.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_PROTOINFO_TCP, nil)
		tcp.AddRtAttr(nl.CTA_PROTOINFO_TCP_STATE, []byte{tcpEstablished})
		for _, flags := range []int{nl.CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, nl.CTA_PROTOINFO_TCP_FLAGS_REPLY} {
			tcp.AddRtAttr(flags, []byte{tcpBeLiberal, tcpBeLiberal}) // struct nf_ct_tcp_flags: value, mask
		}
		req.AddData(info)
	case unix.IPPROTO_UDP:
		if k.Answered {
			life, status = trackUDP, status|statusAssured
		}
	}
	req.AddData(nl.NewRtAttr(nl.CTA_STATUS, nl.BEUint32Attr(status)))
	req.AddData(nl.NewRtAttr(nl.CTA_TIMEOUT, nl.BEUint32Attr(uint32(life/time.Second))))
	_, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	return err
}

func tupleAttr(kind int, proto uint8, t policy.Tuple) *nl.RtAttr {
	out := nl.NewRtAttr(unix.NLA_F_NESTED|kind, nil)
	ip := out.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_IP, nil)
	srcType, dstType := nl.CTA_IP_V4_SRC, nl.CTA_IP_V4_DST
	if t.Src.Addr().Is6() {
		srcType, dstType = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	ip.AddRtAttr(srcType, t.Src.Addr().AsSlice())
	ip.AddRtAttr(dstType, t.Dst.Addr().AsSlice())
	l4 := out.AddRtAttr(unix.NLA_F_NESTED|nl.CTA_TUPLE_PROTO, nil)
	l4.AddRtAttr(nl.CTA_PROTO_NUM, []byte{proto})
	echo := func(id, kind, code int, request, answer byte) {
		number, what := t.Src.Port(), request
		if number == 0 {
			number, what = t.Dst.Port(), answer
		}
		l4.AddRtAttr(id, nl.BEUint16Attr(number))
		l4.AddRtAttr(kind, []byte{what})
		l4.AddRtAttr(code, []byte{0})
	}
	switch proto {
	case unix.IPPROTO_ICMP:
		echo(ctaProtoICMPID, ctaProtoICMPType, ctaProtoICMPCode, 8, 0)
	case unix.IPPROTO_ICMPV6:
		echo(ctaProtoICMPv6ID, ctaProtoICMPv6Type, ctaProtoICMPv6Code, 128, 129)
	default:
		l4.AddRtAttr(nl.CTA_PROTO_SRC_PORT, nl.BEUint16Attr(t.Src.Port()))
		l4.AddRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(t.Dst.Port()))
	}
	return out
}

func natAttr(kind int, to netip.AddrPort) *nl.RtAttr {
	out := nl.NewRtAttr(unix.NLA_F_NESTED|kind, nil)
	low, high := ctaNATv4MinIP, ctaNATv4MaxIP
	if to.Addr().Is6() {
		low, high = ctaNATv6MinIP, ctaNATv6MaxIP
	}
	out.AddRtAttr(low, to.Addr().AsSlice())
	out.AddRtAttr(high, to.Addr().AsSlice())
	l4 := out.AddRtAttr(unix.NLA_F_NESTED|ctaNATProto, nil)
	l4.AddRtAttr(ctaProtoNATMin, nl.BEUint16Attr(to.Port()))
	l4.AddRtAttr(ctaProtoNATMax, nl.BEUint16Attr(to.Port()))
	return out
}
