// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/internal/promise"
)

const crowdPort = 7000 // of the servers that the tests of masquerading speak with

// exhaust has a container send a datagram from each of so many ports to one destination.
func exhaust(t *testing.T, w *site, from *lab.NS, src netip.Addr, ports int, to netip.AddrPort) (sent uint64) {
	t.Helper()
	mac, gateway := from.MAC(t, "eth0"), w.Host.MAC(t, "blue0")
	var frames [][]byte
	flush := func() {
		from.SendFrames(t, "eth0", frames)
		sent, frames = sent+uint64(len(frames)), nil
	}
	for port := 1; port <= ports; port++ {
		frames = append(frames, packet.UDP(netip.AddrPortFrom(src, uint16(port)), to, packet.MAC(mac, gateway), packet.Payload(malice)))
		if len(frames) == 512 { // as many as the queue of the device takes at once
			flush()
		}
	}
	flush()
	return sent
}

// Needs root. A container takes all masquerade ports towards one destination. Without a cap others get none there, and
// hear of it by its own reason; what is open, other destinations, other protocols and the host go on. With a cap on the
// flows of a container nobody notices.
func TestMasqueradeExhausted(t *testing.T) {
	victim := netip.AddrPortFrom(lab.Client4, crowdPort)
	elsewhere := []string{at(lab.Client4, crowdPort+1), at(lab.Client6, crowdPort), at(lab.Client24, crowdPort)}
	prepare := func(t *testing.T, flags ...string) (w *site, peer, evil *lab.NS, src netip.Addr) {
		// The fewest ports for masquerading that a host may leave: the last 20,000.
		l := lab.New(t, lab.Opts{Sysctls: map[string]string{"net.ipv4.ip_local_port_range": "1024 65535"}})
		w = ownSite(t, l, append(flags, "--flows", "65536")...)
		ports := fmt.Sprintf("%d,%d", crowdPort, crowdPort+1)
		w.Client.Serve(t, "--tcp", ports, "--udp", ports)
		w.Client2.Serve(t, "--tcp", ports, "--udp", ports)
		w.sandbox(t, "peer", "blue")
		w.sandbox(t, "evil", "blue")
		src, _ = w.b.Addrs(t, "evil", "blue")
		return w, w.b.NS(t, "peer"), w.b.NS(t, "evil"), src
	}
	unharmed := func(t *testing.T, w *site, peer *lab.NS) {
		for _, network := range []string{"tcp", "udp"} {
			for _, to := range elsewhere {
				peer.MustGet(t, "--network", network, to)
			}
			w.Host.MustGet(t, "--network", network, victim.String())
		}
		peer.MustGet(t, victim.String()) // by the other protocol
	}

	t.Run("without a cap", func(t *testing.T) {
		w, peer, evil, src := prepare(t)
		m := w.maps(t)
		open := openUDP(t, peer, victim)
		say := func(text string) {
			t.Helper()
			require.NoError(t, open.send([]byte(text)))
			got, err := open.receive()
			require.NoError(t, err)
			require.Contains(t, string(got), fmt.Sprintf("%q", text))
		}
		say("before")
		begun := readCounters(t, m)
		sent := exhaust(t, w, evil, src, 45_000, victim)
		busiest, err := m.BusiestDestination(0.8)
		require.NoError(t, err)
		require.Equal(t, victim, busiest.To)
		require.Equal(t, 20_000, busiest.Max)
		require.Equal(t, busiest.Max, busiest.Ports, "all are taken")
		n := since(t, m, begun)["snat_exhausted/container"]
		require.GreaterOrEqual(t, n, (sent-uint64(busiest.Max))/2)
		require.Equal(t, counters{"snat_exhausted/container": n}, since(t, m, begun).drops())

		begun = readCounters(t, m)
		_, err = peer.Get("--network", "udp", "--timeout", "300ms", victim.String())
		require.Error(t, err)
		require.Equal(t, counters{"snat_exhausted/container": 1}, since(t, m, begun).drops())
		say("goes on")
		unharmed(t, w, peer)
		r, err := w.Host.Get("--network", "udp", "--bind", at(lab.Host4, 50_000), victim.String())
		require.Error(t, err)
		require.Equal(t, "EADDRNOTAVAIL", r.Errno, "%+v", r)
		require.Contains(t, w.b.MustCLI(t, "status"), "masquerade ports towards udp "+victim.String())

		w.b.MustCLI(t, "rm", "-f", "evil")
		lab.Eventually(t, 5*time.Second, "its ports are free when it is gone", func() bool {
			_, err := peer.Get("--network", "udp", "--timeout", "300ms", victim.String())
			return err == nil
		})
		say("and on")
		promise.Kept(t, promise.Hostile, "A container that takes all masquerade ports towards one destination keeps others from opening flows to that one, by that protocol, until it goes; what is open, other destinations and the host go on.",
			"%d ports", busiest.Ports)
	})

	t.Run("with a cap", func(t *testing.T) {
		const most = 2000
		w, peer, evil, src := prepare(t, "--endpoint-flows", fmt.Sprint(most))
		m := w.maps(t)
		begun := readCounters(t, m)
		sent := exhaust(t, w, evil, src, 2*most, victim)
		n := since(t, m, begun)["flow_cap/container"]
		require.GreaterOrEqual(t, n, (sent-most)/2)
		require.Equal(t, counters{"flow_cap/container": n}, since(t, m, begun).drops())
		busiest, err := m.BusiestDestination(0)
		require.NoError(t, err)
		require.LessOrEqual(t, busiest.Ports, most)
		for range 20 {
			peer.MustGet(t, "--network", "udp", victim.String())
		}
		unharmed(t, w, peer)
		promise.Kept(t, promise.Hostile, "With `--endpoint-flows`, no container can take the masquerade ports from the others.",
			"a cap of %d, %d flows asked for; nobody else was refused", most, sent)
	})
}
