// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Counters tell which way traffic took. They are those that exist in a mode anyway, read before and
// after a window, so that a proof costs the traffic nothing.
type counters map[string]uint64

// since is what has been counted since before. A count that is not monotonic is not negative.
func (c counters) since(before counters) counters {
	d := counters{}
	for name, n := range c {
		d[name] = n - min(n, before[name])
	}
	return d
}

// claim is what a counter must show.
type claim struct {
	counter string
	least   uint64
	most    uint64 // 0 with least 0: must not have moved
}

func atLeast(counter string, n uint64) claim { return claim{counter, max(n, 1), ^uint64(0)} }
func atMost(counter string, n uint64) claim  { return claim{counter, 0, n} }

const (
	tracked     = "connections tracked in the host (nf_conntrack_count)"
	proxyCPU    = "CPU time of docker-proxy (ticks)"
	redirected  = "packets redirected by bpfnet (bpfnet stats)"
	judged      = "packets that bpfnet let go (bpfnet stats)"
	toStack     = "packets that bpfnet left to the stack or bridge (bpfnet stats)"
	ruleForward = "packets in rules of chain FORWARD"
	ruleDNAT    = "packets in DNAT rules"
	ruleMasq    = "packets in MASQUERADE rules"
)

func device(name string) string { return "packets received by " + name }
func sender(name string) string { return "packets sent by " + name }

// counters reads those of the path's mode and family.
func (p path) counters() (counters, error) {
	c := counters{}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	switch p.mode {
	case Host, Loopback:
		n := p.at
		if p.scenario == "egress" {
			n = p.from
		}
		return c, n.Do(func() error { return c.devices() })
	case Bpfnet:
		if err := p.lab.Host.Do(func() error { return c.conntrack() }); err != nil {
			return nil, err
		}
		return c, c.fates(p)
	}
	if err := p.lab.Host.Do(func() error { return c.conntrack() }); err != nil {
		return nil, err
	}
	if err := c.proxies(p.lab.Host.Path); err != nil {
		return nil, err
	}
	if p.mode == NFTables {
		return c, c.nft(ctx, p)
	}
	return c, c.iptables(ctx, p)
}

// prove fails unless the counters have moved as they do when traffic takes the mode's path.
func (p path) prove(delta counters, m moved) error {
	for _, c := range p.claims(m) {
		n := delta[c.counter]
		if n >= c.least && n <= c.most {
			continue
		}
		want := fmt.Sprintf("at least %d", c.least)
		if n > c.most {
			want = fmt.Sprintf("at most %d", c.most)
		}
		return fmt.Errorf("the traffic did not take the path of mode %s in scenario %s: %s: %d more, want %s",
			p.mode, p.scenario, c.counter, n, want)
	}
	return nil
}

// strays is what may go another way beside the traffic: neighbour discovery, router solicitations, the
// packets that open a flow where those take another way than the rest.
func strays(m moved) uint64 { return 50 + m.packets/100 }

// idleTicks is how long proxies may work beside traffic that they do not copy: 2 µs for each packet, of which none is copied
// in less than 5, and a tick for every hundred of them, whose runtimes have timers.
func (p path) idleTicks(m moved) uint64 {
	pids, _ := processesIn(p.lab.Host, "docker-proxy") // none: as strict as can be
	return m.packets*2/10_000 + uint64(len(pids)/100)
}

// proxied reports whether the Engine's proxy copies what goes along the path.
func (p path) proxied() bool {
	return (p.mode == DockerProxy || p.mode == ProxyPinned) && (p.scenario == "host-published" || p.scenario == "hairpin")
}

func (p path) claims(m moved) []claim {
	switch p.mode {
	case Loopback:
		return []claim{atLeast(device("lo"), m.packets)}
	case Host:
		switch p.scenario {
		case "host-published":
			return []claim{atLeast(device("lo"), m.packets), atMost(device("up0"), strays(m))}
		case "egress":
			return []claim{atLeast(sender("up1"), m.packets), atMost(device("lo"), strays(m))}
		}
		return []claim{atLeast(device("up0"), m.packets), atMost(device("lo"), strays(m))}
	case Bpfnet:
		claims := []claim{atMost(tracked, 0)}
		if p.scenario == "host-published" {
			// The socket dials the container itself: which hook lets the packets go is its business.
			return append(claims, atLeast(judged, m.packets))
		}
		return append(claims, atLeast(redirected, m.packets), atMost(toStack, strays(m)))
	case DockerIPTables, DockerProxy, ProxyPinned, NFTables:
		if p.proxied() {
			return []claim{atLeast(proxyCPU, 1)}
		}
		claims := []claim{atMost(proxyCPU, p.idleTicks(m))}
		switch p.scenario {
		case "container-container":
			claims = append(claims, atLeast(ruleForward, m.packets))
		case "published":
			claims = append(claims, atLeast(ruleForward, m.packets), atLeast(ruleDNAT, m.flows/2))
		case "egress":
			claims = append(claims, atLeast(ruleForward, m.packets), atLeast(ruleMasq, m.flows/2))
		case "host-published", "hairpin":
			claims = append(claims, atLeast(ruleDNAT, m.flows/2))
		}
		return claims
	}
	return nil
}

// devices counts what the interfaces of the calling thread's namespace have received and sent.
func (c counters) devices() error {
	b, err := os.ReadFile("/proc/thread-self/net/dev")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		name, rest, found := strings.Cut(line, ":")
		fields := strings.Fields(rest)
		if !found || len(fields) < 10 {
			continue
		}
		for of, field := range map[string]string{device(strings.TrimSpace(name)): fields[1], sender(strings.TrimSpace(name)): fields[9]} {
			if c[of], err = strconv.ParseUint(field, 10, 64); err != nil {
				return fmt.Errorf("/proc/net/dev: %w", err)
			}
		}
	}
	return nil
}

// conntrack reads how many connections netfilter tracks in the calling thread's namespace.
func (c counters) conntrack() error {
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	if err != nil {
		return err
	}
	c[tracked], err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return err
}

// fates reads what has become of the packets that bpfnet judged.
func (c counters) fates(p path) error {
	out, err := p.bpfnet.CLI("stats", "-o", "json")
	if err != nil {
		return err
	}
	var stats struct {
		Totals map[string]struct{ Packets uint64 }
	}
	if err := json.Unmarshal([]byte(out), &stats); err != nil {
		return fmt.Errorf("bpfnet stats: %w", err)
	}
	c[redirected] = stats.Totals["redirected"].Packets
	c[toStack] = stats.Totals["stack"].Packets + stats.Totals["bridge"].Packets
	c[judged] = c[redirected] + c[toStack]
	return nil
}

// iptables reads the counters of the Engine's rules of the path's family.
func (c counters) iptables(ctx context.Context, p path) error {
	save := "iptables-save"
	if p.family == 6 {
		save = "ip6tables-save"
	}
	out, err := p.lab.Host.Run(ctx, save, "-c")
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		count, rule, found := strings.Cut(strings.TrimPrefix(line, "["), ":")
		if !found || !strings.Contains(rule, "] -A ") {
			continue
		}
		n, err := strconv.ParseUint(count, 10, 64)
		if err != nil {
			return fmt.Errorf("%s: %q: %w", save, line, err)
		}
		switch {
		case strings.Contains(rule, "] -A FORWARD "):
			c[ruleForward] += n
		case strings.Contains(rule, "-j DNAT"):
			c[ruleDNAT] += n
		case strings.Contains(rule, "-j MASQUERADE"):
			c[ruleMasq] += n
		}
	}
	return nil
}

// proxies reads how long the userland proxies in a namespace have worked.
func (c counters) proxies(namespace string) error {
	var want, is os.FileInfo
	want, err := os.Stat(namespace)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	c[proxyCPU] = 0
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil || !strings.Contains(string(stat), "(docker-proxy)") {
			continue
		}
		if is, err = os.Stat("/proc/" + e.Name() + "/ns/net"); err != nil || !os.SameFile(want, is) {
			continue
		}
		_, rest, _ := strings.Cut(string(stat), ") ")
		f := strings.Fields(rest)
		if len(f) < 13 {
			continue
		}
		for _, field := range f[11:13] { // utime, stime
			n, _ := strconv.ParseUint(field, 10, 64)
			c[proxyCPU] += n
		}
	}
	return nil
}
