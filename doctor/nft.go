// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// ParseNFT reads what "nft -j list ruleset" prints (libnftables-json(5)), and the devices of chains
// from what "nft list chains" does: nft before 1.0.9 leaves them out of the former.
func ParseNFT(ruleset, chains []byte) ([]*Chain, error) {
	var doc struct {
		Nftables []struct {
			Chain *struct {
				Family, Table, Name, Hook, Policy string
				Prio                              int
				Dev                               json.RawMessage
			}
			Rule *struct {
				Family, Table, Chain string
				Handle               int
				Expr                 []map[string]json.RawMessage
			}
			Set *struct {
				Family, Table, Name string
				Elem                json.RawMessage
			}
			Map *struct{}
		}
	}
	if err := json.Unmarshal(ruleset, &doc); err != nil {
		return nil, fmt.Errorf("read the output of nft: %w", err)
	}
	devices := chainDevices(string(chains))
	sets := make(map[string][]string)
	byName := make(map[string]*Chain)
	var out []*Chain
	for _, o := range doc.Nftables {
		switch {
		case o.Set != nil:
			var elems []string
			for _, e := range list(o.Set.Elem) {
				elems = append(elems, scalar(e))
			}
			sets[o.Set.Family+" "+o.Set.Table+" @"+o.Set.Name] = elems
		case o.Chain != nil:
			k := o.Chain
			c := &Chain{Tool: "nft", Family: k.Family, Table: k.Table, Name: k.Name, Hook: k.Hook, Prio: k.Prio, Policy: k.Policy}
			for _, d := range list(k.Dev) {
				c.Devices = append(c.Devices, scalar(d))
			}
			key := k.Family + " " + k.Table + " " + k.Name
			if len(c.Devices) == 0 {
				c.Devices = devices[key]
			}
			byName[key] = c
			out = append(out, c)
		}
	}
	for _, o := range doc.Nftables {
		if o.Rule == nil {
			continue
		}
		c := byName[o.Rule.Family+" "+o.Rule.Table+" "+o.Rule.Chain]
		if c == nil {
			continue
		}
		scope := o.Rule.Family + " " + o.Rule.Table + " "
		r := Rule{Handle: o.Rule.Handle}
		for _, e := range o.Rule.Expr {
			r.add(e, func(name string) ([]string, bool) { v, ok := sets[scope+name]; return v, ok })
		}
		c.Rules = append(c.Rules, r)
	}
	return out, nil
}

// add takes one statement of a rule.
func (r *Rule) add(e map[string]json.RawMessage, set func(string) ([]string, bool)) {
	for key, raw := range e {
		switch key {
		case "match":
			r.Matches = append(r.Matches, nftMatch(raw, set)...)
		case "vmap":
			r.addMap(raw)
		case "counter", "log", "comment", "ct helper", "ct timeout", "mangle", "notrack", "flow", "secmark", "dup", "last":
		case "accept", "drop", "jump", "goto", "return", "reject", "queue", "dnat", "snat", "masquerade", "redirect", "tproxy", "synproxy", "fwd", "continue":
			if r.Verdict.Kind == "" {
				r.Verdict = nftVerdict(key, raw)
			}
		case "xt":
			var x struct{ Type string }
			_ = json.Unmarshal(raw, &x)
			if x.Type != "target" {
				r.Matches = append(r.Matches, Match{}) // iptables' own; see iptables-save
			} else if r.Verdict.Kind == "" {
				r.Verdict = Verdict{Kind: "maybe"}
			}
		default: // limit, quota, meter and whatever comes
			r.Matches = append(r.Matches, Match{})
		}
	}
}

func nftVerdict(key string, raw json.RawMessage) Verdict {
	switch key {
	case "accept", "drop", "return":
		return Verdict{Kind: key}
	case "reject", "synproxy":
		return Verdict{Kind: "drop"}
	case "dnat", "snat", "masquerade", "redirect", "tproxy":
		return Verdict{Kind: "accept"}
	case "jump", "goto":
		var j struct{ Target string }
		_ = json.Unmarshal(raw, &j)
		return Verdict{Kind: key, Target: j.Target}
	case "continue":
		return Verdict{}
	}
	return Verdict{Kind: "maybe"}
}

func nftMatch(raw json.RawMessage, set func(string) ([]string, bool)) []Match {
	var m struct {
		Op          string
		Left, Right json.RawMessage
	}
	if json.Unmarshal(raw, &m) != nil || !slices.Contains([]string{"==", "!=", "in"}, m.Op) {
		return []Match{{}}
	}
	field, also := nftField(m.Left)
	var values []string
	for _, v := range list(m.Right) {
		values = append(values, scalar(v))
	}
	if len(values) == 1 && strings.HasPrefix(values[0], "@") {
		elems, ok := set(values[0])
		if !ok {
			field = ""
		}
		values = elems
	}
	if slices.Contains(values, "") && field != "" {
		field = "" // something that scalar does not know
	}
	return append(also, Match{Field: field, Not: m.Op == "!=", Values: values})
}

// nftField names what a match looks at, and what else it asks of the packet by that.
func nftField(raw json.RawMessage) (field string, also []Match) {
	var left struct {
		Meta    *struct{ Key string }
		Ct      *struct{ Key string }
		Payload *struct{ Protocol, Field string }
		Fib     *struct {
			Result string
			Flags  json.RawMessage
		}
	}
	if json.Unmarshal(raw, &left) != nil {
		return "", nil
	}
	switch {
	case left.Meta != nil:
		return map[string]string{
			"iifname": "iif", "iif": "iif", "oifname": "oif", "oif": "oif", "nfproto": "family", "l4proto": "proto",
			"mark": "mark", "pkttype": "pkttype", "protocol": "ethertype",
		}[left.Meta.Key], nil
	case left.Ct != nil && left.Ct.Key == "state":
		return "state", nil
	case left.Fib != nil && left.Fib.Result == "type":
		for _, f := range list(left.Fib.Flags) {
			switch scalar(f) {
			case "daddr":
				return "dsttype", nil
			case "saddr":
				return "srctype", nil
			}
		}
	case left.Payload != nil:
		p := left.Payload
		switch p.Protocol {
		case "ip":
			also = []Match{{Field: "family", Values: []string{"4"}}}
			field = map[string]string{"saddr": "saddr", "daddr": "daddr", "protocol": "proto"}[p.Field]
		case "ip6":
			also = []Match{{Field: "family", Values: []string{"6"}}}
			field = map[string]string{"saddr": "saddr", "daddr": "daddr", "nexthdr": "proto"}[p.Field]
		case "arp":
			also = []Match{{Field: "family", Values: []string{"0"}}}
		case "ether":
			field = map[string]string{"type": "ethertype"}[p.Field]
		case "tcp", "udp", "sctp", "icmp", "dccp", "udplite":
			also = []Match{{Field: "proto", Values: []string{p.Protocol}}}
		case "icmpv6":
			also = []Match{{Field: "proto", Values: []string{"icmpv6", "ipv6-icmp"}}}
		}
		return field, also
	}
	return "", nil
}

// addMap takes a verdict map.
func (r *Rule) addMap(raw json.RawMessage) {
	var v struct {
		Key  json.RawMessage
		Data struct{ Set []json.RawMessage }
	}
	if json.Unmarshal(raw, &v) != nil || len(v.Data.Set) == 0 {
		r.Matches = append(r.Matches, Match{})
		r.Verdict = Verdict{Kind: "maybe"} // a named map
		return
	}
	field, also := nftField(v.Key)
	r.Matches = append(r.Matches, also...)
	for _, pair := range v.Data.Set {
		var kv []json.RawMessage
		var verdict map[string]json.RawMessage
		if json.Unmarshal(pair, &kv) != nil || len(kv) != 2 || json.Unmarshal(kv[1], &verdict) != nil {
			r.Map = append(r.Map, Case{Verdict: Verdict{Kind: "maybe"}})
			continue
		}
		for key, arg := range verdict {
			r.Map = append(r.Map, Case{Match{Field: field, Values: []string{scalar(kv[0])}}, nftVerdict(key, arg)})
		}
	}
}

// list makes a list of what may be one value, a list, or a set.
func list(raw json.RawMessage) []json.RawMessage {
	if len(raw) == 0 || string(raw) == "null" {
		return nil
	}
	var l []json.RawMessage
	if json.Unmarshal(raw, &l) == nil {
		return l
	}
	var s struct{ Set []json.RawMessage }
	if json.Unmarshal(raw, &s) == nil && s.Set != nil {
		return s.Set
	}
	return []json.RawMessage{raw}
}

var nfproto = map[string]string{"ipv4": "4", "ipv6": "6"}

// scalar writes a value: a name, a number, a prefix (10.0.0.0/8), a range (1.2.3.4-1.2.3.9). Empty: it is
// none of these.
func scalar(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		if n, ok := nfproto[s]; ok {
			return n
		}
		return s
	}
	var n int64
	if json.Unmarshal(raw, &n) == nil {
		return strconv.FormatInt(n, 10)
	}
	var o struct {
		Prefix *struct {
			Addr string
			Len  int
		}
		Range []json.RawMessage
		Elem  *struct{ Val json.RawMessage }
	}
	if json.Unmarshal(raw, &o) != nil {
		return ""
	}
	switch {
	case o.Prefix != nil:
		return fmt.Sprintf("%s/%d", o.Prefix.Addr, o.Prefix.Len)
	case len(o.Range) == 2:
		return scalar(o.Range[0]) + "-" + scalar(o.Range[1])
	case o.Elem != nil:
		return scalar(o.Elem.Val)
	}
	return ""
}

var (
	tableLine  = regexp.MustCompile(`^table (\S+) (\S+) \{`)
	chainLine  = regexp.MustCompile(`^\s+chain (\S+) \{`)
	deviceLine = regexp.MustCompile(`hook (?:ingress|egress) (?:device "([^"]+)"|devices = \{([^}]*)\})`)
)

// chainDevices reads "nft list chains", by family, table and name.
func chainDevices(text string) map[string][]string {
	out := make(map[string][]string)
	var table, chain string
	for line := range strings.Lines(text) {
		if m := tableLine.FindStringSubmatch(line); m != nil {
			table = m[1] + " " + m[2]
		} else if m := chainLine.FindStringSubmatch(line); m != nil {
			chain = table + " " + m[1]
		} else if m := deviceLine.FindStringSubmatch(line); m != nil {
			if m[1] != "" {
				out[chain] = []string{m[1]}
			}
			out[chain] = append(out[chain], strings.FieldsFunc(m[2], func(r rune) bool { return strings.ContainsRune(", \t\"", r) })...)
		}
	}
	return out
}
