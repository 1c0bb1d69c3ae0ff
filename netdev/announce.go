// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// Announce tells the neighbours of a bridge that addresses are now at mac: the host, whose neighbour
// entries are set right where it has any, and what is behind the ports, by one unsolicited ARP request
// (RFC 5227 3) or neighbour advertisement (RFC 4861 7.2.6) an address. Whoever does not know an address
// yet learns nothing. The ports are interface indices; that of the owner must not be among them, since
// it would find its own address in use.
func (d *Devices) Announce(bridge int, ports []int, mac policy.MAC, addrs []netip.Addr) error {
	var errs []error
	for _, a := range addrs {
		errs = append(errs, d.moveNeighbour(bridge, a, mac))
	}
	if len(ports) > 0 {
		errs = append(errs, inNetNS(d.ns, func() error { return sendAnnouncements(ports, mac, addrs) }))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("announce %s: %w", mac, err)
	}
	return nil
}

// moveNeighbour changes the host's own neighbour entry, if there is one.
func (d *Devices) moveNeighbour(bridge int, a netip.Addr, mac policy.MAC) error {
	family := unix.AF_INET
	if a.Is6() {
		family = unix.AF_INET6
	}
	list, err := d.handle.NeighList(bridge, family)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return err
	}
	for _, n := range list {
		ip, ok := netip.AddrFromSlice(n.IP)
		if !ok || ip.Unmap() != a || bytes.Equal(n.HardwareAddr, mac[:]) || n.State&(unix.NUD_PERMANENT|unix.NUD_NOARP) != 0 {
			continue
		}
		n.HardwareAddr, n.State = net.HardwareAddr(mac[:]), unix.NUD_STALE
		if err := d.handle.NeighSet(&n); err != nil {
			return fmt.Errorf("neighbour %v: %w", a, err)
		}
	}
	return nil
}

func sendAnnouncements(ports []int, mac policy.MAC, addrs []netip.Addr) error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("packet socket: %w", err)
	}
	defer unix.Close(fd)
	var errs []error
	for _, a := range addrs {
		frame := announcement(mac, a)
		for _, port := range ports {
			err := unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: port})
			// A port may have gone or be down by now: then nobody is to be told.
			if err != nil && !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENETDOWN) {
				errs = append(errs, fmt.Errorf("send: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

// announcement is the frame for one address.
func announcement(mac policy.MAC, a netip.Addr) []byte {
	be := binary.BigEndian
	if a.Is4() {
		ip := a.As4()
		f := append(bytes.Repeat([]byte{0xff}, 6), mac[:]...)
		f = be.AppendUint16(f, unix.ETH_P_ARP)
		f = append(f, 0, 1, 8, 0, 6, 4, 0, 1) // Ethernet, IPv4, their lengths, request
		f = append(append(f, mac[:]...), ip[:]...)
		return append(append(f, make([]byte, 6)...), ip[:]...)
	}
	const (
		payload  = 32 // advertisement and one option
		override = 0x20
	)
	ip, all := a.As16(), [16]byte{0: 0xff, 1: 0x02, 15: 1} // ff02::1
	icmp := append([]byte{136, 0, 0, 0, override, 0, 0, 0}, ip[:]...)
	icmp = append(append(icmp, 2, 1), mac[:]...) // target link-layer address, in units of 8 bytes
	pseudo := append(append(bytes.Clone(ip[:]), all[:]...), 0, 0, 0, payload, 0, 0, 0, unix.IPPROTO_ICMPV6)
	be.PutUint16(icmp[2:], onesComplement(append(pseudo, icmp...)))
	f := append([]byte{0x33, 0x33, 0, 0, 0, 1}, mac[:]...)
	f = be.AppendUint16(f, unix.ETH_P_IPV6)
	f = append(f, 0x60, 0, 0, 0, 0, payload, unix.IPPROTO_ICMPV6, 255)
	return append(append(append(f, ip[:]...), all[:]...), icmp...)
}

// onesComplement is the Internet checksum (RFC 1071) of an even number of bytes.
func onesComplement(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
