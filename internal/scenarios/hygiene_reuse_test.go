// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// deviceOf is the interface of a namespace that has the address.
func deviceOf(t *testing.T, n *lab.NS, a netip.Addr) string {
	t.Helper()
	for line := range strings.Lines(n.MustRun(t, "ip", "-o", "addr", "show")) {
		if fields := strings.Fields(line); strings.HasPrefix(fields[3], a.String()+"/") {
			return fields[1]
		}
	}
	t.Fatalf("%s has no %v", n.Name, a)
	return ""
}

// isFrom selects what one of the addresses sends.
func isFrom(addrs ...netip.Addr) func(gopacket.Packet) bool {
	return func(p gopacket.Packet) bool {
		for _, layer := range p.Layers() {
			var src net.IP
			switch ip := layer.(type) {
			case *layers.IPv4:
				src = ip.SrcIP
			case *layers.IPv6:
				src = ip.SrcIP
			default:
				continue
			}
			a, _ := netip.AddrFromSlice(src)
			for _, want := range addrs {
				if a.Unmap() == want {
					return true
				}
			}
		}
		return false
	}
}

// Needs root and a Docker Engine. A container leaves its network while its connections are open, and
// another one gets its addresses at once, which publishes nothing: nothing of what was open, in any
// direction, ever reaches it, but for a neighbour's own packets, which it refuses.
func TestHygieneReuse(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	w.d.MustRun(t, "network", "create", "-o", "com.docker.network.bridge.name=swap0", "--ipv6", "--subnet", "10.77.0.0/24", "--subnet", "fd00:77::/64", "swap")
	v4, v6 := netip.MustParseAddr("10.77.0.10"), netip.MustParseAddr("fd00:77::10")
	join := func(name string) {
		w.d.MustRun(t, "network", "connect", "--ip", v4.String(), "--ip6", v6.String(), "swap", name)
		w.settled(t, name, "swap", true)
	}
	leave := func(name string) {
		w.d.MustRun(t, "network", "disconnect", "swap", name)
	}
	w.serve(t, "old", "blue", "-p", "5300:80/udp", "-p", "8088:80")
	w.serve(t, "new", "blue")
	w.serve(t, "stays", "blue", "-p", "9090:80/udp")
	w.serve(t, "near", "swap")
	for _, name := range []string{"old", "new"} {
		w.d.MustRun(t, "network", "disconnect", "blue", name)
	}
	old, successor, near := w.d.NS(t, "old"), w.d.NS(t, "new"), w.d.NS(t, "near")

	// Outside, a server that speaks first: what it sends later goes to the flow that was.
	var outside *net.UDPConn
	var listener net.Listener
	require.NoError(t, w.Client2.Do(func() (err error) {
		if outside, err = net.ListenUDP("udp", &net.UDPAddr{IP: lab.Client24.AsSlice(), Port: 7001}); err != nil {
			return err
		}
		listener, err = net.Listen("tcp", at(lab.Client24, 7001))
		return err
	}))
	defer outside.Close()
	defer listener.Close()

	for i := range count(100) {
		join("old")
		w.published(t, "old", "5300/udp", "8088/tcp")
		var talks []*lab.Talk
		talk := func(from *lab.NS, args ...string) *lab.Talk {
			k := from.Talk(t, append([]string{"--timeout", "5s"}, args...)...)
			talks = append(talks, k)
			return k
		}
		tcp := map[string]*lab.Talk{
			"remote":          talk(w.Client, at(lab.Host4, 8088)),
			"remote v6":       talk(w.Client, at(lab.Host6, 8088)),
			"host":            talk(w.Host, "127.0.0.1:8088"),
			"host by lo":      talk(w.Host, "--bind", "127.0.0.1:0", "127.0.0.1:8088"),
			"neighbour":       talk(near, at(v4, 80)),
			"neighbour v6":    talk(near, at(v6, 80)),
			"neighbour's NAT": talk(near, at(lab.Host4, 8088)),
		}
		for name, k := range tcp {
			require.Equal(t, "old", k.First.View.Host, name)
		}
		udp := map[string]*lab.Talk{
			"remote":    talk(w.Client, "--network", "udp", at(lab.Host4, 5300)),
			"remote v6": talk(w.Client, "--network", "udp", "--unconnected", at(lab.Host6, 5300)),
			"host":      talk(w.Host, "--network", "udp", "--unconnected", "127.0.0.1:5300"),
		}
		for name, k := range udp {
			require.Equal(t, "old", k.Say(t, "hello").View.Host, name)
		}
		// Its own connections into the world.
		egress, err := dial(old, "udp", "", at(lab.Client24, 7001))
		require.NoError(t, err)
		_, err = egress.Write([]byte("hello"))
		require.NoError(t, err)
		buf := make([]byte, 64)
		require.NoError(t, outside.SetReadDeadline(time.Now().Add(5*time.Second)))
		_, masqueraded, err := outside.ReadFromUDP(buf)
		require.NoError(t, err)
		dialled, err := dial(old, "tcp", "", at(lab.Client24, 7001))
		require.NoError(t, err)
		accepted, err := listener.Accept()
		require.NoError(t, err)

		leave("old")
		join("new")
		w.forgotten(t, "old")
		seen := successor.Capture(t, deviceOf(t, successor, v4), isFrom(lab.Client4, lab.Client6, lab.Client24, lab.Client26))

		for name, k := range tcp {
			r := k.Say(t, "still there?")
			assert.True(t, isReset(r), "%d: %s: %+v", i, name, r)
		}
		for name, k := range udp {
			r := k.Send(t, "still there?")
			assert.Empty(t, r.View.Host, "%d: %s: %+v", i, name, r)
		}
		_, err = outside.WriteToUDP([]byte("late"), masqueraded)
		require.NoError(t, err)
		require.NoError(t, accepted.SetDeadline(time.Now().Add(5*time.Second)))
		_, err = accepted.Write([]byte("late"))
		require.NoError(t, err)
		_, err = accepted.Read(buf)
		assert.ErrorContains(t, err, "connection reset", "%d: the host refuses what was the container's", i)

		// Behind all that: the new owner lives, and so do others' ports.
		r := near.MustGet(t, at(v4, 80))
		assert.Equal(t, "new", r.View.Host)
		assert.Equal(t, "stays", w.Client.MustGet(t, "--network", "udp", at(lab.Host4, 9090)).View.Host)
		assert.Empty(t, seen.Frames(), "%d: packets of the old owner's peers", i)
		seen.Stop()
		for _, k := range talks {
			k.Close()
		}
		for _, c := range []net.Conn{egress, dialled, accepted} {
			c.Close()
		}
		if t.Failed() {
			return
		}
		leave("new")
		w.settled(t, "new", "swap", false)
	}
	t.Logf("addresses changed hands %d times", count(100))
}
