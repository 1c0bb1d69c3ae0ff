// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// What burst sends can be told from all other packets by these. The lab package has the same ones.
const (
	burstPort  = 7777             // UDP and TCP destination
	burstProto = 253              // for experiments, RFC 3692
	burstText  = "labtool burst " // and the sender's host name, and a dot
)

// burst sends to all targets in every way that a program has, from its first instruction on, whatever
// the kernel says to that: UDP, TCP, ICMP, a protocol without ports, and frames past the kernel's own
// stack to every neighbour that answers ARP. It prints "ready" when it has done so a number of times,
// and goes on until SIGTERM.
func burst(ctx context.Context, args []string) error {
	f := newFlags("burst")
	rounds := f.Int("rounds", 20, "number of `times` before it says ready")
	frames := f.Bool("frames", true, "also past the kernel's stack")
	if err := f.Parse(args); err != nil {
		return err
	}
	var targets []netip.Addr
	for _, s := range f.Args() {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return err
		}
		targets = append(targets, a)
	}
	b := newBurster()
	if !*frames {
		unix.Close(b.frames)
		b.frames = -1
	}
	b.round(targets)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if b.round(targets); n == *rounds {
			ready()
			tick.Reset(200 * time.Millisecond)
		}
	}
}

// burster holds a socket of each kind; -1 where the kernel refuses one.
type burster struct {
	text                                         []byte
	udp4, udp6, icmp4, icmp6, raw4, raw6, frames int
}

func newBurster() *burster {
	open := func(family, kind, proto int) int {
		fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, proto)
		if err != nil {
			return -1
		}
		return fd
	}
	host, _ := os.Hostname()
	return &burster{
		text: []byte(burstText + host + "."),
		udp4: open(unix.AF_INET, unix.SOCK_DGRAM, 0), udp6: open(unix.AF_INET6, unix.SOCK_DGRAM, 0),
		icmp4: open(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP), icmp6: open(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6),
		raw4: open(unix.AF_INET, unix.SOCK_RAW, burstProto), raw6: open(unix.AF_INET6, unix.SOCK_RAW, burstProto),
		frames: open(unix.AF_PACKET, unix.SOCK_RAW, 0),
	}
}

// round sends one packet of each kind to each target.
func (b *burster) round(targets []netip.Addr) {
	for _, to := range targets {
		if to.Is4() {
			b.send(to, unix.AF_INET, b.udp4, b.icmp4, b.raw4, 8)
		} else {
			b.send(to, unix.AF_INET6, b.udp6, b.icmp6, b.raw6, 128)
		}
	}
	b.sendFrames(targets)
}

func (b *burster) send(to netip.Addr, family, udp, icmp, raw int, echo byte) {
	_ = unix.Sendto(udp, b.text, 0, sockaddr(to, burstPort))
	request := append([]byte{echo, 0, 0, 0, 0x77, 0x77, 0, 1}, b.text...)
	if family == unix.AF_INET { // the kernel sums up the other family's itself
		binary.BigEndian.PutUint16(request[2:], internetChecksum(request))
	}
	_ = unix.Sendto(icmp, request, 0, sockaddr(to, 0))
	_ = unix.Sendto(raw, b.text, 0, sockaddr(to, 0))
	if fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err == nil {
		_ = unix.Connect(fd, sockaddr(to, burstPort))
		unix.Close(fd)
	}
}

func sockaddr(a netip.Addr, port int) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Port: port, Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Port: port, Addr: a.As16()}
}

// sendFrames writes IPv4 datagrams to all neighbours that the kernel knows, the gateway among them.
func (b *burster) sendFrames(targets []netip.Addr) {
	raw, _ := os.ReadFile("/proc/net/arp")
	for line := range strings.Lines(string(raw)) {
		w := strings.Fields(line)
		if len(w) < 6 {
			continue
		}
		mac, err := net.ParseMAC(w[3])
		dev, devErr := net.InterfaceByName(w[5])
		if err != nil || devErr != nil || w[2] == "0x0" {
			continue
		}
		addrs, err := dev.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			p, err := netip.ParsePrefix(a.String())
			if err != nil || !p.Addr().Is4() {
				continue
			}
			for _, to := range targets {
				if to.Is4() {
					_ = unix.Sendto(b.frames, b.udpFrame(mac, dev.HardwareAddr, p.Addr(), to), 0,
						&unix.SockaddrLinklayer{Ifindex: dev.Index, Protocol: 0x0008})
				}
			}
		}
	}
}

func (b *burster) udpFrame(dst, src net.HardwareAddr, from, to netip.Addr) []byte {
	length := 8 + len(b.text)
	frame := append(append([]byte{}, dst...), src...)
	ip := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	binary.BigEndian.PutUint16(ip[2:], uint16(20+length))
	ip = append(append(ip, from.AsSlice()...), to.AsSlice()...)
	binary.BigEndian.PutUint16(ip[10:], internetChecksum(ip))
	udp := []byte{0x77, 0x77, burstPort >> 8, burstPort & 0xff, 0, byte(length), 0, 0}
	return append(append(append(append(frame, 0x08, 0x00), ip...), udp...), b.text...)
}

// internetChecksum is that of RFC 1071.
func internetChecksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		word := uint32(b[i]) << 8
		if i+1 < len(b) {
			word |= uint32(b[i+1])
		}
		sum += word
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
