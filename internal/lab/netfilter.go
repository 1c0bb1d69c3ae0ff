// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// ruleset is what a hardened host has (connection tracking through the first rule of
// each filter hook, as ufw does), and a counter at every hook. The counters leave out
// what belongs to the neighbourhood, not to flows: ARP, neighbour and router discovery,
// multicast group membership. They stand before every rule that could drop.
const ruleset = `
table inet lab {
	counter prerouting {}
	counter input {}
	counter forward {}
	counter output {}
	counter postrouting {}
	counter ct_new_input {}
	counter ct_new_forward {}
	counter ct_new_output {}

	chain background {
		icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect, mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } accept
		ip protocol igmp accept
	}
	chain prerouting {
		type filter hook prerouting priority -300
		jump background
		counter name prerouting
	}
	chain input {
		type filter hook input priority -300
		jump background
		counter name input
		ct state new counter name ct_new_input
	}
	chain forward {
		type filter hook forward priority -300
		jump background
		counter name forward
		ct state new counter name ct_new_forward
	}
	chain output {
		type filter hook output priority -150
		jump background
		counter name output
		ct state new counter name ct_new_output
	}
	chain postrouting {
		type filter hook postrouting priority -300
		jump background
		counter name postrouting
	}
}
table bridge lab {
	counter bridge_prerouting {}
	counter bridge_forward {}

	chain background {
		ether type arp accept
		icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect, mld-listener-query, mld-listener-report, mld-listener-done, mld2-listener-report } accept
		ip protocol igmp accept
	}
	chain prerouting {
		type filter hook prerouting priority -300
		jump background
		counter name bridge_prerouting
	}
	chain forward {
		type filter hook forward priority -300
		jump background
		counter name bridge_forward
	}
}
`

func (l *Lab) makeNetfilter(t testing.TB) {
	t.Helper()
	l.Host.MustRun(t, "iptables", "-P", "FORWARD", "DROP")
	l.Host.MustRun(t, "ip6tables", "-P", "FORWARD", "DROP")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	nft := l.Host.Command(ctx, "nft", "-f", "-")
	nft.Stdin = strings.NewReader(ruleset)
	if _, err := run(nft); err != nil {
		t.Fatalf("load the lab's ruleset: %v", err)
	}
}

// NFTCounters reads how many packets have passed each netfilter hook of the host since
// the lab was made, without ARP, neighbour discovery and group membership: prerouting,
// input, forward, output, postrouting, bridge_prerouting, bridge_forward; and
// ct_new_input, ct_new_forward, ct_new_output for those that began a tracked flow.
func (l *Lab) NFTCounters(t testing.TB) map[string]uint64 {
	t.Helper()
	var list struct {
		Nftables []struct {
			Counter *struct {
				Table, Name string
				Packets     uint64
			}
		}
	}
	if err := json.Unmarshal([]byte(l.Host.MustRun(t, "nft", "-j", "list", "counters")), &list); err != nil {
		t.Fatalf("nft -j list counters: %v", err)
	}
	counters := map[string]uint64{}
	for _, object := range list.Nftables {
		if c := object.Counter; c != nil && c.Table == "lab" {
			counters[c.Name] = c.Packets
		}
	}
	return counters
}

// NFTDelta returns by how much the counters have grown since before was read. Counters
// that stand still are left out, so that an empty map says: nothing strayed.
func (l *Lab) NFTDelta(t testing.TB, before map[string]uint64) map[string]uint64 {
	t.Helper()
	delta := map[string]uint64{}
	for name, packets := range l.NFTCounters(t) {
		if packets != before[name] {
			delta[name] = packets - before[name]
		}
	}
	return delta
}

// Conntrack lists the connection tracking entries of the host, IPv4 before IPv6, one
// line of "conntrack -L" each.
func (l *Lab) Conntrack(t testing.TB) []string {
	t.Helper()
	var entries []string
	for _, family := range []string{"ipv4", "ipv6"} {
		for line := range strings.Lines(l.Host.MustRun(t, "conntrack", "-L", "-f", family)) {
			entries = append(entries, strings.TrimSpace(line))
		}
	}
	return entries
}
