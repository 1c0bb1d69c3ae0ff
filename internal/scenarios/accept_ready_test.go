// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
)

// portStats are the counters of a published port, by its host port.
func portStats(t *testing.T, w *site, m *maps.Maps, hostPort int) maps.PortCount {
	t.Helper()
	s, err := api.ReadSnapshot(w.b.State)
	require.NoError(t, err)
	for _, p := range s.Ports {
		if p.Host == fmt.Sprintf("0.0.0.0:%d", hostPort) && p.Proto == "tcp" {
			c, err := m.PortStats(p.Slot)
			require.NoError(t, err)
			return c
		}
	}
	return maps.PortCount{}
}

// Needs root. The first SYN after `docker run` has returned meets the published port, or is dropped
// under the not-ready reason and comes again; the host never answers it.
func TestAcceptReadyPorts(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	m := w.maps(t)
	const notReady = "port_not_ready/uplink"
	var late, refused int
	for i := range count(200) {
		hostPort, name := 20000+i, fmt.Sprintf("c%d", i)
		capture := w.Client.Capture(t, lab.ClientIf, func(p gopacket.Packet) bool {
			tcp, ok := p.TransportLayer().(*layers.TCP)
			return ok && int(tcp.SrcPort) == hostPort && tcp.RST
		})
		nft, before := w.NFTCounters(t), readCounters(t, m)
		w.d.MustRun(t, "run", "-d", "--name", name, "-p", fmt.Sprintf("%d:80", hostPort), lab.Image, "labtool", "serve", "--tcp", "80")
		var view lab.View
		for {
			c, err := dial(w.Client, "tcp", "", at(lab.Host4, hostPort))
			if errors.Is(err, syscall.ECONNREFUSED) {
				refused++
				// Nobody listens in the container yet. That it said so itself is seen below.
				require.NotZero(t, portStats(t, w, m, hostPort).TxPackets, "the host refused the connection")
				continue
			}
			require.NoError(t, err)
			require.NoError(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
			line, err := bufio.NewReader(c).ReadString('\n')
			require.NoError(t, err)
			require.NoError(t, c.Close())
			require.NoError(t, json.Unmarshal([]byte(line), &view))
			break
		}
		require.Equal(t, lab.Client4, netip.MustParseAddrPort(view.Remote).Addr())
		stats := portStats(t, w, m, hostPort)
		got := since(t, m, before).drops()
		late += int(got[notReady])
		delete(got, notReady)
		require.Empty(t, got)
		require.NotZero(t, stats.Connections)
		// Each reset is one that a container sent, and that was counted on its port.
		require.LessOrEqual(t, uint64(len(capture.Frames())), stats.TxPackets)
		delta := w.NFTDelta(t, nft)
		require.Zero(t, delta["input"], "the host's stack saw a packet: %v", delta)
		require.Zero(t, delta["output"], "the host's stack sent a packet: %v", delta)
		capture.Stop()
		if i%10 == 9 {
			for j := i - 9; j <= i; j++ {
				w.d.MustRun(t, "rm", "-f", fmt.Sprintf("c%d", j))
			}
		}
	}
	t.Logf("%d containers: %d first packets found the port not ready, %d the container's program", count(200), late, refused)
}

// belongings are all that containers make the daemon hold.
type belongings struct {
	Endpoints, Ports, Attachments, Pins int
	Maps                                map[string]int
}

func (w *site) belongings(t *testing.T, m *maps.Maps) belongings {
	t.Helper()
	s, err := api.ReadSnapshot(w.b.State)
	require.NoError(t, err)
	b := belongings{Endpoints: len(s.Endpoints), Ports: len(s.Ports), Attachments: len(s.Attachments), Maps: map[string]int{}}
	err = filepath.WalkDir(w.BPFFS, func(path string, _ fs.DirEntry, _ error) error {
		if filepath.Base(filepath.Dir(path)) != "programs" { // pinned for the next start, whenever there is time
			b.Pins++
		}
		return nil
	})
	require.NoError(t, err)
	fill, err := m.Fill()
	require.NoError(t, err)
	for _, f := range fill {
		if f.Map != "host_addrs" { // a bridge gets its fe80:: with its first port, and keeps it
			b.Maps[f.Map] = f.Entries
		}
	}
	return b
}

// nothingLeft waits until the daemon holds what it did before.
func (w *site) nothingLeft(t *testing.T, m *maps.Maps, before belongings) {
	t.Helper()
	var now belongings
	defer func() {
		if t.Failed() {
			t.Logf("before %+v\nnow %+v", before, now)
		}
	}()
	lab.Eventually(t, 10*time.Second, "nothing of the containers is left", func() bool {
		now = w.belongings(t, m)
		return assert.ObjectsAreEqual(before, now)
	})
}

// Needs root. Containers come and go; what was theirs goes with them.
func TestAcceptChurn(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	w.idle(t, "peer", "blue")
	w.Client2.Serve(t, "--tcp", "7000")
	m := w.maps(t)
	start := w.belongings(t, m)
	require.Zero(t, start.Maps["flows4"]+start.Maps["flows6"])
	peer := w.d.NS(t, "peer")
	for round := range count(20) {
		var names []string
		for i := range 20 {
			name := fmt.Sprintf("c%d-%d", round, i)
			names = append(names, name)
			w.d.MustRun(t, "run", "-d", "--name", name, "--network", "blue", "-p", fmt.Sprintf("%d:80", 21000+i),
				lab.Image, "labtool", "serve", "--tcp", "80")
		}
		for i, name := range names {
			w.d.WaitLog(t, name, "ready")
			w.Client.MustGet(t, at(lab.Host4, 21000+i))
			w.Client.MustGet(t, at(lab.Host6, 21000+i))
			v4, _ := w.d.Addrs(t, name, "blue")
			peer.MustGet(t, at(v4, 80))
			w.d.NS(t, name).MustGet(t, at(lab.Client24, 7000))
		}
		now := w.belongings(t, m)
		require.Equal(t, start.Endpoints+20, now.Endpoints)
		require.Equal(t, 40, now.Ports)
		require.GreaterOrEqual(t, now.Maps["flows4"], 3*2*20)
		w.d.MustRun(t, append([]string{"rm", "-f"}, names...)...)
		w.nothingLeft(t, m, start)
	}

	// A network that a container leaves.
	w.d.MustRun(t, "network", "connect", "red", "peer")
	lab.Eventually(t, 5*time.Second, "red is connected", func() bool {
		return w.belongings(t, m).Maps["endpoints"] > start.Maps["endpoints"]
	})
	w.idle(t, "far", "red")
	far := w.d.NS(t, "far")
	v4, _ := w.d.Addrs(t, "peer", "red")
	far.MustRun(t, "ping", "-c", "1", "-W", "2", v4.String())
	require.NotZero(t, w.belongings(t, m).Maps["flows4"])
	w.d.MustRun(t, "network", "disconnect", "red", "peer")
	w.d.MustRun(t, "rm", "-f", "far")
	w.nothingLeft(t, m, start)
}
