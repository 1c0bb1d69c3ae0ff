// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

var iptablesTools = []string{"iptables", "ip6tables", "iptables-legacy", "ip6tables-legacy"}

// nftTable is where an Engine with the nftables backend has its rules.
const nftTable = "docker-bridges"

// Leftover is what an Engine that made rules has left with one tool.
type Leftover struct {
	Tool   string `json:"tool"`   // "iptables", "ip6tables-legacy", "nft", …
	Family string `json:"family"` // "ip" or "ip6"
	Chains int    `json:"chains"`
	Rules  int    `json:"rules"`
	// Remove is what takes it away: lines for "TOOL-restore --noflush", or one command of nft.
	Remove []string `json:"remove"`
	// Own are the operator's rules in the Engine's chains. They are not among those to be removed.
	Own []string `json:"own"`
	// Bridges are the devices that the rules name.
	Bridges []string `json:"-"`
	// InUse: an Engine runs that makes such rules, so nothing is left over.
	InUse bool `json:"-"`
}

// Leftovers are all there are. What is in them is the Engine's beyond doubt: its chains, what jumps to
// them, and rules of its forms about its bridges. dropUser says that DOCKER-USER goes whatever is in it.
func (f *Facts) Leftovers(dropUser bool) []Leftover {
	var out []Leftover
	for _, tool := range iptablesTools {
		l := f.collect(tool, dropUser)
		x := Leftover{
			Tool: tool, Family: l.family, Chains: l.chains, Rules: l.rules, Remove: l.restore, Own: []string{},
			Bridges: l.bridges, InUse: f.iptablesOn(l.family),
		}
		for _, c := range l.kept {
			for _, r := range c.Rules {
				x.Own = append(x.Own, r.Text)
			}
		}
		if len(x.Remove) > 0 || len(x.Own) > 0 {
			out = append(out, x)
		}
	}
	for _, c := range f.Rules.Chains {
		if c.Tool != "nft" || c.Table != nftTable {
			continue
		}
		i := slices.IndexFunc(out, func(x Leftover) bool { return x.Tool == "nft" && x.Family == c.Family })
		if i < 0 {
			i = len(out)
			out = append(out, Leftover{
				Tool: "nft", Family: c.Family, Own: []string{}, InUse: f.iptablesOn(c.Family),
				Remove: []string{fmt.Sprintf("delete table %s %s", c.Family, nftTable)},
			})
		}
		out[i].Chains++
		out[i].Rules += len(c.Rules)
		for _, r := range c.Rules {
			out[i].Bridges = append(out[i].Bridges, devicesOf(r)...)
		}
	}
	return out
}

// devicesOf are the devices that a rule is about.
func devicesOf(r Rule) []string {
	var out []string
	add := func(m Match) {
		if m.Field == "iif" || m.Field == "oif" {
			out = append(out, m.Values...)
		}
	}
	for _, m := range r.Matches {
		add(m)
	}
	for _, k := range r.Map {
		add(k.Match)
	}
	return out
}

// Unserved are those of the bridges named, and of the Engine's, that have containers on them and no
// programs: without the Engine's rules nothing would guard them.
func (f *Facts) Unserved(named []string) []string {
	programs := make(map[string]map[int]bool)
	for _, p := range f.Pins {
		if programs[p.Program] == nil {
			programs[p.Program] = make(map[int]bool)
		}
		programs[p.Program][p.Ifindex] = true
	}
	var out []string
	for _, b := range f.Devices {
		if b.Kind != "bridge" || !dockerDevice(b.Name) && !slices.Contains(named, b.Name) {
			continue
		}
		ports, guarded := 0, programs["from_bridge"][b.Ifindex]
		for _, d := range f.Devices {
			if d.Master == b.Name {
				ports++
				guarded = guarded && programs["from_container"][d.Ifindex] && programs["to_container"][d.Ifindex]
			}
		}
		if ports > 0 && !guarded {
			out = append(out, b.Name)
		}
	}
	return out
}

// Stays says what a takeover leaves that is no rule of the Engine's, or not provably one: each with the
// reason.
func (f *Facts) Stays() []string {
	var out []string
	for _, c := range f.Rules.Chains {
		if c.Hook == "forward" && c.Policy == "drop" && c.Tool != "nft" && c.Table == "filter" {
			out = append(out, fmt.Sprintf("policy DROP of FORWARD (%s), which others set too: packets of containers do not pass there, and the host is no router", c.Tool))
		}
	}
	if slices.ContainsFunc(f.Rules.Chains, func(c *Chain) bool { return c.Table == "firewalld" && strings.HasSuffix(c.Name, "_docker") }) {
		out = append(out, "zone docker of firewalld, in its own configuration: "+both([]string{"firewall-cmd --permanent --delete-zone=docker", "firewall-cmd --reload"}))
	}
	return out
}

// Running are the Engines that make rules, as text for a person.
func (f *Facts) Running() []string {
	var out []string
	for _, e := range f.Engines {
		if on, _ := e.setting("iptables", true); on {
			out = append(out, fmt.Sprintf("dockerd (process %d)", e.PID))
		}
	}
	return out
}

// Handover is what becomes of Docker's networks when bpfnet's programs go.
type Handover struct {
	// Open are networks that nothing would guard, as "NAME (IPv4)".
	Open []string
	// V4 and V6 say that the Engine's rules guard networks of that family.
	V4, V6 bool
}

// Handover looks at every network of Docker's that is served and whose bridge is there. Where no Engine
// runs, one without containers needs no guard.
func (f *Facts) Handover() Handover {
	var h Handover
	if f.Snapshot == nil {
		return h
	}
	for _, n := range f.Snapshot.Networks {
		i := slices.IndexFunc(f.Devices, func(d netdev.Device) bool { return d.Kind == "bridge" && d.Name == n.Bridge })
		if n.Source != string(policy.SourceDocker) || i < 0 {
			continue
		}
		busy := slices.ContainsFunc(f.Devices, func(d netdev.Device) bool { return d.Master == n.Bridge })
		for _, family := range []string{"ip", "ip6"} {
			has := slices.ContainsFunc(n.Subnets, func(s string) bool {
				p, err := netip.ParsePrefix(s)
				return err == nil && p.Addr().Is4() == (family == "ip")
			})
			switch {
			case !has:
			case f.engineGuards(n.Bridge, family):
				h.V4, h.V6 = h.V4 || family == "ip", h.V6 || family == "ip6"
			case busy || len(f.Engines) > 0:
				h.Open = append(h.Open, fmt.Sprintf("%s (%s)", n.Name, map[string]string{"ip": "IPv4", "ip6": "IPv6"}[family]))
			}
		}
	}
	return h
}

// engineGuards reports whether rules of the Engine's stand for a bridge, and somebody keeps them.
func (f *Facts) engineGuards(bridge, family string) bool {
	if len(f.Engines) > 0 && !f.iptablesOn(family) {
		return false // left over: for what comes they do nothing
	}
	linked, named := false, false
	for _, c := range f.Rules.Chains {
		if c.Family != family {
			continue
		}
		if c.Tool == "nft" {
			// Chains of a bridge are named so: filter-forward-in__br0.
			if c.Table == nftTable && strings.HasSuffix(c.Name, "__"+bridge) {
				return true
			}
			continue
		}
		for _, r := range c.Rules {
			if c.Table != "filter" {
				continue
			}
			linked = linked || c.Name == "FORWARD" && dockerChain(r.Verdict.Target) && r.Verdict.Target != "DOCKER-USER"
			named = named || dockerChain(c.Name) && slices.Contains(devicesOf(r), bridge)
		}
	}
	return linked && named
}
