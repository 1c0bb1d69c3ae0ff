// SPDX-License-Identifier: Apache-2.0

package ipam_test

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/ipam"
)

// count is a tenth of a stated count, or all of it where BPFNET_FULL is 1.
func count(n int) int {
	if os.Getenv("BPFNET_FULL") == "1" {
		return n
	}
	return n / 10
}

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func leases(t testing.TB, p, gateway, ipRange string, rest time.Duration) *ipam.Leases {
	t.Helper()
	s, err := subnet(t, p, gateway, ipRange).Normalize()
	require.NoError(t, err)
	return ipam.NewLeases(s, rest)
}

// all allocates until there is nothing left.
func all(t testing.TB, l *ipam.Leases, now time.Time) []string {
	t.Helper()
	var out []string
	for {
		a, err := l.Allocate(now)
		if err != nil {
			require.ErrorIs(t, err, ipam.ErrFull)
			return out
		}
		out = append(out, a.String())
	}
}

func TestAllocateAll(t *testing.T) {
	for _, c := range []struct {
		prefix, gateway, ipRange string
		want                     []string
	}{
		{"10.0.0.0/29", "", "", []string{"10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6"}},
		{"10.0.0.0/29", "10.0.0.3", "", []string{"10.0.0.1", "10.0.0.2", "10.0.0.4", "10.0.0.5", "10.0.0.6"}},
		{"10.0.0.0/30", "", "", []string{"10.0.0.2"}},
		{"10.0.0.0/31", "", "", []string{"10.0.0.1"}},
		{"10.0.0.0/31", "10.0.0.1", "", []string{"10.0.0.0"}},
		{"10.0.0.0/8", "", "10.3.255.252/30", []string{"10.3.255.252", "10.3.255.253", "10.3.255.254", "10.3.255.255"}},
		{"10.0.0.0/8", "", "10.255.255.252/30", []string{"10.255.255.252", "10.255.255.253", "10.255.255.254"}},
		{"10.0.0.0/8", "10.3.0.1", "10.3.0.0/31", []string{"10.3.0.0"}},
		{"255.255.255.248/29", "", "255.255.255.252/30", []string{"255.255.255.252", "255.255.255.253", "255.255.255.254"}},
		{"fd00::/126", "", "", []string{"fd00::2", "fd00::3"}},
		{"fd00::/127", "", "", []string{"fd00::1"}},
		{"fd00::/127", "fd00::1", "", []string{"fd00::"}},
		{"fd00::/64", "", "fd00::ffff:ffff:ffff:fffe/127", []string{"fd00::ffff:ffff:ffff:fffe", "fd00::ffff:ffff:ffff:ffff"}},
		{"fc00::/8", "", "fcff:ffff:ffff:ffff:ffff:ffff:ffff:fffe/127",
			[]string{"fcff:ffff:ffff:ffff:ffff:ffff:ffff:fffe", "fcff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}},
	} {
		assert.Equal(t, c.want, all(t, leases(t, c.prefix, c.gateway, c.ipRange, 0), epoch), "%s %s %s", c.prefix, c.gateway, c.ipRange)
	}
	// All of a /16, each once.
	got := all(t, leases(t, "172.19.0.0/16", "", "", 0), epoch)
	require.Len(t, got, 1<<16-3)
	require.Equal(t, "172.19.255.254", got[len(got)-1])
	slices.Sort(got)
	require.Len(t, slices.Compact(got), 1<<16-3)

	l := leases(t, "10.0.0.0/30", "", "", 0)
	all(t, l, epoch)
	_, err := l.Allocate(epoch)
	require.EqualError(t, err, "subnet 10.0.0.0/30: no address is free; remove a sandbox from the network, or make a larger network")
}

func TestTake(t *testing.T) {
	l := leases(t, "10.0.0.0/24", "", "10.0.0.128/25", time.Minute)
	require.NoError(t, l.Take(addr("10.0.0.128")))
	require.NoError(t, l.Take(addr("10.0.0.5"))) // not in the range, as Docker has it
	require.NoError(t, l.Take(addr("::ffff:10.0.0.6")))
	a, err := l.Allocate(epoch)
	require.NoError(t, err)
	require.Equal(t, addr("10.0.0.129"), a)

	for _, c := range []struct {
		addr string
		is   error
		text string
	}{
		{"10.0.0.5", ipam.ErrTaken, "address 10.0.0.5: is taken; choose another, or none to get one that is free"},
		{"10.0.0.6", ipam.ErrTaken, "address 10.0.0.6: is taken; choose another, or none to get one that is free"},
		{"10.0.0.129", ipam.ErrTaken, "address 10.0.0.129: is taken; choose another, or none to get one that is free"},
		{"10.0.1.5", ipam.ErrOutside, "address 10.0.1.5: outside of subnet 10.0.0.0/24; choose an address in it"},
		{"fd00::5", ipam.ErrOutside, "address fd00::5: outside of subnet 10.0.0.0/24; choose an address in it"},
		{"10.0.0.1", ipam.ErrReserved, "address 10.0.0.1: reserved as the gateway of subnet 10.0.0.0/24; choose another"},
		{"10.0.0.0", ipam.ErrReserved, "address 10.0.0.0: reserved as the network address of subnet 10.0.0.0/24; choose another"},
		{"10.0.0.255", ipam.ErrReserved, "address 10.0.0.255: reserved as the broadcast address of subnet 10.0.0.0/24; choose another"},
	} {
		err := l.Take(addr(c.addr))
		assert.ErrorIs(t, err, c.is)
		assert.EqualError(t, err, c.text)
	}
	require.ErrorIs(t, l.Take(netip.Addr{}), ipam.ErrOutside)
	require.ErrorIs(t, leases(t, "fd00::/64", "", "", 0).Take(addr("fd00::")), ipam.ErrReserved)
	require.NoError(t, leases(t, "fd00::/64", "", "", 0).Take(addr("fd00::ffff:ffff:ffff:ffff")), "IPv6 has no broadcast")

	// What was never given, and what cannot be, can be given back.
	for _, s := range []string{"10.0.0.200", "10.0.0.1", "10.0.0.0", "10.0.0.255", "192.0.2.1", "fd00::1"} {
		l.Release(addr(s), epoch)
		l.Rest(addr(s), epoch)
	}
	l.Release(netip.Addr{}, epoch)
	require.ErrorIs(t, l.Take(addr("10.0.0.1")), ipam.ErrReserved)
	require.NoError(t, l.Take(addr("10.0.0.200")))
}

func TestReuseIsDelayed(t *testing.T) {
	at := func(s int) time.Time { return epoch.Add(time.Duration(s) * time.Second) }
	next := func(l *ipam.Leases, s int) string {
		a, err := l.Allocate(at(s))
		require.NoError(t, err)
		return a.String()
	}
	l := leases(t, "10.0.0.0/29", "", "", 10*time.Second) // .2 to .6
	require.Equal(t, "10.0.0.2", next(l, 0))
	require.Equal(t, "10.0.0.3", next(l, 0))
	l.Release(addr("10.0.0.3"), at(1))
	l.Release(addr("10.0.0.2"), at(2))
	l.Release(addr("10.0.0.2"), at(9)) // not leased any more: rests since 2
	require.Equal(t, "10.0.0.4", next(l, 10))
	require.Equal(t, "10.0.0.3", next(l, 11), "its time is over")
	require.Equal(t, "10.0.0.2", next(l, 12))
	require.Equal(t, "10.0.0.5", next(l, 12))
	require.Equal(t, "10.0.0.6", next(l, 12))

	// Nothing else left: the one that was released longest ago.
	l.Release(addr("10.0.0.6"), at(20))
	l.Release(addr("10.0.0.2"), at(21))
	require.Equal(t, "10.0.0.6", next(l, 22))
	// A fixed one that rests.
	require.NoError(t, l.Take(addr("10.0.0.2")))
	require.ErrorIs(t, l.Take(addr("10.0.0.2")), ipam.ErrTaken)
	_, err := l.Allocate(at(1000))
	require.ErrorIs(t, err, ipam.ErrFull)

	// What an earlier run has left, in any order, before or after the leases.
	l = leases(t, "10.0.0.0/29", "", "", 10*time.Second)
	l.Rest(addr("10.0.0.4"), at(3))
	l.Rest(addr("10.0.0.3"), at(5))
	l.Rest(addr("10.0.0.2"), at(1))
	l.Rest(addr("10.0.0.2"), at(4)) // the later one counts
	l.Rest(addr("10.0.0.2"), at(2))
	require.NoError(t, l.Take(addr("10.0.0.5")))
	l.Rest(addr("10.0.0.5"), at(0))
	require.Equal(t, "10.0.0.6", next(l, 6))
	require.Equal(t, "10.0.0.4", next(l, 7))
	require.Equal(t, "10.0.0.2", next(l, 7))
	require.Equal(t, "10.0.0.3", next(l, 7))
	_, err = l.Allocate(at(8))
	require.ErrorIs(t, err, ipam.ErrFull)

	// An address outside of the range is nobody's but by choice: it has no need of rest.
	l = leases(t, "10.0.0.0/24", "", "10.0.0.128/31", time.Hour)
	require.NoError(t, l.Take(addr("10.0.0.9")))
	l.Release(addr("10.0.0.9"), at(0))
	require.Equal(t, []string{"10.0.0.128", "10.0.0.129"}, all(t, l, at(1)))
	require.NoError(t, l.Take(addr("10.0.0.9")))
}

// model is Leases without any thought for speed.
type model struct {
	subnet ipam.Subnet
	rest   time.Duration
	leased map[netip.Addr]bool
	rests  map[netip.Addr]time.Time
	usable []netip.Addr // of the range
}

func newModel(s ipam.Subnet, rest time.Duration) *model {
	m := &model{s, rest, make(map[netip.Addr]bool), make(map[netip.Addr]time.Time), nil}
	r := s.Prefix
	if s.Range.IsValid() {
		r = s.Range
	}
	for a := r.Addr(); r.Contains(a); a = a.Next() {
		if !m.reserved(a) {
			m.usable = append(m.usable, a)
		}
	}
	return m
}

func (m *model) reserved(a netip.Addr) bool {
	p := m.subnet.Prefix
	wide := p.Addr().BitLen()-p.Bits() >= 2
	return a == m.subnet.Gateway ||
		wide && (a == p.Addr() || a.Is4() && !p.Contains(a.Next()))
}

func (m *model) allocate(now time.Time) (netip.Addr, error) {
	best := netip.Addr{}
	for _, a := range m.usable {
		if m.leased[a] {
			continue
		}
		at, rests := m.rests[a]
		if !rests || now.Sub(at) >= m.rest {
			best = a
			break
		}
		if !best.IsValid() || at.Before(m.rests[best]) {
			best = a
		}
	}
	if !best.IsValid() {
		return best, ipam.ErrFull
	}
	delete(m.rests, best)
	m.leased[best] = true
	return best, nil
}

func (m *model) take(a netip.Addr) error {
	switch {
	case !m.subnet.Prefix.Contains(a):
		return ipam.ErrOutside
	case m.reserved(a):
		return ipam.ErrReserved
	case m.leased[a]:
		return ipam.ErrTaken
	}
	delete(m.rests, a)
	m.leased[a] = true
	return nil
}

func (m *model) release(a netip.Addr, now time.Time) {
	if m.leased[a] {
		delete(m.leased, a)
		m.rests[a] = now
	}
}

func (m *model) restore(a netip.Addr, at time.Time) {
	old, rests := m.rests[a]
	if !m.leased[a] && !m.reserved(a) && (!rests || at.After(old)) {
		m.rests[a] = at
	}
}

// againstModel does what the bytes say to leases and to their model.
func againstModel(t *testing.T, ops []byte) {
	next := func() int {
		if len(ops) == 0 {
			return 0
		}
		b := ops[0]
		ops = ops[1:]
		return int(b)
	}
	s := ipam.Subnet{Prefix: prefix("10.1.2.0/24")}
	if next()%2 == 1 {
		s.Prefix = prefix("fd00::1:200/120")
	}
	// At most 256 addresses in all; the range starts anywhere.
	length := s.Prefix.Addr().BitLen()
	pick := func(p netip.Prefix, n int) netip.Addr {
		a := p.Addr()
		for range n {
			a = a.Next()
		}
		return a
	}
	whole := s.Prefix
	bits := whole.Bits() + next()%8
	s.Prefix = netip.PrefixFrom(pick(whole, next()), bits).Masked()
	if n := next(); n%2 == 1 {
		s.Range = netip.PrefixFrom(pick(s.Prefix, next()), bits+next()%(length-bits+1)).Masked()
	}
	if n := next(); n%2 == 1 {
		s.Gateway = pick(s.Prefix, next())
	}
	s, err := s.Normalize()
	if err != nil {
		return
	}
	rest := time.Duration(next()) * time.Second
	l, m := ipam.NewLeases(s, rest), newModel(s, rest)
	now := epoch
	for len(ops) > 0 {
		switch op := next(); op % 8 {
		case 0, 1, 2:
			got, err := l.Allocate(now)
			want, wantErr := m.allocate(now)
			require.Equal(t, want, got, "allocate of %v", s)
			require.True(t, errors.Is(err, wantErr), "allocate: %v, want %v", err, wantErr)
		case 3:
			a := pick(whole, next())
			err, want := l.Take(a), m.take(a)
			require.True(t, errors.Is(err, want), "take %v of %v: %v, want %v", a, s, err, want)
		case 4, 5, 6:
			a := pick(whole, next())
			if op&8 == 0 {
				l.Release(a, now)
				m.release(a, now)
				break
			}
			at := now.Add(-time.Duration(next()) * time.Second)
			l.Rest(a, at)
			if s.Prefix.Contains(a) {
				m.restore(a, at)
			}
		case 7:
			now = now.Add(time.Duration(next()) * time.Second)
		}
	}
}

func TestLeasesAgainstModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range count(20_000) {
		ops := make([]byte, 20+rng.IntN(600))
		for i := range ops {
			ops[i] = byte(rng.Uint32())
		}
		againstModel(t, ops)
	}
}

func FuzzLeases(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 10, 0, 0, 3, 2, 4, 3, 0, 7, 9, 0})
	f.Add([]byte{1, 6, 77, 1, 3, 5, 1, 2, 3, 0, 0, 0, 12, 3, 4, 12, 4, 200, 0, 0})
	f.Fuzz(againstModel)
}

// patterns are a million leases in a /8.
var patterns = map[string]func(t testing.TB, l *ipam.Leases){
	"dense": func(t testing.TB, l *ipam.Leases) {
		for range million {
			if _, err := l.Allocate(epoch); err != nil {
				t.Fatal(err)
			}
		}
	},
	"every second": func(t testing.TB, l *ipam.Leases) {
		for i := range million {
			take(t, l, uint32(2*i+2))
		}
	},
	"random": func(t testing.TB, l *ipam.Leases) {
		rng := rand.New(rand.NewPCG(1, 2))
		for n := 0; n < million; {
			if l.Take(at8(rng.Uint32()&(1<<24-1))) == nil {
				n++
			}
		}
	},
	// The lowest free address is the last one that is looked at.
	"dense from the end of a gap": func(t testing.TB, l *ipam.Leases) {
		for i := range million {
			take(t, l, uint32(i+2))
		}
		l.Release(at8(million), epoch)
	},
}

const million = 1_000_000

func at8(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
}

func take(t testing.TB, l *ipam.Leases, n uint32) {
	if err := l.Take(at8(n)); err != nil {
		t.Fatal(err)
	}
}

// Allocation in a /8 with a million leases: at most 1 ms, by the median of a thousand.
func TestMillionLeases(t *testing.T) {
	for name, fill := range patterns {
		t.Run(name, func(t *testing.T) {
			before := heap()
			l := leases(t, "10.0.0.0/8", "", "", 0)
			start := time.Now()
			fill(t, l)
			filled := time.Since(start)
			memory := heap() - before

			var took []time.Duration
			for range 1000 {
				start := time.Now()
				a, err := l.Allocate(epoch.Add(time.Hour))
				took = append(took, time.Since(start))
				require.NoError(t, err)
				require.ErrorIs(t, l.Take(a), ipam.ErrTaken)
			}
			slices.Sort(took)
			t.Logf("filled in %v; %.1f MB; allocate p50 %v, p99 %v, max %v",
				filled.Round(time.Millisecond), float64(memory)/1e6, took[500], took[990], took[999])
			require.LessOrEqual(t, took[500], time.Millisecond)
			require.Less(t, memory, int64(64e6))
			runtime.KeepAlive(l)
		})
	}
}

// A wide IPv6 subnet costs what is used of it.
func TestWideSubnetMemory(t *testing.T) {
	before := heap()
	l := leases(t, "fd00::/16", "", "", time.Minute)
	for range 10_000 {
		_, err := l.Allocate(epoch)
		require.NoError(t, err)
	}
	require.NoError(t, l.Take(addr("fd00:ffff:ffff:ffff:ffff:ffff:ffff:ffff")))
	memory := heap() - before
	t.Logf("%d bytes", memory)
	require.Less(t, memory, int64(64<<10))
	runtime.KeepAlive(l)
}

// heap is what is reachable, in bytes.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func BenchmarkAllocate(b *testing.B) {
	for name, fill := range patterns {
		b.Run(name, func(b *testing.B) {
			l := leases(b, "10.0.0.0/8", "", "", 0)
			fill(b, l)
			b.ReportAllocs()
			for b.Loop() {
				a, err := l.Allocate(epoch)
				if err != nil {
					b.Fatal(err)
				}
				l.Release(a, epoch)
			}
		})
	}
}
