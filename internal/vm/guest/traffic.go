// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// patience bounds every exchange: seconds, as an emulated processor is slow.
const patience = 30 * time.Second

// serve answers on TCP and UDP, both families: a line with the client's address as it is seen
// there, then what it sends.
func (s *space) serve(port uint16) error {
	var tcp net.Listener
	var udp net.PacketConn
	err := s.do(func() (err error) {
		if tcp, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		udp, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		return err
	}
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if _, err := fmt.Fprintln(c, c.RemoteAddr()); err == nil {
					_, _ = io.Copy(c, c)
				}
			}()
		}
	}()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(fmt.Appendf(nil, "%s\n%s", from, buf[:n]), from)
		}
	}()
	return nil
}

func (s *space) dial(network string, to netip.AddrPort) (net.Conn, error) {
	var c net.Conn
	err := s.do(func() (err error) {
		d := net.Dialer{Timeout: patience}
		d.SetMultipathTCP(false)
		c, err = d.Dial(network, to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, c.SetDeadline(time.Now().Add(patience))
}

// send sends a datagram that nothing need answer.
func (s *space) send(to netip.AddrPort) error {
	c, err := s.dial("udp", to)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte("lost"))
	return err
}

// conversation is a client's connection to one of our servers.
type conversation struct {
	net.Conn
	seen netip.Addr     // how the server sees it
	from netip.AddrPort // the same with its port
}

// ask opens a conversation with some bytes that must come back unchanged.
func (s *space) ask(network string, to netip.AddrPort, size int) (*conversation, error) {
	conn, err := s.dial(network, to)
	if err != nil {
		return nil, err
	}
	c := &conversation{Conn: conn}
	if err := c.first(network, size); err != nil {
		c.Close()
		return nil, err
	}
	if peer := conn.RemoteAddr().String(); peer != to.String() {
		c.Close()
		return nil, fmt.Errorf("dialled %s, connected to %s", to, peer)
	}
	return c, nil
}

func payload(size int) []byte {
	out := make([]byte, size)
	for i := range out {
		out[i] = byte(i ^ i>>8)
	}
	return out
}

func (c *conversation) first(network string, size int) error {
	if network == "udp" {
		out, in := payload(size), make([]byte, 1<<16)
		if _, err := c.Write(out); err != nil {
			return err
		}
		n, err := c.Read(in)
		if err != nil {
			return err
		}
		line, echo, _ := bytes.Cut(in[:n], []byte("\n"))
		return errors.Join(c.parse(line), same(out, echo))
	}
	// The line first, byte by byte: nothing else comes before the first bytes are sent.
	var line []byte
	for b := make([]byte, 1); b[0] != '\n'; line = append(line, b[0]) {
		if _, err := io.ReadFull(c, b); err != nil {
			return err
		}
	}
	return errors.Join(c.parse(bytes.TrimSpace(line)), c.echo(size))
}

func (c *conversation) parse(line []byte) error {
	seen, err := netip.ParseAddrPort(string(line))
	c.from = netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port())
	c.seen = c.from.Addr()
	return err
}

// echo sends bytes over TCP and reads them back.
func (c *conversation) echo(size int) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	out, in := payload(size), make([]byte, size)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(out)
		sent <- err
	}()
	_, err := io.ReadFull(c, in)
	return errors.Join(err, <-sent, same(out, in))
}

func same(want, have []byte) error {
	if !bytes.Equal(want, have) {
		return fmt.Errorf("%d bytes came back as %d others", len(want), len(have))
	}
	return nil
}

// exchange is one conversation, which the server must see come from there.
func (s *space) exchange(network string, to netip.AddrPort, size int, seen netip.Addr) error {
	c, err := s.ask(network, to, size)
	if err != nil {
		return err
	}
	defer c.Close()
	if c.seen != seen {
		return fmt.Errorf("the server sees %s, not %s", c.seen, seen)
	}
	return nil
}

// ping sends an echo request and waits for its answer.
func (s *space) ping(to netip.Addr) error {
	network, request, reply, proto := "ip4:icmp", icmp.Type(ipv4.ICMPTypeEcho), icmp.Type(ipv4.ICMPTypeEchoReply), 1
	if to.Is6() {
		network, request, reply, proto = "ip6:ipv6-icmp", ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply, 58
	}
	var c *net.IPConn
	err := s.do(func() (err error) {
		c, err = net.DialIP(network, nil, &net.IPAddr{IP: to.AsSlice()})
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	out, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: 7, Seq: 1, Data: payload(64)}}).Marshal(nil)
	if err != nil {
		return err
	}
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := c.Write(out); err != nil {
		return err
	}
	for in := make([]byte, 1500); ; {
		n, _, err := c.ReadFrom(in) // without the IP header, which Read would leave
		if err != nil {
			return err
		}
		m, err := icmp.ParseMessage(proto, in[:n])
		if err != nil {
			return err
		}
		if echo, ok := m.Body.(*icmp.Echo); ok && m.Type == reply && echo.ID == 7 {
			return same(payload(64), echo.Data)
		}
	}
}

// refused sends to a port where nobody listens: the answer is an ICMP error, or RST.
func (s *space) refused(network string, to netip.AddrPort) error {
	c, err := s.dial(network, to)
	if err == nil {
		defer c.Close()
		if _, err = c.Write([]byte("anybody?")); err == nil {
			_, err = c.Read(make([]byte, 1))
		}
	}
	switch {
	case err == nil:
		return errors.New("somebody answers")
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("no refusal: %w", err)
	case !errors.Is(err, unix.ECONNREFUSED):
		return err
	}
	return nil
}
