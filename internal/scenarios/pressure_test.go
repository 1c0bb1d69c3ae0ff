// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes namespaces, and runs bpfnet. Topology: see natSite.
//
// What is limited fills up. Connections that stand go on, and so does what the host does itself; what is new is
// refused under its own reason; bpfnet status says so.
package scenarios

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/internal/promise"
)

const hostEchoPort = 9300 // of the client's own echo server

// standing opens a connection each way: out of a container, into one, and of the host's own. It returns what
// speaks over all of them.
func (w *natSite) standing(t *testing.T) (speak func(t *testing.T)) {
	t.Helper()
	var all []func(*testing.T, string)
	for _, c := range []struct {
		from *lab.NS
		to   netip.AddrPort
	}{
		{w.peer, netip.AddrPortFrom(far4, echoPort)},
		{w.peer, netip.AddrPortFrom(w.web4, echoPort)},
		{w.far, netip.AddrPortFrom(lab.HostB4, echoPort)},
		{w.far, netip.AddrPortFrom(lab.HostB6, echoPort)},
		{w.Host, netip.AddrPortFrom(lab.Client4, hostEchoPort)},
	} {
		all = append(all, echoing(t, c.from, c.to))
	}
	return func(t *testing.T) {
		t.Helper()
		for _, say := range all {
			say(t, strings.Repeat("the same as ever ", 500))
		}
	}
}

// warned waits for a warning of bpfnet status that begins with the word.
func (w *natSite) warned(t *testing.T, about string) {
	t.Helper()
	lab.Eventually(t, 5*time.Second, "status warns about "+about, func() bool {
		var s struct{ Warnings []string }
		require.NoError(t, json.Unmarshal([]byte(w.b.MustCLI(t, "status", "-o", "json")), &s))
		for _, text := range s.Warnings {
			if strings.HasPrefix(text, about) {
				require.Contains(t, w.b.MustCLI(t, "status"), "Warning")
				return true
			}
		}
		return false
	})
}

func TestPressure(t *testing.T) {
	w := newNATSite(t, "--flows", "1024", "--timeout", "udp-new=32s")
	echoTCP(t, w.Client, hostEchoPort)
	m := w.maps(t)
	speak := w.standing(t)
	speak(t)

	t.Run("flow table full", func(t *testing.T) {
		begun := readCounters(t, m)
		s := openSocket(t, w.web, false, unix.SOCK_DGRAM, 0)
		for port := range 2000 {
			require.NoError(t, unix.Sendto(s.fd, []byte("hello"), 0, &unix.SockaddrInet4{Addr: lab.Client4.As4(), Port: 10000 + port}))
		}
		refused := since(t, m, begun)["flow_table_full/container"]
		require.NotZero(t, refused)
		w.warned(t, "flows4: ")
		speak(t)
		echoing(t, w.Host, netip.AddrPortFrom(lab.Client4, hostEchoPort))(t, "the host opens another")
		lab.Eventually(t, 20*time.Second, "short timeouts make room", func() bool {
			c, err := dial(w.peer, "tcp", "", netip.AddrPortFrom(far4, echoPort).String())
			if err == nil {
				c.Close()
			}
			return err == nil
		})
		speak(t)
		promise.Kept(t, promise.Pressure, "A full flow table refuses new flows (`flow_table_full`) and ends none: connections out of containers, into them, between them and of the host go on, and timeouts shrink until there is room again.",
			"%d of 2,000 new flows refused", refused)
	})

	t.Run("flood of SYNs", func(t *testing.T) {
		const rounds, each = 128, 512 // as many as the queue of the device takes at once
		w.Host.AddRoute(t, netip.MustParsePrefix("198.18.0.0/15"), lab.Client4)
		client, up := w.Client.MAC(t, lab.ClientIf), w.Host.MAC(t, lab.HostIf)
		entries := func() int {
			v4, _, err := m.Flows()
			require.NoError(t, err)
			return v4
		}
		begun, had := readCounters(t, m), entries()
		from := netip.MustParseAddr("198.18.0.0")
		for round := range rounds {
			frames := make([][]byte, each)
			for i := range frames {
				from = from.Next()
				frames[i] = packet.TCP(netip.AddrPortFrom(from, 40000), netip.AddrPortFrom(lab.Host4, echoPort), packet.MAC(client, up))
			}
			w.Client.SendFrames(t, lab.ClientIf, frames)
			if round%16 == 0 {
				echoing(t, w.far, netip.AddrPortFrom(lab.HostB4, echoPort))(t, "a new one meanwhile")
			}
		}
		w.warned(t, "syns4: ")
		speak(t)
		delta := since(t, m, begun)
		require.GreaterOrEqual(t, delta["fate container/uplink"], uint64(rounds*each), "it came to the container")
		require.Zero(t, delta["flow_table_full/uplink"])
		require.Less(t, entries(), had+100, "nobody of the flood has a flow")
		promise.Kept(t, promise.Pressure, "A flood of SYNs from forged addresses to a published port takes no room in the flow table: connections go on, and new ones come through.",
			"%d SYNs, %d entries before and %d after", rounds*each, had, entries())
	})
}
