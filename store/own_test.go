// SPDX-License-Identifier: Apache-2.0

package store

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.etcd.io/bbolt"

	"github.com/bpfnet/bpfnet/policy"
)

// Everything that a record can hold comes back.
func TestKeepsWholeRecords(t *testing.T) {
	code := 137
	at := time.Date(2026, 11, 21, 10, 0, 0, 123456789, time.UTC)
	own := Own{
		Networks: []Network{{
			ID: "n", Name: "mynet", Created: at, Bridge: "bpn-1", Internal: true,
			Subnets: []Subnet{
				{
					Prefix: netip.MustParsePrefix("10.1.0.0/16"), Gateway: netip.MustParseAddr("10.1.0.1"),
					Range: netip.MustParsePrefix("10.1.2.0/24"),
				},
				{Prefix: netip.MustParsePrefix("fd00:1::/64"), Gateway: netip.MustParseAddr("fd00:1::1")},
			},
			Options: map[string]string{"com.docker.network.driver.mtu": "1400"},
			Labels:  map[string]string{"a": "b"},
		}},
		Sandboxes: []Sandbox{{
			ID: "s", Name: "web", Hostname: "web", Mode: "container", JoinID: "other",
			Networks: []Attach{{
				NetworkID: "n", IP4: netip.MustParseAddr("10.1.2.3"), IP6: netip.MustParseAddr("fd00:1::3"),
				Aliases: []string{"w"},
			}},
			Publish: []PortWish{
				{Proto: policy.UDP, Host: netip.MustParseAddr("::"), First: 53, Last: 54, Target: 5353},
				{Proto: policy.TCP, Target: 80},
			},
			DNS: []netip.Addr{netip.MustParseAddr("192.0.2.53")}, AutoRemove: true,
			Command: []string{"sh", "-c", "exit 1"}, Dir: "/tmp", Env: []string{"A=B"}, Created: at,
			Status: "exited", Started: at, Ended: at.Add(time.Second),
			Main: Process{PID: 10, StartTime: 1 << 40, BootID: "b"}, Runner: Process{PID: 9, StartTime: 3, BootID: "b"},
			ExitCode: &code, Why: "killed",
			Published: []Published{{Proto: policy.TCP, Host: netip.MustParseAddrPort("0.0.0.0:8080"), Target: 80}},
		}},
		Endpoints: []Endpoint{{
			ID: "e", NetworkID: "n", SandboxID: "s",
			Addrs: []netip.Addr{netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("fd00:1::3")},
			MAC:   policy.MAC{2, 0x42, 10, 1, 2, 3}, Link: "bpv-1", Name: "eth0", Aliases: []string{"w"},
		}},
		Releases: []Release{
			{NetworkID: "n", Addr: netip.MustParseAddr("10.1.2.9"), At: at},
			{NetworkID: "n", Addr: netip.MustParseAddr("10.1.2.10"), At: at},
			{NetworkID: "n", Addr: netip.MustParseAddr("fd00:1::9"), At: at},
		},
	}
	s := open(t, t.TempDir())
	require.NoError(t, s.Write(Batch{
		Networks: own.Networks, Sandboxes: own.Sandboxes, Endpoints: own.Endpoints, Releases: own.Releases,
	}))
	for range 2 {
		got, err := s.Own()
		require.NoError(t, err)
		assert.Equal(t, own, got)
		s = reopen(t, s)
	}
}

func TestDeletionsComeFirst(t *testing.T) {
	s := open(t, t.TempDir())
	require.NoError(t, s.Write(Batch{Networks: several(network, 0, 2), Releases: several(release, 0, 2)}))
	other := network(0)
	other.Name = "other"
	later := release(0)
	later.At = later.At.Add(time.Hour)
	require.NoError(t, s.Write(Batch{
		DeleteNetworks: []string{other.ID, network(1).ID, "missing"}, Networks: []Network{other},
		DeleteReleases: []Release{{NetworkID: later.NetworkID, Addr: later.Addr}, release(7)}, Releases: []Release{later},
	}))
	own, err := s.Own()
	require.NoError(t, err)
	assert.Equal(t, Own{Networks: []Network{other}, Releases: []Release{later, release(1)}}, own)
}

// A record without an ID is refused, and the others with it.
func TestWriteIsAllOrNothing(t *testing.T) {
	s := open(t, t.TempDir())
	require.NoError(t, s.Write(Batch{Networks: several(network, 0, 1)}))
	err := s.Write(Batch{
		DeleteNetworks: []string{network(0).ID}, Networks: several(network, 1, 1), Endpoints: []Endpoint{{}},
	})
	require.ErrorContains(t, err, `endpoints "": key required`)
	own, err := s.Own()
	require.NoError(t, err)
	assert.Equal(t, Own{Networks: several(network, 0, 1)}, own)
}

func TestDamageOfOwnThingsIsToldByName(t *testing.T) {
	s := open(t, t.TempDir())
	require.NoError(t, s.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte(kindEndpoints)).Put([]byte("e1"), seal([]byte(`{"id":`)))
	}))
	_, err := s.Own()
	require.ErrorIs(t, err, ErrDamaged)
	require.ErrorContains(t, err, "endpoints e1")
	require.NoError(t, s.db.Update(func(tx *bbolt.Tx) error { return tx.DeleteBucket([]byte(kindEndpoints)) }))
	_, err = s.Own()
	require.ErrorIs(t, err, ErrDamaged)
	require.ErrorIs(t, s.Write(Batch{Endpoints: several(endpoint, 0, 1)}), ErrDamaged)
}

// model is what a store should hold.
type model struct {
	networks  map[string]Network
	sandboxes map[string]Sandbox
	endpoints map[string]Endpoint
	releases  map[string]Release
}

func (m model) own() Own {
	return Own{
		Networks: sorted(m.networks), Sandboxes: sorted(m.sandboxes), Endpoints: sorted(m.endpoints),
		Releases: slices.SortedFunc(maps.Values(m.releases), func(a, b Release) int { return a.Addr.Compare(b.Addr) }),
	}
}

func sorted[T any](records map[string]T) []T {
	var list []T
	for _, key := range slices.Sorted(maps.Keys(records)) {
		list = append(list, records[key])
	}
	return list
}

// some draws numbers below n.
func some(random *rand.Rand, n int) []int {
	list := make([]int, random.IntN(8))
	for i := range list {
		list[i] = random.IntN(n)
	}
	return list
}

// pick draws records to write and IDs to delete, and does the same to the model.
func pick[T any](random *rand.Rand, records map[string]T, f func(int) T, id func(T) string) (put []T, gone []string) {
	for _, i := range some(random, 60) {
		gone = append(gone, id(f(i)))
		delete(records, id(f(i)))
	}
	for _, i := range some(random, 60) {
		put = append(put, f(i))
		records[id(f(i))] = f(i)
	}
	return put, gone
}

// Random batches leave what they would leave in plain maps, also after the store is opened again.
func TestOwnIsWhatWasWritten(t *testing.T) {
	rounds := 500
	if fullCount() {
		rounds = 5000
	}
	random := seeded(t)
	m := model{
		make(map[string]Network), make(map[string]Sandbox), make(map[string]Endpoint), make(map[string]Release),
	}
	s := open(t, t.TempDir())
	for round := range rounds {
		var b Batch
		b.Networks, b.DeleteNetworks = pick(random, m.networks, func(i int) Network {
			n := network(i)
			n.Name = fmt.Sprint(round)
			return n
		}, func(n Network) string { return n.ID })
		b.Sandboxes, b.DeleteSandboxes = pick(random, m.sandboxes, sandbox, sandboxID)
		b.Endpoints, b.DeleteEndpoints = pick(random, m.endpoints, endpoint, endpointID)
		for _, i := range some(random, 60) {
			b.DeleteReleases = append(b.DeleteReleases, release(i))
			delete(m.releases, release(i).Addr.String())
		}
		for _, i := range some(random, 60) {
			b.Releases = append(b.Releases, release(i))
			m.releases[release(i).Addr.String()] = release(i)
		}
		require.NoError(t, s.Write(b))
		if random.IntN(20) == 0 {
			s = reopen(t, s)
		}
		own, err := s.Own()
		require.NoError(t, err)
		require.Equal(t, m.own(), own, "round %d", round)
	}
}

// filled is a store of 500 networks and 1,000 endpoints, on the disk.
func filled(b *testing.B) *Store {
	b.Helper()
	s, err := Open(b.TempDir())
	require.NoError(b, err)
	b.Cleanup(func() { s.Close() })
	require.NoError(b, s.Write(Batch{
		Networks: several(network, 0, 500), Sandboxes: several(sandbox, 0, 1000), Endpoints: several(endpoint, 0, 1000),
	}))
	return s
}

// BenchmarkWrite is one changed network among 500.
func BenchmarkWrite(b *testing.B) {
	s := filled(b)
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		begin := time.Now()
		require.NoError(b, s.Write(Batch{Networks: several(network, i%500, 1)}))
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
}

func BenchmarkOwn(b *testing.B) {
	s := filled(b)
	for b.Loop() {
		_, err := s.Own()
		require.NoError(b, err)
	}
}

func BenchmarkOpen(b *testing.B) {
	s := filled(b)
	for b.Loop() {
		require.NoError(b, s.Close())
		var err error
		s, err = Open(s.dir)
		require.NoError(b, err)
	}
	defer s.Close()
	info, err := os.Stat(s.path())
	require.NoError(b, err)
	b.ReportMetric(float64(info.Size())/1024, "KiB")
}
