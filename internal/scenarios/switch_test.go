// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// The options of an Engine that makes its rules, in both families, and of one that leaves them to
// bpfnet.
var (
	rulesOn  = lab.DockerOpts{IPTables: true, Proxy: true, ExtraArgs: []string{"--ip6tables=true", "--experimental"}}
	rulesOff = lab.DockerOpts{ExtraArgs: []string{"--experimental"}}
)

// liveRestore has the Engine leave containers running when it restarts, from now on.
func (w *site) liveRestore(t *testing.T) {
	t.Helper()
	w.d.Reload(t, `{"live-restore": true}`)
	lab.Eventually(t, 10*time.Second, "live-restore is on", func() bool {
		return w.d.MustRun(t, "info", "--format", "{{.LiveRestoreEnabled}}") == "true"
	})
}

// newSwitchSite is a host with an Engine that makes its own rules, and containers on three networks:
// web and peer on blue, other on red, plain on the default one.
func newSwitchSite(t *testing.T, docker lab.DockerOpts) *site {
	t.Helper()
	l := lab.New(t, lab.Opts{BridgeNetfilter: true})
	w := &site{Lab: l, d: l.StartDocker(t, docker)}
	w.networks(t)
	w.serve(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.d.Serve(t, "--name", "peer", "--network", "blue")
	w.d.Serve(t, "--name", "other", "--network", "red")
	w.d.Serve(t, "--name", "plain")
	l.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	return w
}

// busy starts what must not notice that the host is switched over.
func busy(t *testing.T, w *site) *traffic {
	t.Helper()
	tr := &traffic{streams: map[string]*lab.Stream{}, pings: map[string]*lab.Process{}}
	web4, web6 := w.d.Addrs(t, "web", "blue")
	peer := w.d.NS(t, "peer")
	for _, c := range []struct {
		name string
		from *lab.NS
		to   string
	}{
		{"published", w.Client, at(lab.Host4, 8080)},
		{"published v6", w.Client, at(lab.Host6, 8080)},
		{"container", peer, at(web4, 80)},
		{"container v6", peer, at(web6, 80)},
		{"egress", peer, at(lab.Client24, 7000)},
		{"egress v6", peer, at(lab.Client26, 7000)},
		{"egress of the default network", w.d.NS(t, "plain"), at(lab.Client24, 7000)},
		{"host to container", w.Host, at(web4, 80)},
	} {
		for _, network := range []string{"tcp", "udp"} {
			tr.streams[c.name+" "+network] = c.from.Stream(t, "--network", network, "--interval", "10ms", "--duration", "5m", "--grace", map[string]string{"tcp": "6s", "udp": "500ms"}[network], c.to)
		}
	}
	for name, to := range map[string]netip.Addr{"egress": lab.Client24, "egress v6": lab.Client26} {
		tr.pings[name] = peer.Start(t, "stdbuf", "-oL", "ping", "-i", "0.02", "-W", "2", to.String())
	}
	tr.flow(t)
	return tr
}

// What the probes of closed ways carry, so that captures know them whatever became of their source.
const (
	probePort = 4321
	probeSize = 333 // bytes of an echo request's data
)

// watched are captures inside of containers, of what should never arrive there.
type watched map[string]*lab.Capture

// isProbe knows a probe by what it carries.
func isProbe(p gopacket.Packet) bool {
	switch l := p.TransportLayer().(type) {
	case *layers.TCP:
		return l.DstPort == probePort
	case *layers.UDP:
		return l.DstPort == probePort
	}
	if l, ok := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
		return l.TypeCode.Type() == layers.ICMPv4TypeEchoRequest && len(l.LayerPayload()) == probeSize
	}
	if l, ok := p.Layer(layers.LayerTypeICMPv6Echo).(*layers.ICMPv6Echo); ok {
		return len(l.LayerPayload())+4 >= probeSize && len(l.LayerPayload()) <= probeSize+4
	}
	return false
}

// knockAt sends to an address by every protocol, some dozen packets a second, until the test ends.
func knockAt(t *testing.T, w *site, from *lab.NS, to netip.Addr) {
	t.Helper()
	target := at(to, probePort)
	from.Start(t, w.Tool, "flood-connect", "--duration", "5m", "--timeout", "50ms", target)
	from.Start(t, w.Tool, "udp-count", "--count", "100000", "--interval", "50ms", target)
	from.Start(t, "ping", "-q", "-i", "0.05", "-s", fmt.Sprint(probeSize), to.String())
}

// knock has every way probed that the Engine's own rules close.
func knock(t *testing.T, w *site) watched {
	t.Helper()
	seen := watched{}
	nets := map[string]string{"web": "blue", "other": "red", "plain": "bridge"}
	from := map[string][]*lab.NS{
		"web":   {w.d.NS(t, "other"), w.d.NS(t, "plain"), w.Client},
		"other": {w.d.NS(t, "web"), w.Client},
		"plain": {w.d.NS(t, "other"), w.Client},
	}
	for name, network := range nets {
		ns := w.d.NS(t, name)
		seen[name] = ns.Capture(t, "eth0", func(p gopacket.Packet) bool { return isProbe(p) })
		v4, v6 := w.d.Addrs(t, name, network)
		for _, f := range from[name] {
			knockAt(t, w, f, v4)
			if v6.IsValid() && f.Name != "plain" { // which has no IPv6: it would try in a loop, and take a processor
				knockAt(t, w, f, v6)
			}
		}
	}
	return seen
}

// none requires that no probe has arrived.
func (seen watched) none(t *testing.T, when string) {
	t.Helper()
	for name, c := range seen {
		for _, f := range c.Frames() {
			if !f.Outgoing {
				t.Fatalf("%s: %s got a packet that the Engine's rules would have dropped: %v", when, name, f.Packet)
			}
		}
	}
}

// Needs root. A host whose Engine makes its own rules is switched over to bpfnet and back, as README.md
// says, with containers running, streams in both directions, and every closed way probed all the time.
//
//	client ── host (dockerd, bpfnet; blue: web, peer; red: other; bridge: plain) ── client2
func TestSwitchOverAndBack(t *testing.T) {
	w := newSwitchSite(t, rulesOn)
	tr := busy(t, w)
	seen := knock(t, w)
	proxied := map[string]*lab.Stream{
		"the host":               w.Host.Stream(t, "--interval", "10ms", "--duration", "5m", "127.0.0.1:8080"),
		"a neighbour":            w.d.NS(t, "peer").Stream(t, "--interval", "10ms", "--duration", "5m", at(lab.Host4, 8080)),
		"one of another network": w.d.NS(t, "other").Stream(t, "--interval", "10ms", "--duration", "5m", at(lab.Host4, 8080)),
	}
	step := func(when string) {
		t.Helper()
		tr.flow(t)
		seen.none(t, when)
	}
	step("before")

	// Beside the Engine's rules.
	w.b = w.StartBpfnet(t, w.d)
	for _, name := range []string{"web", "peer", "other", "plain"} {
		w.ready(t, name)
	}
	m := w.maps(t)
	before := readCounters(t, m)
	step("beside the Engine's rules")
	assert.Positive(t, since(t, m, before).fast(), "nothing takes the fast path")
	assert.Contains(t, w.b.Log(), "took over flows from netfilter")
	for who, s := range proxied {
		sum := s.Finish(t)
		assert.Zero(t, sum.Lost+sum.Corrupt+sum.Resets, "%s through docker-proxy: %+v", who, sum)
		assert.Greater(t, sum.Received, int64(20), who)
	}

	// The Engine without.
	w.liveRestore(t)
	w.d.Reconfigure(t, rulesOff)
	step("the Engine without rules of its own")
	require.Contains(t, w.Host.MustRun(t, "iptables-save"), "DOCKER", "the Engine left nothing behind")
	require.Contains(t, w.Host.MustRun(t, "ip6tables-save"), "DOCKER", "the Engine left nothing behind")

	// Without the old rules.
	rules := w.rules(t)
	assert.Contains(t, w.b.MustCLI(t, "takeover", "--dry-run"), "would remove")
	require.Equal(t, rules, w.rules(t), "a dry run changes nothing")
	assert.Contains(t, w.b.MustCLI(t, "takeover"), "left alone: policy DROP of FORWARD (iptables)")
	assert.NotContains(t, w.rules(t), "DOCKER")
	assert.NotContains(t, w.rules(t), "MASQUERADE")
	assert.Contains(t, w.b.MustCLI(t, "takeover"), "nothing is left of an Engine that made rules")
	step("the old rules gone")
	w.b.Restart(t)
	step("a daemon that did not see the flows begin")

	// And back: the Engine makes its rules again; the programs stand until they do.
	_, err := w.b.CLI("cleanup")
	require.ErrorContains(t, err, "stop it first")
	w.d.Reconfigure(t, rulesOn)
	step("the Engine with its rules again")
	w.b.Stop(t)
	step("without a daemon")
	out := w.b.MustCLI(t, "cleanup")
	assert.Regexp(t, `flows handed to netfilter: [1-9]`, out)
	assert.Zero(t, w.cgroupPrograms(t))
	step("back")
	strayed := w.NFTCounters(t)
	step("back")
	assert.Positive(t, w.NFTDelta(t, strayed)["forward"], "nothing passes netfilter")
	w.Client.MustGet(t, at(lab.Host4, 8080))
	tr.end(t, false)

	// Had one been open, it would have been seen.
	web, _ := w.d.Addrs(t, "web", "blue")
	for _, network := range []string{"tcp", "udp"} {
		_, _ = w.d.NS(t, "peer").Get("--network", network, "--timeout", "100ms", at(web, probePort))
	}
	ping, _ := w.d.NS(t, "peer").Run(t.Context(), "ping", "-c", "1", "-s", fmt.Sprint(probeSize), web.String())
	require.Contains(t, ping, "1 received")
	seen["web"].Wait(t, 3, 10*time.Second)
}

// rules are those of iptables, both families, without counters.
func (w *site) rules(t *testing.T) string {
	t.Helper()
	var out []string
	for _, tool := range []string{"iptables-save", "ip6tables-save"} {
		for line := range strings.Lines(w.Host.MustRun(t, tool)) {
			if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, ":") {
				out = append(out, tool+" "+line)
			}
		}
	}
	return strings.Join(out, "")
}

// Needs root. What takeover and cleanup refuse, and that they change nothing then.
func TestSwitchRefusals(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	w := &site{Lab: l, d: l.StartDocker(t, rulesOn)}
	w.networks(t)
	w.serve(t, "web", "blue", "-p", "8080:80")
	w.b = l.StartBpfnet(t, w.d)
	w.ready(t, "web")
	refused := func(why string, args ...string) {
		t.Helper()
		before := w.rules(t)
		_, err := w.b.CLI(args...)
		require.ErrorContains(t, err, why)
		assert.Equal(t, before, w.rules(t), "%v changed something", args)
	}

	refused("makes iptables rules", "takeover")
	l.Host.MustRun(t, "iptables", "-I", "DOCKER-USER", "-s", "10.8.0.0/16", "-j", "DROP")
	l.Host.MustRun(t, "iptables", "-A", "INPUT", "-p", "tcp", "--dport", "25", "-j", "DROP")
	w.liveRestore(t)
	w.d.Reconfigure(t, rulesOff)
	refused("DOCKER-USER has rules of your own, which no packet of a container meets: iptables -A DOCKER-USER -s 10.8.0.0/16 -j DROP", "takeover")
	w.b.Stop(t)
	refused("no daemon runs", "takeover", "--drop-docker-user")
	// The Engine's old rules guard nothing that comes.
	refused("these networks would stand open: blue (IPv4), blue (IPv6)", "cleanup")
	w.b.Start(t)
	w.ready(t, "web")
	l.Client.MustGet(t, at(lab.Host4, 8080))

	// A network whose containers no program guards: it would be open.
	l.Host.MustRun(t, "ip", "link", "add", "odd0", "type", "bridge")
	l.Host.MustRun(t, "ip", "link", "add", "stray0", "master", "odd0", "type", "veth", "peer", "stray1")
	l.Host.MustRun(t, "iptables", "-A", "DOCKER", "!", "-i", "odd0", "-o", "odd0", "-j", "DROP")
	refused("not served, and without these rules open: odd0", "takeover", "--drop-docker-user")
	l.Host.MustRun(t, "ip", "link", "del", "stray0")

	out := w.b.MustCLI(t, "takeover", "--drop-docker-user")
	assert.Contains(t, out, "-F DOCKER-USER")
	assert.NotContains(t, w.rules(t), "DOCKER")
	assert.Contains(t, w.rules(t), "--dport 25 -j DROP", "the host's own rules stay")
	l.Client.MustGet(t, at(lab.Host4, 8080))
	assert.JSONEq(t, `{"dry_run": false, "removed": [], "left": [
		"policy DROP of FORWARD (iptables), which others set too: packets of containers do not pass there, and the host is no router",
		"policy DROP of FORWARD (ip6tables), which others set too: packets of containers do not pass there, and the host is no router"
	]}`, w.b.MustCLI(t, "takeover", "-o", "json"))

	// Those of the old iptables, and of an Engine with the nftables backend.
	for _, words := range []string{"-N DOCKER", "-A DOCKER ! -i blue0 -o blue0 -j DROP", "-A FORWARD -o blue0 -j DOCKER", "-A FORWARD -i vm0 -j ACCEPT"} {
		l.Host.MustRun(t, "iptables-legacy", strings.Fields(words)...)
	}
	l.Host.MustRun(t, "nft", "add", "table", "ip6", "docker-bridges")
	l.Host.MustRun(t, "nft", "add", "chain", "ip6", "docker-bridges", "filter-FORWARD", "{ type filter hook forward priority filter; }")
	out = w.b.MustCLI(t, "takeover")
	assert.Contains(t, out, "iptables-legacy: removed 2 rules and 1 chains of the Engine's")
	assert.Contains(t, out, "nft delete table ip6 docker-bridges")
	assert.Equal(t, "-A FORWARD -i vm0 -j ACCEPT", strings.TrimSpace(regexp.MustCompile(`(?m)^-A.*`).FindString(l.Host.MustRun(t, "iptables-legacy-save"))))
	assert.NotContains(t, l.Host.MustRun(t, "nft", "list", "tables"), "docker-bridges")

	// An Engine that makes rules for one family guards nothing of the other.
	half := rulesOn
	half.ExtraArgs = nil
	w.d.Reconfigure(t, half)
	w.b.Stop(t)
	refused("these networks would stand open: blue (IPv6), red (IPv6)", "cleanup")
	w.b.MustCLI(t, "cleanup", "--leave-open")
	l.Client.MustGet(t, at(lab.Host4, 8080))
}
