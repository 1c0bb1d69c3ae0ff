// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bpf"
)

var update = flag.Bool("update", false, "write the generated documents instead of comparing with them")

const root = "../.."

// generated compares a document with what it should be, or writes it.
func generated(t *testing.T, name, want string) {
	t.Helper()
	path := filepath.Join(root, "docs/generated", name)
	if *update {
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(want), 0o644))
		return
	}
	have, err := os.ReadFile(path)
	require.NoError(t, err, "write it: go test ./internal/doctest -update")
	assert.Equal(t, want, string(have), "%s is stale: go test ./internal/doctest -update", path)
}

// advice is what to do about a drop reason. The meanings stand in bpf/lib/types.h.
var advice = map[string]string{
	"not_ready":          "Normal for some milliseconds while a container starts (at the hook `strict` its sender sees EPERM). If it lasts: `bpfnet status` says under NOT READY what the endpoint waits for.",
	"port_not_ready":     "Normal while a container with a published port starts: the client's next try gets through. If it lasts, see whether the container is READY and on which network it publishes.",
	"spoofed_address":    "The container sends from an address that Docker did not give it. Give it the label `bpfnet.allowed_addresses` (addresses or prefixes, separated by commas) if it may.",
	"spoofed_mac":        "The container sends from a MAC address that Docker did not give it: a bridge or virtual machine inside it. Use a macvlan network for that.",
	"loopback_address":   "Somebody sends to or from 127.0.0.0/8, ::1 or 0.0.0.0/8 across an interface: a misconfiguration or an attack.",
	"isolated":           "Two networks that may not talk. Put the container on both (`docker network connect`), or let them: `bpfnet network allow A B`.",
	"icc_disabled":       "The network was made with `enable_icc=false` (or the daemon runs with `--default-bridge-no-icc`).",
	"internal":           "The network was made with `--internal`.",
	"direct_access":      "Somebody outside sends to a container's own address. Publish the port, and use the host's address.",
	"unknown_endpoint":   "Nobody in the container's own network has that address, as far as the Engine knows.",
	"malformed":          "A truncated or contradictory packet. Many of them: look for a broken sender, or for an attack.",
	"fragment_not_found": "A later fragment came before the first, or without it. See the MTU along the path; fragments that overtake each other are not reordered.",
	"snat_exhausted":     "All ports tried towards that destination are taken: `bpfnet nat` shows by whom. Widen what the host leaves free (net.ipv4.ip_local_port_range), or spread destinations.",
	"flow_cap":           "The container has as many flows as `--endpoint-flows` allows; they go as they end or time out. Raise it, or look at what opens so many (`bpfnet flows --by container`).",
	"flow_table_full":    "Raise `--flows`, or shorten timeouts. `bpfnet status` shows the fill, `bpfnet flows --by container` who fills it.",
	"flow_collision":     "Two flows would look the same to a container (one client port through two host addresses, for a protocol without ports to change). Rare and harmless.",
	"no_flow":            "A reset, an answer to a SYN, or an ICMP error about a flow that is not known (any more). Harmless; many answers to SYNs mean that more of these come in than can wait, as in a flood.",
	"stale_flow":         "The flow's container is gone. Harmless: the client has to connect again.",
	"transit":            "The host would forward for others, only because bpfnet turned forwarding on. If it is a router: set the forwarding sysctls yourself before the daemon starts, or run it with `--ip-forward-no-drop`.",
	"martian":            "A packet from outside claims one of the host's or its containers' addresses.",
	"too_big":            "Larger than the way ahead allows and without the don't-fragment bit. Lower the container network's MTU (`com.docker.network.driver.mtu`).",
	"unsupported":        "SCTP to a published port whose number in the container differs. Publish it under its own number.",
	"spoofed_router":     "A container poses as an IPv6 router to its neighbours, which is an attack or a misconfiguration. One that is to be a router needs the label bpfnet.allowed_addresses=::/0.",
	"no_route":           "The host has no route back to the client, or, for a container's packet, no route or no address to masquerade with: it is not sent untranslated. See the host's routes and the uplinks' addresses (`bpfnet status`).",
	"not_published":      "The Engine holds the port, but its network is routed (dial the container's own address), or `--default-bridge-ip` publishes it on another of the host's addresses.",
	"tables_moving":      "The first packet of a flow came in the moments in which an upgrade, or another `--flows`, copied the flow tables. It comes again, and is let through.",
	"denied":             "Meant: `bpfnet deny` put the source on the shield's list. `bpfnet shield` counts by prefix; `bpfnet deny rm` lets it in again.",
	"syn_rate":           "The source opens more connections a second than `--shield-syn-rate` allows. If it is an honest one, many users behind one address perhaps, raise the rate.",
	"no_memory":          "The kernel could not make room for a packet's new header: memory pressure.",
}

// comments are the comments behind the enumerators of an enum in bpf/lib/types.h, by lower-case name.
func comments(t *testing.T, prefix string) map[string]string {
	t.Helper()
	src, err := os.ReadFile(filepath.Join(root, "bpf/lib/types.h"))
	require.NoError(t, err)
	out := make(map[string]string)
	for _, m := range regexp.MustCompile(`(?m)^\t`+prefix+`(\w+),(?: /\* (.*) \*/)?$`).FindAllStringSubmatch(string(src), -1) {
		out[strings.ToLower(m[1])] = m[2]
	}
	return out
}

// names are the enumerators of an enum in the object, in order, lower case and without the prefix.
func names(t *testing.T, enum, prefix string) []string {
	t.Helper()
	spec, err := bpf.LoadDatapath()
	require.NoError(t, err)
	var e *btf.Enum
	require.NoError(t, spec.Types.TypeByName(enum, &e))
	var out []string
	for _, v := range e.Values {
		out = append(out, strings.ToLower(strings.TrimPrefix(v.Name, prefix)))
	}
	return out
}

func TestDropReasons(t *testing.T) {
	meaning := comments(t, "REASON_")
	var doc strings.Builder
	doc.WriteString(`# Drop reasons

Made by ` + "`go test ./internal/doctest -update`" + ` from bpf/lib/types.h.

Every dropped packet counts under exactly one reason and one hook; ` + "`bpfnet stats`" + ` shows those that are not zero.

| reason | meaning | what to do |
|---|---|---|
`)
	seen := make(map[string]bool)
	for _, name := range names(t, "reason", "REASON_") {
		if name == "none" || name == "count" {
			continue
		}
		seen[name] = true
		require.Contains(t, advice, name, "say what to do about it")
		text := cmp.Or(meaning[name], strings.ReplaceAll(name, "_", " "))
		fmt.Fprintf(&doc, "| `%s` | %s | %s |\n", name, text, advice[name])
	}
	for name := range advice {
		assert.True(t, seen[name], "advice about %s, which is no reason", name)
	}
	doc.WriteString("\n## Hooks\n\n| hook | where |\n|---|---|\n")
	where := comments(t, "HOOK_")
	for _, name := range names(t, "hook", "HOOK_") {
		if name == "none" || name == "count" {
			continue
		}
		require.NotEmpty(t, where[name])
		fmt.Fprintf(&doc, "| `%s` | %s |\n", name, where[name])
	}
	generated(t, "reasons.md", doc.String())
}

// What a map is for, and who writes it.
var purpose = map[string]struct{ owner, text string }{
	"config":           {"daemon", "settings of the data path: policy generation, timeouts, masquerade ranges, the host's namespace"},
	"endpoint_slots":   {"daemon", "endpoints by slot"},
	"network_slots":    {"daemon", "networks by slot"},
	"port_slots":       {"daemon", "which slots of published ports are in use: flows of the others are purged"},
	"endpoints":        {"daemon", "a container's address to its slot, READY or not"},
	"links":            {"daemon", "host-side interface to the slot of its READY endpoint"},
	"ports":            {"daemon", "published ports"},
	"pairs":            {"daemon", "pairs of networks that may talk, lower slot first"},
	"host_addrs":       {"daemon", "addresses that the host answers to, loopback apart"},
	"open_ports":       {"daemon", "containers' ports that may be dialled by the containers' own addresses: routed networks, trusted interfaces, direct routing, links"},
	"trusted":          {"daemon", "devices by which a network's containers may be dialled"},
	"subnets":          {"daemon", "container subnets, for packets to addresses that nobody has"},
	"allowed_sources":  {"daemon", "more sources that an endpoint may send from (label `bpfnet.allowed_addresses`)"},
	"masquerade_addrs": {"daemon", "the address to masquerade with by uplink, for kernels whose route lookup does not tell"},
	"port_class":       {"daemon; `engine` by post_bind", "the one lookup that host traffic pays: what a port number may be, and which addresses may be a container's"},
	"flows4":           {"data path", "IPv4 flows, one entry a direction; sized by the loader"},
	"flows6":           {"data path", "IPv6 flows; half the entries of flows4"},
	"syns4":            {"data path", "IPv4 TCP connections from the world that their client has not confirmed yet, keyed as their answers"},
	"syns6":            {"data path", "the same for IPv6"},
	"endpoint_flows":   {"data path", "how many flows each endpoint has, for `--endpoint-flows`"},
	"listeners":        {"`bpfnet drops -f`", "until when each listener wants to be told of drops"},
	"event_rings":      {"`bpfnet drops -f`", "the ring buffer of each listener"},
	"event_buckets":    {"data path", "by reason: when the next drop may be told, and how many were not"},
	"flow_gauge":       {"data path", "how many entries the flow tables hold"},
	"frags":            {"data path", "ports of a fragmented datagram, left by its first fragment"},
	"reservations":     {"sock programs", "ports that the Engine's own sockets hold, and since when"},
	"sock_peers":       {"sock programs", "what a host socket dialled before it was sent to a container"},
	"sock_marks":       {"sock programs", "which sockets the sock programs have touched"},
	"device_sockets":   {"sock programs", "the host's sockets on masquerade ports that are bound to a device, by port"},
	"strict_sources":   {"daemon", "strict mode: the addresses of READY endpoints, each with its namespace"},
	"shield_deny4":     {"daemon", "shield: the deny list, with each prefix's index into `shield_hits`"},
	"shield_deny6":     {"daemon", "the same for IPv6"},
	"shield_devices":   {"daemon", "shield: the uplinks' MACs"},
	"shield_config":    {"daemon", "shield: the rate of new connections"},
	"shield_hits":      {"shield", "packets that each prefix of the deny list has kept out"},
	"shield_sources":   {"shield", "when each source's next new connection is due; the least recent goes first"},
	"strict_marks":     {"strict programs", "the namespace that a container's socket was made in"},
	"gc":               {"data path", "the timer that expires flows when no daemon does"},
	"scratch":          {"data path", "working memory of one program run, see bpf/README.md"},
	"takeovers":        {"data path", "finished flows whose tuple is being taken or freed right now"},
	"drops":            {"data path", "dropped packets and bytes by reason and hook"},
	"fates":            {"data path", "packets and bytes let go, by fate and hook"},
	"endpoint_stats":   {"data path", "traffic of each endpoint"},
	"port_stats":       {"data path", "traffic of each published port"},
	"snat_stats":       {"data path", "at which try a masquerade port was found; the last element counts exhaustion"},
}

func typeName(typ btf.Type) string {
	switch v := btf.UnderlyingType(typ).(type) {
	case *btf.Struct:
		return "struct " + v.Name
	case nil:
		return "-"
	default:
		return cmp.Or(typ.TypeName(), "-")
	}
}

func TestMaps(t *testing.T) {
	datapath, err := bpf.LoadDatapath()
	require.NoError(t, err)
	sock, err := bpf.LoadSock()
	require.NoError(t, err)
	strict, err := bpf.LoadStrict()
	require.NoError(t, err)
	shield, err := bpf.LoadShield()
	require.NoError(t, err)
	all := make(map[string]*ebpf.MapSpec)
	users := make(map[string][]string)
	for _, object := range []struct {
		name string
		spec *ebpf.CollectionSpec
	}{{"datapath", datapath}, {"sock", sock}, {"strict", strict}, {"shield", shield}} {
		for name, m := range object.spec.Maps {
			if strings.HasPrefix(name, ".") {
				continue // constants of the compiler
			}
			if all[name] == nil {
				all[name] = m
			}
			users[name] = append(users[name], object.name)
		}
	}
	order := make([]string, 0, len(all))
	for name := range all {
		order = append(order, name)
	}
	slices.SortFunc(order, func(a, b string) int {
		return cmp.Or(cmp.Compare(purpose[a].owner, purpose[b].owner), cmp.Compare(a, b))
	})
	var doc strings.Builder
	doc.WriteString(`# Maps

Made by ` + "`go test ./internal/doctest -update`" + ` from the compiled objects.

Sizes are in bytes; of per-CPU maps, for one CPU. Pinned maps stand below ` + "`maps/`" + ` in the instance's pin directory. The shapes
of keys and values are in bpf/lib/types.h. The sock, the strict and the shield object declare all maps of bpf/lib/maps.h and use a few of them.

| map | type | written by | key | value | entries | pinned | for |
|---|---|---|---|---|---|---|---|
`)
	for _, name := range order {
		m := all[name]
		p, ok := purpose[name]
		require.True(t, ok, "say what map %s is for", name)
		pinned := "no"
		if m.Pinning == ebpf.PinByName {
			pinned = "yes"
		}
		entries := fmt.Sprint(m.MaxEntries)
		switch name {
		case "flows4", "flows6":
			entries = "by memory or `--flows`"
		case "sock_marks", "strict_marks":
			entries = "one a socket"
		}
		fmt.Fprintf(&doc, "| `%s` | %s | %s | %s, %d | %s, %d | %s | %s | %s |\n", name, m.Type, p.owner,
			typeName(m.Key), m.KeySize, typeName(m.Value), m.ValueSize, entries, pinned, p.text)
	}
	for name := range purpose {
		assert.Contains(t, all, name, "a purpose for a map that there is not")
	}
	generated(t, "maps.md", doc.String())
}
