// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	bpfmaps "github.com/bpfnet/bpfnet/maps"
)

var update = flag.Bool("update", false, "write docs/generated/metrics.md instead of comparing with it")

// fakeCounters derives counts from slots, so that a wrong slot shows.
type fakeCounters struct{ err error }

func (c fakeCounters) Drops() ([]bpfmaps.Drop, error) {
	return []bpfmaps.Drop{{Reason: "isolated", Hook: "container", Packets: 2, Bytes: 168}}, c.err
}

func (c fakeCounters) Fates() ([]bpfmaps.Fate, error) {
	return []bpfmaps.Fate{{Fate: "uplink", Hook: "container", Packets: 50, Bytes: 4e4}}, c.err
}

func (c fakeCounters) Fill() ([]bpfmaps.Fill, error) {
	return []bpfmaps.Fill{{Map: "flows4", Entries: 131, Max: 262144}}, c.err
}

func (c fakeCounters) MasqueradeTries() (bpfmaps.Tries, error) {
	return bpfmaps.Tries{Found: []uint64{10, 5, 3, 1}, Exhausted: 7}, c.err
}

func (c fakeCounters) EndpointStats(slot uint16) (bpfmaps.EndpointCount, error) {
	n := uint64(slot)
	return bpfmaps.EndpointCount{RxPackets: n, RxBytes: 10 * n, TxPackets: 100 * n, TxBytes: 1000 * n, DropPackets: 1e4 * n, DropBytes: 1e5 * n}, c.err
}

func (c fakeCounters) PortStats(slot uint16) (bpfmaps.PortCount, error) {
	n := uint64(slot)
	return bpfmaps.PortCount{Connections: n, RxPackets: 10 * n, RxBytes: 100 * n, TxPackets: 1000 * n, TxBytes: 1e4 * n, NotReady: 1e5 * n}, c.err
}

// sample has two containers of one name in one network, a name that is no UTF-8, and an endpoint without
// a slot.
func sample() *api.Snapshot {
	return &api.Snapshot{
		Attach:   "tcx",
		Networks: []api.Network{{Name: "back"}, {Name: "front"}},
		Endpoints: []api.Endpoint{
			{Slot: 1, ID: "a", Name: "db", Network: "back", Ready: true},
			{Slot: 2, ID: "b", Name: "db", Network: "back", Ready: true},
			{Slot: 3, ID: "c", Name: "web\xff", Network: "front"},
			{ID: "d", Name: "none", Network: "front"},
		},
		Ports:       []api.Port{{Slot: 4, Proto: "tcp", Host: "0.0.0.0:80", Endpoint: "c", Container: "web", Network: "front"}},
		Problems:    []api.Problem{{}},
		Attachments: []api.Attachment{{Program: "from_uplink"}, {Program: "from_uplink"}},
		Sources:     []api.Source{{Name: "docker", Connected: true, LastSync: time.Unix(100, 0)}, {Name: "netlink"}},
	}
}

func options() Options {
	rounds := NewRounds()
	rounds.Reconciled(time.Unix(50, 0), time.Second, nil)
	rounds.Reconciled(time.Unix(60, 0), time.Second, errors.New("refused"))
	rounds.Expired(time.Millisecond)
	rounds.Swept("expired", 3, 4)
	return Options{
		Version: "1.2.3", Counters: fakeCounters{}, Rounds: rounds, Snapshot: sample,
		Relay: func() (*Relay, error) {
			return &Relay{Active: 1, Ports: []RelayPort{{Host: "[::]:80", Proto: "tcp", Clients: 5, Dropped: 2, Failed: 1}}}, nil
		},
	}
}

func TestLint(t *testing.T) {
	problems, err := testutil.CollectAndLint(New(options()))
	require.NoError(t, err)
	assert.Empty(t, problems)
}

// Every family is documented with its type and labels, and a pedantic registry takes them.
func TestFamilies(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	require.NoError(t, reg.Register(New(options())))
	got, err := reg.Gather()
	require.NoError(t, err)
	documented := make(map[string]Family)
	for _, f := range Families() {
		documented[f.Name] = f
	}
	for _, g := range got {
		f, ok := documented[g.GetName()]
		if !assert.True(t, ok, "%s is not documented", g.GetName()) {
			continue
		}
		delete(documented, g.GetName())
		assert.Equal(t, f.Type, strings.ToLower(g.GetType().String()), f.Name)
		assert.Equal(t, f.Help, g.GetHelp())
		labels := []string{}
		for _, l := range g.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		assert.ElementsMatch(t, f.Labels, labels, f.Name)
	}
	assert.Empty(t, slices.Sorted(maps.Keys(documented)), "documented, and not there")
}

func TestValues(t *testing.T) {
	text := scrapeText(t, New(options()))
	for _, line := range []string{
		`bpfnet_forwarded_packets_total{fate="uplink",hook="container"} 50`,
		`bpfnet_dropped_bytes_total{hook="container",reason="isolated"} 168`,
		`bpfnet_endpoint_receive_packets_total{container="db",network="back"} 3`, // two of that name
		`bpfnet_endpoint_dropped_bytes_total{container="db",network="back"} 300000`,
		"bpfnet_endpoint_transmit_bytes_total{container=\"web\uFFFD\",network=\"front\"} 3000",
		`bpfnet_published_port_connections_total{container="web",host="0.0.0.0:80",network="front",proto="tcp"} 4`,
		`bpfnet_published_port_not_ready_packets_total{container="web",host="0.0.0.0:80",network="front",proto="tcp"} 400000`,
		`bpfnet_endpoints{network="back",state="ready"} 2`,
		`bpfnet_endpoints{network="back",state="not_ready"} 0`,
		`bpfnet_endpoints{network="front",state="not_ready"} 2`,
		`bpfnet_map_entries{map="flows4"} 131`,
		`bpfnet_map_max_entries{map="flows4"} 262144`,
		`bpfnet_flow_entries_deleted_total{cause="expired",family="ipv6"} 4`,
		`bpfnet_flow_entries_deleted_total{cause="purged",family="ipv4"} 0`,
		`bpfnet_masquerade_port_tries_bucket{le="1"} 10`,
		`bpfnet_masquerade_port_tries_bucket{le="2"} 15`,
		`bpfnet_masquerade_port_tries_bucket{le="4"} 19`,
		`bpfnet_masquerade_port_tries_sum 33`,
		`bpfnet_masquerade_port_tries_count 19`,
		`bpfnet_masquerade_ports_exhausted_total 7`,
		`bpfnet_reconcile_duration_seconds_count 2`,
		`bpfnet_reconcile_errors_total 1`,
		`bpfnet_reconcile_last_success_timestamp_seconds 51`,
		`bpfnet_source_connected{source="netlink"} 0`,
		`bpfnet_source_last_sync_timestamp_seconds{source="docker"} 100`,
		`bpfnet_attached_programs{program="from_uplink"} 2`,
		`bpfnet_relay_dropped_clients_total{host="[::]:80",proto="tcp"} 2`,
		`bpfnet_metrics_folded{kind="container"} 0`,
	} {
		assert.Contains(t, text, line+"\n")
	}
	assert.NotContains(t, text, `container="none"`)
}

func scrapeText(t *testing.T, c *Collector) string {
	t.Helper()
	w := httptest.NewRecorder()
	Handler(c).ServeHTTP(w, httptest.NewRequest(http.MethodGet, Path, nil))
	require.Equal(t, http.StatusOK, w.Code, w.Body)
	return w.Body.String()
}

// A map that cannot be read takes its own series away, and no others.
func TestReadError(t *testing.T) {
	o := options()
	o.Counters = fakeCounters{err: errors.New("no such map")}
	text := scrapeText(t, New(o))
	assert.Contains(t, text, "bpfnet_metrics_read_errors_total{what=\"drops\"} 1\n")
	assert.Contains(t, text, "bpfnet_networks 2\n")
	assert.NotContains(t, text, "bpfnet_dropped")
}

func TestBeforeTheFirstRound(t *testing.T) {
	o := options()
	o.Snapshot, o.Relay, o.Rounds = func() *api.Snapshot { return nil }, nil, nil
	assert.Contains(t, scrapeText(t, New(o)), "bpfnet_networks 0\n")
}

func TestLimit(t *testing.T) {
	o, snap := options(), sample()
	o.Limit, o.Snapshot = 1, func() *api.Snapshot { return snap }
	c := New(o)
	text := scrapeText(t, c)
	assert.Contains(t, text, `bpfnet_endpoint_receive_packets_total{container="db",network="back"} 1`)
	assert.Contains(t, text, `bpfnet_endpoint_receive_packets_total{container="_other",network="back"} 0`, "their past is not the sum's")
	assert.Contains(t, text, `bpfnet_endpoint_receive_packets_total{container="_other",network="front"} 0`)
	assert.Contains(t, text, `bpfnet_metrics_folded{kind="container"} 2`)
	c.SetLimit(10)
	text = scrapeText(t, c)
	assert.Contains(t, text, `bpfnet_endpoint_receive_packets_total{container="db",network="back"} 3`)
	assert.Contains(t, text, `bpfnet_metrics_folded{kind="container"} 0`)
}

// The sum of the others never falls, whoever of them comes, goes and begins anew; who has its own series
// keeps them.
func TestFold(t *testing.T) {
	var f fold
	r := func(id string, n uint64) row { return row{id, []string{"net", id}, counts{n}} }
	step := func(rows ...row) map[string]uint64 {
		out, _ := f.bound(rows, 1, 1)
		got := make(map[string]uint64)
		for _, r := range out {
			got[r.labels[1]] = r.n[0]
		}
		return got
	}
	type want = map[string]uint64
	assert.Equal(t, want{"b": 5}, step(r("b", 5)))
	assert.Equal(t, want{"b": 6, Other: 10}, step(r("a", 10), r("b", 6)), "b was there first")
	assert.Equal(t, want{"b": 6, Other: 115}, step(r("a", 15), r("b", 6), r("c", 100)))
	assert.Equal(t, want{"b": 6, Other: 116}, step(r("b", 6), r("c", 101)), "a's past is not taken back")
	assert.Equal(t, want{"b": 6, Other: 118}, step(r("b", 6), r("c", 2)), "c's counter began anew")
	assert.Equal(t, want{"c": 3, Other: 118}, step(r("c", 3), r("a", 0)), "b's place is free")
	assert.Equal(t, want{}, step(), "the network is gone")

	f = fold{} // a new daemon over old maps
	assert.Equal(t, want{"a": 10, Other: 0}, step(r("a", 10), r("b", 6)))
	assert.Equal(t, want{"a": 10, Other: 3}, step(r("a", 10), r("b", 7), r("c", 2)))
}

func TestListenFamilies(t *testing.T) {
	l, err := Listen(netip.MustParseAddrPort("0.0.0.0:0"))
	require.NoError(t, err)
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	_, err = net.Dial("tcp", fmt.Sprintf("[::1]:%d", port))
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	require.NoError(t, err)
	c.Close()

	all, err := Listen(netip.MustParseAddrPort("[::]:0"))
	require.NoError(t, err)
	defer all.Close()
	c, err = net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", all.Addr().(*net.TCPAddr).Port))
	require.NoError(t, err, "[::] is all addresses")
	c.Close()
}

func TestTakenNamesTheOwner(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	_, err = Listen(netip.MustParseAddrPort(l.Addr().String()))
	var taken *TakenError
	require.ErrorAs(t, err, &taken)
	require.ErrorIs(t, err, syscall.EADDRINUSE)
	assert.Equal(t, os.Getpid(), taken.PID)
	assert.Equal(t, fmt.Sprintf("--metrics-listen %s: in use by metrics.test (pid %d); stop that, or choose another port", l.Addr(), os.Getpid()), err.Error())

	_, err = Listen(netip.MustParseAddrPort("192.0.2.1:9"))
	require.EqualError(t, err, "--metrics-listen 192.0.2.1:9: this host does not have the address; choose one that it has")
}

// TestReference writes docs/generated/metrics.md.
func TestReference(t *testing.T) {
	var doc strings.Builder
	doc.WriteString("# Metrics\n\nMade by `go test ./metrics -run TestReference -update` from metrics/metrics.go.\n\n" +
		"Besides these there are those of the Go runtime (`go_`) and of the daemon's process (`process_`).\n\n" +
		"| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, f := range Families() {
		labels := "–"
		if len(f.Labels) > 0 {
			labels = "`" + strings.Join(f.Labels, "`, `") + "`"
		}
		fmt.Fprintf(&doc, "| `%s` | %s | %s | %s |\n", f.Name, f.Type, labels, f.Help)
	}
	const path = "../docs/generated/metrics.md"
	if *update {
		require.NoError(t, os.WriteFile(path, []byte(doc.String()), 0o644))
		return
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, string(want), doc.String(), "%s is stale: go test ./metrics -update", path)
}
