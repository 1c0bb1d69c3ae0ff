// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// At 500,000 connection tracking would need its machine-wide limit raised.
var flowPoints = []point{
	{1000, []string{DockerIPTables, Bpfnet}},
	{100_000, []string{DockerIPTables, Bpfnet}},
	{200_000, []string{DockerIPTables, Bpfnet}},
	{500_000, []string{Bpfnet}},
}

// flowRoom is for how many flows bpfnet makes its tables in all of these labs.
const flowRoom = 1_000_000

func flowsGroup() Group { return scaledFlows(flowPoints, flowRoom, "crr") }

// scaledFlows asks a published port while there are other flows to it.
func scaledFlows(points []point, room int, metrics ...string) Group {
	return scaleGroup("flows", 40*time.Second, 7*time.Second, points, func(t testing.TB, o Options, mode string, at int) []Probe {
		s := newSpot(t, mode, spotOpts{udp: true, daemon: []string{"--flows", strconv.Itoa(room), "--timeout", "udp-new=24h"}})
		if mode != Bpfnet {
			s.lab.Host.Sysctl(t, "net.netfilter.nf_conntrack_udp_timeout", "86400")
		}
		// Those of the measured connections come on top: no more of them than connection tracking has
		// room for.
		s.lab.Client.Sysctl(t, "net.ipv4.ip_local_port_range", "32768 60999")
		p := s.path("published", 4)
		p.serve(t)
		p.openFlows(t, at)
		if err := s.hasFlows(at); err != nil { // before crr leaves some of its own
			t.Fatal(err)
		}
		stands := func() error { return s.hasFlows(at) }
		note := "each of the other flows is one UDP datagram from the client to the same port, not answered, and kept by a timeout of a day"
		if mode == Bpfnet {
			note += fmt.Sprintf("; tables for %d flows", room)
		}
		return s.scaled(t, o, Key{Scenario: "flows", At: at}, "published", note, stands, metrics...)
	})
}

// flowsEach is how many flows one address of the client opens.
const flowsEach = 60_000

// openFlows sends one datagram of each of n flows. The server counts them and does not answer.
func (p path) openFlows(t testing.TB, n int) {
	t.Helper()
	first := lab.Client4
	for i := 1; i*flowsEach < n; i++ { // addresses that answer ARP
		first = first.Next()
		p.from.AddAddr(t, lab.ClientIf, netip.PrefixFrom(first, 24))
	}
	err := p.from.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		to := &unix.SockaddrInet4{Addr: p.to.As4()}
		for i, from := 0, lab.Client4; i < n; from = from.Next() {
			for port := 1024; port < 1024+flowsEach && i < n; port++ {
				if err := unix.Sendto(fd, datagram(netip.AddrPortFrom(from, uint16(port)), netip.AddrPortFrom(p.to, loadPort)), 0, to); err != nil {
					return fmt.Errorf("open a flow from %v:%d: %w", from, port, err)
				}
				i++
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// datagram is a UDP packet over IPv4 that the generator's server counts. The kernel writes the IP header's
// length, identification and checksum; without a checksum of its own UDP over IPv4 is right.
func datagram(from, to netip.AddrPort) []byte {
	b := make([]byte, 0, 29)
	src, dst := from.Addr().As4(), to.Addr().As4()
	b = append(b, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0)
	b = append(append(b, src[:]...), dst[:]...)
	for _, v := range []uint16{from.Port(), to.Port(), 9, 0} {
		b = binary.BigEndian.AppendUint16(b, v)
	}
	return append(b, 'u')
}

// hasFlows fails unless there are at least so many flows where the mode has them.
func (s *site) hasFlows(want int) error {
	have := 0
	if s.mode == Bpfnet {
		st, err := s.standing()
		if err != nil {
			return err
		}
		have = st.entries("flows4") / 2 // one a direction
	} else {
		c := counters{}
		if err := s.lab.Host.Do(func() error { return c.conntrack() }); err != nil {
			return err
		}
		have = int(c[tracked])
	}
	if have < want {
		return fmt.Errorf("%d flows are there, want %d", have, want)
	}
	return nil
}
