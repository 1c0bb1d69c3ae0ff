// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// view is what a server tells a client: how the server sees the exchange. The lab
// package has the same fields in its View.
type view struct {
	Proto  string `json:"proto"`
	Remote string `json:"remote"` // the client's address and port, as the server sees them
	Local  string `json:"local"`  // the address and port that the client has reached
	Host   string `json:"host"`   // the server's host name
	Text   string `json:"text,omitempty"`
	Echo   string `json:"echo,omitempty"` // UDP: what the client has sent
}

// streamPrefix begins the datagrams of "stream", which are echoed as they are.
const streamPrefix = "seq "

type server struct {
	text     string // fixed answer, optional
	hostname string
	family   string // "", "4" or "6"
	listen   string
	naive    bool
}

func serve(ctx context.Context, args []string) error {
	var s server
	f := newFlags("serve")
	tcp := f.String("tcp", "", "TCP `ports`, separated by commas")
	udp := f.String("udp", "", "UDP `ports`")
	web := f.String("http", "", "HTTP `ports`")
	f.StringVar(&s.text, "text", "", "fixed `text` in each answer")
	f.StringVar(&s.family, "family", "", "4 or 6 only; without it, both on one socket")
	f.StringVar(&s.listen, "listen", "", "`address` to listen on; without it, all")
	f.BoolVar(&s.naive, "naive", false, "UDP: let the kernel choose the address to answer from, not the one that was reached")
	proxies := proxyTable{}
	f.Var(proxies, "proxy", "HTTP: forward `PREFIX=URL`; may be repeated")
	if err := f.Parse(args); err != nil {
		return err
	}
	s.hostname, _ = os.Hostname()

	failed := make(chan error, 1)
	fail := func(err error) {
		select {
		case failed <- err:
		default:
		}
	}
	var all []io.Closer
	for _, port := range ports(*tcp) {
		l, err := net.Listen("tcp"+s.family, net.JoinHostPort(s.listen, port))
		if err != nil {
			return err
		}
		all = append(all, l)
		go func() { fail(s.acceptTCP(l)) }()
	}
	for _, port := range ports(*udp) {
		c, err := net.ListenPacket("udp"+s.family, net.JoinHostPort(s.listen, port))
		if err != nil {
			return err
		}
		roomy(c.(*net.UDPConn))
		all = append(all, c)
		go func() { fail(s.answerUDP(c.(*net.UDPConn))) }()
	}
	for _, port := range ports(*web) {
		l, err := net.Listen("tcp"+s.family, net.JoinHostPort(s.listen, port))
		if err != nil {
			return err
		}
		all = append(all, l)
		go func() { fail(http.Serve(l, s.handler(proxies))) }()
	}
	if len(all) == 0 {
		return errors.New("nothing to serve: give --tcp, --udp or --http")
	}
	ready()
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

// roomy lets a socket hold some thousand datagrams, where that is permitted: a program that waits for
// a processor for a while must not look like a network that loses them.
func roomy(c *net.UDPConn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20)
	})
}

func ports(list string) []string {
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' })
}

// acceptTCP tells each client its view, one line of JSON, and then echoes.
func (s *server) acceptTCP(l net.Listener) error {
	for {
		c, err := l.Accept()
		if errors.Is(err, syscall.ECONNABORTED) || errors.Is(err, syscall.EMFILE) {
			continue
		}
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if _, err := c.Write(s.view("tcp", c.RemoteAddr(), c.LocalAddr())); err == nil {
				_, _ = io.Copy(c, c)
			}
		}()
	}
}

func (s *server) view(proto string, remote, local net.Addr) []byte {
	line, _ := json.Marshal(view{
		Proto: proto, Remote: unmap(remote), Local: unmap(local), Host: s.hostname, Text: s.text,
	})
	return append(line, '\n')
}

// unmap writes an address as the client would: IPv4 without ::ffff:.
func unmap(a net.Addr) string {
	p, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port()).String()
}

func (s *server) answerUDP(c *net.UDPConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	// One of the two fails, according to the socket's family.
	_ = raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	})
	port := c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	buf, oob := make([]byte, 1<<16), make([]byte, 256)
	for {
		n, oobSize, _, from, err := c.ReadMsgUDPAddrPort(buf, oob)
		if err != nil {
			// An ICMP error about an earlier answer is no reason to end.
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			continue
		}
		reached, control := reachedAddr(oob[:oobSize])
		if s.naive {
			control = nil
		}
		answer := buf[:n]
		if !bytes.HasPrefix(answer, []byte(streamPrefix)) {
			line, _ := json.Marshal(view{
				Proto:  "udp",
				Remote: netip.AddrPortFrom(from.Addr().Unmap(), from.Port()).String(),
				Local:  netip.AddrPortFrom(reached, port).String(),
				Host:   s.hostname, Text: s.text, Echo: string(answer),
			})
			answer = append(line, '\n')
		}
		_, _, _ = c.WriteMsgUDPAddrPort(answer, control, from)
	}
}

// reachedAddr returns the address that a datagram was sent to, and the control message
// that makes an answer come from it.
func reachedAddr(oob []byte) (netip.Addr, []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.Addr{}, nil
	}
	// A dual-stack socket gets both messages for IPv4, the mapped address in the second.
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= 12:
			// struct in_pktinfo: ifindex, address to answer from, address reached
			var info unix.Inet4Pktinfo
			copy(info.Spec_dst[:], m.Data[8:12])
			return netip.AddrFrom4(info.Spec_dst), unix.PktInfo4(&info)
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= 16:
			var info unix.Inet6Pktinfo
			copy(info.Addr[:], m.Data[:16])
			a := netip.AddrFrom16(info.Addr)
			if !a.Is4In6() {
				return a, unix.PktInfo6(&info)
			}
		}
	}
	return netip.Addr{}, nil
}

// handler answers with the view, or forwards. The longest prefix wins; what follows it
// is appended to the URL's path, as nginx does for proxy_pass with a path.
func (s *server) handler(proxies proxyTable) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var prefix string
		for p := range proxies {
			if strings.HasPrefix(r.URL.Path, p) && len(p) > len(prefix) {
				prefix = p
			}
		}
		if prefix != "" {
			to := proxies[prefix]
			proxy := httputil.ReverseProxy{
				// A connection for each request: the name is looked up each time.
				Transport: &http.Transport{DisableKeepAlives: true, ResponseHeaderTimeout: 5 * time.Second},
				Rewrite: func(p *httputil.ProxyRequest) {
					p.Out.URL.Path = strings.TrimPrefix(r.URL.Path, prefix)
					p.SetURL(to)
					p.SetXForwarded()
				},
			}
			proxy.ServeHTTP(w, r)
			return
		}
		if s.text != "" {
			fmt.Fprintln(w, s.text)
			return
		}
		local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
		remote, err := net.ResolveTCPAddr("tcp", r.RemoteAddr)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_, _ = w.Write(s.view("http", remote, local))
	})
}

// proxyTable maps path prefixes to where they are forwarded.
type proxyTable map[string]*url.URL

func (t proxyTable) String() string { return "" }

func (t proxyTable) Set(rule string) error {
	prefix, to, found := strings.Cut(rule, "=")
	if !found || !strings.HasPrefix(prefix, "/") {
		return fmt.Errorf("want /PREFIX=URL, got %q", rule)
	}
	u, err := url.Parse(to)
	if err != nil {
		return err
	}
	t[prefix] = u
	return nil
}

// stun answers each datagram with the address and port it came from, as plain text. A
// datagram "via N" is answered from the N'th of the listening sockets instead, counted
// from 0: what a NAT lets in from elsewhere is its filtering behaviour (RFC 4787, 5).
func stun(ctx context.Context, args []string) error {
	f := newFlags("stun")
	listen := f.String("listen", ":3478", "`ADDRESS:PORT` list, separated by commas")
	if err := f.Parse(args); err != nil {
		return err
	}
	var socks []*net.UDPConn
	for _, a := range strings.Split(*listen, ",") {
		c, err := net.ListenPacket("udp", a)
		if err != nil {
			return err
		}
		socks = append(socks, c.(*net.UDPConn))
	}
	for _, c := range socks {
		go func() {
			buf := make([]byte, 1<<16)
			for {
				n, from, err := c.ReadFromUDPAddrPort(buf)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					continue
				}
				out := c
				if rest, ok := strings.CutPrefix(string(buf[:n]), "via "); ok {
					if i, err := strconv.Atoi(strings.TrimSpace(rest)); err == nil && i >= 0 && i < len(socks) {
						out = socks[i]
					}
				}
				seen := netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
				_, _ = out.WriteToUDPAddrPort([]byte(seen.String()+"\n"), from)
			}
		}()
	}
	ready()
	<-ctx.Done()
	return nil
}

// udpSink counts datagrams until SIGTERM, or until it has as many as it was told to
// expect, and prints how many there were, with their payload in bytes.
func udpSink(ctx context.Context, args []string) error {
	f := newFlags("udp-sink")
	listen := f.String("listen", ":9000", "`ADDRESS:PORT`")
	expect := f.Int("expect", 0, "end after `N` datagrams; 0: at SIGTERM")
	if err := f.Parse(args); err != nil {
		return err
	}
	pc, err := net.ListenPacket("udp", *listen)
	if err != nil {
		return err
	}
	c := pc.(*net.UDPConn)
	_ = c.SetReadBuffer(8 << 20)
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	ready()
	var count struct {
		Received int `json:"received"`
		Bytes    int `json:"bytes"`
	}
	buf := make([]byte, 1<<16)
	for *expect == 0 || count.Received < *expect {
		n, _, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			continue
		}
		count.Received++
		count.Bytes += n
	}
	return printJSON(count)
}
