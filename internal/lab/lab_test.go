// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"

	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

func TestMain(m *testing.M) { Main(m) }

func port(a netip.Addr, p uint16) string { return netip.AddrPortFrom(a, p).String() }

// Both clients reach the host, in both families, over TCP and UDP, and are seen as
// themselves; the loopback addresses of client2 stand for the internet.
func TestTopology(t *testing.T) {
	l := New(t, Opts{})
	l.Host.Serve(t, "--tcp", "80", "--udp", "80")
	l.Client2.Serve(t, "--tcp", "80", "--udp", "80")
	for _, way := range []struct {
		from     *NS
		src, dst netip.Addr
	}{
		{l.Client, Client4, Host4},
		{l.Client, Client6, Host6},
		{l.Client, Client4, HostB4},
		{l.Client2, Client24, HostB4},
		{l.Client2, Client26, HostB6},
		{l.Host, HostB4, Internet4},
		{l.Host, HostB6, Internet6},
	} {
		for _, proto := range []string{"tcp", "udp"} {
			r := way.from.MustGet(t, "--network", proto, port(way.dst, 80))
			remote := netip.MustParseAddrPort(r.View.Remote).Addr()
			if remote != way.src || r.View.Local != port(way.dst, 80) {
				t.Errorf("%s from %v to %v: seen as %+v", proto, way.src, way.dst, r.View)
			}
		}
	}
	if out, err := l.Host.Run(t.Context(), "ip", "-o", "link", "show", "type", "veth"); err != nil || strings.Count(out, "\n") != 1 {
		t.Errorf("host's interfaces: %v\n%s", err, out)
	}
}

// What ends its goroutine, as a failed require does, fails and does not hang.
func TestDoThatEnds(t *testing.T) {
	l := New(t, Opts{})
	err := l.Host.Do(func() error {
		runtime.Goexit()
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), "ended its goroutine") {
		t.Errorf("ended: %v", err)
	}
	if err := l.Host.Do(func() error { return nil }); err != nil {
		t.Error(err)
	}
}

// With forwarding on, it is the FORWARD policy that drops, and nothing else does.
func TestForwardPolicyDrops(t *testing.T) {
	l := New(t, Opts{Forwarding: true})
	l.Client2.Serve(t, "--udp", "80")
	for _, family := range []struct {
		dst      netip.Addr
		iptables string
	}{{Internet4, "iptables"}, {Internet6, "ip6tables"}} {
		before := l.NFTCounters(t)
		if r, err := l.Client.Get("--network", "udp", "--timeout", "300ms", port(family.dst, 80)); err == nil {
			t.Errorf("%v answered through FORWARD DROP: %+v", family.dst, r)
		}
		delta := l.NFTDelta(t, before)
		if delta["forward"] != 1 || delta["prerouting"] != 1 || delta["postrouting"] != 0 {
			t.Errorf("one datagram to %v passed %v", family.dst, delta)
		}
		l.Host.MustRun(t, family.iptables, "-P", "FORWARD", "ACCEPT")
		l.Client.MustGet(t, "--network", "udp", port(family.dst, 80))
		entry := func(line string) bool { return strings.Contains(line, "dst="+family.dst.String()) }
		if entries := l.Conntrack(t); !slices.ContainsFunc(entries, entry) {
			t.Errorf("no connection tracking entry for %v in %q", family.dst, entries)
		}
	}
}

// What the neighbourhood says to itself is not counted.
func TestCountersLeaveOutNeighbours(t *testing.T) {
	l := New(t, Opts{})
	before := l.NFTCounters(t)
	l.Client.SendFrame(t, ClientIf, packet.ARP(Client4, Host4, false, packet.MAC(l.Client.MAC(t, ClientIf), []byte{255, 255, 255, 255, 255, 255})))
	l.Client.SendFrame(t, ClientIf, packet.NeighborSolicit(Client6, Host6, packet.MAC(l.Client.MAC(t, ClientIf), l.Host.MAC(t, HostIf))))
	mac := packet.MAC(l.Client.MAC(t, ClientIf), l.Host.MAC(t, HostIf))
	l.Client.SendFrame(t, ClientIf, packet.ICMPEcho(Client4, Host4, 1, 1, mac))
	Eventually(t, 5*time.Second, "the echo is counted", func() bool { return l.NFTDelta(t, before)["postrouting"] > 0 })
	if delta := l.NFTDelta(t, before); delta["prerouting"] != 1 || delta["input"] != 1 || delta["output"] != 1 {
		t.Errorf("ARP, neighbour discovery and one echo: %v", delta)
	}
}

// A frame arrives as it was sent; the host's answer has right checksums.
func TestSendAndCapture(t *testing.T) {
	l := New(t, Opts{})
	mac := packet.MAC(l.Client.MAC(t, ClientIf), l.Host.MAC(t, HostIf))
	src, dst := netip.AddrPortFrom(Client4, 4000), netip.AddrPortFrom(Host4, 80)
	l.Host.Sysctl(t, "net.ipv4.icmp_ratelimit", "0")

	isTCP := func(p gopacket.Packet) bool { return p.Layer(layers.LayerTypeTCP) != nil }
	got := l.Host.Capture(t, HostIf, isTCP)
	l.Client.SendFrame(t, ClientIf, packet.TCP(src, dst, mac, packet.SkewL4(0x55)))
	frame := got.Wait(t, 1, 5*time.Second)[0]
	if _, l4, err := packet.Skew(frame.Data()); l4 != 0x55 || frame.Outgoing || err != nil {
		t.Errorf("skew %#x, outgoing %v, %v; want 0x55, false", l4, frame.Outgoing, err)
	}
	l.Client.SendFrame(t, ClientIf, packet.TCP(src, dst, mac))
	reset := got.Wait(t, 3, 5*time.Second)[2] // the kernel has dropped the first
	if tcp := reset.Layer(layers.LayerTypeTCP).(*layers.TCP); !tcp.RST || !reset.Outgoing {
		t.Errorf("the host answered %v", reset)
	}
	if err := packet.VerifyChecksums(reset.Data()); err != nil && !reset.PartialChecksum {
		t.Error(err)
	}
}

// A stream is whole while nothing happens, and says so when its server dies.
func TestStream(t *testing.T) {
	l := New(t, Opts{})
	server := l.Host.Serve(t, "--tcp", "80", "--udp", "80")
	streams := []*Stream{
		l.Client.Stream(t, "--interval", "1ms", port(Host4, 80)),
		l.Client.Stream(t, "--interval", "1ms", "--network", "udp", port(Host6, 80)),
	}
	// The counters of the host tell how far the streams have come.
	before := l.NFTCounters(t)
	Eventually(t, 10*time.Second, "200 messages", func() bool { return l.NFTDelta(t, before)["input"] > 200 })
	for _, s := range streams {
		if sum := s.Finish(t); sum.Sent == 0 || sum.Received != sum.Sent || sum.Lost+sum.Corrupt+sum.Resets > 0 {
			t.Errorf("undisturbed stream: %+v", sum)
		}
	}
	broken := l.Client.Stream(t, port(Host4, 80))
	server.Kill()
	Eventually(t, 5*time.Second, "end of the broken stream", broken.Exited)
	if sum := broken.Finish(t); sum.Resets != 1 {
		t.Errorf("stream whose server died: %+v", sum)
	}
}

// Each way to use a socket works and tells what it should.
func TestGet(t *testing.T) {
	l := New(t, Opts{})
	l.Host.Serve(t, "--tcp", "80", "--udp", "80", "--text", "it is me")
	dst4, dst6 := port(Host4, 80), port(Host6, 80)

	if r := l.Client.MustGet(t, "--mapped", dst4); r.View.Text != "it is me" || r.Peer != "[::ffff:192.0.2.1]:80" {
		t.Errorf("mapped: %+v", r)
	}
	if r := l.Client.MustGet(t, "--network", "udp", "--unconnected", dst6); r.From != dst6 || r.Peer != "" {
		t.Errorf("unconnected: %+v", r)
	}
	if r := l.Client.MustGet(t, "--network", "udp", "--mapped", "--unconnected", dst4); r.From != "[::ffff:192.0.2.1]:80" {
		t.Errorf("mapped and unconnected: %+v", r)
	}
	if r := l.Client.MustGet(t, "--network", "udp", "--send", "abc", dst4); r.Peer != dst4 || r.View.Echo != "abc" || r.View.Local != dst4 {
		t.Errorf("connected UDP: %+v", r)
	}
	if r := l.Client.MustGet(t, "--bind", "192.0.2.2:12345", dst4); r.View.Remote != "192.0.2.2:12345" || r.Local != "192.0.2.2:12345" {
		t.Errorf("bound: %+v", r)
	}
	if r, err := l.Client.Get(port(Host4, 81)); err == nil || r.Errno != "ECONNREFUSED" || r.Stage != "connect" {
		t.Errorf("closed port: %v: %+v", err, r)
	}
	if r, err := l.Client.Get("--network", "udp", "--timeout", "100ms", port(Client4, 9)); err == nil {
		t.Errorf("nobody: %+v", r)
	}
}

func TestLoadTools(t *testing.T) {
	l := New(t, Opts{})
	l.Host.Serve(t, "--tcp", "80")
	out := l.Client.MustRun(t, l.Tool, "flood-connect", "--workers", "4", "--duration", "200ms", port(Host4, 80))
	if !strings.Contains(out, `"failed":0,`) {
		t.Errorf("flood-connect: %s", out)
	}
	sink := l.Host.Sink(t, "--listen", ":9000", "--expect", "100")
	l.Client.MustRun(t, l.Tool, "udp-count", "--count", "100", port(Host6, 9000))
	if err := sink.Wait(5 * time.Second); err != nil || !strings.Contains(sink.Stdout(), `"received":100,`) {
		t.Errorf("udp-sink: %v: %s", err, sink.Stdout())
	}
	l.Host.Stun(t, "--listen", "192.0.2.1:3478,192.0.2.1:3479")
	r := l.Client.MustGet(t, "--network", "udp", "--unconnected", "--bind", "192.0.2.2:5000", "--send", "via 1", "192.0.2.1:3478")
	if r.Text != "192.0.2.2:5000" || r.From != "192.0.2.1:3479" {
		t.Errorf("stun: %+v", r)
	}
}

// With iptables off and nothing else, the engine's containers reach each other by
// bridging and by name; nothing gets out, and published ports hang.
func TestDocker(t *testing.T) {
	l := New(t, Opts{})
	d := l.StartDocker(t, DockerOpts{})

	d.MustRun(t, "network", "create", "--ipv6", "--subnet", "172.30.0.0/24", "--subnet", "fd00:30::/64", "n1")
	d.Serve(t, "--name", "web", "--network", "n1", "-p", "8080:80")
	d.MustRun(t, "run", "-d", "--stop-signal", "KILL", "--name", "peer", "--network", "n1", Image, "sleep", "1000")
	v4, v6 := d.Addrs(t, "web", "n1")
	for _, a := range []string{v4.String(), v6.String(), "web"} {
		if out, err := d.Run("exec", "peer", "ping", "-c", "1", "-W", "2", a); err != nil || !strings.Contains(out, "ttl=64") {
			t.Errorf("ping %s: %v: %s", a, err, out)
		}
	}
	r := d.MustGet(t, "peer", "web:80")
	if id := d.Inspect(t, "web", "{{.Id}}"); r.View.Host != id[:12] {
		t.Errorf("answered by %q, want container %s", r.View.Host, id[:12])
	}
	if out, err := d.Run("exec", "peer", "ping", "-c", "1", "-W", "1", Internet4.String()); err == nil {
		t.Errorf("got out without masquerading: %s", out)
	}
	if r, err := l.Client.Get("--timeout", "500ms", port(Host4, 8080)); err == nil {
		t.Errorf("published port answered with nobody to forward it: %+v", r)
	}
	if out := d.NS(t, "peer").MustRun(t, "ip", "-o", "-4", "addr", "show", "dev", "eth0"); !strings.Contains(out, "172.30.0.") {
		t.Errorf("namespace of container peer: %s", out)
	}
	// What programs at the lab's cgroup see: the engine, and its containers.
	pid, _ := strconv.Atoi(d.Inspect(t, "web", "{{.State.Pid}}"))
	for who, pid := range map[string]int{"dockerd": d.PID(), "the container": pid} {
		if !insideCgroup(t, l, pid) {
			t.Errorf("%s is not below the lab's cgroup", who)
		}
	}

	d.Restart(t)
	d.MustRun(t, "start", "web")
	d.Kill(t)
	d.Start(t)
	d.MustRun(t, "rm", "-f", "web", "peer")
}

func insideCgroup(t *testing.T, l *Lab, pid int) bool {
	t.Helper()
	root, err := cgroup2Root()
	if err != nil {
		t.Fatal(err)
	}
	inside := ":" + strings.TrimPrefix(l.Cgroup, root) + "/"
	return strings.Contains(read(fmt.Sprintf("/proc/%d/cgroup", pid)), "0:"+inside)
}

// An engine that writes its own rules is the reference: outsiders reach published ports
// and are seen as themselves, containers get out, under the same FORWARD policy.
func TestReferenceEngine(t *testing.T) {
	l := New(t, Opts{})
	d := l.StartDocker(t, DockerOpts{IPTables: true})
	l.Client2.Serve(t, "--tcp", "80")
	d.Serve(t, "--name", "web", "-p", "8080:80")
	r := l.Client.MustGet(t, port(Host4, 8080))
	if remote := netip.MustParseAddrPort(r.View.Remote).Addr(); remote != Client4 {
		t.Errorf("client seen as %v", remote)
	}
	r = d.MustGet(t, "web", port(Internet4, 80))
	if remote := netip.MustParseAddrPort(r.View.Remote).Addr(); remote != HostB4 {
		t.Errorf("container seen as %v", remote)
	}
}

// Hosts of two labs can be neighbours.
func TestJoin(t *testing.T) {
	a, b := New(t, Opts{}), New(t, Opts{})
	Join(t,
		End{a.Host, "side", []netip.Prefix{netip.MustParsePrefix("203.0.113.65/26")}},
		End{b.Host, "side", []netip.Prefix{netip.MustParsePrefix("203.0.113.66/26")}})
	b.Host.Serve(t, "--tcp", "80")
	if r := a.Host.MustGet(t, "203.0.113.66:80"); !strings.HasPrefix(r.View.Remote, "203.0.113.65:") {
		t.Errorf("seen as %+v", r.View)
	}
}

// The engine's own proxy makes published ports work, so the lab's way in is sound.
func TestDockerProxyAndCompose(t *testing.T) {
	l := New(t, Opts{})
	d := l.StartDocker(t, DockerOpts{Proxy: true})
	dir := filepath.Join(l.Dir, "project")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	compose := `
version: "3"
services:
  dashboard:
    image: lab
    command: labtool serve --http 9090 --text "the dashboard"
  front:
    image: lab
    command: labtool serve --http 80 --proxy /api=http://dashboard:9090/
    ports: ["8080:80"]
`
	if err := os.WriteFile(filepath.Join(dir, "docker-compose.yml"), []byte(compose), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := d.Compose(dir, "up", "-d"); err != nil {
		t.Fatal(err, out)
	}
	fetch := func() string {
		out, _ := l.Client.Run(t.Context(), "curl", "-s", "-m", "2", "http://"+port(Host4, 8080)+"/api")
		return out
	}
	Eventually(t, 10*time.Second, "answer of the dashboard behind the proxy", func() bool { return fetch() == "the dashboard" })
	if out, err := d.Compose(dir, "down"); err != nil {
		t.Error(err, out)
	}
}

// The leak check sees what it is there for.
func TestLeaksAreSeen(t *testing.T) {
	before := look(os.Geteuid() == 0)
	f, err := os.Open("/etc/passwd")
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	go func() { <-stop }()
	left := before.own.missingFrom(look(false).own)
	want := []string{
		"goroutine started by " + module + "/internal/lab.TestLeaksAreSeen (1 more)",
		"open file /etc/passwd (1 more)",
	}
	for _, w := range want {
		if !slices.Contains(left, w) {
			t.Errorf("not seen: %s in %q", w, left)
		}
	}
	f.Close()
	close(stop)
	if os.Geteuid() != 0 {
		return
	}
	l := New(t, Opts{})
	p := l.Host.Serve(t, "--tcp", "80")
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "leak", Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	at, err := link.AttachCgroup(link.CgroupOptions{Path: l.Cgroup, Attach: ebpf.AttachCGroupInetEgress, Program: prog})
	if err != nil {
		t.Fatal(err)
	}
	defer at.Close()
	if shared := before.shared.missingFrom(look(true).shared); !slices.Contains(shared, "loaded CGroupSKB program leak (1 more)") {
		t.Errorf("loaded program not seen in %q", shared)
	}
	left = before.own.missingFrom(look(true).own)
	for _, w := range []string{"network namespace " + l.name + "-host", "cgroup " + l.Cgroup, "pin " + l.BPFFS, "directory " + l.Dir, "process " + filepath.Base(l.Tool), "CGroupInetEgress program at " + l.Cgroup} {
		if !slices.ContainsFunc(left, func(s string) bool { return strings.HasPrefix(s, w) }) {
			t.Errorf("not seen: %s in %q", w, left)
		}
	}
	p.Kill()
}

// What a test leaves running of bpfnet's own ends with the lab: detached sandboxes, one that
// listens to no signal, and their runners.
func TestSandboxesEnd(t *testing.T) {
	var pids []int
	t.Run("left running", func(t *testing.T) {
		l := New(t, Opts{})
		b := l.StartBpfnet(t, nil)
		b.Serve(t, "--name", "web", "-p", "8080:80")
		b.MustCLI(t, "run", "-d", "--name", "deaf", "--", "sh", "-c", "trap '' TERM HUP INT; while :; do sleep 1; done")
		l.Client.MustGet(t, port(Host4, 8080))
		v4, v6 := b.Addrs(t, "web", "bpfnet")
		if r := b.MustGet(t, "deaf", port(v4, 80)); r.View.Host != b.Sandbox(t, "web").ID[:12] || !v6.IsValid() {
			t.Errorf("%v, %v: %+v", v4, v6, r)
		}
		for _, name := range []string{"web", "deaf"} {
			pids = append(pids, b.Sandbox(t, name).PID)
		}
		if got := b.Runners(); len(got) != 2 {
			t.Errorf("runners: %v", got)
		} else {
			pids = append(pids, got...)
		}
		kinds := map[string]int{}
		for _, what := range b.Belongings(t) {
			kind, _, _ := strings.Cut(what, " ")
			kinds[kind]++
		}
		// The default network's bridge, and a link and a directory each.
		if want := map[string]int{"device": 3, "cgroup": 2, "directory": 2, "runner": 2}; !maps.Equal(kinds, want) {
			t.Errorf("belongings %v, want %v", kinds, want)
		}
	})
	for _, pid := range processes(func(procInfo) bool { return true }) {
		if slices.Contains(pids, pid) {
			t.Errorf("process %d lives on: %s", pid, read(fmt.Sprintf("/proc/%d/cmdline", pid)))
		}
	}
}

// A machine behind a tun link is reached, and reaches the host, in both families and both ways,
// with packets as large as the link takes.
func TestTun(t *testing.T) {
	const mtu = 1400
	l := New(t, Opts{})
	remote := l.Tun(t, mtu)
	l.Host.Serve(t, "--tcp", "80", "--udp", "80")
	remote.Serve(t, "--tcp", "80", "--udp", "80")
	text := strings.Repeat("x", 5000) // several segments, or fragments
	for _, way := range []struct {
		from     *NS
		src, dst netip.Addr
	}{
		{remote, Remote4, Tun4},
		{remote, Remote6, Tun6},
		{remote, Remote4, Host4},
		{l.Host, Tun4, Remote4},
		{l.Host, Tun6, Remote6},
	} {
		for _, proto := range []string{"tcp", "udp"} {
			r := way.from.MustGet(t, "--network", proto, "--send", text, port(way.dst, 80))
			if seen := netip.MustParseAddrPort(r.View.Remote).Addr(); seen != way.src {
				t.Errorf("%s from %v to %v: seen as %v", proto, way.src, way.dst, seen)
			}
		}
	}
	link := l.Host.Link(t, TunIf).Attrs()
	if link.MTU != mtu || len(link.HardwareAddr) != 0 {
		t.Errorf("tun device: mtu %d, hardware address %v", link.MTU, link.HardwareAddr)
	}
}

// What a command does with labs is cleaned up as in a test, last first, and what failed is told.
func TestSession(t *testing.T) {
	s := &Session{}
	var order []string
	var log strings.Builder
	err := s.Do(t.Context(), &log, func(t testing.TB) {
		t.Cleanup(func() { order = append(order, "first") })
		t.Cleanup(func() { order = append(order, "second"); t.Error("cleanup went wrong") })
		t.Logf("at %d", 1)
		t.Fatalf("no %s", "engine")
		order = append(order, "went on")
	})
	if got, want := fmt.Sprint(err), "no engine\ncleanup went wrong"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if !slices.Equal(order, []string{"second", "first"}) || log.String() != "at 1\n" {
		t.Errorf("order %q, log %q", order, log.String())
	}
	if err := s.Do(t.Context(), &log, func(t testing.TB) { panic("absurd") }); err == nil || !strings.Contains(err.Error(), "absurd") {
		t.Errorf("a panic was lost: %v", err)
	}
	if err := s.Do(t.Context(), &log, func(t testing.TB) {}); err != nil {
		t.Error(err)
	}
}
