// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"math/big"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The tree against a map, in neighbourhoods that span several levels and ones of a single node.
func TestTreeAgainstMap(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for _, width := range []int{1, 6, 7, 12, 13, 24, 64, 112, 127} {
		tr := newTree(width)
		set := make(map[u128]bool)
		span := 1 << min(width, 9) // numbers in play, at both ends
		number := func() u128 {
			x := u128{lo: uint64(rng.IntN(span))}
			if rng.IntN(2) == 0 {
				x = ones(width).sub(x)
			}
			return x
		}
		for range 5000 {
			x := number()
			switch rng.IntN(4) {
			case 0, 1:
				require.Equal(t, !set[x], tr.add(x))
				set[x] = true
			case 2:
				require.Equal(t, set[x], tr.remove(x))
				delete(set, x)
			default:
				want := x
				for set[want] {
					want = want.add(u128{lo: 1})
				}
				got, ok := tr.missing(x)
				if ones(width).less(want) { // only outside of the width, if anywhere
					require.True(t, !ok || ones(width).less(got))
					break
				}
				require.True(t, ok)
				require.Equal(t, want, got)
			}
			y := number()
			require.Equal(t, set[y], tr.has(y))
		}
		for x := range set {
			require.True(t, tr.remove(x))
		}
		require.Zero(t, tr.root, "an empty tree has no nodes")
	}
}

func TestU128(t *testing.T) {
	mod := new(big.Int).Lsh(big.NewInt(1), 128)
	toBig := func(x u128) *big.Int {
		n := new(big.Int).Lsh(new(big.Int).SetUint64(x.hi), 64)
		return n.Or(n, new(big.Int).SetUint64(x.lo))
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for range 10_000 {
		x := u128{rng.Uint64() >> rng.IntN(64), rng.Uint64() >> rng.IntN(64)}
		y := u128{rng.Uint64() >> rng.IntN(64), rng.Uint64() >> rng.IntN(64)}
		n := rng.IntN(133)
		bx, by := toBig(x), toBig(y)
		require.Zero(t, toBig(x.add(y)).Cmp(new(big.Int).Mod(new(big.Int).Add(bx, by), mod)))
		require.Zero(t, toBig(x.sub(y)).Cmp(new(big.Int).Mod(new(big.Int).Sub(bx, by), mod)))
		require.Zero(t, toBig(x.shl(n)).Cmp(new(big.Int).Mod(new(big.Int).Lsh(bx, uint(n)), mod)))
		require.Zero(t, toBig(x.shr(n)).Cmp(new(big.Int).Rsh(bx, uint(n))))
		require.Equal(t, bx.Cmp(by) < 0, x.less(y))
		require.Equal(t, x, number(x.addr(128)))
	}
}

// What is completely in the set has no nodes: a search passes it in one step.
func TestTreeForgetsFullParts(t *testing.T) {
	tr := newTree(24)
	for i := range uint64(2 * 64 * 64) {
		require.True(t, tr.add(u128{lo: i}))
	}
	require.Len(t, tr.root.kids, 1)
	require.Equal(t, &node{full: 0b11}, tr.root.kids[0])
	require.True(t, tr.remove(u128{lo: 64*64 + 70}))
	got, ok := tr.missing(u128{lo: 5})
	require.True(t, ok)
	require.Equal(t, u128{lo: 64*64 + 70}, got)
}
