// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// Needs root. Connections and datagrams of all kinds, as the kernel's own ends make and take them,
// through masquerading, published ports and between containers.
func TestNATFlows(t *testing.T) {
	w := newNATSite(t)
	t.Run("half close", func(t *testing.T) { testHalfClose(t, w) })
	t.Run("reset", func(t *testing.T) { testReset(t, w) })
	t.Run("forged reset", func(t *testing.T) { testForgedReset(t, w) })
	t.Run("simultaneous open", func(t *testing.T) { testSimultaneousOpen(t, w) })
	t.Run("tuple in TIME_WAIT", func(t *testing.T) { testTimeWait(t, w) })
	t.Run("fragments", func(t *testing.T) { testFragments(t, w) })
	t.Run("fragments out of order", func(t *testing.T) { testFragmentOrder(t, w) })
	t.Run("options", func(t *testing.T) { testOptions(t, w) })
	t.Run("by address", func(t *testing.T) { testByAddress(t, w) })
	t.Run("link", func(t *testing.T) { testLink(t, w) })
	t.Run("host's socket", func(t *testing.T) { testHostSocket(t, w) })
}

// way is one of the ways that packets take, and back.
type way struct {
	name string
	from *lab.NS
	to   netip.Addr
}

// ways lead to an echo server on echoPort.
func (w *natSite) ways() []way {
	return []way{
		{"egress v4", w.peer, far4}, {"egress v6", w.peer, far6},
		{"published v4", w.far, lab.HostB4}, {"published v6", w.far, lab.HostB6},
		{"neighbour v4", w.peer, w.web4}, {"neighbour v6", w.peer, w.web6},
		{"neighbour's published v4", w.peer, lab.HostB4}, {"neighbour's published v6", w.peer, lab.HostB6},
		{"own published v4", w.web, lab.HostB4}, {"own published v6", w.web, lab.HostB6},
	}
}

// server accepts one connection, has serve deal with it, and returns what that has to say.
func server(t *testing.T, n *lab.NS, port int, serve func(c *net.TCPConn) error) (wait func() error) {
	t.Helper()
	var l net.Listener
	require.NoError(t, n.Do(func() (err error) {
		l, err = net.Listen("tcp", ":"+strconv.Itoa(port))
		return err
	}))
	result := make(chan error, 1)
	go func() {
		defer close(result)
		defer l.Close()
		_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(10 * time.Second))
		c, err := l.Accept()
		if err == nil {
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			err = serve(c.(*net.TCPConn))
			c.Close()
		}
		result <- err
	}()
	t.Cleanup(func() {
		l.Close()
		for range result {
			continue // it has ended
		}
	})
	return func() error { return <-result }
}

const oncePort = 9100 // of servers for one connection; published by web as such

// tcpWays are those between two ends of which one may be a server on oncePort.
func (w *natSite) tcpWays(t *testing.T, f func(t *testing.T, c way, server *lab.NS)) {
	t.Helper()
	for _, c := range w.ways() {
		if c.from == w.web {
			continue
		}
		at := w.web
		if strings.HasPrefix(c.name, "egress") {
			at = w.far
		}
		t.Run(c.name, func(t *testing.T) { f(t, c, at) })
	}
}

func testHalfClose(t *testing.T, w *natSite) {
	w.tcpWays(t, func(t *testing.T, c way, at *lab.NS) {
		// The client closes first and goes on reading.
		stream(t, c.from, netip.AddrPortFrom(c.to, echoPort), 50_000)
		// The server closes first and goes on reading.
		var got []byte
		done := server(t, at, oncePort, func(s *net.TCPConn) (err error) {
			if _, err = s.Write([]byte("that was all")); err == nil {
				err = s.CloseWrite()
			}
			if err == nil {
				got, err = io.ReadAll(s)
			}
			return err
		})
		conn, err := dial(c.from, "tcp", "", netip.AddrPortFrom(c.to, oncePort).String())
		require.NoError(t, err)
		defer conn.Close()
		require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		text, err := io.ReadAll(conn)
		require.NoError(t, err)
		require.Equal(t, "that was all", string(text))
		for range 10 {
			_, err = conn.Write(bytes.Repeat([]byte("x"), 5000))
			require.NoError(t, err)
		}
		conn.Close()
		require.NoError(t, done())
		require.Len(t, got, 50_000)
	})
}

func testReset(t *testing.T, w *natSite) {
	w.tcpWays(t, func(t *testing.T, c way, at *lab.NS) {
		to := netip.AddrPortFrom(c.to, oncePort).String()
		done := server(t, at, oncePort, func(s *net.TCPConn) error {
			_, err := io.ReadAll(s)
			return err
		})
		conn, err := dial(c.from, "tcp", "", to)
		require.NoError(t, err)
		_, err = conn.Write([]byte("hello"))
		require.NoError(t, err)
		require.NoError(t, conn.(*net.TCPConn).SetLinger(0))
		conn.Close()
		require.ErrorIs(t, done(), syscall.ECONNRESET, "the client's reset")

		done = server(t, at, oncePort, func(s *net.TCPConn) error {
			_, err := io.ReadFull(s, make([]byte, 5))
			return errors.Join(err, s.SetLinger(0))
		})
		conn, err = dial(c.from, "tcp", "", to)
		require.NoError(t, err)
		defer conn.Close()
		require.NoError(t, conn.SetDeadline(time.Now().Add(5*time.Second)))
		_, err = conn.Write([]byte("hello"))
		require.NoError(t, err)
		_, err = io.ReadAll(conn)
		require.ErrorIs(t, err, syscall.ECONNRESET, "the server's reset")
		require.NoError(t, done())
	})
}

// A reset that the receiver does not believe, since its numbers are wrong, leaves the flow as it was:
// it goes on, and nobody else gets its outer tuple.
func testForgedReset(t *testing.T, w *natSite) {
	up, outside := w.Host.MAC(t, lab.HostIf2), w.Client2.MAC(t, lab.ClientIf)
	m := w.maps(t)
	for _, v6 := range []bool{false, true} {
		to, client := far4, lab.HostB4
		if v6 {
			to, client = far6, lab.HostB6
		}
		for _, c := range []struct {
			name string
			from *lab.NS
			to   netip.AddrPort
			flip bool // the forger speaks for the client
		}{
			{"egress", w.peer, netip.AddrPortFrom(to, echoPort), false},
			{"published", w.far, netip.AddrPortFrom(client, echoPort), true},
		} {
			t.Run(fmt.Sprintf("%s v6=%v", c.name, v6), func(t *testing.T) {
				seen := w.Client2.Capture(t, lab.ClientIf, func(p gopacket.Packet) bool {
					tcp, ok := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
					return ok && tcp.SYN && !tcp.ACK && int(tcp.DstPort) == echoPort
				})
				say := echoing(t, c.from, c.to)
				say(t, "before")
				syn := seen.Wait(t, 1, 2*time.Second)[0]
				src, dst := syn.NetworkLayer().NetworkFlow().Endpoints()
				tcp := syn.Layer(layers.LayerTypeTCP).(*layers.TCP)
				a, _ := netip.AddrFromSlice(src.Raw())
				b, _ := netip.AddrFromSlice(dst.Raw())
				from, target := netip.AddrPortFrom(b, uint16(tcp.DstPort)), netip.AddrPortFrom(a, uint16(tcp.SrcPort))
				if c.flip {
					from, target = target, from
				}
				before := readCounters(t, m)
				w.Client2.SendFrame(t, lab.ClientIf, packet.TCP(from, target, packet.MAC(outside, up), packet.Flags("R"), packet.Seq(0x7fffffff, 0)))
				lab.Eventually(t, 2*time.Second, "the reset went to the container", func() bool {
					return since(t, m, before)["fate container/uplink"] > 0
				})
				say(t, "after")
				say(t, "and on")
				require.Empty(t, since(t, m, before).drops())
			})
		}
	}
}

// Both ends dial each other, from known ports, before either hears of the other.
func testSimultaneousOpen(t *testing.T, w *natSite) {
	const inner, outer = 41000, 7100
	w.Client2.Serve(t, "--tcp", "7000")
	for _, c := range []struct {
		name       string
		there, out netip.Addr
		any        netip.Addr
	}{
		{"v4", lab.Client24, lab.HostB4, netip.IPv4Unspecified()},
		{"v6", lab.Client26, lab.HostB6, netip.IPv6Unspecified()},
	} {
		t.Run(c.name, func(t *testing.T) {
			// One socket has one outer port towards all: somebody else tells which.
			first, err := dial(w.peer, "tcp", netip.AddrPortFrom(c.any, inner).String(), netip.AddrPortFrom(c.there, 7000).String())
			require.NoError(t, err)
			line := make([]byte, 4096)
			n, err := first.Read(line)
			require.NoError(t, err)
			require.NoError(t, first.(*net.TCPConn).SetLinger(0)) // no TIME_WAIT
			first.Close()
			var view lab.View
			require.NoError(t, json.Unmarshal(line[:n], &view))
			mapped := netip.MustParseAddrPort(view.Remote)
			require.Equal(t, c.out, mapped.Addr())

			// The first SYN is lost on its way, for there nobody has dialled yet.
			w.Client2.MustRun(t, "nft", "add table inet sim; add chain inet sim in { type filter hook input priority 0; };"+
				fmt.Sprintf("add rule inet sim in tcp dport %d tcp flags & (syn|ack) == syn counter drop", outer))
			t.Cleanup(func() { w.Client2.MustRun(t, "nft", "delete table inet sim") })
			bound := func(n *lab.NS, port uint16) *socket {
				s := openSocket(t, n, c.any.Is6(), unix.SOCK_STREAM, 0)
				require.NoError(t, unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
				require.NoError(t, unix.Bind(s.fd, sockaddr(netip.AddrPortFrom(c.any, port))))
				return s
			}
			here, there := bound(w.peer, inner), bound(w.Client2, outer)
			require.NoError(t, unix.SetNonblock(here.fd, true))
			require.ErrorIs(t, unix.Connect(here.fd, sockaddr(netip.AddrPortFrom(c.there, outer))), unix.EINPROGRESS)
			lab.Eventually(t, 2*time.Second, "the first SYN was there", func() bool {
				return !strings.Contains(w.Client2.MustRun(t, "nft", "list", "ruleset"), "counter packets 0")
			})
			require.NoError(t, unix.Connect(there.fd, sockaddr(mapped)), "dials the outer port")
			require.NoError(t, unix.SetNonblock(here.fd, false))
			for _, way := range [][2]*socket{{here, there}, {there, here}} {
				require.NoError(t, way[0].send([]byte("hello")))
				got, err := way[1].receive()
				require.NoError(t, err)
				require.Equal(t, "hello", string(got))
			}
			for _, s := range []*socket{here, there} {
				require.NoError(t, unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
			}
		})
	}
}

// The server has closed first and waits; the client uses the same tuple again at once, and the outer
// one is the same too.
func testTimeWait(t *testing.T, w *natSite) {
	for _, to := range []netip.Addr{far4, far6} {
		t.Run(to.String(), func(t *testing.T) {
			var l net.Listener
			require.NoError(t, w.far.Do(func() (err error) {
				l, err = net.Listen("tcp", ":"+strconv.Itoa(oncePort))
				return err
			}))
			var wait sync.WaitGroup
			seen := make(chan string, 10)
			wait.Go(func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					seen <- c.RemoteAddr().String()
					c.Close()
				}
			})
			defer wait.Wait()
			defer l.Close()
			outer := map[string]bool{}
			for range 5 {
				s := openSocket(t, w.peer, to.Is6(), unix.SOCK_STREAM, 0)
				require.NoError(t, unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
				any := netip.IPv4Unspecified()
				if to.Is6() {
					any = netip.IPv6Unspecified()
				}
				require.NoError(t, unix.Bind(s.fd, sockaddr(netip.AddrPortFrom(any, 42000))))
				require.NoError(t, unix.Connect(s.fd, sockaddr(netip.AddrPortFrom(to, oncePort))))
				end, err := s.receive()
				require.NoError(t, err)
				require.Empty(t, end)
				outer[<-seen] = true
				require.NoError(t, unix.Shutdown(s.fd, unix.SHUT_WR))
				lab.Eventually(t, 2*time.Second, "the connection is closed on both sides", func() bool {
					info, err := unix.GetsockoptTCPInfo(s.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
					return err == nil && info.State == 7 // TCP_CLOSE
				})
				require.NoError(t, unix.Close(s.fd))
				s.fd = openNothing(t)
			}
			require.Len(t, outer, 1)
		})
	}
}

// openNothing is a descriptor that may be closed in another's place.
func openNothing(t *testing.T) int {
	fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	return fd
}

// Datagrams and echo requests that need several fragments, the last of one to three bytes or more.
func testFragments(t *testing.T, w *natSite) {
	m := w.maps(t)
	for _, c := range w.ways() {
		t.Run(c.name, func(t *testing.T) {
			before := readCounters(t, m)
			s := openUDP(t, c.from, netip.AddrPortFrom(c.to, echoPort))
			each := map[bool]int{false: 1480, true: 1448}[s.v6] // bytes of the datagram in a fragment
			for _, last := range []int{1, 2, 3, 8, 9, 700} {
				for _, whole := range []int{1, 2, 5} {
					size := whole*each + last - 8 // behind UDP's header
					require.NoError(t, s.exchange(numbered(size)), "%d fragments and %d bytes", whole, last)
				}
			}
			require.NoError(t, s.exchange(numbered(60_000)))
			if !strings.Contains(c.name, "published") {
				for _, last := range []int{1, 3, 500} {
					out := c.from.MustRun(t, "ping", "-n", "-c", "1", "-W", "2", "-s", strconv.Itoa(each+last-8), c.to.String())
					require.Contains(t, out, " 0% packet loss")
				}
			}
			require.Empty(t, since(t, m, before).drops())
		})
	}
}

func testFragmentOrder(t *testing.T, w *natSite) {
	m := w.maps(t)
	up, outside := w.Host.MAC(t, lab.HostIf2), w.Client2.MAC(t, lab.ClientIf)
	bridge, mac := w.Host.MAC(t, "blue0"), w.peer.MAC(t, "eth0")
	for _, v6 := range []bool{false, true} {
		client, host, inside, away := far4, lab.HostB4, w.peer4, lab.Client24
		if v6 {
			client, host, inside, away = far6, lab.HostB6, w.peer6, lab.Client26
		}
		data := packet.Payload(numbered(3000))
		for _, c := range []struct {
			name   string
			from   *lab.NS
			ifname string
			frame  []byte
			want   counters
		}{
			{
				"from outside", w.Client2, lab.ClientIf,
				packet.UDP(netip.AddrPortFrom(client, 5000), netip.AddrPortFrom(host, echoPort), packet.MAC(outside, up), data),
				counters{"fragment_not_found/uplink": 2},
			},
			{
				"from a container", w.peer, "eth0",
				packet.UDP(netip.AddrPortFrom(inside, 5000), netip.AddrPortFrom(away, 7999), packet.MAC(mac, bridge), data),
				counters{"fragment_not_found/container": 2},
			},
		} {
			t.Run(fmt.Sprintf("%s v6=%v", c.name, v6), func(t *testing.T) {
				parts := packet.Fragment(c.frame, 1024, 77)
				require.Len(t, parts, 3)
				before := readCounters(t, m)
				c.from.SendFrames(t, c.ifname, [][]byte{parts[2], parts[1], parts[0]})
				lab.Eventually(t, 2*time.Second, "both are counted", func() bool {
					for reason, n := range c.want {
						return since(t, m, before)[reason] >= n
					}
					return false
				})
				require.Equal(t, c.want, since(t, m, before).drops())
			})
		}
	}
}

// IPv4 options and IPv6 extension headers, set by the sending socket.
func testOptions(t *testing.T, w *natSite) {
	padding := string([]byte{0, 0, 1, 4, 0, 0, 0, 0}) // an extension header of PadN
	for _, c := range w.ways() {
		if c.from == w.web {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			s := openUDP(t, c.from, netip.AddrPortFrom(c.to, echoPort))
			there := w.web
			if strings.HasPrefix(c.name, "egress") {
				there = w.far
			}
			optional := there.Capture(t, "eth0", func(p gopacket.Packet) bool {
				if ip, ok := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok {
					return ip.IHL > 5 && ip.Protocol == layers.IPProtocolUDP
				}
				ip, ok := p.Layer(layers.LayerTypeIPv6).(*layers.IPv6)
				return ok && ip.NextHeader == layers.IPProtocolIPv6HopByHop && p.Layer(layers.LayerTypeUDP) != nil
			})
			if s.v6 {
				require.NoError(t, unix.SetsockoptString(s.fd, unix.IPPROTO_IPV6, unix.IPV6_HOPOPTS, padding))
				require.NoError(t, unix.SetsockoptString(s.fd, unix.IPPROTO_IPV6, unix.IPV6_DSTOPTS, padding))
			} else {
				require.NoError(t, unix.SetsockoptString(s.fd, unix.IPPROTO_IP, unix.IP_OPTIONS, "\x01\x01\x01\x00"))
			}
			require.NoError(t, s.exchange(numbered(100)))
			require.NoError(t, s.exchange(numbered(4000)), "in fragments")
			optional.Wait(t, 1, 2*time.Second)
		})
	}
}

// Protocols without ports, between raw sockets.
func testByAddress(t *testing.T, w *natSite) {
	for name, proto := range map[string]int{"GRE": 47, "ESP": 50, "experimental": 253} {
		for _, c := range []struct {
			to, seen netip.Addr
		}{{far4, lab.HostB4}, {far6, lab.HostB6}} {
			t.Run(fmt.Sprintf("%s to %v", name, c.to), func(t *testing.T) {
				v6 := c.to.Is6()
				here, there := openSocket(t, w.peer, v6, unix.SOCK_RAW, proto), openSocket(t, w.far, v6, unix.SOCK_RAW, proto)
				data := []byte("sixteen bytes or more of something")
				require.NoError(t, unix.Sendto(here.fd, data, 0, sockaddr(netip.AddrPortFrom(c.to, 0))))
				seen := receiveRaw(t, there, data)
				require.Equal(t, c.seen, seen)
				require.NoError(t, unix.Sendto(there.fd, data, 0, sockaddr(netip.AddrPortFrom(seen, 0))))
				require.Equal(t, c.to, receiveRaw(t, here, data))
			})
		}
	}
}

// receiveRaw wants that payload, and returns who has sent it.
func receiveRaw(t *testing.T, s *socket, payload []byte) netip.Addr {
	t.Helper()
	buf := make([]byte, 2048)
	n, from, err := unix.Recvfrom(s.fd, buf, 0)
	require.NoError(t, err)
	got := buf[:n]
	switch a := from.(type) {
	case *unix.SockaddrInet4: // with the IP header
		require.Equal(t, payload, got[int(got[0]&0xf)*4:])
		return netip.AddrFrom4(a.Addr)
	case *unix.SockaddrInet6:
		require.Equal(t, payload, got)
		return netip.AddrFrom16(a.Addr)
	}
	t.Fatalf("from %T", from)
	return netip.Addr{}
}

// What belongs to the link: multicast groups, broadcast, address resolution. All of it is the
// bridge's, and none of it is dropped.
func testLink(t *testing.T, w *natSite) {
	const port = 7300
	m := w.maps(t)
	before := readCounters(t, m)
	ifindex := w.web.Ifindex(t, "eth0")
	for _, c := range []struct {
		name string
		to   netip.Addr
		join func(fd int) error
	}{
		{"multicast v4", netip.MustParseAddr("239.1.2.3"), func(fd int) error {
			return unix.SetsockoptIPMreqn(fd, unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, &unix.IPMreqn{Multiaddr: [4]byte{239, 1, 2, 3}, Ifindex: int32(ifindex)})
		}},
		{"multicast v6", netip.MustParseAddr("ff15::1234"), func(fd int) error {
			return unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP,
				&unix.IPv6Mreq{Multiaddr: netip.MustParseAddr("ff15::1234").As16(), Interface: uint32(ifindex)})
		}},
		{"all nodes", netip.MustParseAddr("ff02::1"), nil},
		{"limited broadcast", netip.MustParseAddr("255.255.255.255"), nil},
		{"broadcast of the subnet", netip.MustParseAddr("172.30.255.255"), nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			v6 := c.to.Is6()
			here, there := openSocket(t, w.peer, v6, unix.SOCK_DGRAM, 0), openSocket(t, w.web, v6, unix.SOCK_DGRAM, 0)
			any := netip.IPv4Unspecified()
			if v6 {
				any = netip.IPv6Unspecified()
				require.NoError(t, unix.SetsockoptInt(here.fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, w.peer.Ifindex(t, "eth0")))
			} else {
				require.NoError(t, unix.SetsockoptInt(here.fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1))
			}
			require.NoError(t, unix.Bind(there.fd, sockaddr(netip.AddrPortFrom(any, port))))
			if c.join != nil {
				require.NoError(t, c.join(there.fd))
			}
			require.NoError(t, unix.Sendto(here.fd, []byte("to all"), 0, sockaddr(netip.AddrPortFrom(c.to, port))))
			got, err := there.receive()
			require.NoError(t, err)
			require.Equal(t, "to all", string(got))
		})
	}
	t.Run("resolution", func(t *testing.T) {
		mac := w.web.MAC(t, "eth0").String()
		for _, to := range []netip.Addr{w.web4, w.web6} {
			w.peer.MustRun(t, "ip", "neigh", "flush", "dev", "eth0")
			require.NoError(t, openUDP(t, w.peer, netip.AddrPortFrom(to, echoPort)).exchange(numbered(10)))
			require.Contains(t, w.peer.MustRun(t, "ip", "neigh", "show", to.String()), "lladdr "+mac)
		}
	})
	require.Empty(t, since(t, m, before).drops())
}

// A host's socket that was bound to a container's outer port may dial anybody but whom that flow is
// with; there it gets an error, and the flow goes on.
func testHostSocket(t *testing.T, w *natSite) {
	w.Client2.Serve(t, "--tcp", "7001,7002", "--udp", "7001,7002")
	for _, there := range []netip.Addr{lab.Client24, lab.Client26} {
		any := map[bool]string{false: "0.0.0.0", true: "[::]"}[there.Is6()]
		flow := converse(t, w.peer, at(there, 7001))
		outer := parseAddrPort(t, flow.view.Remote)
		for _, bind := range []string{outer.String(), any + ":" + strconv.Itoa(int(outer.Port()))} {
			r, err := w.Host.Get("--bind", bind, at(there, 7001))
			require.Error(t, err)
			require.Equal(t, "EADDRNOTAVAIL", r.Errno, "%s: %+v", bind, r)
			require.Equal(t, "connect", r.Stage, "%s: %+v", bind, r)
		}
		flow.say(t, "goes on")
		w.Host.MustGet(t, "--network", "udp", "--bind", outer.String(), at(there, 7001))
		w.Host.MustGet(t, "--bind", any+":"+strconv.Itoa(int(outer.Port())), at(there, 7002))
		flow.say(t, "and on")
	}
}

// Needs root. Streams and datagrams with and without checksum and segmentation offloads at both ends
// and on the uplink: packets with partial checksums and of many segments on the one hand, finished ones
// on the other. And a wrong checksum stays wrong, by as much.
func TestNATOffloads(t *testing.T) {
	w := newNATSite(t)
	m := w.maps(t)
	before := readCounters(t, m)
	for _, c := range []struct{ checksum, segments string }{{"on", "on"}, {"on", "off"}, {"off", "off"}} {
		t.Run("checksum "+c.checksum+", segmentation "+c.segments, func(t *testing.T) {
			for _, device := range []struct {
				n      *lab.NS
				ifname string
			}{{w.web, "eth0"}, {w.peer, "eth0"}, {w.far, "eth0"}, {w.Host, lab.HostIf2}, {w.Client2, lab.ClientIf}, {w.Client2, "eth1"}} {
				device.n.MustRun(t, "ethtool", "-K", device.ifname, "rx", c.checksum, "tx", c.checksum,
					"sg", c.segments, "tso", c.segments, "gso", c.segments, "gro", c.segments)
			}
			for _, way := range w.ways() {
				t.Run(way.name, func(t *testing.T) {
					to := netip.AddrPortFrom(way.to, echoPort)
					stream(t, way.from, to, 300_000)
					s := openUDP(t, way.from, to)
					for _, size := range []int{1, 2, 3, 100, 1401} {
						require.NoError(t, s.exchange(numbered(size)), "%d bytes", size)
					}
				})
			}
		})
	}
	require.Empty(t, since(t, m, before).drops())
	t.Run("wrong checksum", func(t *testing.T) { testWrongChecksum(t, w) })
}

func testWrongChecksum(t *testing.T, w *natSite) {
	const wrong = 0x1234
	up, outside := w.Host.MAC(t, lab.HostIf2), w.Client2.MAC(t, lab.ClientIf)
	bridge, mac := w.Host.MAC(t, "blue0"), w.peer.MAC(t, "eth0")
	for _, v6 := range []bool{false, true} {
		client, host, inside := far4, lab.HostB4, w.peer4
		if v6 {
			client, host, inside = far6, lab.HostB6, w.peer6
		}
		for _, c := range []struct {
			name       string
			from, to   *lab.NS
			out        string
			smac, dmac net.HardwareAddr
			src, dst   netip.AddrPort
		}{
			{"published", w.Client2, w.web, lab.ClientIf, outside, up, netip.AddrPortFrom(client, 5001), netip.AddrPortFrom(host, echoPort)},
			{"egress", w.peer, w.far, "eth0", mac, bridge, netip.AddrPortFrom(inside, 5001), netip.AddrPortFrom(client, echoPort)},
		} {
			t.Run(fmt.Sprintf("%s v6=%v", c.name, v6), func(t *testing.T) {
				text := []byte("WRONG" + c.name)
				seen := c.to.Capture(t, "eth0", func(p gopacket.Packet) bool { return bytes.Contains(p.Data(), text) })
				send := func(skew uint16) {
					c.from.SendFrame(t, c.out, packet.UDP(c.src, c.dst, packet.MAC(c.smac, c.dmac), packet.Payload(text), packet.SkewL4(skew)))
				}
				send(wrong)
				first := seen.Wait(t, 1, 2*time.Second)[0]
				_, skew, err := packet.Skew(first.Data())
				require.NoError(t, err)
				require.EqualValues(t, wrong, skew)
				send(0)
				// The right one is echoed, the wrong one was not: one in, one in, one out.
				all := seen.Wait(t, 3, 2*time.Second)
				require.True(t, all[2].Outgoing && !all[1].Outgoing, "%v %v", all[1], all[2])
			})
		}
	}
}
