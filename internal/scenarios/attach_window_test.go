// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// What labtool burst sends, as internal/lab/tool/burst.go says.
const (
	burstPort  = 7777
	burstProto = 253
	burstText  = "labtool burst " // and who sent it, and a dot
)

// isBurst tells burst's packets, and only these: what others answer goes to other ports.
func isBurst(p gopacket.Packet) bool {
	switch l := p.TransportLayer().(type) {
	case *layers.UDP:
		return l.DstPort == burstPort
	case *layers.TCP:
		return l.DstPort == burstPort
	}
	if p.Layer(layers.LayerTypeICMPv4) == nil && p.Layer(layers.LayerTypeICMPv6) == nil && transport(p) != burstProto {
		return false
	}
	// Errors quote what they are about.
	if icmp, ok := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok && icmp.TypeCode.Type() != layers.ICMPv4TypeEchoRequest {
		return false
	}
	if icmp, ok := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6); ok && icmp.TypeCode.Type() != layers.ICMPv6TypeEchoRequest {
		return false
	}
	return bytes.Contains(p.Data(), []byte(burstText))
}

// burstFrom is who sent a packet; "" where it does not say, as TCP's.
func burstFrom(data []byte) string {
	_, rest, _ := bytes.Cut(data, []byte(burstText))
	name, _, _ := bytes.Cut(rest, []byte("."))
	return string(name)
}

func transport(p gopacket.Packet) layers.IPProtocol {
	switch ip := p.NetworkLayer().(type) {
	case *layers.IPv4:
		return ip.Protocol
	case *layers.IPv6:
		return ip.NextHeader
	}
	return 0
}

func sourceOf(p gopacket.Packet) netip.Addr {
	if p.NetworkLayer() == nil {
		return netip.Addr{}
	}
	a, _ := netip.AddrFromSlice(p.NetworkLayer().NetworkFlow().Src().Raw())
	return a
}

// window is a host on which containers send from their first instruction on, with somebody at every
// place where that could arrive. The FORWARD policy lets all pass: what does not arrive was dropped by
// the programs.
type window struct {
	*lab.Lab
	d        *lab.Docker
	b        *lab.Bpfnet // nil: nobody guards
	random   *rand.Rand
	networks []string
	subnets  map[string][]netip.Prefix
	targets  []string
	senders  int
	noFrames bool // senders do not write past the kernel's stack

	mu          sync.Mutex
	escaped     map[string]int         // packets that are where they must not be, by how
	first       map[string]string      // the first of each
	heard       map[string]int         // by neighbours: sender@network
	atHost      map[string]int         // by a service of the host: sender
	masqueraded map[netip.AddrPort]int // outside, by source and protocol
}

const quiet = "quiet" // the network with icc=false

func newWindow(t *testing.T, guarded bool, daemon ...string) *window {
	t.Helper()
	l := lab.New(t, lab.Opts{Forwarding: true})
	l.Host.MustRun(t, "iptables", "-P", "FORWARD", "ACCEPT")
	l.Host.MustRun(t, "ip6tables", "-P", "FORWARD", "ACCEPT")
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	w := &window{
		Lab: l, d: l.StartDocker(t, lab.DockerOpts{}), random: rand.New(rand.NewPCG(seed, 0)),
		networks: []string{"blue", "red", quiet}, subnets: make(map[string][]netip.Prefix),
		escaped: make(map[string]int), first: make(map[string]string),
		heard: make(map[string]int), atHost: make(map[string]int), masqueraded: make(map[netip.AddrPort]int),
	}
	for _, n := range w.networks {
		if n == quiet {
			w.network(t, n, "-o", "com.docker.network.bridge.enable_icc=false")
		} else {
			w.network(t, n)
		}
	}
	if guarded {
		w.b = l.StartBpfnet(t, w.d, daemon...)
	}
	for _, n := range w.networks {
		w.listen(t, n)
		if guarded {
			w.site().ready(t, "in-"+n)
		}
	}
	for _, a := range []netip.Addr{lab.Client4, lab.Client6, lab.Internet4, lab.Internet6, lab.Host4, lab.Host6} {
		w.targets = append(w.targets, a.String())
	}
	w.Client.Capture(t, lab.ClientIf, w.outside)
	w.Client2.Capture(t, lab.ClientIf, w.outside)
	w.serveHost(t)
	return w
}

// network makes a dual-stack network.
func (w *window) network(t *testing.T, name string, args ...string) {
	t.Helper()
	args = append([]string{"network", "create", "--ipv6", "--subnet", fmt.Sprintf("fd00:b%d::/64", len(w.subnets)+1)}, args...)
	w.d.MustRun(t, append(args, name)...)
	for _, s := range strings.Fields(w.d.Inspect(t, name, "{{range .IPAM.Config}}{{.Subnet}} {{end}}")) {
		w.subnets[name] = append(w.subnets[name], netip.MustParsePrefix(s))
	}
}

// listen puts a container on a network that hears who sends to it, and makes it a target.
func (w *window) listen(t *testing.T, network string) {
	t.Helper()
	name := "in-" + network
	w.d.MustRun(t, "run", "-d", "--name", name, "--network", network, lab.Image, "sleep", "100000")
	v4, v6 := w.d.Addrs(t, name, network)
	w.targets = append(w.targets, v4.String(), v6.String())
	w.d.NS(t, name).Capture(t, "eth0", func(p gopacket.Packet) bool { return w.inside(network, p) })
}

func (w *window) site() *site { return &site{Lab: w.Lab, d: w.d, b: w.b} }

// networkOf is where an address is at home; "" for one outside.
func (w *window) networkOf(a netip.Addr) string {
	for n, list := range w.subnets {
		for _, p := range list {
			if p.Contains(a) {
				return n
			}
		}
	}
	return ""
}

func (w *window) escape(how string, p gopacket.Packet) {
	if w.escaped[how]++; w.escaped[how] == 1 {
		w.first[how] = p.String()
	}
}

// inside sees a packet at a container of a network. It is one more filter that keeps nothing: a test
// sends millions.
func (w *window) inside(network string, p gopacket.Packet) bool {
	if !isBurst(p) {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch a := sourceOf(p); {
	case w.networkOf(a) != network && !a.IsLinkLocalUnicast():
		w.escape("to another network", p)
	case network == quiet:
		w.escape("to a neighbour without icc", p)
	default:
		w.heard[burstFrom(p.Data())+"@"+network]++
	}
	return false
}

func (w *window) outside(p gopacket.Packet) bool {
	if !isBurst(p) {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if a := sourceOf(p); w.networkOf(a) != "" || a.IsLinkLocalUnicast() {
		w.escape("outside, not masqueraded", p)
	} else {
		w.masqueraded[netip.AddrPortFrom(a, uint16(transport(p)))]++
	}
	return false
}

// serveHost is a service of the host on all its addresses.
func (w *window) serveHost(t *testing.T) {
	var c *net.UDPConn
	require.NoError(t, w.Host.Do(func() (err error) {
		c, err = net.ListenUDP("udp", &net.UDPAddr{Port: burstPort})
		return err
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			buf := make([]byte, 128)
			n, err := c.Read(buf)
			if err != nil {
				return
			}
			w.mu.Lock()
			w.atHost[burstFrom(buf[:n])]++
			w.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
}

// nothingEscaped requires that no packet is where it must not be.
func (w *window) nothingEscaped(t *testing.T) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	require.Empty(t, w.escaped, "%v", w.first)
}

// countOf reads one of the counts.
func countOf[K comparable](w *window, m map[K]int, k K) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return m[k]
}

// sender is a container that sends.
type sender struct {
	name string
	on   []string // networks
}

// start starts n senders at once on some of the networks, and waits until each has sent to all.
func (w *window) start(t *testing.T, n int, networks ...string) []sender {
	t.Helper()
	all := make([]sender, n)
	errs := make([]error, n)
	var wait sync.WaitGroup
	for i := range all {
		w.senders++
		all[i] = sender{fmt.Sprintf("s%d", w.senders), []string{networks[w.random.IntN(len(networks))]}}
		wait.Go(func() {
			_, errs[i] = w.d.Run(append([]string{"run", "-d", "--name", all[i].name, "--hostname", all[i].name, "--network", all[i].on[0],
				lab.Image, "labtool", "burst", fmt.Sprintf("-frames=%t", !w.noFrames)}, w.targets...)...)
		})
	}
	wait.Wait()
	for i, s := range all {
		require.NoError(t, errs[i])
		w.d.WaitLog(t, s.name, "ready")
	}
	return all
}

// connect connects running senders to another network each, by chance, and waits until they have sent by
// the new interface for some rounds.
func (w *window) connect(t *testing.T, all []sender) {
	t.Helper()
	errs := make([]error, len(all))
	var wait sync.WaitGroup
	for i := range all {
		s := &all[i]
		others := slices.DeleteFunc(slices.Clone(w.networks), func(n string) bool { return n == s.on[0] })
		s.on = append(s.on, others[w.random.IntN(len(others))])
		wait.Go(func() { _, errs[i] = w.d.Run("network", "connect", s.on[1], s.name) })
	}
	wait.Wait()
	for i, s := range all {
		require.NoError(t, errs[i])
		ns := w.d.NS(t, s.name)
		lab.Eventually(t, 20*time.Second, s.name+" sends by its new interface", func() bool { return sentAnew(t, ns) > 40 })
	}
}

func (w *window) disconnect(t *testing.T, all []sender) {
	t.Helper()
	var wait sync.WaitGroup
	for i := range all {
		s := &all[i]
		wait.Go(func() {
			if _, err := w.d.Run("network", "disconnect", s.on[1], s.name); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	for i := range all {
		all[i].on = all[i].on[:1]
	}
}

// sentAnew is how many packets have left by other interfaces than the first.
func sentAnew(t *testing.T, ns *lab.NS) (n int) {
	t.Helper()
	out := ns.MustRun(t, "cat", "/proc/net/dev")
	for line := range strings.Lines(out) {
		name, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if f := strings.Fields(rest); ok && strings.HasPrefix(name, "eth") && name != "eth0" && len(f) > 9 {
			sent, err := strconv.Atoi(f[9])
			require.NoError(t, err)
			n += sent
		}
	}
	return n
}

func (w *window) remove(t *testing.T, all []sender) {
	t.Helper()
	args := []string{"rm", "-f"}
	for _, s := range all {
		args = append(args, s.name)
	}
	w.d.MustRun(t, args...)
}

// flows requires that senders are served: ready, heard by their neighbours and by the host; and that
// packets come out as the host's.
func (w *window) flows(t *testing.T, all []sender) {
	t.Helper()
	for _, s := range all {
		w.site().ready(t, s.name)
	}
	for _, s := range all {
		for _, n := range s.on {
			if n != quiet {
				lab.Eventually(t, 20*time.Second, s.name+" is heard on "+n, func() bool { return countOf(w, w.heard, s.name+"@"+n) > 0 })
			}
		}
		lab.Eventually(t, 20*time.Second, s.name+" is heard by the host", func() bool { return countOf(w, w.atHost, s.name) > 0 })
	}
	for _, p := range []layers.IPProtocol{layers.IPProtocolUDP, layers.IPProtocolTCP, layers.IPProtocolICMPv4} {
		key := netip.AddrPortFrom(lab.HostB4, uint16(p))
		before := countOf(w, w.masqueraded, key)
		lab.Eventually(t, 20*time.Second, "masqueraded packets outside: "+p.String(), func() bool { return countOf(w, w.masqueraded, key) > before })
	}
}

// unheard requires that nothing of senders has come to the host or, on their networks, to neighbours that a
// program guards.
func (w *window) unheard(t *testing.T, all []sender) {
	t.Helper()
	for _, s := range all {
		assert.Zero(t, countOf(w, w.atHost, s.name), "packets of %s at the host", s.name)
		assert.Zero(t, countOf(w, w.heard, s.name+"@"+s.on[0]), "packets of %s at its neighbours", s.name)
	}
}

const together = 5 // senders that start at once

// Needs root. A container that sends from its first instruction on, at a start and at `network
// connect`: no packet of it crosses networks, or leaves with its own address; with the daemon running,
// stopped by SIGSTOP and killed. It becomes ready, and its traffic flows, when there is a daemon.
func TestAcceptAttachWindow(t *testing.T) {
	w := newWindow(t, true)
	for _, mode := range []struct {
		name string
		down func()
		up   func()
	}{
		{"running", func() {}, func() {}},
		{
			"stopped",
			func() { require.NoError(t, syscall.Kill(w.b.PID(), syscall.SIGSTOP)) },
			func() { require.NoError(t, syscall.Kill(w.b.PID(), syscall.SIGCONT)) },
		},
		{"killed", func() { w.b.Kill() }, func() { w.b.Start(t) }},
	} {
		passed := t.Run(mode.name, func(t *testing.T) {
			// Those to be connected are ready on their first network before.
			running := w.start(t, 2*together, w.networks...)
			w.flows(t, running)
			mode.down()
			for i := 0; i < count(200); i += together {
				all := w.start(t, together, w.networks...)
				w.nothingEscaped(t)
				if mode.name != "running" {
					w.unheard(t, all)
				}
				if mode.name == "running" || i+together >= count(200) {
					mode.up()
					w.flows(t, all)
					mode.down()
				}
				w.remove(t, all)
			}
			for i := 0; i < count(200); i += together {
				some := running[i%len(running):][:together]
				w.connect(t, some)
				if mode.name == "running" {
					w.flows(t, some)
				}
				w.disconnect(t, some)
				w.nothingEscaped(t)
			}
			mode.up()
			w.flows(t, running)
			w.remove(t, running)
			w.nothingEscaped(t)
		})
		if !passed {
			break // the daemon may still be down
		}
	}
}

// Needs root. The same containers where nobody guards: their packets arrive everywhere, so that the
// test above sees what it looks for.
func TestAttachWindowUnguarded(t *testing.T) {
	w := newWindow(t, false)
	for _, n := range w.networks {
		w.start(t, 1, n)
	}
	for _, how := range []string{"to another network", "to a neighbour without icc", "outside, not masqueraded"} {
		lab.Eventually(t, 10*time.Second, how, func() bool { return countOf(w, w.escaped, how) > 0 })
	}
	t.Logf("%v", w.escaped)
}
