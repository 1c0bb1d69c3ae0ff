// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes namespaces, and runs bpfnet. Topology: see natSite.
//
// What the flow tables hold, by bpfnet flows: each kind of flow under its names, with just the packets that
// its ends have sent.
package scenarios

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// flowLine is what the tests read of "bpfnet flows -o json".
type flowLine struct {
	Event              string
	Time               time.Time
	Proto, State, Path string
	From, To           flowEnd
	NATFrom            *flowEnd `json:"nat_from"`
	NATTo              *flowEnd `json:"nat_to"`
	Networks           []string
	Published          string
	Sent, Answered     struct{ Packets, Bytes uint64 }
	Age                int `json:"age_seconds"`
}

type flowEnd struct {
	Addr      netip.Addr
	Port      uint16
	Container string
}

func (w *site) flowList(t *testing.T, args ...string) (out []flowLine) {
	t.Helper()
	text := w.b.MustCLI(t, append([]string{"flows", "-o", "json"}, args...)...)
	require.NoError(t, json.Unmarshal([]byte(text), &out), text)
	return out
}

// flowTo is the one flow that was dialled to there.
func (w *site) flowTo(t *testing.T, proto string, from netip.Addr, to netip.AddrPort) flowLine {
	t.Helper()
	var found []flowLine
	for _, l := range w.flowList(t, "--proto", proto) {
		if l.From.Addr == from && l.To.Addr == to.Addr() && l.To.Port == to.Port() {
			found = append(found, l)
		}
	}
	require.Len(t, found, 1, "%s from %v to %v", proto, from, to)
	return found[0]
}

func TestFlows(t *testing.T) {
	w := newNATSite(t)
	for _, c := range []struct {
		name             string
		from             *lab.NS
		addr             netip.Addr // of from
		to               netip.AddrPort
		opener, target   string
		natFrom          netip.Addr
		natTo            netip.AddrPort
		networks         []string
		published, state string
	}{
		{"out of a container", w.peer, w.peer4, netip.AddrPortFrom(far4, echoPort), "peer", "", lab.HostB4, netip.AddrPort{}, []string{"blue"}, "", "established"},
		{"the same by IPv6", w.peer, w.peer6, netip.AddrPortFrom(far6, echoPort), "peer", "", lab.HostB6, netip.AddrPort{}, []string{"blue"}, "", "established"},
		{"to a published port", w.far, far4, netip.AddrPortFrom(lab.HostB4, echoPort), "", "web", netip.Addr{}, netip.AddrPortFrom(w.web4, echoPort), []string{"blue"}, "0.0.0.0:9000", "established"},
		{"to a neighbour", w.peer, w.peer4, netip.AddrPortFrom(w.web4, echoPort), "peer", "web", netip.Addr{}, netip.AddrPort{}, []string{"blue"}, "", "established"},
	} {
		t.Run(c.name, func(t *testing.T) {
			const rounds, size = 7, 100
			s := openUDP(t, c.from, c.to)
			for range rounds {
				require.NoError(t, s.exchange(make([]byte, size)))
			}
			header := 14 + 20 + 8
			if c.to.Addr().Is6() {
				header += 20
			}
			begun := time.Now()
			l := w.flowTo(t, "udp", c.addr, c.to)
			assert.Equal(t, [2]string{"answered", "fast"}, [2]string{l.State, l.Path})
			assert.Equal(t, [2]uint64{rounds, uint64(rounds * (header + size))}, [2]uint64{l.Sent.Packets, l.Sent.Bytes})
			assert.Equal(t, [2]uint64{rounds, uint64(rounds * (header + size))}, [2]uint64{l.Answered.Packets, l.Answered.Bytes})
			assert.Equal(t, s.local(t).Port(), l.From.Port)
			assert.Less(t, l.Age, 10+int(time.Since(begun).Seconds()))

			say := echoing(t, c.from, c.to)
			say(t, "hello")
			l = w.flowTo(t, "tcp", c.addr, c.to)
			assert.Equal(t, [2]string{c.state, "fast"}, [2]string{l.State, l.Path})
			assert.Equal(t, c.opener, l.From.Container)
			assert.Equal(t, c.networks, l.Networks)
			assert.Equal(t, c.published, l.Published)
			if c.natFrom.IsValid() {
				require.NotNil(t, l.NATFrom)
				assert.Equal(t, c.natFrom, l.NATFrom.Addr)
			} else {
				assert.Nil(t, l.NATFrom)
			}
			if c.natTo.IsValid() {
				require.NotNil(t, l.NATTo)
				assert.Equal(t, flowEnd{c.natTo.Addr(), c.natTo.Port(), c.target}, *l.NATTo)
			} else {
				assert.Nil(t, l.NATTo)
				assert.Equal(t, c.target, l.To.Container)
			}
		})
	}

	t.Run("states", func(t *testing.T) {
		at := netip.AddrPortFrom
		c, err := dial(w.peer, "tcp", "", at(w.web4, 9200).String()) // nobody listens
		require.Error(t, err, "%v", c)
		assert.Equal(t, "reset", w.flowTo(t, "tcp", w.peer4, at(w.web4, 9200)).State)

		echoTCP(t, w.peer, echoPort)
		stream(t, w.web, at(w.peer4, echoPort), 1000)
		lab.Eventually(t, 5*time.Second, "both sides have closed", func() bool {
			return w.flowTo(t, "tcp", w.web4, at(w.peer4, echoPort)).State == "closed"
		})

		finish := make(chan struct{})
		done := server(t, w.peer, oncePort, func(*net.TCPConn) error { <-finish; return nil })
		c, err = dial(w.web, "tcp", "", at(w.peer4, oncePort).String())
		require.NoError(t, err)
		defer c.Close()
		require.NoError(t, c.(*net.TCPConn).CloseWrite())
		lab.Eventually(t, 5*time.Second, "one side has closed", func() bool {
			return w.flowTo(t, "tcp", w.web4, at(w.peer4, oncePort)).State == "closing"
		})
		close(finish)
		require.NoError(t, done())

		require.NoError(t, openUDP(t, w.peer, at(w.web4, 9300)).send([]byte("hello")))
		assert.Equal(t, "unanswered", w.flowTo(t, "udp", w.peer4, at(w.web4, 9300)).State)

		echoTCP(t, w.Host, hostEchoPort)
		echoing(t, w.peer, at(lab.Host4, hostEchoPort))(t, "to the host itself")
		l := w.flowTo(t, "tcp", w.peer4, at(lab.Host4, hostEchoPort))
		assert.Equal(t, [3]string{"one-sided", "stack", "peer"}, [3]string{l.State, l.Path, l.From.Container})
		assert.Zero(t, l.Answered.Packets)

		require.Len(t, ttls(w.peer, far4, 3), 3)
		l = w.flowTo(t, "icmp", w.peer4, at(far4, 0))
		assert.Equal(t, "answered", l.State)
		assert.Equal(t, [2]uint64{3, 3}, [2]uint64{l.Sent.Packets, l.Answered.Packets})
	})

	t.Run("whole", func(t *testing.T) {
		w.b.Stop(t) // it reads the maps and asks nobody
		stream(t, w.far, netip.AddrPortFrom(lab.HostB4, echoPort), 400_000)
		all := w.flowList(t)
		entries := 0
		for _, l := range all {
			entries += 2
			if l.State == "one-sided" {
				entries--
			}
		}
		v4, v6, err := w.maps(t).Flows()
		require.NoError(t, err)
		assert.Equal(t, v4+v6, entries, "every entry is one of a flow's")

		first := w.flowList(t, "--sort", "bytes", "--limit", "1")
		require.Len(t, first, 1)
		assert.GreaterOrEqual(t, first[0].Sent.Bytes, uint64(400_000))
		assert.Equal(t, far4, first[0].From.Addr)

		var groups []struct {
			Name  string
			Flows int
		}
		require.NoError(t, json.Unmarshal([]byte(w.b.MustCLI(t, "flows", "--by", "container", "-o", "json")), &groups))
		sum := 0
		for _, g := range groups {
			sum += g.Flows
		}
		assert.Equal(t, len(all), sum)
		assert.Contains(t, w.b.MustCLI(t, "flows", "--port", "9000"), fmt.Sprintf("%v:9000 (web)", w.web4))
		w.b.Start(t)
	})
}

// Who follows sees flows as they come, close and go, by name, also those of a container that is gone, and in the tables that
// a daemon puts in the place of others.
func TestFlowsFollow(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue")
	w.sandbox(t, "peer", "blue")
	to, _ := w.b.Addrs(t, "web", "blue")
	from, _ := w.b.Addrs(t, "peer", "blue")
	peer := w.b.NS(t, "peer")
	before := converse(t, peer, at(to, 80))

	text := w.b.StartCLI(t, "flows", "-f", "--proto", "tcp")
	all := w.b.StartCLI(t, "flows", "-f", "-o", "json")
	lines := func() (out []flowLine) {
		s := all.Stdout()
		for line := range strings.Lines(s[:strings.LastIndexByte(s, '\n')+1]) {
			var l flowLine
			require.NoError(t, json.Unmarshal([]byte(line), &l), line)
			out = append(out, l)
		}
		return out
	}
	told := func(event string, port uint16) *flowLine {
		var found []flowLine
		for _, l := range lines() {
			if l.Event == event && l.From.Port == port {
				found = append(found, l)
			}
		}
		require.LessOrEqual(t, len(found), 1, "%s of %d is told once", event, port)
		if len(found) == 0 {
			return nil
		}
		return &found[0]
	}
	// The first look is over when a flow is told.
	text.WaitOutput(t, "EVENT")
	lab.Eventually(t, 10*time.Second, "it follows", func() bool {
		require.NoError(t, openUDP(t, peer, parseAddrPort(t, at(to, 80))).send([]byte("hello")))
		return len(lines()) > 0
	})

	begun := time.Now()
	c := converse(t, peer, at(to, 80))
	port := portOf(c.LocalAddr())
	c.say(t, "hello")
	lab.Eventually(t, 10*time.Second, "it was opened", func() bool { return told("opened", port) != nil })
	l := told("opened", port)
	assert.WithinDuration(t, begun, l.Time, 4*time.Second)
	assert.Equal(t, flowEnd{from, port, "peer"}, l.From)
	assert.Equal(t, flowEnd{to, 80, "web"}, l.To)
	c.Close()
	lab.Eventually(t, 10*time.Second, "it was closed", func() bool { return told("closed", port) != nil })
	assert.NotZero(t, told("closed", port).Answered.Bytes)
	lab.Eventually(t, 10*time.Second, "both are in the text", func() bool {
		lines := strings.Split(strings.TrimSpace(text.Stdout()), "\n")
		return len(lines) == 3 && strings.Contains(lines[1], "  opened ") && strings.Contains(lines[2], "  closed ")
	})

	w.b.Stop(t)
	w.b.Use(w.b.Binary(), "--flows", "16384")
	w.b.Start(t)
	require.Contains(t, w.b.Log(), "flow tables carried over to another shape or size")
	udp := openUDP(t, peer, parseAddrPort(t, at(to, 80)))
	require.NoError(t, udp.send([]byte("hello")))
	port = udp.local(t).Port()
	lab.Eventually(t, 10*time.Second, "it was opened", func() bool { return told("opened", port) != nil })
	assert.Nil(t, told("expired", portOf(before.LocalAddr())), "it was carried over")
	w.b.MustCLI(t, "rm", "--force", "web")
	lab.Eventually(t, 10*time.Second, "it went with its container", func() bool { return told("expired", port) != nil })
	assert.Equal(t, "web", told("expired", port).To.Container)
	assert.Nil(t, told("opened", portOf(before.LocalAddr())), "it was there before")
}

// openFlows has the client send a datagram each of so many flows to a port of the host that a container has published.
func (w *site) openFlows(t *testing.T, n int, port uint16) {
	t.Helper()
	w.Host.AddRoute(t, netip.MustParsePrefix("198.18.0.0/15"), lab.Client4)
	s := openSocket(t, w.Client, false, unix.SOCK_RAW, unix.IPPROTO_RAW)
	rawUDP(t, s, n, netip.MustParseAddr("198.18.0.1"), netip.AddrPortFrom(lab.Host4, port))
}

// rawUDP sends n datagrams, each from another port, and from another address after 60,000.
func rawUDP(t *testing.T, s *socket, n int, from netip.Addr, to netip.AddrPort) {
	t.Helper()
	b := make([]byte, 29) // the kernel writes the header's checksum and length
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_UDP
	dst := to.Addr().As4()
	copy(b[16:], dst[:])
	binary.BigEndian.PutUint16(b[22:], to.Port())
	binary.BigEndian.PutUint16(b[24:], 9)
	const each, first = 60_000, 1024
	for i := range n {
		if i > 0 && i%each == 0 {
			from = from.Next()
		}
		src := from.As4()
		copy(b[12:], src[:])
		binary.BigEndian.PutUint16(b[20:], uint16(first+i%each))
		require.NoError(t, unix.Sendto(s.fd, b, 0, &unix.SockaddrInet4{Addr: dst}))
	}
}

// Half a million flows are listed within two seconds of a processor, in either form, and the daemon answers meanwhile.
func TestFlowsMany(t *testing.T) {
	flows := count(500_000)
	w := newOwnSite(t, "--flows", fmt.Sprint(2*flows), "--timeout", "udp-new=24h")
	w.sandbox(t, "web", "blue", "-p", "7000:7000/udp")
	s := openSocket(t, w.b.NS(t, "web"), false, unix.SOCK_DGRAM, 0) // it does not answer
	require.NoError(t, unix.Bind(s.fd, &unix.SockaddrInet4{Port: 7000}))
	w.openFlows(t, flows, 7000)
	m := w.maps(t)
	lab.Eventually(t, 10*time.Second, "they are there", func() bool {
		v4, _, err := m.Flows()
		require.NoError(t, err)
		return v4 >= 2*flows
	})

	ctx, cancel := context.WithCancel(t.Context())
	worst := make(chan time.Duration, 1)
	client, err := api.Dial(ctx, w.b.Socket)
	require.NoError(t, err)
	go func() {
		var longest time.Duration
		defer func() { worst <- longest }()
		for ctx.Err() == nil {
			begun := time.Now()
			_, err := client.Status(ctx)
			if ctx.Err() == nil {
				assert.NoError(t, err)
				longest = max(longest, time.Since(begun))
			}
		}
	}()
	for _, c := range []struct {
		args []string
		want int // lines
	}{
		{[]string{"flows"}, flows + 1},
		{[]string{"flows", "-o", "json"}, flows + 2},
		{[]string{"flows", "--sort", "packets", "--limit", "10"}, 12},
		{[]string{"flows", "--by", "container"}, 2},
	} {
		cmd := w.b.Command(t.Context(), c.args...)
		out, err := cmd.Output()
		require.NoError(t, err, c.args)
		// Of the processor, as other tests run beside this one.
		took := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
		t.Logf("%v: %d flows in %v of a processor", c.args, flows, took)
		assert.Less(t, took, 2*time.Second, c.args)
		assert.GreaterOrEqual(t, strings.Count(string(out), "\n"), c.want, c.args)
	}
	cancel()
	took := <-worst
	t.Logf("the daemon's longest answer took %v", took)
	assert.Less(t, took, 5*time.Second)
}
