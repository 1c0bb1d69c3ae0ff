// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

func tupleOf(src, dst string) policy.Tuple {
	return policy.Tuple{Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst)}
}

// Needs root. What netfilter is told it tells again, with the translation, and what it knew of the same
// tuples is replaced.
func TestSwitchTrack(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	list := []policy.Tracked{
		{Proto: 6, Orig: tupleOf("172.18.0.2:4000", "198.51.100.9:443"), Reply: tupleOf("198.51.100.9:443", "192.0.2.1:61000"), Answered: true},
		{Proto: 17, Orig: tupleOf("172.18.0.2:4000", "198.51.100.9:53"), Reply: tupleOf("198.51.100.9:53", "192.0.2.1:61001"), Answered: true},
		{Proto: 17, Orig: tupleOf("172.18.0.2:4001", "198.51.100.9:53"), Reply: tupleOf("198.51.100.9:53", "192.0.2.1:61002")},
		{Proto: 1, Orig: tupleOf("172.18.0.2:77", "198.51.100.9:0"), Reply: tupleOf("198.51.100.9:0", "192.0.2.1:78"), Answered: true},
		{Proto: 6, Orig: tupleOf("198.51.100.9:5000", "192.0.2.1:8080"), Reply: tupleOf("172.18.0.2:80", "198.51.100.9:5000"), Answered: true},
		{Proto: 6, Orig: tupleOf("172.20.0.2:5000", "192.0.2.1:8080"), Reply: tupleOf("172.18.0.2:80", "172.18.0.1:6000"), Answered: true},
		{Proto: 6, Orig: tupleOf("[fd00::2]:4000", "[2001:db8::9]:443"), Reply: tupleOf("[2001:db8::9]:443", "[2001:db8::1]:61000"), Answered: true},
		{Proto: 58, Orig: tupleOf("[fd00::2]:77", "[2001:db8::9]:0"), Reply: tupleOf("[2001:db8::9]:0", "[2001:db8::1]:78"), Answered: true},
		{Proto: 17, Orig: tupleOf("172.18.0.2:4002", "198.51.100.9:53"), Reply: tupleOf("198.51.100.9:53", "172.18.0.2:4002")},
	}
	// The answers of an echo carry the identifier as destination port.
	for i, k := range list {
		if k.Proto == 1 || k.Proto == 58 {
			list[i].Reply = policy.Tuple{Src: netip.AddrPortFrom(k.Reply.Src.Addr(), 0), Dst: k.Reply.Dst}
		}
	}
	read := func() (out []policy.Tracked) {
		t.Helper()
		require.NoError(t, l.Host.Do(func() (err error) {
			out, err = netdev.Tracked()
			return err
		}))
		return out
	}
	for range 2 {
		require.NoError(t, l.Host.Do(func() error {
			n, err := netdev.Track(list)
			assert.Equal(t, len(list), n)
			return err
		}))
		assert.ElementsMatch(t, list, read())
	}
	// The same flow under another port: the old entry is in the way.
	list[0].Reply = tupleOf("198.51.100.9:443", "192.0.2.1:61009")
	require.NoError(t, l.Host.Do(func() error {
		_, err := netdev.Track(list[:1])
		return err
	}))
	assert.ElementsMatch(t, list, read())
	assert.Contains(t, strings.Join(l.Conntrack(t), "\n"), "[ASSURED]")
}
