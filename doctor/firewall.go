// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// probe is a packet of ours that passes netfilter, and what it means if it is dropped there.
type probe struct {
	hooks    []string // in order; the first that drops it counts
	device   string   // of ingress and egress
	families []string
	packet   Packet
	state    State
	what     string // "… is dropped": %s is where
	in       string // device that a rule to let it pass would name
	out      string
}

var (
	ipFamilies   = []string{"ip", "ip6", "inet"}
	linkFamilies = []string{"netdev", "inet"}
)

// probes are the packets that do not take the fast path past netfilter:
//
//   - a container and the host itself talk through the stack, in both directions;
//   - ARP and neighbour discovery take the bridge;
//   - what leaves by an uplink passes that device's egress hook, where netfilter can have one too;
//   - the answers to the host's own sockets on 127.0.0.1 come in by lo.
func (f *Facts) probes() []probe {
	var out []probe
	for _, b := range f.bridges() {
		for _, p := range []netip.Prefix{b.v4, b.v6} {
			if !p.IsValid() {
				continue
			}
			host, family := p.Addr(), 6
			if host.Is4() {
				family = 4
			}
			ctr := f.neighbour(b, p)
			up := Packet{Family: family, In: b.name, Src: ctr, Dst: host, Proto: "tcp", ToHost: true}
			down := Packet{Family: family, Out: b.name, Src: host, Dst: ctr, Proto: "tcp", FromHost: true}
			answer, first := up, up
			answer.State, first.State, down.State = "established", "new", "new"
			out = append(out,
				probe{
					hooks: []string{"prerouting", "input"}, families: ipFamilies, packet: answer, state: Broken, in: b.name,
					what: "the host's own connections to containers get no answer: %s",
				}, probe{
					hooks: []string{"prerouting", "input"}, families: ipFamilies, packet: first, state: Note, in: b.name,
					what: "containers cannot reach services of the host itself (published ports they can): %s",
				}, probe{
					hooks: []string{"output", "postrouting"}, families: ipFamilies, packet: down, state: Broken, out: b.name,
					what: "the host cannot reach containers, nor ports published on it: %s",
				}, probe{
					hooks: []string{"prerouting", "input"}, families: []string{"bridge"}, state: Broken,
					packet: Packet{Family: family, Src: ctr, Dst: host, Proto: "tcp"},
					what:   "containers and the host cannot talk: %s",
				}, probe{
					hooks: []string{"output", "postrouting"}, families: []string{"bridge"}, state: Broken,
					packet: Packet{Family: family, Src: host, Dst: ctr, Proto: "tcp"},
					what:   "containers and the host cannot talk: %s",
				}, probe{
					hooks: []string{"ingress"}, device: b.name, families: linkFamilies, packet: answer, state: Broken,
					what: "containers and the host cannot talk: %s",
				})
		}
		if b.v4.IsValid() {
			arp := probe{families: []string{"bridge"}, state: Broken, what: "containers do not find each other's MACs: %s"}
			arp.hooks = []string{"prerouting", "forward", "postrouting"}
			out = append(out, arp)
			arp.families, arp.what = []string{"arp"}, "containers and the host do not find each other's MACs: %s"
			in, sent := arp, arp
			in.hooks, in.packet, in.in = []string{"input"}, Packet{In: b.name}, b.name
			sent.hooks, sent.packet, sent.out = []string{"output"}, Packet{Out: b.name}, b.name
			out = append(out, in, sent)
		}
		if b.v6.IsValid() {
			out = append(out, probe{
				hooks: []string{"prerouting", "forward", "postrouting"}, families: []string{"bridge"}, state: Broken,
				packet: Packet{Family: 6, Proto: "icmpv6"},
				what:   "containers do not find each other's MACs by IPv6: %s",
			})
		}
	}
	for _, l := range f.Seen.Links {
		out = append(out, probe{
			hooks: []string{"ingress"}, device: l.Name, families: linkFamilies, state: Broken,
			packet: Packet{In: l.Name}, what: "a container does not find its neighbours' MACs: %s",
		})
	}
	for _, u := range f.Seen.Uplinks {
		p := Packet{Family: 4, Out: u.Name, Proto: "tcp"}
		for _, a := range u.Addrs {
			if a.Addr().Is4() {
				p.Src = a.Addr()
			}
		}
		out = append(out, probe{
			hooks: []string{"egress"}, device: u.Name, families: linkFamilies, packet: p, state: Broken,
			what: "what containers send to the world is lost: %s",
		})
	}
	if f.Snapshot != nil && len(f.Snapshot.Ports) > 0 {
		lo := netip.MustParseAddr("127.0.0.1")
		out = append(out, probe{
			hooks: []string{"prerouting", "input"}, families: ipFamilies, state: Broken, in: "lo",
			packet: Packet{Family: 4, In: "lo", Src: lo, Dst: lo, Proto: "tcp", State: "established", ToHost: true, FromHost: true},
			what:   "programs of the host get no answer on 127.0.0.1: %s",
		})
	}
	return out
}

// neighbour is an address of a container on the bridge: one that is there, or one that could be.
func (f *Facts) neighbour(b bridge, p netip.Prefix) netip.Addr {
	if f.Snapshot != nil {
		for _, e := range f.Snapshot.Endpoints {
			if !slices.Contains(b.networks, e.Network) {
				continue
			}
			for _, s := range e.Addresses {
				if a, err := netip.ParseAddr(s); err == nil && p.Contains(a) {
					return a
				}
			}
		}
	}
	if next := p.Addr().Next(); p.Contains(next) {
		return next
	}
	return p.Addr().Prev()
}

func checkFirewall(f *Facts) []Finding {
	if !f.Rules.Read {
		return []Finding{unknownf("%s", f.Rules.Why)}
	}
	type group struct {
		state State
		text  string
		fix   []string
	}
	var groups []*group
	dead := make(map[string]bool) // bridge and family whose answers are dropped already
	for _, p := range f.probes() {
		var found []Culprit
		for _, hook := range p.hooks {
			if found = f.Rules.Drops(hook, p.device, p.packet, p.families...); len(found) > 0 {
				break
			}
		}
		if len(found) == 0 {
			continue
		}
		key := fmt.Sprint(p.in, p.packet.Family)
		if p.in != "" && p.state == Broken {
			dead[key] = true
		} else if p.in != "" && dead[key] {
			continue
		}
		where := make([]string, 0, len(found))
		var fix []string
		for _, c := range found {
			if w := c.where(); !slices.Contains(where, w) {
				where = append(where, w)
			}
			fix = append(fix, c.mend(p))
		}
		text := fmt.Sprintf(p.what, strings.Join(where, ", ")+" drops it")
		i := slices.IndexFunc(groups, func(g *group) bool { return g.text == text })
		if i < 0 {
			groups = append(groups, &group{state: p.state, text: text})
			i = len(groups) - 1
		}
		groups[i].fix = append(groups[i].fix, fix...)
	}
	var out []Finding
	for _, g := range groups {
		out = append(out, Finding{State: g.state, Detail: g.text, Fix: both(g.fix)})
	}
	if len(out) > 0 {
		return out
	}
	forward := "no rule drops what passes the host's stack"
	if c := f.forwardDrop(); c != nil {
		forward += fmt.Sprintf("; %s drops, which is fine: what is forwarded for containers does not come there", c.where())
	}
	return []Finding{okf("%s", forward)}
}

// forwardDrop is what drops a packet that the host would forward from one device to another.
func (f *Facts) forwardDrop() *Culprit {
	for _, b := range f.bridges() {
		for _, u := range f.Seen.Uplinks {
			for _, family := range []int{4, 6} {
				p := Packet{Family: family, In: u.Name, Out: b.name, Proto: "tcp", State: "new"}
				if found := f.Rules.Drops("forward", "", p, ipFamilies...); len(found) > 0 {
					return &found[0]
				}
			}
		}
	}
	return nil
}

func (c Culprit) where() string {
	if c.Chain.Tool == "nft" {
		s := fmt.Sprintf("chain %s of the nft table %s %s", c.At.Name, c.At.Family, c.At.Table)
		if c.Rule == nil {
			s += " (policy)"
		}
		return s
	}
	s := fmt.Sprintf("chain %s of %s", c.At.Name, c.At.Tool)
	if c.At.Table != "filter" {
		s += fmt.Sprintf(" (table %s)", c.At.Table)
	}
	if c.Rule == nil {
		s += " (policy)"
	}
	return s
}

// mend lets the packet pass. Where a rule can name the bridge, it goes to the beginning of the chain with
// the hook, so that nothing else is opened; in the other families the rule that drops goes.
func (c Culprit) mend(p probe) string {
	base := c.Chain
	device, iptablesFlag, nftKey := p.in, "-i", "iifname"
	if p.out != "" {
		device, iptablesFlag, nftKey = p.out, "-o", "oifname"
	}
	if base.Tool != "nft" {
		words := []string{base.Tool}
		if base.Table != "filter" {
			words = append(words, "-t", base.Table)
		}
		return commandLine(append(words, "-I", base.Name, iptablesFlag, device, "-j", "ACCEPT")...)
	}
	switch {
	case base.Table == "firewalld" && device != "":
		return both([]string{commandLine("firewall-cmd", "--permanent", "--zone=trusted", "--add-interface="+device), "firewall-cmd --reload"})
	case device != "":
		return quoted("nft", fmt.Sprintf("insert rule %s %s %s %s %q accept", base.Family, base.Table, base.Name, nftKey, device))
	case c.Rule != nil:
		return commandLine("nft", "delete", "rule", c.At.Family, c.At.Table, c.At.Name, "handle", fmt.Sprint(c.Rule.Handle))
	}
	return quoted("nft", fmt.Sprintf("chain %s %s %s { policy accept ; }", base.Family, base.Table, base.Name))
}

// quoted is a command with one quoted argument.
func quoted(command, argument string) string { return command + " " + Quote(argument) }

// checkBridgeNetfilter: with it, frames between a bridge's ports pass iptables' FORWARD. What takes the
// bridge is neighbour discovery, multicast, and fragments out of order.
func checkBridgeNetfilter(f *Facts) []Finding {
	var out []Finding
	for _, v := range []struct {
		name   string
		packet Packet
		what   string
		state  State
		has    func(bridge) bool
	}{
		{"bridge-nf-call-ip6tables", Packet{Family: 6, Proto: "icmpv6", State: "new"}, "containers do not find each other's MACs by IPv6", Broken, func(b bridge) bool { return b.v6.IsValid() }},
		{"bridge-nf-call-iptables", Packet{Family: 4, Proto: "udp", State: "new"}, "multicast and broadcast between containers is lost", Note, func(b bridge) bool { return b.v4.IsValid() }},
	} {
		path := "net/bridge/" + v.name
		if f.sysctl(path) != "1" {
			continue
		}
		var hit []string
		for _, b := range f.bridges() {
			p := v.packet
			p.In, p.Out = b.name, b.name
			if v.has(b) && f.Rules.Read && len(f.Rules.Drops("forward", "", p, ipFamilies...)) > 0 {
				hit = append(hit, b.name)
			}
		}
		switch fix := setSysctl(path, "0"); {
		case f.Snapshot == nil:
			out = append(out, okf("%s is on; the daemon switches it off when it starts", v.name))
		case len(hit) > 0:
			out = append(out, Finding{State: v.state, Fix: fix, Detail: fmt.Sprintf("%s is on and FORWARD drops: on %s, %s", v.name, some(hit), v.what)})
		default:
			out = append(out, notef(fix, "%s is on: frames that the bridge carries pass netfilter for nothing", v.name))
		}
	}
	return one(out, "bridged frames do not pass netfilter")
}
