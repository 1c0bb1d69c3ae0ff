// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sighting is one line that witness prints: which probe has come, and as what. The lab package has
// the same fields in its Sighting.
type sighting struct {
	Tag   string `json:"tag"`
	Proto string `json:"proto"`
	Src   string `json:"src"` // address only
	Dst   string `json:"dst"` // address that was reached, where the protocol tells it
	TTL   int    `json:"ttl"` // time to live or hop limit of the packet (TCP: of the SYN)
}

// tagSize is the length of a probe's tag: hexadecimal digits, unique in a run.
const tagSize = 16

// witness answers probes of all protocols on all its addresses, and prints a line for each that it
// has seen, before it answers. What it does not do itself is answering echo requests: the kernel does.
func witness(ctx context.Context, args []string) error {
	f := newFlags("witness")
	tcp := f.String("tcp", "", "ports, separated by commas")
	udp := f.String("udp", "", "ports")
	sctp := f.String("sctp", "", "ports, answered by raw packets: the kernel need not know SCTP")
	if err := f.Parse(args); err != nil {
		return err
	}
	w := &witnesser{}
	for _, family := range []string{"4", "6"} {
		for _, port := range ports(*tcp) {
			if err := w.listenTCP(family, port); err != nil {
				return err
			}
		}
		for _, port := range ports(*udp) {
			if err := w.listenUDP(family, port); err != nil {
				return err
			}
		}
		for _, proto := range []string{"icmp", "sctp"} {
			r, err := openRaw(proto, family)
			if err != nil {
				return err
			}
			sctpPorts := map[string]bool{}
			for _, p := range ports(*sctp) {
				sctpPorts[p] = true
			}
			go r.read(func(p rawPacket) {
				switch {
				case proto == "icmp" && p.echo == echoRequest:
					w.see(sighting{Tag: p.tag, Proto: proto, Src: p.src.String(), Dst: p.dst.String(), TTL: p.ttl})
				case proto == "sctp" && p.chunk == sctpInit && sctpPorts[fmt.Sprint(p.dport)]:
					w.see(sighting{Tag: p.tag, Proto: proto, Src: p.src.String(), Dst: p.dst.String(), TTL: p.ttl})
					_ = r.send(p.dst, p.src, sctpPacket(sctpInitAck, p.dport, p.sport, p.initTag, p.tag))
				}
			})
		}
	}
	ready()
	<-ctx.Done()
	return nil
}

type witnesser struct{ mu sync.Mutex }

func (w *witnesser) see(s sighting) {
	line, err := json.Marshal(s)
	if err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	_, _ = os.Stdout.Write(append(line, '\n'))
}

func validTag(b []byte) bool {
	if len(b) != tagSize {
		return false
	}
	for _, c := range b {
		if !strings.ContainsRune("0123456789abcdef", rune(c)) {
			return false
		}
	}
	return true
}

func (w *witnesser) listenTCP(family, port string) error {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var serr error
		err := raw.Control(func(fd uintptr) {
			serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_SAVE_SYN, 1)
		})
		return errors.Join(err, serr)
	}}
	l, err := lc.Listen(context.Background(), "tcp"+family, ":"+port)
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue
			}
			go w.answerTCP(c.(*net.TCPConn))
		}
	}()
	return nil
}

func (w *witnesser) answerTCP(c *net.TCPConn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	line, err := bufio.NewReaderSize(c, 64).ReadSlice('\n')
	if err != nil || !validTag(bytes.TrimSpace(line)) {
		return
	}
	tag := string(bytes.TrimSpace(line))
	w.see(sighting{
		Tag: tag, Proto: "tcp", TTL: synTTL(c),
		Src: c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().WithZone("").String(),
		Dst: c.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().WithZone("").String(),
	})
	_, _ = fmt.Fprintln(c, tag)
}

// synTTL is the time to live or hop limit of the SYN that opened the connection, 0 if it is not known.
func synTTL(c *net.TCPConn) int {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	ttl := 0
	_ = raw.Control(func(fd uintptr) {
		var syn [256]byte // the packet from its IP header on
		size := uint32(len(syn))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.IPPROTO_TCP, unix.TCP_SAVED_SYN,
			uintptr(unsafe.Pointer(&syn[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno != 0 || size < 20:
		case syn[0]>>4 == 4:
			ttl = int(syn[8])
		case syn[0]>>4 == 6:
			ttl = int(syn[7])
		}
	})
	return ttl
}

func (w *witnesser) listenUDP(family, port string) error {
	pc, err := net.ListenPacket("udp"+family, ":"+port)
	if err != nil {
		return err
	}
	c := pc.(*net.UDPConn)
	roomy(c)
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if err := wantControl(raw, family); err != nil {
		return err
	}
	go func() {
		buf, oob := make([]byte, 2048), make([]byte, 512)
		for {
			n, oobSize, _, from, err := c.ReadMsgUDPAddrPort(buf, oob)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil || !validTag(buf[:n]) {
				continue
			}
			dst, ttl := parseControl(oob[:oobSize])
			w.see(sighting{
				Tag: string(buf[:n]), Proto: "udp", Src: from.Addr().Unmap().WithZone("").String(),
				Dst: dst.String(), TTL: ttl,
			})
			_, _, _ = c.WriteMsgUDPAddrPort(buf[:n], answerFrom(dst), from)
		}
	}()
	return nil
}

// wantControl has a socket tell where a datagram was sent to, and its TTL or hop limit.
func wantControl(raw syscall.RawConn, family string) error {
	var serr error
	err := raw.Control(func(fd uintptr) {
		if family == "4" {
			serr = errors.Join(
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1),
				unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVTTL, 1))
			return
		}
		serr = errors.Join(
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1),
			unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVHOPLIMIT, 1))
	})
	return errors.Join(err, serr)
}

func parseControl(oob []byte) (dst netip.Addr, ttl int) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return dst, 0
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= 12:
			dst, _ = netip.AddrFromSlice(m.Data[8:12])
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= 16:
			dst, _ = netip.AddrFromSlice(m.Data[:16])
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_TTL && len(m.Data) >= 4,
			m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_HOPLIMIT && len(m.Data) >= 4:
			ttl = int(binary.NativeEndian.Uint32(m.Data))
		}
	}
	return dst, ttl
}

// answerFrom is the control message that has an answer come from the address that was reached.
func answerFrom(dst netip.Addr) []byte {
	switch {
	case dst.Is4():
		return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: dst.As4()})
	case dst.Is6():
		return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: dst.As16()})
	}
	return nil
}

const (
	sctpInit    = 1
	sctpInitAck = 2

	echoRequest = "request"
	echoReply   = "reply"
)

// rawPacket is what a raw socket has taken in, if it carries a tag.
type rawPacket struct {
	src, dst     netip.Addr
	ttl          int
	tag          string
	echo         string // ICMP: request or reply
	chunk        byte   // SCTP: the type of the first
	sport, dport uint16 // SCTP
	initTag      uint32 // SCTP
}

// raw is a raw socket of one protocol and family.
type raw struct {
	proto string
	four  bool
	conn  *net.IPConn
}

func openRaw(proto, family string) (*raw, error) {
	number := "132" // SCTP
	if proto == "icmp" {
		number = map[string]string{"4": "icmp", "6": "ipv6-icmp"}[family]
	}
	pc, err := net.ListenPacket("ip"+family+":"+number, "")
	if err != nil {
		return nil, err
	}
	r := &raw{proto: proto, four: family == "4", conn: pc.(*net.IPConn)}
	_ = r.conn.SetReadBuffer(8 << 20)
	sc, err := r.conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	return r, wantControl(sc, family)
}

// read hands every packet with a tag to f, until the socket is closed.
func (r *raw) read(f func(rawPacket)) {
	buf, oob := make([]byte, 4096), make([]byte, 512)
	for {
		n, oobSize, _, from, err := r.conn.ReadMsgIP(buf, oob)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue
		}
		b := buf[:n]
		if r.four { // comes with its IP header
			if len(b) < 20 || len(b) < int(b[0]&15)*4 {
				continue
			}
			b = b[int(b[0]&15)*4:]
		}
		p := rawPacket{}
		p.src, _ = netip.AddrFromSlice(from.IP)
		p.src = p.src.Unmap()
		p.dst, p.ttl = parseControl(oob[:oobSize])
		if r.parse(&p, b) {
			f(p)
		}
	}
}

func (r *raw) parse(p *rawPacket, b []byte) bool {
	if r.proto == "icmp" {
		if len(b) < 8+tagSize || !validTag(b[8:8+tagSize]) {
			return false
		}
		p.tag = string(b[8 : 8+tagSize])
		switch b[0] {
		case 8, 128:
			p.echo = echoRequest
		case 0, 129:
			p.echo = echoReply
		}
		return true
	}
	const tagAt = 12 + 20 + 4 // common header, fixed part of INIT, parameter header
	if len(b) < tagAt+tagSize || !validTag(b[tagAt:tagAt+tagSize]) {
		return false
	}
	p.tag = string(b[tagAt : tagAt+tagSize])
	p.sport, p.dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	p.chunk = b[12]
	p.initTag = binary.BigEndian.Uint32(b[16:])
	return true
}

// send sends a packet without its IP header. An invalid source leaves the choice to the kernel.
func (r *raw) send(src, dst netip.Addr, b []byte) error {
	_, _, err := r.conn.WriteMsgIP(b, answerFrom(src), &net.IPAddr{IP: dst.AsSlice()})
	return err
}

// echoPacket is an echo request that carries a tag. The kernel completes the checksum for IPv6.
func echoPacket(four bool, id uint16, tag string) []byte {
	b := make([]byte, 8, 8+tagSize)
	b[0] = 128
	if four {
		b[0] = 8
	}
	binary.BigEndian.PutUint16(b[4:], id)
	b[7] = 1
	b = append(b, tag...)
	if four {
		var sum uint32
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		for sum>>16 != 0 {
			sum = sum&0xffff + sum>>16
		}
		binary.BigEndian.PutUint16(b[2:], ^uint16(sum))
	}
	return b
}

// sctpPacket is an INIT or INIT ACK (RFC 9260) that carries a tag in a parameter: of the first, one
// that receivers skip; of the second, the cookie.
func sctpPacket(chunk byte, sport, dport uint16, verification uint32, tag string) []byte {
	b := make([]byte, 36, 36+tagSize)
	binary.BigEndian.PutUint16(b, sport)
	binary.BigEndian.PutUint16(b[2:], dport)
	binary.BigEndian.PutUint32(b[4:], verification)
	b[12] = chunk
	binary.BigEndian.PutUint16(b[14:], 20+4+tagSize)
	binary.BigEndian.PutUint32(b[16:], crc32.ChecksumIEEE([]byte(tag))|1) // initiate tag: anything but 0
	binary.BigEndian.PutUint32(b[20:], 65536)                             // window
	binary.BigEndian.PutUint16(b[24:], 1)                                 // streams out
	binary.BigEndian.PutUint16(b[26:], 1)                                 // and in
	param := uint16(0x8042)
	if chunk == sctpInitAck {
		param = 7
	}
	binary.BigEndian.PutUint16(b[32:], param)
	binary.BigEndian.PutUint16(b[34:], 4+tagSize)
	b = append(b, tag...)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}
