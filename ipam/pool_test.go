// SPDX-License-Identifier: Apache-2.0

package ipam_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/ipam"
)

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, prefix(s))
	}
	return out
}

// The pools give the Engine's subnets, in its order, and then no more.
func TestDefaultPools(t *testing.T) {
	var taken []netip.Prefix
	for {
		p, err := ipam.NextSubnet(ipam.DefaultPools(), taken)
		if err != nil {
			require.ErrorIs(t, err, ipam.ErrPoolsExhausted)
			require.Contains(t, err.Error(), "--subnet")
			break
		}
		taken = append(taken, p)
	}
	require.Len(t, taken, 15+16)
	for i, p := range taken[:15] {
		require.Equal(t, netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(17 + i), 0, 0}), 16), p)
	}
	for i, p := range taken[15:] {
		require.Equal(t, netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(16 * i), 0}), 20), p)
	}
}

func TestNextSubnet(t *testing.T) {
	pool := func(base string, bits int) ipam.Pool { return ipam.Pool{Base: prefix(base), Bits: bits} }
	for _, c := range []struct {
		name  string
		pool  ipam.Pool
		taken []netip.Prefix
		want  string // empty: exhausted
	}{
		{"nothing taken", pool("10.0.0.0/8", 24), nil, "10.0.0.0/24"},
		{"defaults do not count", pool("10.0.0.0/8", 24), prefixes("0.0.0.0/0", "0.0.0.0/1"), "10.0.0.0/24"},
		{"the other family does not count", pool("10.0.0.0/8", 24), prefixes("fd00::/8", "::/0"), "10.0.0.0/24"},
		{"a host route takes it", pool("10.0.0.0/8", 24), prefixes("10.0.0.77/32"), "10.0.1.0/24"},
		{"a large one takes many", pool("10.0.0.0/8", 24), prefixes("10.0.0.0/9"), "10.128.0.0/24"},
		{"a gap that is too small", pool("10.0.0.0/8", 23), prefixes("10.0.1.0/24", "10.0.2.0/24"), "10.0.4.0/23"},
		{"out of order, nested, twice", pool("10.0.0.0/8", 24), prefixes("10.0.2.0/24", "10.0.0.0/24", "10.0.0.0/23", "10.0.0.0/24"), "10.0.3.0/24"},
		{"host bits", pool("10.0.0.0/8", 24), []netip.Prefix{netip.PrefixFrom(addr("10.0.0.7"), 24)}, "10.0.1.0/24"},
		{"a larger one than the pool", pool("10.0.0.0/16", 24), prefixes("10.0.0.0/8"), ""},
		{"the last", pool("10.0.0.0/23", 24), prefixes("10.0.0.0/24"), "10.0.1.0/24"},
		{"none", pool("10.0.0.0/23", 24), prefixes("10.0.0.0/24", "10.0.1.0/30"), ""},
		{"the end of IPv4", pool("255.255.254.0/23", 24), prefixes("255.255.254.0/24", "255.255.255.0/30"), ""},
		{"whole", pool("10.0.0.0/8", 8), nil, "10.0.0.0/8"},
		{"IPv6", pool("fd00:1::/48", 64), prefixes("fd00:1::/64", "fd00:1:0:1::5/128"), "fd00:1:0:2::/64"},
		{"the end of IPv6", pool("ffff:ffff:ffff:ffff::/64", 65), prefixes("ffff:ffff:ffff:ffff::/65", "ffff:ffff:ffff:ffff:8000::/66"), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ipam.NextSubnet([]ipam.Pool{c.pool}, c.taken)
			if c.want == "" {
				require.ErrorIs(t, err, ipam.ErrPoolsExhausted)
				return
			}
			require.NoError(t, err)
			require.Equal(t, prefix(c.want), got)
		})
	}
	for _, bad := range []ipam.Pool{{}, pool("10.0.0.0/8", 7), pool("10.0.0.0/8", 33), pool("10.1.0.0/8", 24)} {
		_, err := ipam.NextSubnet([]ipam.Pool{bad}, nil)
		require.ErrorContains(t, err, "cannot be cut")
	}
	_, err := ipam.NextSubnet(nil, nil)
	require.ErrorIs(t, err, ipam.ErrPoolsExhausted)
}

// Against trying one after the other.
func TestNextSubnetProperty(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := mathrand.New(mathrand.NewPCG(seed, 0))
	for range count(20_000) {
		// Pools of at most 16 subnets, at the end of the addresses too.
		base := [][]byte{{10, 9, byte(rng.IntN(2)), 0}, {255, 255, 255, 0}}[rng.IntN(2)]
		from := 24 + rng.IntN(5)
		pool := ipam.Pool{Base: netip.PrefixFrom(netip.AddrFrom4([4]byte(base)), from), Bits: from + rng.IntN(5)}
		var taken []netip.Prefix
		for range rng.IntN(12) {
			a := [4]byte(base)
			a[3] = byte(rng.IntN(256))
			taken = append(taken, netip.PrefixFrom(netip.AddrFrom4(a), 23+rng.IntN(10)))
		}
		got, err := ipam.NextSubnet([]ipam.Pool{pool}, taken)
		want, ok := naiveNext(pool, taken)
		require.Equal(t, ok, err == nil, "%v %v", pool, taken)
		require.Equal(t, want, got, "%v %v", pool, taken)
	}
}

func naiveNext(pool ipam.Pool, taken []netip.Prefix) (netip.Prefix, bool) {
next:
	for a := pool.Base.Addr(); pool.Base.Contains(a); {
		p := netip.PrefixFrom(a, pool.Bits)
		for p.Contains(a) {
			a = a.Next()
		}
		for _, t := range taken {
			if t.Overlaps(p) {
				continue next
			}
		}
		return p, true
	}
	return netip.Prefix{}, false
}

func TestULA(t *testing.T) {
	p, err := ipam.ULA(bytes.NewReader([]byte{1, 2, 3, 4, 5}), prefixes("::/0", "fd00::/64"))
	require.NoError(t, err)
	require.Equal(t, prefix("fd01:203:405::/64"), p)

	// One that is taken is drawn again.
	p, err = ipam.ULA(bytes.NewReader([]byte{1, 2, 3, 4, 5, 1, 2, 3, 4, 6}), prefixes("fd01:203:405::/48"))
	require.NoError(t, err)
	require.Equal(t, prefix("fd01:203:406::/64"), p)

	_, err = ipam.ULA(rand.Reader, prefixes("fd00::/8"))
	require.ErrorIs(t, err, ipam.ErrPoolsExhausted)
	_, err = ipam.ULA(bytes.NewReader([]byte{1, 2}), nil)
	require.True(t, errors.Is(err, io.ErrUnexpectedEOF), "%v", err)

	seen := make(map[netip.Prefix]bool)
	for range 1000 {
		p, err := ipam.ULA(rand.Reader, nil)
		require.NoError(t, err)
		_, err = ipam.Subnet{Prefix: p}.Normalize()
		require.NoError(t, err)
		seen[p] = true
	}
	assert.Len(t, seen, 1000)
}

// A default network's creation with 500 networks present must not notice this.
func BenchmarkNextSubnet(b *testing.B) {
	pools := []ipam.Pool{{Base: prefix("10.0.0.0/8"), Bits: 24}}
	var taken []netip.Prefix
	for range 500 {
		p, err := ipam.NextSubnet(pools, taken)
		require.NoError(b, err)
		taken = append(taken, p)
	}
	for b.Loop() {
		if _, err := ipam.NextSubnet(pools, taken); err != nil {
			b.Fatal(err)
		}
	}
}
