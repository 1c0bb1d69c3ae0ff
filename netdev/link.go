// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"
)

// errShort is for a message of the kernel that ends too early.
var errShort = errors.New("netlink: message cut short")

// parseLink reads what this package wants of an RTM_NEWLINK message (struct ifinfomsg and its
// attributes, rtnetlink(7)). With hundreds of bridges every round reads hundreds of these, and most
// of what the netlink package would make of them is not wanted here.
func parseLink(m []byte) (device, error) {
	if len(m) < unix.SizeofIfInfomsg {
		return device{}, errShort
	}
	kind, flags := binary.NativeEndian.Uint16(m[2:]), binary.NativeEndian.Uint32(m[8:])
	d := device{
		index:    int(int32(binary.NativeEndian.Uint32(m[4:]))),
		kind:     "device",
		up:       flags&unix.IFF_UP != 0,
		loopback: flags&unix.IFF_LOOPBACK != 0,
		ethernet: kind == unix.ARPHRD_ETHER,
		peerNS:   -1,
	}
	err := attributes(m[unix.SizeofIfInfomsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.IFLA_IFNAME:
			d.name = text(value)
		case unix.IFLA_IFALIAS:
			d.own = text(value) == Alias
		case unix.IFLA_ADDRESS:
			if len(value) == len(d.mac) {
				copy(d.mac[:], value)
			}
		case unix.IFLA_MTU:
			return number(value, &d.mtu)
		case unix.IFLA_MASTER:
			return number(value, &d.master)
		case unix.IFLA_LINK:
			return number(value, &d.peer)
		case unix.IFLA_LINK_NETNSID:
			return number(value, &d.peerNS)
		case unix.IFLA_LINKINFO:
			return attributes(value, func(kind uint16, value []byte) error {
				if kind == unix.IFLA_INFO_KIND {
					d.kind = text(value)
				}
				return nil
			})
		}
		return nil
	})
	return d, err
}

// parseAddress reads an RTM_NEWADDR message (struct ifaddrmsg and its attributes, rtnetlink(7)). With a peer's
// address the prefix is the peer's, and that of the device's own address its whole length.
func parseAddress(m []byte) (address, error) {
	if len(m) < unix.SizeofIfAddrmsg {
		return address{}, errShort
	}
	var local, peer netip.Addr
	err := attributes(m[unix.SizeofIfAddrmsg:], func(kind uint16, value []byte) error {
		switch kind {
		case unix.IFA_ADDRESS:
			peer, _ = netip.AddrFromSlice(value)
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(value)
		}
		return nil
	})
	a := address{index: int(int32(binary.NativeEndian.Uint32(m[4:])))}
	switch bits := int(m[1]); {
	case !local.IsValid() && peer.IsValid(): // IPv6 without a peer
		a.prefix = netip.PrefixFrom(peer, bits)
	case local.IsValid() && local == peer && local.Is4():
		a.prefix = netip.PrefixFrom(local, bits)
	case local.IsValid():
		a.prefix = netip.PrefixFrom(local, local.BitLen())
	}
	return a, err
}

// attributes calls f for each attribute of a list (struct rtattr, netlink(7)), nesting and byte order
// flags taken off.
func attributes(b []byte, f func(kind uint16, value []byte) error) error {
	for len(b) >= unix.SizeofRtAttr {
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofRtAttr || size > len(b) {
			return errShort
		}
		kind := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
		if err := f(kind, b[unix.SizeofRtAttr:size]); err != nil {
			return err
		}
		b = b[min((size+unix.NLA_ALIGNTO-1)&^(unix.NLA_ALIGNTO-1), len(b)):]
	}
	return nil
}

func number(value []byte, to *int) error {
	if len(value) < 4 {
		return errShort
	}
	*to = int(int32(binary.NativeEndian.Uint32(value)))
	return nil
}

// text is a string without the zero that ends it.
func text(value []byte) string {
	s, _, _ := bytes.Cut(value, []byte{0})
	return string(s)
}
