// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// nftSite is what the rules of mode nftables are made of, for one family.
type nftSite struct {
	family int
	bridge string
	subnet netip.Prefix
	server netip.Addr
	client netip.Addr
	ports  []int  // published, TCP and UDP, the same inside
	ip     string // nft's name of the family
}

// rules are those that Engine 29 has with its nftables backend and without userland proxy, for one bridge
// network with one container that publishes ports and one that does not. They mirror the structure, not
// the text, of moby's nftabler (daemon/libnetwork/drivers/bridge/internal/nftabler, and the tables in
// integration/network/bridge/nftablesdoc): one table a family; base chains that jump by verdict maps from
// the bridge's name; translation of what is addressed to the host, for prerouting and output; masquerade
// of what leaves the network, and of what the host or a container itself sends to a published port;
// established connections accepted before the rule for each port; what would reach a container's own
// address from elsewhere dropped before connection tracking sees it. A counter stands where one of the
// Engine's does.
func (s nftSite) rules() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("table %s bench {", s.ip)
	for _, m := range []string{"into", "out-of", "masq-into", "masq-out-of"} {
		line("map %s { type ifname : verdict; elements = { %q : jump %s-one } }", m, s.bridge, m)
	}
	line("chain into-one {")
	line("ct state established,related counter accept comment \"FORWARD\"")
	line("iifname %q counter accept comment \"FORWARD\"", s.bridge)
	for _, port := range s.ports {
		for _, proto := range []string{"tcp", "udp"} {
			line("%s daddr %s %s dport %d counter accept comment \"FORWARD\"", s.ip, s.server, proto, port)
		}
	}
	line("counter drop")
	line("}")
	line("chain out-of-one { ct state established,related counter accept comment \"FORWARD\"; counter accept comment \"FORWARD\"; }")
	line("chain masq-into-one {")
	line("fib saddr type local counter masquerade comment \"MASQUERADE\"")
	for _, port := range s.ports {
		for _, proto := range []string{"tcp", "udp"} {
			line("%s saddr %s %s daddr %s %s dport %d counter masquerade comment \"MASQUERADE\"", s.ip, s.server, s.ip, s.server, proto, port)
		}
	}
	line("}")
	line("chain masq-out-of-one { oifname != %q %s saddr %s counter masquerade comment \"MASQUERADE\"; }", s.bridge, s.ip, s.subnet)
	line("chain published {")
	for _, port := range s.ports {
		for _, proto := range []string{"tcp", "udp"} {
			to := netip.AddrPortFrom(s.server, uint16(port))
			line("%s dport %d counter dnat to %s comment \"DNAT\"", proto, port, to)
		}
	}
	line("}")
	line("chain forward { type filter hook forward priority filter; policy accept; oifname vmap @into; iifname vmap @out-of; }")
	line("chain prerouting { type nat hook prerouting priority dstnat; policy accept; fib daddr type local counter jump published; }")
	line("chain output { type nat hook output priority -100; policy accept; fib daddr type local counter jump published; }")
	line("chain postrouting { type nat hook postrouting priority srcnat; policy accept; iifname vmap @masq-out-of; oifname vmap @masq-into; }")
	line("chain raw { type filter hook prerouting priority raw; policy accept;")
	for _, container := range []netip.Addr{s.server, s.client} {
		line("%s daddr %s iifname != %q counter drop", s.ip, container, s.bridge)
	}
	line("}")
	line("}")
	return b.String()
}

// loadNFT loads the rules of both families into the site's host, whose Engine makes none.
func (s *site) loadNFT(t testing.TB) {
	t.Helper()
	for _, family := range []int{4, 6} {
		rules := nftSite{
			family: family, bridge: "docker0", ip: "ip", server: s.addrs[family], client: s.clientAddrs[family],
			ports: []int{loadPort, streamPort, streamPort + 1},
		}
		subnet := s.docker.MustRun(t, "network", "inspect", "bridge", "--format", `{{range .IPAM.Config}}{{.Subnet}} {{end}}`)
		for field := range strings.FieldsSeq(subnet) {
			if p, err := netip.ParsePrefix(field); err == nil && p.Addr().Is4() == (family == 4) {
				rules.subnet = p
			}
		}
		if family == 6 {
			rules.ip = "ip6"
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		nft := s.lab.HostCommand(ctx, "nft", "-f", "-")
		nft.Stdin = strings.NewReader(rules.rules())
		out, err := nft.CombinedOutput()
		cancel()
		if err != nil {
			t.Fatalf("nft: %v: %s", err, out)
		}
	}
}

// nft reads the counters of the rules of mode nftables, by their comments.
func (c counters) nft(ctx context.Context, p path) error {
	family := "ip"
	if p.family == 6 {
		family = "ip6"
	}
	out, err := p.lab.Host.Run(ctx, "nft", "-j", "list", "table", family, "bench")
	if err != nil {
		return err
	}
	var list struct {
		Nftables []struct {
			Rule *struct {
				Comment string
				Expr    []struct{ Counter *struct{ Packets uint64 } }
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return fmt.Errorf("nft -j list table: %w", err)
	}
	names := map[string]string{"FORWARD": ruleForward, "DNAT": ruleDNAT, "MASQUERADE": ruleMasq}
	for _, object := range list.Nftables {
		if object.Rule == nil || names[object.Rule.Comment] == "" {
			continue
		}
		for _, e := range object.Rule.Expr {
			if e.Counter != nil {
				c[names[object.Rule.Comment]] += e.Counter.Packets
			}
		}
	}
	return nil
}
