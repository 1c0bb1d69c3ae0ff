// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Ruleset is what netfilter holds, of all tools that write it.
type Ruleset struct {
	Chains []*Chain
	// Read says whether anything could read it; if not, Why says what was in the way.
	Read bool
	Why  string
}

// Chain is a list of rules. One with a hook is asked by the kernel, the others by jumps.
type Chain struct {
	Tool   string // that lists it: "nft", "iptables", "ip6tables", "iptables-legacy", "ip6tables-legacy"
	Family string // "ip", "ip6", "inet", "arp", "bridge" or "netdev"
	Table  string
	Name   string
	Hook   string // "input"…; empty: of no hook
	Prio   int
	Policy string // "accept" or "drop", of a chain with a hook
	// Devices are those that an ingress or egress chain is for; empty: not known which.
	Devices []string
	Rules   []Rule
}

// Rule is what matches, and what is done then.
type Rule struct {
	Text    string // "-A INPUT …" of an iptables rule
	Handle  int    // of an nft rule
	Matches []Match
	Verdict Verdict
	Map     []Case // of a verdict map: tried one by one
}

// Case is one entry of a verdict map.
type Case struct {
	Match   Match
	Verdict Verdict
}

// Verdict is "accept", "drop", "jump", "goto", "return", or empty where the rule goes on. "maybe": the
// packet is somebody else's to judge.
type Verdict struct {
	Kind   string
	Target string // chain of a jump or goto
}

// Match is a condition on a packet. An empty Field is one that is not understood.
type Match struct {
	Field  string // see Packet
	Not    bool
	Values []string // one of which it must be
}

// Packet is one that is looked for in the rules. An empty or zero field can be anything.
type Packet struct {
	Family   int // 4, 6, or 0 for ARP
	In, Out  string
	Src, Dst netip.Addr
	State    string // of its connection: "new" or "established"
	Proto    string // "tcp", "icmpv6", …
	ToHost   bool   // its destination is an address of the host
	FromHost bool
}

type answer int

const (
	no answer = iota
	maybe
	yes
)

func (m Match) holds(p Packet) answer {
	a := maybe
	switch m.Field {
	case "iif":
		a = oneOf(m.Values, p.In, matchName)
	case "oif":
		a = oneOf(m.Values, p.Out, matchName)
	case "family":
		a = no
		if slices.Contains(m.Values, strconv.Itoa(p.Family)) {
			a = yes
		}
	case "ethertype":
		a = oneOf(m.Values, map[int]string{0: "arp", 4: "ip", 6: "ip6"}[p.Family], strings.EqualFold)
	case "proto":
		a = oneOf(m.Values, p.Proto, strings.EqualFold)
	case "state":
		a = oneOf(m.Values, p.State, strings.EqualFold)
	case "saddr":
		a = inPrefixes(m.Values, p.Src)
	case "daddr":
		a = inPrefixes(m.Values, p.Dst)
	case "mark":
		// Nothing of ours carries one where netfilter looks.
		a = oneOf(m.Values, "0", func(v, have string) bool { return v == have })
	case "dsttype":
		if p.ToHost {
			a = oneOf(m.Values, "local", strings.EqualFold)
		}
	case "srctype":
		if p.FromHost {
			a = oneOf(m.Values, "local", strings.EqualFold)
		}
	case "pkttype":
		a = oneOf(m.Values, "host", func(v, have string) bool { return v == have || v == "unicast" })
	}
	if m.Not {
		return yes - a
	}
	return a
}

func oneOf(values []string, have string, equal func(value, have string) bool) answer {
	if have == "" {
		return maybe
	}
	for _, v := range values {
		if equal(v, have) {
			return yes
		}
	}
	return no
}

// matchName compares a device's name with one that may end in a star, or in iptables' plus.
func matchName(pattern, name string) bool {
	for _, star := range []string{"*", "+"} {
		if begin, ok := strings.CutSuffix(pattern, star); ok && strings.HasPrefix(name, begin) {
			return true
		}
	}
	return pattern == name
}

// inPrefixes knows addresses, prefixes and ranges. What it cannot read may match.
func inPrefixes(values []string, a netip.Addr) answer {
	if !a.IsValid() {
		return maybe
	}
	out := no
	for _, v := range values {
		if first, last, ok := strings.Cut(v, "-"); ok {
			lo, err1 := netip.ParseAddr(first)
			hi, err2 := netip.ParseAddr(last)
			if err1 != nil || err2 != nil {
				out = max(out, maybe)
			} else if lo.Compare(a) <= 0 && a.Compare(hi) <= 0 {
				return yes
			}
			continue
		}
		p, err := netip.ParsePrefix(v)
		if err != nil {
			var addr netip.Addr
			if addr, err = netip.ParseAddr(v); err == nil {
				p = netip.PrefixFrom(addr, addr.BitLen())
			}
		}
		switch {
		case err != nil:
			out = max(out, maybe)
		case p.Contains(a):
			return yes
		}
	}
	return out
}

// Culprit is what drops a packet.
type Culprit struct {
	Chain *Chain // with the hook
	At    *Chain // that the rule stands in
	Rule  *Rule  // nil: the policy
}

// outcome of a packet in a chain: what can become of it.
type outcome struct {
	accept, fall bool // fall: it comes to the chain's end
	drops        []Culprit
}

// maxDepth bounds jumps; the kernel allows 16.
const maxDepth = 16

func (rs *Ruleset) chain(like *Chain, name string) *Chain {
	for _, c := range rs.Chains {
		if c.Name == name && c.Tool == like.Tool && c.Family == like.Family && c.Table == like.Table {
			return c
		}
	}
	return nil
}

// walk follows a packet through a chain. Where a condition cannot be decided, it goes both ways.
func (rs *Ruleset) walk(base, c *Chain, p Packet, depth int) outcome {
	var out outcome
	if c == nil || depth > maxDepth {
		return outcome{accept: true, fall: true} // nothing is known of it
	}
	for i := range c.Rules {
		r := &c.Rules[i]
		a := yes
		for _, m := range r.Matches {
			a = min(a, m.holds(p))
		}
		if a == no {
			continue
		}
		goesOn := false
		do := func(v Verdict, sure bool) {
			switch v.Kind {
			case "accept":
				out.accept = true
			case "drop":
				out.drops = append(out.drops, Culprit{base, c, r})
			case "maybe":
				out.accept, goesOn = true, true
			case "return":
				out.fall = true
			case "jump", "goto":
				sub := rs.walk(base, rs.chain(c, v.Target), p, depth+1)
				out.accept = out.accept || sub.accept
				out.drops = append(out.drops, sub.drops...)
				if sub.fall && v.Kind == "jump" {
					goesOn = true
				} else if sub.fall {
					out.fall = true
				}
			default:
				goesOn = true
			}
			if !sure {
				goesOn = true
			}
		}
		if len(r.Map) == 0 {
			do(r.Verdict, a == yes)
		} else {
			some, sure := false, false
			for _, k := range r.Map {
				h := min(a, k.Match.holds(p))
				if h == no {
					continue
				}
				some, sure = true, sure || h == yes
				do(k.Verdict, h == yes)
				if h == yes {
					break
				}
			}
			if !some || !sure {
				goesOn = true
			}
		}
		if !goesOn {
			return out
		}
	}
	out.fall = true
	return out
}

// Drops says which rules drop the packet at a hook of the families named, where no way through is left
// for it. None: it passes, or that depends on what the packet does not say. device is the one of an
// ingress or egress hook.
func (rs *Ruleset) Drops(hook, device string, p Packet, families ...string) []Culprit {
	var chains []*Chain
	for _, c := range rs.Chains {
		if c.Hook == hook && slices.Contains(families, c.Family) && c.sees(p, hook, device) {
			chains = append(chains, c)
		}
	}
	slices.SortStableFunc(chains, func(a, b *Chain) int { return cmp.Compare(a.Prio, b.Prio) })
	for _, c := range chains {
		o := rs.walk(c, c, p, 0)
		if o.fall && c.Policy == "drop" {
			o.drops = append(o.drops, Culprit{Chain: c, At: c})
		} else if o.fall {
			o.accept = true
		}
		if !o.accept && len(o.drops) > 0 {
			return o.drops
		}
	}
	return nil
}

// sees reports whether the kernel shows the chain such a packet.
func (c *Chain) sees(p Packet, hook, device string) bool {
	if hook == "ingress" || hook == "egress" {
		return slices.Contains(c.Devices, device)
	}
	switch c.Family {
	case "ip":
		return p.Family == 4
	case "ip6":
		return p.Family == 6
	case "inet":
		return p.Family != 0
	case "arp":
		return p.Family == 0
	}
	return true
}
