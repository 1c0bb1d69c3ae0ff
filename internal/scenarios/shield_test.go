// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/promise"
)

type shieldDevice struct{ Device, Why string }

// shieldShown is what "bpfnet shield -o json" says.
type shieldShown struct {
	On      bool
	Mode    string
	Devices []shieldDevice
	Drops   []struct {
		Reason  string
		Packets int
	}
	Denied []struct {
		Prefix  netip.Prefix
		Packets int
	}
}

func (w *site) shield(t *testing.T) (s shieldShown) {
	t.Helper()
	require.NoError(t, json.Unmarshal([]byte(w.b.MustCLI(t, "shield", "-o", "json")), &s))
	return s
}

// dropped is how many packets the shield has dropped for a reason.
func (s shieldShown) dropped(reason string) int {
	for _, d := range s.Drops {
		if d.Reason == reason {
			return d.Packets
		}
	}
	return 0
}

// kept is how many packets a prefix of the deny list has kept out.
func (s shieldShown) kept(prefix string) int {
	for _, d := range s.Denied {
		if d.Prefix.String() == prefix {
			return d.Packets
		}
	}
	return -1
}

// xdpOf is the ID of the XDP program on a device of the host; 0: none.
func (w *site) xdpOf(t *testing.T, device string) uint32 {
	t.Helper()
	if x := w.Host.Link(t, device).Attrs().Xdp; x != nil && x.Attached {
		return x.ProgId
	}
	return 0
}

func (w *site) refused(t *testing.T, from *lab.NS, network, address string) {
	t.Helper()
	_, err := from.Get("--network", network, "--timeout", noAnswer.String(), address)
	require.Error(t, err, "%s %s", network, address)
}

// Needs root.
//
//	client ── up0 host up1 ── client2
//	             └ web
//
// Who is denied gets nothing new in, neither to containers nor to the host; what is established, and what is
// asked of it, goes on, also while the daemon is killed, started again and away.
func TestShieldDenies(t *testing.T) {
	w := newOwnSite(t, "--shield")
	w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.Host.Serve(t, "--tcp", "7000", "--udp", "7000")
	w.Client.Serve(t, "--tcp", "7001", "--udp", "7001")
	web := w.b.NS(t, "web")
	hosts := map[netip.Addr]netip.Addr{lab.Host4: lab.Client4, lab.Host6: lab.Client6}

	program := w.xdpOf(t, lab.HostIf)
	require.NotZero(t, program)
	require.Equal(t, program, w.xdpOf(t, lab.HostIf2), "one program for all uplinks")
	out := w.b.MustCLI(t, "status")
	require.Contains(t, out, "native, on 2 of 2 uplinks, 0 denied")
	open := make(map[string]*lab.Talk)
	for host, client := range hosts {
		for _, network := range []string{"tcp", "udp"} {
			open["client to web, "+network+host.String()] = w.Client.Talk(t, "--network", network, at(host, 8080))
			open["host to client, "+network+host.String()] = w.Host.Talk(t, "--network", network, at(client, 7001))
			open["web to client, "+network+host.String()] = w.b.NS(t, "web").Talk(t, "--network", network, at(client, 7001))
		}
		open["client to host"+host.String()] = w.Client.Talk(t, at(host, 7000))
	}
	for who, k := range open {
		require.Empty(t, k.Say(t, "first").Error, who)
	}
	stream := w.Client.Stream(t, "--interval", "10ms", at(lab.Host4, 8080))

	require.Equal(t, "2 prefixes denied now", w.b.MustCLI(t, "deny", "add", lab.Client4.String(), "2001:db8:1::2/128"))
	require.Contains(t, w.b.MustCLI(t, "explain", "--from", lab.Client4.String(), "--to", lab.Host4.String(), "--port", "8080"), "Verdict    dropped as denied")
	asked := 0
	shut := func() {
		t.Helper()
		for who, k := range open {
			require.Empty(t, k.Say(t, fmt.Sprint("still ", asked)).Error, who)
			asked++
		}
		var wait sync.WaitGroup // each takes as long as nobody answers
		for _, dial := range [][2]string{
			{"tcp", at(lab.Host4, 8080)}, {"udp", at(lab.Host6, 8080)}, {"udp", at(lab.Host4, 7000)}, {"tcp", at(lab.Host6, 7000)},
		} {
			wait.Go(func() {
				_, err := w.Client.Get("--network", dial[0], "--timeout", noAnswer.String(), dial[1])
				assert.Error(t, err, "%s", dial)
			})
		}
		wait.Wait()
		for _, client := range hosts {
			for _, network := range []string{"tcp", "udp"} {
				w.Host.MustGet(t, "--network", network, at(client, 7001))
				web.MustGet(t, "--network", network, at(client, 7001))
			}
			// Its neighbour discovery and pings that it is sent are answered.
			w.Host.MustRun(t, "ping", "-n", "-c", "1", "-W", "2", client.String())
			web.MustRun(t, "ping", "-n", "-c", "1", "-W", "2", client.String())
		}
		for _, network := range []string{"tcp", "udp"} {
			w.Client2.MustGet(t, "--network", network, at(lab.HostB4, 8080))
			w.Client2.MustGet(t, "--network", network, at(lab.HostB6, 7000))
		}
	}
	shut()
	s := w.shield(t)
	require.Greater(t, s.kept("192.0.2.2/32"), 0)
	require.Greater(t, s.kept("2001:db8:1::2/128"), 0)
	require.Equal(t, s.dropped("denied"), s.kept("192.0.2.2/32")+s.kept("2001:db8:1::2/128"))

	// Nothing is heard of it while the daemon comes and goes, and the shield stays in place.
	sink := w.Host.Sink(t, "--listen", ":7100")
	flood := w.Client.Start(t, w.Tool, "udp-count", "--count", "1000000", "--interval", "1ms", at(lab.Host4, 7100))
	for _, end := range []func(){func() { w.b.Stop(t) }, w.b.Kill} {
		end()
		shut()
		w.b.Start(t)
		require.Equal(t, program, w.xdpOf(t, lab.HostIf), "the same program, which was never off")
		require.GreaterOrEqual(t, w.shield(t).kept("192.0.2.2/32"), s.kept("192.0.2.2/32"), "and its counters")
		shut()
	}
	flood.Stop(t)
	require.Contains(t, sink.Stop(t), `"received":0`)
	sum := stream.Finish(t)
	require.Zero(t, sum.Lost+sum.Corrupt+sum.Resets, "%+v", sum)

	require.Equal(t, "1 prefix let in again", w.b.MustCLI(t, "deny", "rm", lab.Client4.String()))
	w.Client.MustGet(t, at(lab.Host4, 8080))
	w.Client.MustGet(t, "--network", "udp", at(lab.Host4, 7000))
	w.refused(t, w.Client, "tcp", at(lab.Host6, 8080))
	require.Equal(t, "2001:db8:1::2/128", w.b.MustCLI(t, "deny", "ls"))
	doctor, _ := w.b.CLI("doctor")
	require.Contains(t, doctor, "on all uplinks, native")
	promise.Kept(t, promise.Shield, "Connections that stand when their source is denied go on, and so do new ones to it; the source opens nothing.",
		"%d messages over %d sockets, %d of a stream while the daemon was stopped and killed: none lost.", asked, len(open), sum.Sent)
}

// shieldPins are the pins that only a shield has.
func (w *site) shieldPins(t *testing.T) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(w.BPFFS, "*", "shield*"))
	require.NoError(t, err)
	return found
}

// Needs root. A driver that cannot run the shield keeps no other uplink from having it, and what to do about it is said; with
// --shield-mode generic it runs there too.
func TestShieldModes(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	l.Host.MustRun(t, "ip", "link", "add", "link", lab.HostIf, "name", "slow0", "type", "macvlan", "mode", "bridge")
	l.Host.MustRun(t, "ip", "addr", "add", "192.0.2.9/32", "dev", "slow0")
	l.Host.MustRun(t, "ip", "link", "set", "slow0", "up")
	w := ownSite(t, l, "--shield", "--uplink", lab.HostIf, "--uplink", "slow0")
	w.sandbox(t, "web", "blue", "-p", "8080:80")
	require.NotZero(t, w.xdpOf(t, lab.HostIf))
	require.Zero(t, w.xdpOf(t, "slow0"))
	devices := w.shield(t).Devices
	i := slices.IndexFunc(devices, func(d shieldDevice) bool { return d.Device == "slow0" })
	require.Contains(t, devices[i].Why, "--shield-mode generic")
	w.Client.MustGet(t, at(lab.Host4, 8080))

	w.b.Stop(t)
	w.b.Use(w.b.Binary(), "--shield-mode", "generic")
	w.b.Start(t)
	require.NotZero(t, w.xdpOf(t, lab.HostIf))
	require.NotZero(t, w.xdpOf(t, "slow0"))
	require.Contains(t, w.b.MustCLI(t, "shield"), "Shield: generic, on 2 of 2 uplinks")
	w.Client.MustGet(t, at(lab.Host4, 8080))
	w.b.MustCLI(t, "deny", "add", lab.Client4.String())
	w.refused(t, w.Client, "tcp", at(lab.Host4, 8080))
	require.Positive(t, w.shield(t).kept(netip.PrefixFrom(lab.Client4, 32).String()))
	w.b.MustCLI(t, "deny", "rm", lab.Client4.String())
	w.Client.MustGet(t, at(lab.Host4, 8080))
}

// Needs root. Without the flag there is no shield, and after a start without it no trace of one but the list.
// Somebody else's program stays, and keeps the shield from its device only. Direct access is dropped before
// from_uplink sees it.
func TestShieldOff(t *testing.T) {
	w := newOwnSite(t, "--shield")
	w.sandbox(t, "web", "blue", "-p", "8080:80")
	w.b.MustCLI(t, "deny", "add", "203.0.113.0/24")
	require.NotEmpty(t, w.shieldPins(t))
	in4, _ := w.b.Addrs(t, "web", "blue")
	w.Client.AddRoute(t, netip.PrefixFrom(in4, 32), lab.Host4)
	w.refused(t, w.Client, "udp", at(in4, 80))
	require.Greater(t, w.shield(t).dropped("direct_access"), 0)
	require.Zero(t, readCounters(t, w.maps(t))["direct_access/uplink"])
	w.b.Stop(t)

	plain := w.StartBpfnet(t, nil)
	require.Zero(t, w.xdpOf(t, lab.HostIf)+w.xdpOf(t, lab.HostIf2))
	require.Empty(t, w.shieldPins(t))
	require.Equal(t, "203.0.113.0/24", plain.MustCLI(t, "deny", "ls"))
	w.refused(t, w.Client, "udp", at(in4, 80))
	require.NotZero(t, readCounters(t, w.maps(t))["direct_access/uplink"], "by from_uplink again")
	plain.Stop(t)

	var foreign link.Link
	require.NoError(t, w.Host.Do(func() error {
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Name: "somebody", Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
		})
		if err != nil {
			return err
		}
		defer prog.Close()
		foreign, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: w.Host.Ifindex(t, lab.HostIf), Flags: link.XDPDriverMode})
		return err
	}))
	defer foreign.Close()
	theirs := w.xdpOf(t, lab.HostIf)
	w.b.Start(t)
	require.Equal(t, theirs, w.xdpOf(t, lab.HostIf))
	require.NotZero(t, w.xdpOf(t, lab.HostIf2))
	devices := w.shield(t).Devices
	i := slices.IndexFunc(devices, func(d shieldDevice) bool { return d.Device == lab.HostIf })
	require.Equal(t, fmt.Sprintf(`the XDP program "somebody" (id %d) is on it, and stays; the shield comes when it is gone`, theirs), devices[i].Why)
	doctor, _ := w.b.CLI("doctor")
	require.Contains(t, doctor, "not on up0: the XDP program \"somebody\"")
	w.Client.MustGet(t, at(lab.Host4, 8080))
	require.Equal(t, 0, w.shield(t).kept("203.0.113.0/24"), "the list is back")
	w.b.Stop(t)
	w.b.MustCLI(t, "cleanup", "--force")
	require.Equal(t, theirs, w.xdpOf(t, lab.HostIf))
	require.Zero(t, w.xdpOf(t, lab.HostIf2))
	require.Empty(t, w.shieldPins(t))
	promise.Kept(t, promise.Shield, "Without --shield nothing of it is attached, loaded or pinned, also where it was on before; another's XDP program is never replaced.",
		"Looked for on 2 uplinks and in all pins.")
}
