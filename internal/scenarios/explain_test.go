// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
)

// attempt is a connection that is explained first, and then made.
type attempt struct {
	name    string
	from    *lab.NS
	who     string // from, for explain
	network string // "tcp" or "udp"
	whom    string // for explain
	to      netip.Addr
	port    uint16
	more    []string // flags of explain
	bind    string
	path    string
	reason  string
}

// Needs root. What explain says of a connection is what happens to a real one, whoever makes it, and asking writes no map.
func TestExplain(t *testing.T) {
	w := newOwnSite(t)
	w.b.MustCLI(t, "network", "create", "-o", "com.docker.network.bridge.enable_icc=false", "quiet")
	w.b.MustCLI(t, "network", "create", "--internal", "inner")
	w.sandbox(t, "web", "blue", "-p", "8080:80/tcp", "-p", "8080:80/udp", "-p", lab.HostB4.String()+":8081:80")
	w.sandbox(t, "cli", "blue")
	w.sandbox(t, "db", "red")
	w.sandbox(t, "quinn", "quiet")
	w.sandbox(t, "rita", "quiet")
	w.sandbox(t, "ian", "inner")
	w.Client2.Serve(t, "--tcp", "80", "--udp", "80")
	m := w.maps(t)

	ns := func(name string) *lab.NS { return w.b.NS(t, name) }
	v4 := func(name, network string) netip.Addr {
		a, _ := w.b.Addrs(t, name, network)
		return a
	}
	_, web6 := w.b.Addrs(t, "web", "blue")
	loopback := netip.MustParseAddr("127.0.0.1")
	// Without a route of its own it would not even try.
	ns("ian").MustRun(t, "ip", "route", "add", "default", "via", w.b.InspectNetwork(t, "inner").IPAM.Config[0].Gateway)
	const spoofed = "10.99.0.9"
	ns("cli").MustRun(t, "ip", "addr", "add", spoofed+"/32", "dev", "lo")
	for _, a := range []attempt{
		{name: "wrong network", from: ns("web"), who: "web", network: "tcp", whom: "db", to: v4("db", "red"), port: 80, path: "dropped", reason: "isolated"},
		{name: "wrong network, UDP", from: ns("web"), who: "web", network: "udp", whom: "db", to: v4("db", "red"), port: 80, path: "dropped", reason: "isolated"},
		{name: "same network", from: ns("cli"), who: "cli", network: "tcp", whom: "web", to: v4("web", "blue"), port: 80, path: "container"},
		{name: "same network, IPv6", from: ns("cli"), who: "cli", network: "tcp", whom: web6.String(), to: web6, port: 80, path: "container"},
		{name: "published", from: w.Client, who: lab.Client4.String(), network: "tcp", whom: lab.Host4.String(), to: lab.Host4, port: 8080, path: "container"},
		{name: "published, UDP", from: w.Client, who: lab.Client4.String(), network: "udp", whom: lab.Host4.String(), to: lab.Host4, port: 8080, path: "container"},
		{name: "published, IPv6", from: w.Client, who: lab.Client6.String(), network: "tcp", whom: lab.Host6.String(), to: lab.Host6, port: 8080, path: "container"},
		{name: "not published", from: w.Client, who: lab.Client4.String(), network: "tcp", whom: lab.Host4.String(), to: lab.Host4, port: 8099, path: "host"},
		{name: "published on another address", from: w.Client, who: lab.Client4.String(), network: "tcp", whom: lab.Host4.String(), to: lab.Host4, port: 8081, path: "host"},
		{name: "published on that address", from: w.Client, who: lab.Client4.String(), network: "tcp", whom: lab.HostB4.String(), to: lab.HostB4, port: 8081, path: "container"},
		{name: "published, from another network", from: ns("db"), who: "db", network: "tcp", whom: lab.Host4.String(), to: lab.Host4, port: 8080, path: "container"},
		{name: "published, by itself", from: ns("web"), who: "web", network: "tcp", whom: lab.Host4.String(), to: lab.Host4, port: 8080, path: "container"},
		{name: "container's own address from outside", from: w.Client, who: lab.Client4.String(), network: "tcp", whom: "web", to: v4("web", "blue"), port: 80, path: "dropped", reason: "direct_access"},
		{name: "icc off", from: ns("quinn"), who: "quinn", network: "tcp", whom: "rita", to: v4("rita", "quiet"), port: 80, path: "dropped", reason: "icc_disabled"},
		{name: "internal network, to the world", from: ns("ian"), who: "ian", network: "tcp", whom: lab.Client4.String(), to: lab.Client4, port: 80, path: "dropped", reason: "internal"},
		{name: "internal network, from another", from: ns("web"), who: "web", network: "tcp", whom: "ian", to: v4("ian", "inner"), port: 80, path: "dropped", reason: "internal"},
		{name: "masqueraded", from: ns("cli"), who: "cli", network: "tcp", whom: lab.Internet4.String(), to: lab.Internet4, port: 80, path: "uplink"},
		{name: "masqueraded, UDP", from: ns("db"), who: "db", network: "udp", whom: lab.Internet4.String(), to: lab.Internet4, port: 80, path: "uplink"},
		{name: "nobody has it", from: ns("web"), who: "web", network: "tcp", whom: "172.31.77.77", to: netip.MustParseAddr("172.31.77.77"), port: 80, path: "dropped", reason: "isolated"},
		{name: "the host's published port", from: w.Host, who: "host", network: "tcp", whom: loopback.String(), to: loopback, port: 8080, path: "socket"},
		{name: "the host to a container", from: w.Host, who: "host", network: "tcp", whom: "web", to: v4("web", "blue"), port: 80, path: "stack"},
		{name: "a port of the host's", from: ns("cli"), who: "cli", network: "tcp", whom: lab.Host4.String(), to: lab.Host4, port: 8099, path: "stack"},
		{name: "spoofed", from: ns("cli"), who: "cli", network: "tcp", whom: "web", to: v4("web", "blue"), port: 80, more: []string{"--source", spoofed},
			bind: spoofed + ":0", path: "dropped", reason: "spoofed_address"},
	} {
		t.Run(a.name, func(t *testing.T) { a.try(t, w, m) })
	}

	// Any number may ask at a time.
	var group errgroup.Group
	for range 8 {
		group.Go(func() error {
			_, err := w.b.CLI("explain", "--from", "cli", "--to", lab.Internet4.String(), "--port", "80")
			return err
		})
	}
	require.NoError(t, group.Wait())

	// Where somebody has written a map behind the daemon's back, the programs do not do what policy says.
	var slots []uint16
	for _, n := range w.b.Snapshot(t).Networks {
		if n.Name == "blue" || n.Name == "red" {
			slots = append(slots, n.Slot)
		}
	}
	pair := bpf.DatapathPair{A: slices.Min(slots), B: slices.Max(slots)}
	require.NoError(t, m.Map("pairs").Put(pair, uint8(1)))
	cmd := w.b.Command(t.Context(), "explain", "--from", "web", "--to", "db", "--port", "80")
	out, err := cmd.CombinedOutput()
	require.Error(t, err)
	assert.Equal(t, 3, cmd.ProcessState.ExitCode(), "%s", out)
	assert.Contains(t, string(out), "CONTRADICTION: policy says dropped as isolated, the data path container\n")
	require.NoError(t, m.Map("pairs").Delete(pair))
}

func (a attempt) try(t *testing.T, w *site, m *maps.Maps) {
	args := append([]string{"explain", "--from", a.who, "--to", a.whom, "--proto", a.network, "--port", fmt.Sprint(a.port), "-o", "json"}, a.more...)
	var e api.Explanation
	lab.Eventually(t, 20*time.Second, "asking writes no map", func() bool {
		before := kept(t, m)
		e = api.Explanation{}
		require.NoError(t, json.Unmarshal([]byte(w.b.MustCLI(t, args...)), &e))
		return slices.Equal(before, kept(t, m)) // others talk meanwhile, but not each time
	})
	assert.Equal(t, [2]string{a.path, a.reason}, [2]string{e.Path, e.Reason}, "%+v", e)
	assert.Empty(t, e.Disagree)
	assert.Equal(t, a.path != "socket", e.DataPath != nil, "the programs have been asked: %s", e.Why)

	get := []string{"--network", a.network, "--timeout", noAnswer.String()}
	if a.bind != "" {
		get = append(get, "--bind", a.bind)
	}
	before := readCounters(t, m)
	r, err := a.from.Get(append(get, at(a.to, int(a.port)))...)
	moved := since(t, m, before)
	switch {
	case a.reason != "":
		require.Error(t, err)
		assert.NotZero(t, moved[e.Reason+"/"+e.DataPath.Hook], "%v", moved)
	case a.port == 8099 || a.path == "host":
		require.Error(t, err)
		assert.Equal(t, "ECONNREFUSED", r.Errno)
	default:
		require.NoError(t, err, "%+v", r)
		sees := parseAddrPort(t, r.View.Remote).Addr().Unmap()
		if as, err := netip.ParseAddrPort(e.Received.From); err == nil {
			assert.Equal(t, as.Addr(), sees, "who the server sees")
		} else if as, err := netip.ParseAddr(e.Received.From); err == nil {
			assert.Equal(t, as, sees, "who the server sees")
		}
	}
}

// kept is what the data path keeps, as text; of its arrays, what the few slots of the test have.
func kept(t *testing.T, m *maps.Maps) (out []string) {
	t.Helper()
	const inUse = 300 // more than there are reasons by hook, too
	for _, name := range []string{
		"flows4", "flows6", "syns4", "syns6", "flow_gauge", "endpoint_flows", "frags", "drops", "fates", "snat_stats", "event_buckets", "endpoint_stats", "port_stats",
	} {
		it := m.Map(name).Iterate()
		key := make([]byte, m.Map(name).KeySize())
		if m.Map(name).Type() == ebpf.PerCPUArray {
			var values [][]byte
			for n := 0; n < inUse && it.Next(&key, &values); n++ {
				out = append(out, fmt.Sprintf("%s %x %x", name, key, values))
			}
		} else {
			var value []byte
			for n := 0; (n < inUse || m.Map(name).Type() != ebpf.Array) && it.Next(&key, &value); n++ {
				out = append(out, fmt.Sprintf("%s %x %x", name, key, value))
			}
		}
		require.NoError(t, it.Err(), name)
	}
	slices.Sort(out)
	return out
}
