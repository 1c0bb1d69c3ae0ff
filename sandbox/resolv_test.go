// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestResolv(t *testing.T) {
	for _, c := range []struct {
		name, host string
		dns        []netip.Addr
		want       string
	}{
		{"nothing", "", nil, ""},
		{"the host's", "# by hand\nsearch example.com corp\nnameserver 192.0.2.53\nnameserver 2001:db8::53\noptions ndots:2\n", nil,
			"nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch example.com corp\noptions ndots:2\n"},
		{"given", "nameserver 192.0.2.53\nsearch example.com\n", addrs("198.51.100.1", "2001:db8::1"),
			"nameserver 198.51.100.1\nnameserver 2001:db8::1\nsearch example.com\n"},
		{"given, one of them none", "nameserver 192.0.2.53\n", []netip.Addr{{}, netip.MustParseAddr("198.51.100.1")}, "nameserver 198.51.100.1\n"},
		{"given, all of them none", "nameserver 192.0.2.53\n", []netip.Addr{{}}, "nameserver 192.0.2.53\n"},
		{"given, loopback", "", addrs("127.0.0.1"), "nameserver 127.0.0.1\n"},
		{"loopback", "nameserver 127.0.0.1\nnameserver ::1\nnameserver 0.0.0.0\nnameserver ::ffff:127.0.0.53\nnameserver 192.0.2.53\n", nil, "nameserver 192.0.2.53\n"},
		{"link-local", "nameserver fe80::1%eth0\nnameserver 169.254.169.253\n", nil, "nameserver 169.254.169.253\n"},
		{"the last list counts", "search a b\ndomain c\n", nil, "domain c\n"},
		{"the last list counts, again", "domain c\nsearch a b\n", nil, "search a b\n"},
		{"options add up", "options a\noptions  b\tc\n", nil, "options a\noptions b c\n"},
		{"no sense", "nameserver\nnameserver x\nsearch\nwhatever 1\n;nameserver 192.0.2.1\n#nameserver 192.0.2.2\nnameserver 192.0.2.53", nil, "nameserver 192.0.2.53\n"},
		{"other line ends", "nameserver 192.0.2.53\r\nsearch a\r\n", nil, "nameserver 192.0.2.53\nsearch a\n"},
	} {
		assert.Equal(t, c.want, string(Resolv([]byte(c.host), c.dns)), c.name)
	}
}

func TestHostResolv(t *testing.T) {
	const behind = "nameserver 192.0.2.53\n"
	for _, c := range []struct{ name, conf, resolved, want string }{
		{"plain", "nameserver 192.0.2.1\n", behind, "nameserver 192.0.2.1\n"},
		{"resolved", "# stub\nnameserver 127.0.0.53\noptions edns0 trust-ad\n", behind, behind},
		{"resolved and another", "nameserver 127.0.0.53\nnameserver 192.0.2.1\n", behind, "nameserver 127.0.0.53\nnameserver 192.0.2.1\n"},
		{"dnsmasq", "nameserver 127.0.0.1\n", behind, "nameserver 127.0.0.1\n"},
		{"resolved without its file", "nameserver 127.0.0.53\n", "", "nameserver 127.0.0.53\n"},
		{"none", "", behind, ""},
		{"no servers", "search a\n", behind, "search a\n"},
	} {
		dir := t.TempDir()
		conf, resolved := filepath.Join(dir, "conf"), filepath.Join(dir, "resolved")
		if c.conf != "" {
			writeFile(t, conf, c.conf)
		}
		if c.resolved != "" {
			writeFile(t, resolved, c.resolved)
		}
		got, err := hostResolv(conf, resolved)
		require.NoError(t, err, c.name)
		assert.Equal(t, c.want, string(got), c.name)
	}
	_, err := hostResolv(t.TempDir(), "")
	require.ErrorContains(t, err, "read name servers")
	got, err := HostResolv()
	require.NoError(t, err)
	assert.NotContains(t, string(Resolv(got, nil)), "nameserver 127.")
}

// What comes out is a resolv.conf with servers that a sandbox can reach and that it was told, and
// is the same when it goes in again.
func FuzzResolv(f *testing.F) {
	f.Add("nameserver 127.0.0.53\noptions edns0\nsearch a b\n", "")
	f.Add("nameserver fe80::1%2\nnameserver ::ffff:8.8.8.8\ndomain x", "192.0.2.1 2001:db8::1")
	f.Add("search\x85a\u2028b\nnameserver 1.1.1.1 2.2.2.2\noptions \x00", "")
	f.Add("nameserver 2001:db8::1%0\n", "")
	f.Fuzz(func(t *testing.T, host, given string) {
		var dns []netip.Addr
		want := make(map[netip.Addr]bool)
		for text := range strings.FieldsSeq(given) {
			a, _ := netip.ParseAddr(text)
			dns = append(dns, a)
			want[a] = a.IsValid()
		}
		out := Resolv([]byte(host), dns)
		lists, servers := 0, 0
		for line := range strings.Lines(string(out)) {
			require.True(t, strings.HasSuffix(line, "\n"))
			f := strings.Fields(line)
			require.GreaterOrEqual(t, len(f), 2, line)
			switch f[0] {
			case "nameserver":
				servers++
				a, err := netip.ParseAddr(f[1])
				require.NoError(t, err)
				if !want[a] {
					require.Contains(t, host, "nameserver")
					require.False(t, a.Unmap().IsLoopback() || a.IsUnspecified(), line)
					require.Empty(t, a.Zone())
				}
			case "search", "domain":
				lists++
			default:
				require.Equal(t, "options", f[0])
			}
		}
		require.LessOrEqual(t, lists, 1)
		for a, valid := range want {
			if valid {
				require.Contains(t, string(out), "nameserver "+a.String()+"\n")
			}
		}
		require.Equal(t, string(out), string(Resolv(out, dns)))
		if len(dns) == 0 {
			require.Equal(t, string(out), string(Resolv(out, nil)))
		}
	})
}
