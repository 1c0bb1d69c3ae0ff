// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
)

// Engine is a Docker Engine that runs in the host's namespace.
type Engine struct {
	PID        int
	Args       []string // its command line
	ConfigPath string
	Config     []byte // of that file; nil: there is none
}

// setting is an option's value: of the command line, else of the file, else the default. byFlag says
// that it stands on the command line, where the file may not say it too.
func (e Engine) setting(name string, def bool) (on, byFlag bool) {
	for i := len(e.Args) - 1; i > 0; i-- {
		switch arg := strings.TrimLeft(e.Args[i], "-"); {
		case !strings.HasPrefix(e.Args[i], "--"):
		case arg == name:
			return true, true
		case strings.HasPrefix(arg, name+"="):
			on, err := strconv.ParseBool(strings.TrimPrefix(arg, name+"="))
			return on || err != nil, true
		}
	}
	if v, ok := e.file()[name].(bool); ok {
		return v, false
	}
	return def, false
}

func (e Engine) file() map[string]any {
	var m map[string]any
	if json.Unmarshal(e.Config, &m) != nil || m == nil {
		return map[string]any{}
	}
	return m
}

// wanted are the settings that leave the data path to bpfnet.
var wanted = []string{"iptables", "ip6tables"}

// mend is the command that gives the Engine new settings. The file is written as a whole: it is JSON,
// and no tool to edit that can be counted on.
func (e Engine) mend(options ...string) string {
	for _, o := range options {
		if _, byFlag := e.setting(o, true); byFlag {
			// dockerd refuses an option that both say.
			args := slices.DeleteFunc(slices.Clone(e.Args), func(a string) bool {
				name, _, _ := strings.Cut(strings.TrimLeft(a, "-"), "=")
				return strings.HasPrefix(a, "--") && slices.Contains(options, name)
			})
			for _, o := range options {
				args = append(args, "--"+o+"=false")
			}
			pid := fmt.Sprint(e.PID)
			return both([]string{commandLine("kill", pid), commandLine("tail", "--pid="+pid, "-f", "/dev/null"), commandLine(args...)})
		}
	}
	m := e.file()
	for _, o := range options {
		m[o] = false
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return ""
	}
	return both([]string{"echo " + Quote(string(raw)) + " >" + Quote(e.ConfigPath), "systemctl restart docker"})
}

func checkEngine(f *Facts) []Finding {
	var out []Finding
	for _, e := range f.Engines {
		if len(e.Config) > 0 && !json.Valid(e.Config) {
			out = append(out, notef("", "%s of dockerd (process %d) is no JSON", e.ConfigPath, e.PID))
			continue
		}
		if on, _ := e.setting("iptables", true); on {
			out = append(out, notef(e.mend(wanted...), "dockerd (process %d) runs with iptables on: its rules cost time and conntrack entries, and do nothing for packets that bpfnet takes first", e.PID))
		}
	}
	if len(f.Engines) == 0 {
		return []Finding{okf("no Docker Engine runs here")}
	}
	return one(out, "dockerd leaves the rules to bpfnet")
}

func checkProxies(f *Facts) []Finding {
	if len(f.Proxies) == 0 {
		return []Finding{okf("none runs")}
	}
	fix := ""
	for _, e := range f.Engines {
		if on, _ := e.setting("userland-proxy", true); on {
			fix = e.mend("userland-proxy")
		}
	}
	return []Finding{notef(fix, "processes: %d; only remote IPv6 clients of containers with IPv4 alone need them, and each holds some megabytes", len(f.Proxies))}
}

// iptablesOn reports whether an Engine writes rules of that family at this moment.
func (f *Facts) iptablesOn(family string) bool {
	for _, e := range f.Engines {
		option := "iptables"
		if family == "ip6" {
			option = "ip6tables"
		}
		on, _ := e.setting(option, true)
		both, _ := e.setting("iptables", true)
		if on && both {
			return true
		}
	}
	return false
}

// dockerChain knows the Engine's chains, of all its versions, by their names. Anybody may call a chain
// DOCKER-something.
func dockerChain(name string) bool {
	switch name {
	case "DOCKER", "DOCKER-USER", "DOCKER-FORWARD", "DOCKER-CT", "DOCKER-BRIDGE", "DOCKER-INTERNAL", "DOCKER-INGRESS",
		"DOCKER-ISOLATION", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2":
		return true
	}
	return false
}

// leftovers are the rules of an Engine that ran with iptables on, of one tool.
type leftovers struct {
	tool, family string
	restore      []string // what iptables-restore is to be given
	chains       int
	rules        int
	kept         []*Chain         // with rules of the user's own
	bridges      []string         // that the rules name
	ports        map[string]int64 // published ports that are still translated: "tcp 8080"
}

// collect goes through the chains of one tool. dropUser: DOCKER-USER goes too, whatever is in it.
func (f *Facts) collect(tool string, dropUser bool) leftovers {
	l := leftovers{tool: tool, ports: make(map[string]int64)}
	tables := make(map[string][]*Chain)
	var order []string
	swarm := len(f.Engines) > 0 // its ingress rules are made whatever the settings say
	for _, c := range f.Rules.Chains {
		if c.Tool != tool {
			continue
		}
		l.family = c.Family
		if len(tables[c.Table]) == 0 {
			order = append(order, c.Table)
		}
		tables[c.Table] = append(tables[c.Table], c)
	}
	ours := func(c *Chain) bool {
		return dockerChain(c.Name) && !(swarm && c.Name == "DOCKER-INGRESS") && (dropUser || !ownRules(c))
	}
	any := false
	for _, t := range order {
		any = any || slices.ContainsFunc(tables[t], ours)
	}
	if !any {
		return l
	}
	for _, t := range order {
		gone := make(map[string]bool)
		for _, c := range tables[t] {
			if ours(c) {
				gone[c.Name] = true
				l.chains++
			} else if dockerChain(c.Name) && ownRules(c) {
				l.kept = append(l.kept, c)
			}
		}
		var lines []string
		for _, c := range tables[t] {
			for _, r := range c.Rules {
				if gone[c.Name] {
					l.rules++
					l.port(r)
					l.bridge(r)
					continue
				}
				if gone[r.Verdict.Target] || c.Hook != "" && f.dockerRule(t, c.Name, r) {
					l.rules++
					l.bridge(r)
					lines = append(lines, "-D"+strings.TrimPrefix(r.Text, "-A"))
				}
			}
		}
		// A chain must be empty and unused when it goes.
		for _, c := range tables[t] {
			if gone[c.Name] {
				lines = append(lines, "-F "+c.Name)
			}
		}
		for _, c := range tables[t] {
			if gone[c.Name] {
				lines = append(lines, "-X "+c.Name)
			}
		}
		if len(lines) > 0 {
			l.restore = append(append(append(l.restore, "*"+t), lines...), "COMMIT")
		}
	}
	return l
}

// bridge remembers which of the Engine's devices a rule names.
func (l *leftovers) bridge(r Rule) {
	for _, m := range r.Matches {
		if m.Field != "iif" && m.Field != "oif" {
			continue
		}
		for _, v := range m.Values {
			if !slices.Contains(l.bridges, v) {
				l.bridges = append(l.bridges, v)
			}
		}
	}
}

// port remembers which port a rule translates.
func (l *leftovers) port(r Rule) {
	w := shellWords(r.Text)
	var proto, port string
	dnat := false
	for i, x := range w[:max(len(w)-1, 0)] {
		switch x {
		case "-p":
			proto = w[i+1]
		case "--dport":
			port = w[i+1]
		case "-j":
			dnat = w[i+1] == "DNAT"
		}
	}
	if n, err := strconv.ParseUint(port, 10, 16); dnat && err == nil {
		l.ports[proto+" "+port] = int64(n)
	}
}

// ownRules reports whether DOCKER-USER has rules that the user made.
func ownRules(c *Chain) bool {
	return c.Name == "DOCKER-USER" && slices.ContainsFunc(c.Rules, func(r Rule) bool { return r.Text != "-A DOCKER-USER -j RETURN" })
}

// dockerRule knows the rules that the Engine puts into the kernel's own chains, beside the jumps: all are
// about one of its bridges or subnets, and match by nothing else. One that says more is somebody else's.
func (f *Facts) dockerRule(table, chain string, r Rule) bool {
	match := make(map[string]Match)
	others := 0 // that are not understood, such as ports
	for _, m := range r.Matches {
		if _, twice := match[m.Field]; twice && m.Field != "" {
			return false
		}
		if m.Field == "" {
			others++
			continue
		}
		match[m.Field] = m
	}
	only := func(fields ...string) bool {
		for field := range match {
			if !slices.Contains(fields, field) {
				return false
			}
		}
		return len(match) == len(fields)
	}
	theirs := func(m Match) bool {
		if len(m.Values) != 1 {
			return false
		}
		n := f.network(m.Values[0])
		return dockerDevice(m.Values[0]) || n != nil && n.Source == string(policy.SourceDocker)
	}
	in, out, src, dst := match["iif"], match["oif"], match["saddr"], match["daddr"]
	w := shellWords(r.Text)
	target := ""
	if i := slices.Index(w, "-j"); i >= 0 && i+1 < len(w) {
		target = w[i+1]
	}
	switch table + " " + chain {
	case "filter FORWARD":
		switch {
		case others > 0:
		case only("oif", "state"):
			return target == "ACCEPT" && slices.Contains(match["state"].Values, "ESTABLISHED") && theirs(out) && !out.Not
		case only("iif", "oif"):
			return (target == "ACCEPT" || target == "DROP") && theirs(in) && !in.Not && slices.Equal(in.Values, out.Values)
		}
	case "nat POSTROUTING":
		switch {
		case target != "MASQUERADE" && target != "SNAT":
		case others == 0 && only("saddr", "oif"): // -s SUBNET ! -o BRIDGE
			return theirs(out) && out.Not && !src.Not && f.hasSubnet(out.Values[0], src.Values)
		case others == 0 && only("srctype", "oif"): // the host's own, without docker-proxy
			return theirs(out) && !out.Not && slices.Equal(match["srctype"].Values, []string{"LOCAL"}) && !match["srctype"].Not
		case others == 1 && only("saddr", "daddr", "proto"): // a container that dials its own published port
			return !src.Not && !dst.Not && slices.Equal(src.Values, dst.Values) && f.isContainer(src.Values)
		}
	case "raw PREROUTING":
		return target == "DROP" && others == 0 && only("iif", "daddr") && theirs(in) && in.Not && !dst.Not
	}
	return false
}

// hasSubnet reports whether the prefix is one of the bridge's network. Of a network that is not known any
// more, only the name of its bridge can tell.
func (f *Facts) hasSubnet(bridge string, prefix []string) bool {
	n := f.network(bridge)
	if n == nil {
		return true
	}
	return len(prefix) == 1 && slices.ContainsFunc(n.Subnets, func(s string) bool {
		a, err := netip.ParsePrefix(s)
		b, berr := netip.ParsePrefix(prefix[0])
		return err == nil && berr == nil && a.Masked() == b.Masked()
	})
}

// isContainer reports whether the value is one address, and in a network of the Engine's.
func (f *Facts) isContainer(value []string) bool {
	if len(value) != 1 || f.Snapshot == nil {
		return false
	}
	p, err := netip.ParsePrefix(value[0])
	if err != nil {
		a, err := netip.ParseAddr(value[0])
		if err != nil {
			return false
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	return p.IsSingleIP() && slices.ContainsFunc(f.Snapshot.Networks, func(n api.Network) bool {
		return n.Source == string(policy.SourceDocker) && slices.ContainsFunc(n.Subnets, func(s string) bool {
			subnet, err := netip.ParsePrefix(s)
			return err == nil && subnet.Contains(p.Addr())
		})
	})
}

func checkLeftovers(f *Facts) []Finding {
	if !f.Rules.Read {
		return []Finding{unknownf("%s", f.Rules.Why)}
	}
	var out []Finding
	inUse := false
	for _, tool := range iptablesTools {
		l := f.collect(tool, false)
		if len(l.restore) == 0 {
			continue
		}
		if f.iptablesOn(l.family) {
			inUse = true
			continue
		}
		words := make([]string, 0, len(l.restore))
		for _, line := range l.restore {
			words = append(words, Quote(line))
		}
		fix := fmt.Sprintf(`printf '%%s\n' %s | %s-restore --noflush`, strings.Join(words, " "), tool)
		text := fmt.Sprintf("rules (%d) and chains (%d) of an Engine that ran with iptables before (%s)", l.rules, l.chains, tool)
		if len(l.kept) > 0 {
			text += "; DOCKER-USER has rules of your own, which no packet of a container meets, and stays"
		} else if f.Daemon.Running {
			fix = f.ours("takeover")
		}
		if stolen := f.stolen(l); len(stolen) > 0 {
			out = append(out, brokenf(fix, "%s: they take %s from the program of the host that listens there", text, some(stolen)))
			continue
		}
		out = append(out, notef(fix, "%s: they take no packet from bpfnet, but cost each of the host's own", text))
	}
	for _, c := range f.Rules.Chains {
		fix := commandLine("nft", "delete", "table", c.Family, c.Table)
		if f.Daemon.Running {
			fix = f.ours("takeover")
		}
		if c.Tool != "nft" || c.Table != "docker-bridges" || slices.ContainsFunc(out, func(x Finding) bool { return x.Fix == fix }) {
			continue
		}
		if f.iptablesOn(c.Family) {
			inUse = true
			continue
		}
		out = append(out, notef(fix, "the nft table %s %s of an Engine that made rules before", c.Family, c.Table))
	}
	if inUse && len(out) == 0 {
		return []Finding{okf("the rules that are there are the running Engine's")}
	}
	return one(out, "none")
}

// stolen are the ports that the rules translate though nobody publishes them any more, where a program
// of the host listens.
func (f *Facts) stolen(l leftovers) []string {
	var out []string
	for key, number := range l.ports {
		proto, _, _ := strings.Cut(key, " ")
		published := f.Snapshot != nil && slices.ContainsFunc(f.Snapshot.Ports, func(p api.Port) bool {
			return p.Proto == proto && strings.HasSuffix(p.Host, ":"+strconv.FormatInt(number, 10))
		})
		listens := slices.ContainsFunc(f.Sockets, func(s Socket) bool {
			return s.Proto.String() == proto && int64(s.Addr.Port()) == number && !s.Addr.Addr().IsLoopback() && !engineProcess(s.Process.Name)
		})
		if !published && listens {
			out = append(out, fmt.Sprintf("%d/%s", number, proto))
		}
	}
	slices.Sort(out)
	return out
}

// engineProcess reports whether a process holds ports for published ones.
func engineProcess(name string) bool {
	return name == "dockerd" || name == "docker-proxy" || strings.HasPrefix(name, "bpfnet")
}
