// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	ctr  = netip.MustParseAddr("172.17.0.2")
	host = netip.MustParseAddr("172.17.0.1")
)

func up(state string) Packet {
	return Packet{Family: 4, In: "docker0", Src: ctr, Dst: host, Proto: "tcp", State: state, ToHost: true}
}

// nft makes the JSON of an inet table with one chain "c" at the input hook, and more chains.
func nftDoc(policy string, rules ...string) string {
	out := []string{
		`{"metainfo":{"version":"1.0.6"}}`,
		`{"set":{"family":"inet","name":"lan","table":"t","elem":[{"prefix":{"addr":"10.0.0.0","len":8}},"192.168.1.1"]}}`,
		`{"set":{"family":"inet","name":"ctrs","table":"t","elem":[{"range":["172.16.0.0","172.31.255.255"]}]}}`,
		`{"chain":{"family":"inet","table":"t","name":"c","hook":"input","prio":0,"policy":"` + policy + `"}}`,
		`{"chain":{"family":"inet","table":"t","name":"sub"}}`,
		`{"rule":{"family":"inet","table":"t","chain":"sub","handle":90,"expr":[` + nftIIF("docker*") + `,{"drop":null}]}}`,
	}
	for i, r := range rules {
		out = append(out, fmt.Sprintf(`{"rule":{"family":"inet","table":"t","chain":"c","handle":%d,"expr":[%s]}}`, i+1, r))
	}
	return `{"nftables":[` + strings.Join(out, ",") + `]}`
}

func nftIIF(name string) string {
	return `{"match":{"op":"==","left":{"meta":{"key":"iifname"}},"right":"` + name + `"}}`
}

const (
	nftAccept      = `,{"accept":null}`
	nftDrop        = `,{"drop":null}`
	nftEstablished = `{"match":{"op":"in","left":{"ct":{"key":"state"}},"right":["established","related"]}}`
)

func nftAddr(op, field, right string) string {
	return `{"match":{"op":"` + op + `","left":{"payload":{"protocol":"ip","field":"` + field + `"}},"right":` + right + `}}`
}

func TestNFT(t *testing.T) {
	dport := `{"match":{"op":"==","left":{"payload":{"protocol":"tcp","field":"dport"}},"right":{"set":[22,{"range":[80,90]}]}}}`
	for _, tc := range []struct {
		name   string
		policy string
		rules  []string
		state  string
		drops  bool
	}{
		{"nothing", "accept", nil, "new", false},
		{"the policy", "drop", nil, "new", true},
		{"established passes", "drop", []string{nftEstablished + nftAccept}, "established", false},
		{"new does not", "drop", []string{nftEstablished + nftAccept}, "new", true},
		{"some port may", "drop", []string{dport + nftAccept}, "new", false},
		{"some port may not", "accept", []string{dport + nftDrop}, "new", false},
		{"the interface", "drop", []string{nftIIF("docker0") + nftAccept}, "new", false},
		{"another interface", "drop", []string{nftIIF("eth0") + nftAccept}, "new", true},
		{"interfaces by pattern", "accept", []string{nftIIF("dock*") + nftDrop}, "new", true},
		{"a set of interfaces", "accept", []string{`{"match":{"op":"==","left":{"meta":{"key":"iifname"}},"right":{"set":["br-*","docker0"]}}}` + nftDrop}, "new", true},
		{"not that interface", "accept", []string{`{"match":{"op":"!=","left":{"meta":{"key":"iifname"}},"right":"lo"}}` + nftDrop}, "new", true},
		{"a subnet", "accept", []string{nftAddr("==", "saddr", `{"prefix":{"addr":"172.17.0.0","len":16}}`) + nftDrop}, "new", true},
		{"another subnet", "accept", []string{nftAddr("==", "saddr", `{"prefix":{"addr":"10.0.0.0","len":8}}`) + nftDrop}, "new", false},
		{"a named set that has it", "accept", []string{nftAddr("==", "saddr", `"@ctrs"`) + nftDrop}, "new", true},
		{"a named set that has it not", "accept", []string{nftAddr("==", "saddr", `"@lan"`) + nftDrop}, "new", false},
		{"a set that is not listed", "accept", []string{nftAddr("==", "saddr", `"@gone"`) + nftDrop}, "new", false},
		{"IPv6 only", "accept", []string{`{"match":{"op":"==","left":{"meta":{"key":"nfproto"}},"right":"ipv6"}}` + nftDrop}, "new", false},
		{"a limit lets some through", "drop", []string{`{"limit":{"rate":5,"per":"second"}}` + nftAccept}, "new", false},
		{"reject", "accept", []string{`{"reject":{"type":"icmpx","expr":"port-unreachable"}}`}, "new", true},
		{"a jump", "accept", []string{`{"jump":{"target":"sub"}}`}, "new", true},
		{"a jump behind an accept", "accept", []string{nftEstablished + nftAccept, `{"jump":{"target":"sub"}}`}, "established", false},
		{"a map", "accept", []string{`{"vmap":{"key":{"ct":{"key":"state"}},"data":{"set":[["established",{"accept":null}],["new",{"jump":{"target":"sub"}}]]}}}`}, "new", true},
		{"a map's other way", "drop", []string{`{"vmap":{"key":{"ct":{"key":"state"}},"data":{"set":[["established",{"accept":null}],["new",{"drop":null}]]}}}`}, "established", false},
		{"a map that has it not", "drop", []string{`{"vmap":{"key":{"meta":{"key":"iifname"}},"data":{"set":[["eth0",{"accept":null}]]}}}`}, "new", true},
		{"a named map", "accept", []string{`{"vmap":{"key":{"meta":{"key":"iifname"}},"data":"@zones"}}`}, "new", false},
		{"addressed to the host", "accept", []string{`{"match":{"op":"==","left":{"fib":{"result":"type","flags":["daddr"]}},"right":"local"}}` + nftDrop}, "new", true},
		{"iptables' own match", "accept", []string{`{"xt":{"type":"match","name":"conntrack"}}` + nftDrop}, "new", false},
		{"counted and logged", "accept", []string{`{"counter":{"packets":0,"bytes":0}},{"log":{}}` + nftDrop}, "new", true},
		{"something of tomorrow", "accept", []string{`{"quantum":{}}` + nftDrop}, "new", false},
		{"another operator", "accept", []string{`{"match":{"op":"<","left":{"meta":{"key":"iifname"}},"right":"a"}}` + nftDrop}, "new", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			chains, err := ParseNFT([]byte(nftDoc(tc.policy, tc.rules...)), nil)
			require.NoError(t, err)
			rs := Ruleset{Chains: chains, Read: true}
			assert.Equal(t, tc.drops, len(rs.Drops("input", "", up(tc.state), ipFamilies...)) > 0)
			assert.Empty(t, rs.Drops("output", "", up(tc.state), ipFamilies...), "of another hook")
		})
	}
	_, err := ParseNFT([]byte("Error: no"), nil)
	require.ErrorContains(t, err, "read the output of nft")
}

// A drop is final; an accept only ends its own chain.
func TestChainsInOrder(t *testing.T) {
	rs := Ruleset{Chains: []*Chain{
		{Tool: "nft", Family: "inet", Table: "a", Name: "late", Hook: "input", Prio: 10, Policy: "drop"},
		{Tool: "nft", Family: "ip", Table: "b", Name: "early", Hook: "input", Prio: -10, Policy: "accept", Rules: []Rule{{Verdict: Verdict{Kind: "accept"}}}},
		{Tool: "nft", Family: "ip6", Table: "c", Name: "other", Hook: "input", Policy: "drop"},
	}}
	found := rs.Drops("input", "", up("new"), ipFamilies...)
	require.Len(t, found, 1)
	assert.Equal(t, "chain late of the nft table inet a (policy)", found[0].where())
	// Chains that jump in circles end.
	loop := &Chain{Tool: "nft", Family: "ip", Name: "x", Hook: "input", Policy: "accept", Rules: []Rule{{Verdict: Verdict{Kind: "jump", Target: "x"}}}}
	rs = Ruleset{Chains: []*Chain{loop}}
	assert.Empty(t, rs.Drops("input", "", up("new"), ipFamilies...))
}

func TestChainDevices(t *testing.T) {
	text := `table netdev fw {
	chain in {
		type filter hook ingress device "eth0" priority filter; policy accept;
	}
	chain out {
		type filter hook egress devices = { "eth0", "eth1" } priority 0; policy drop;
	}
}
table inet t {
	chain c {
		type filter hook input priority 0; policy accept;
	}
}
`
	assert.Equal(t, map[string][]string{"netdev fw in": {"eth0"}, "netdev fw out": {"eth0", "eth1"}}, chainDevices(text))
	doc := `{"nftables":[{"chain":{"family":"netdev","table":"fw","name":"out","hook":"egress","prio":0,"policy":"drop"}},
		{"chain":{"family":"netdev","table":"fw","name":"new","hook":"egress","prio":0,"policy":"drop","dev":["eth7"]}}]}`
	chains, err := ParseNFT([]byte(doc), []byte(text))
	require.NoError(t, err)
	rs := Ruleset{Chains: chains}
	assert.Len(t, rs.Drops("egress", "eth1", Packet{Family: 4}, linkFamilies...), 1)
	assert.Len(t, rs.Drops("egress", "eth7", Packet{Family: 4}, linkFamilies...), 1)
	assert.Empty(t, rs.Drops("egress", "eth2", Packet{Family: 4}, linkFamilies...))
}

func TestIPTables(t *testing.T) {
	save := func(rules ...string) string {
		return "# Generated\n*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [1:2]\n:ufw - [0:0]\n" + strings.Join(rules, "\n") + "\nCOMMIT\n"
	}
	for _, tc := range []struct {
		name  string
		rules []string
		state string
		drops bool
	}{
		{"nothing", nil, "new", false},
		{"all", []string{"-A INPUT -j DROP"}, "new", true},
		{"state", []string{"-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A INPUT -j DROP"}, "established", false},
		{"state of a new one", []string{"-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A INPUT -j DROP"}, "new", true},
		{"not from there", []string{"-A INPUT ! -i eth0 -j DROP"}, "new", true},
		{"from there", []string{"-A INPUT -i docker+ -j DROP"}, "new", true},
		{"a subnet", []string{"-A INPUT -s 172.17.0.0/16 -j REJECT --reject-with icmp-port-unreachable"}, "new", true},
		{"a port", []string{"-A INPUT -p tcp -m tcp --dport 22 -j DROP"}, "new", false},
		{"a comment with what looks like options", []string{`-A INPUT -m comment --comment "say \"-i lo\" it's" -j DROP`}, "new", true},
		{"a match of several words", []string{`-A INPUT -m limit --limit 5/min ! --limit-burst 7 -j DROP`}, "new", false},
		{"a chain", []string{"-A INPUT -j ufw", "-A ufw -i docker0 -j DROP"}, "new", true},
		{"a chain that returns", []string{"-A INPUT -j ufw", "-A ufw -i docker0 -j RETURN", "-A ufw -j DROP"}, "new", false},
		{"a goto does not come back", []string{"-A INPUT -g ufw", "-A INPUT -j DROP", "-A ufw -i eth0 -j DROP"}, "new", false},
		{"a log", []string{"-A INPUT -j LOG --log-prefix x", "-A INPUT -j DROP"}, "new", true},
		{"another's decision", []string{"-A INPUT -j NFQUEUE --queue-num 1", "-A INPUT -j DROP"}, "new", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rs := Ruleset{Chains: ParseIPTables("iptables", "ip", save(tc.rules...)), Read: true}
			found := rs.Drops("input", "", up(tc.state), ipFamilies...)
			require.Equal(t, tc.drops, len(found) > 0)
			if tc.drops {
				assert.Contains(t, found[0].where(), " of iptables")
			}
		})
	}
	rs := Ruleset{Chains: ParseIPTables("iptables", "ip", save())}
	found := rs.Drops("forward", "", Packet{Family: 4}, ipFamilies...)
	require.Len(t, found, 1)
	assert.Equal(t, "chain FORWARD of iptables (policy)", found[0].where())
}

// Whatever a tool prints, reading it ends without a crash.
func FuzzRules(f *testing.F) {
	f.Add(nftDoc("drop", nftEstablished+nftAccept), "*filter\n:INPUT DROP [0:0]\n-A INPUT ! -i lo -m x --y \"a\\\"b\" -j DROP\nCOMMIT\n")
	f.Add(`{"nftables":[{"rule":{"expr":[{"vmap":{"key":3,"data":{"set":[[],[1,2]]}}}]}}]}`, "-A\n*\n:\n-A INPUT -j\n:INPUT x\n")
	f.Fuzz(func(t *testing.T, nft, ipt string) {
		rs := Ruleset{Chains: ParseIPTables("iptables", "ip", ipt), Read: true}
		if chains, err := ParseNFT([]byte(nft), []byte(ipt)); err == nil {
			rs.Chains = append(rs.Chains, chains...)
		}
		for _, hook := range []string{"input", "output", "forward", "prerouting"} {
			for _, c := range rs.Drops(hook, "", up("new"), ipFamilies...) {
				if c.Chain == nil || c.At == nil {
					t.Fatal("a drop by nothing")
				}
			}
		}
		ParseSockets("tcp", ipt)
		judged := Judge(&Facts{Rules: rs})
		if len(judged) == 0 {
			t.Fatal("no checks")
		}
	})
}
