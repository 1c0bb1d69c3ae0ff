// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Labels and options are written by whoever writes them: what is read of one is never more open than Docker's default,
// unless it is one of the words for that, and says so where it is none.
func FuzzParseOptions(f *testing.F) {
	keys := []string{OptICC, OptMasquerade, OptHostBinding, OptMode4, OptMode6, OptTrusted, OptSource4, OptSource6, OptMTU}
	for i, value := range []string{
		"true", "0", "FALSE ", "yes", "nat-unprotected", "Nat-Unprotected", "routed\n", "isolated", "::ffff:127.0.0.1", "0.0.0.0",
		"fe80::1%eth0", "224.0.0.1", "::", "-1", "99999999999999999999", "1e3", "0x5dc", ":::", "eth0: eth0 :..", strings.Repeat("A", 70000),
		"\x00", "\xff\xfe", "%s%n", "$(reboot)", "../../etc/passwd", "٣", "true;drop",
	} {
		f.Add(uint8(i%len(keys)), value, i%2 == 0)
	}
	f.Fuzz(func(t *testing.T, which uint8, value string, internal bool) {
		key := keys[int(which)%len(keys)]
		o, problems := ParseOptions(map[string]string{key: value}, internal)
		again, _ := ParseOptions(map[string]string{key: value}, internal)
		require.Equal(t, o, again)
		for _, p := range problems {
			require.Equal(t, key, p.Setting)
			require.NotEmpty(t, p.Text)
			require.NotEmpty(t, p.Instead)
		}
		for _, mode := range []GatewayMode{o.Mode4, o.Mode6} {
			if mode == ModeNATUnprotected || mode == ModeRouted {
				require.Contains(t, []string{"nat-unprotected", "routed"}, value)
				require.False(t, internal)
			}
		}
		for _, a := range []netip.Addr{o.Source4, o.Source6, o.HostBinding} {
			require.Empty(t, a.Zone())
			require.False(t, a.Is4In6())
		}
		require.False(t, o.Source4.IsValid() && !o.Source4.Is4())
		require.False(t, o.Source6.IsValid() && !o.Source6.Is6())
		if o.MTU != 0 {
			require.True(t, o.MTU >= 68 && o.MTU <= 65535)
		}
		for _, name := range o.Trusted {
			require.Equal(t, strings.TrimSpace(name), name)
			require.NotContains(t, name, ":")
		}
	})
}
