// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

var portPoints = []point{
	{1, []string{DockerIPTables, DockerProxy, NFTables, Bpfnet}},
	{100, []string{DockerIPTables, DockerProxy, NFTables, Bpfnet}},
	{1000, []string{DockerIPTables, DockerProxy, NFTables, Bpfnet}},
	{10000, []string{DockerIPTables, Bpfnet}},
}

// realPorts is how many ports an Engine that writes rules publishes itself: it takes a second for a
// hundred and more than a minute for a thousand.
const realPorts = 100

func portsGroup() Group { return scaledPorts(portPoints, realPorts, "rr", "crr") }

// scaledPorts asks one published port while others are published, up to real of them by an Engine that
// writes rules.
func scaledPorts(points []point, real int, metrics ...string) Group {
	return scaleGroup("ports", 80*time.Second, 20*time.Second, points, func(t testing.TB, o Options, mode string, at int) []Probe {
		var s *site
		note := "all ports published by docker run, the measured one last"
		switch others := at - 1; {
		case mode == NFTables:
			note = "the rules of all ports by nft, as Engine 29 has them, the measured one last"
			s = newSpot(t, mode, spotOpts{})
			s.publishByNFT(t, others)
		case mode == Bpfnet || at <= real:
			s = newSpot(t, mode, spotOpts{before: func(s *site) {
				if others > 0 {
					s.docker.MustRun(t, slices.Concat([]string{"run", "-d", "--name", "others", "-p", publish(firstOther, others)}, sleep)...)
				}
			}})
		default:
			note = "one port published by docker run; the rules of the others by iptables-restore, as the Engine writes them, before its own"
			if mode == DockerProxy {
				note += "; their docker-proxy processes started by hand"
			}
			s = newSpot(t, mode, spotOpts{})
			s.publishByHand(t, others)
		}
		stands := func() error { return s.publishes(at) }
		waitUntil(t, patience, stands)
		return s.scaled(t, o, Key{Scenario: "ports", At: at}, "published", note, stands, metrics...)
	})
}

// publishByHand does what the Engine would have done for other ports of the server.
func (s *site) publishByHand(t testing.TB, n int) {
	t.Helper()
	others := make([]uint16, n)
	for i := range others {
		others[i] = uint16(firstOther + i)
	}
	rules, err := morePorts(s.savedRules(t), loadPort, loadPort, others)
	if err != nil {
		t.Fatal(err)
	}
	s.restoreRules(t, rules)
	if s.mode == DockerProxy {
		s.startProxies(t, firstOther, n)
	}
}

// publishByNFT loads the rules for other ports and the server's own.
func (s *site) publishByNFT(t testing.TB, n int) {
	t.Helper()
	rules := nftSite{family: 4, ip: "ip", bridge: "docker0", server: s.addrs[4]}
	rules.client, _ = s.docker.Addrs(t, "client", "bridge")
	subnet := s.docker.MustRun(t, "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Subnet}}")
	var err error
	if rules.subnet, err = netip.ParsePrefix(subnet); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		rules.ports = append(rules.ports, firstOther+i)
	}
	rules.ports = append(rules.ports, loadPort)
	var tcp strings.Builder
	for line := range strings.Lines(rules.rules()) {
		if !strings.Contains(line, "udp dport") {
			tcp.WriteString(line)
		}
	}
	feed(t, s.lab.Host, tcp.String(), "nft", "-f", "-")
}

// dockerProxy is the Engine's own. It tells by file descriptor 3 how its start went.
const dockerProxy = "/usr/sbin/docker-proxy"

// startProxies starts a docker-proxy for each of n ports, all children of one shell, which ends them.
func (s *site) startProxies(t testing.TB, first, n int) {
	t.Helper()
	if _, err := os.Stat(dockerProxy); err != nil {
		t.Fatalf("no docker-proxy (scripts/deps.sh test): %v", err)
	}
	shell := s.lab.Host.Start(t, "sh", "-c", fmt.Sprintf(
		`trap 'kill $(jobs -p)' TERM
p=%d; while [ $p -lt %d ]; do
	%s -proto tcp -host-ip 0.0.0.0 -host-port $p -container-ip %s -container-port $p 3>/dev/null &
	p=$((p+1))
done
echo started; wait`, first, first+n, dockerProxy, s.addrs[4]))
	t.Cleanup(func() { shell.Stop(t) })
	shell.WaitOutput(t, "started")
}

// publishes counts the published ports where the mode has them.
func (s *site) publishes(want int) error {
	switch s.mode {
	case Bpfnet:
		st, err := s.standing()
		if err != nil {
			return err
		}
		if err := counted("published ports", st.Ports, want); err != nil {
			return err
		}
		return counted("entries of map ports", st.entries("ports"), want)
	case DockerProxy:
		proxies, err := processesIn(s.lab.Host, "docker-proxy")
		if err != nil {
			return err
		}
		if err := counted("docker-proxy processes", len(proxies), want); err != nil {
			return err
		}
	}
	if s.mode == NFTables {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		out, err := s.lab.Host.Run(ctx, "nft", "list", "table", "ip", "bench")
		if err != nil {
			return err
		}
		return counted("dnat rules", strings.Count(out, " dnat to "), want)
	}
	dnat, err := s.ruleCount("-A DOCKER ", "-j DNAT")
	if err != nil {
		return err
	}
	if err := counted("DNAT rules", dnat, want); err != nil {
		return err
	}
	accept, err := s.ruleCount("-A DOCKER ", "--dport", "-j ACCEPT")
	if err != nil {
		return err
	}
	return counted("ACCEPT rules", accept, want)
}
