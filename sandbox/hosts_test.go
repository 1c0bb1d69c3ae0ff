// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, a := range list {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

func entry(a string, names ...string) HostsEntry {
	return HostsEntry{netip.MustParseAddr(a), names}
}

func TestHosts(t *testing.T) {
	long := make([]string, 3)
	for i := range long {
		long[i] = strings.Repeat(string(rune('a'+i)), 240)
	}
	for _, c := range []struct {
		name string
		file HostsFile
		want string // after what every file begins with
	}{
		{"nothing", HostsFile{}, ""},
		{"no address", HostsFile{Hostname: "web"}, ""},
		{"own", HostsFile{Hostname: "web", Addrs: addrs("fd00::2", "172.18.0.2", "172.17.0.2", "172.17.0.2")},
			"172.17.0.2\tweb\n172.18.0.2\tweb\nfd00::2\tweb\n"},
		{"neighbours", HostsFile{Neighbours: []HostsEntry{
			entry("fd00::3", "db"), entry("172.17.0.10", "cache"), entry("172.17.0.3", "db", "sql", "9f8e7d"),
		}}, "172.17.0.3\tdb sql 9f8e7d\n172.17.0.10\tcache\nfd00::3\tdb\n"},
		{"two entries of one address", HostsFile{Neighbours: []HostsEntry{
			entry("172.17.0.3", "x", "db"), entry("172.17.0.3", "db", "DB", "y"),
		}}, "172.17.0.3\tdb y x\n"},
		{"a name of two", HostsFile{Neighbours: []HostsEntry{entry("172.17.0.4", "pool"), entry("172.17.0.3", "pool")}},
			"172.17.0.3\tpool\n172.17.0.4\tpool\n"},
		{"names that are taken", HostsFile{Hostname: "web", Addrs: addrs("172.17.0.2"), Neighbours: []HostsEntry{
			entry("172.17.0.3", "WEB", "localhost", "ip6-localhost", "db"), entry("172.17.0.4", "LocalHost"),
		}}, "172.17.0.2\tweb\n172.17.0.3\tdb\n"},
		{"a hostname that is taken", HostsFile{Hostname: "localhost", Addrs: addrs("172.17.0.2")}, ""},
		{"names that are none", HostsFile{Hostname: "a b", Addrs: addrs("172.17.0.2"), Neighbours: []HostsEntry{
			entry("172.17.0.3", "", "x\n1.2.3.4 bank", "#x", "ok", strings.Repeat("x", 256), "é"), entry("172.17.0.4"),
		}}, "172.17.0.3\tok\n"},
		{"addresses that are none", HostsFile{Hostname: "web", Addrs: []netip.Addr{{}}, Neighbours: []HostsEntry{{netip.Addr{}, []string{"db"}}}}, ""},
		{"addresses of other forms", HostsFile{Hostname: "web", Addrs: addrs("::ffff:172.17.0.2", "fe80::1%eth0")}, "172.17.0.2\tweb\nfe80::1\tweb\n"},
		{"more than a line", HostsFile{Neighbours: []HostsEntry{entry("172.17.0.3", long...)}},
			"172.17.0.3\t" + long[0] + " " + long[1] + "\n172.17.0.3\t" + long[2] + "\n"},
	} {
		assert.Equal(t, hostsBegin+c.want, string(Hosts(c.file)), c.name)
	}
}

// lookup reads a hosts file as the resolver does: all addresses of a name, whatever its case.
func lookup(t *testing.T, file []byte) map[string][]netip.Addr {
	t.Helper()
	found := make(map[string][]netip.Addr)
	for line := range strings.Lines(string(file)) {
		require.LessOrEqual(t, len(line), maxHostsLine)
		require.True(t, strings.HasSuffix(line, "\n"))
		f := strings.Fields(line)
		require.GreaterOrEqual(t, len(f), 2, line)
		a, err := netip.ParseAddr(f[0])
		require.NoError(t, err)
		for _, name := range f[1:] {
			require.True(t, hostName(name), name)
			name = strings.ToLower(name)
			require.NotContains(t, found[name], a, "twice: %s", name)
			found[name] = append(found[name], a)
		}
	}
	return found
}

// The file says of each name what was asked for, and nothing else, in whatever order it was.
func FuzzHosts(f *testing.F) {
	f.Add("web", "172.17.0.2 fd00::2", "172.17.0.3 db sql\n172.17.0.4 db\nfd00::3 web x")
	f.Add("localhost", "127.0.0.1", "::ffff:1.2.3.4 a\n1.2.3.4 A b")
	f.Add("x", "", "1.1.1.1 "+strings.Repeat("abcdefg ", 100))
	f.Add("", "", "fe80::1%eth0 é \x00 #\n\n1.1.1.1")
	standard := []byte(hostsBegin)
	f.Fuzz(func(t *testing.T, hostname, own, neighbours string) {
		h := HostsFile{Hostname: hostname}
		for text := range strings.FieldsSeq(own) {
			a, _ := netip.ParseAddr(text)
			h.Addrs = append(h.Addrs, a)
		}
		for line := range strings.Lines(neighbours) {
			if text := strings.Fields(line); len(text) > 0 {
				a, _ := netip.ParseAddr(text[0])
				h.Neighbours = append(h.Neighbours, HostsEntry{a, text[1:]})
			}
		}

		want := make(map[string]map[netip.Addr]bool)
		add := func(name string, a netip.Addr) {
			if name = strings.ToLower(name); hostName(name) && a.IsValid() {
				if want[name] == nil {
					want[name] = make(map[netip.Addr]bool)
				}
				want[name][a.Unmap().WithZone("")] = true
			}
		}
		begin := lookup(t, standard)
		taken := slices.Collect(maps.Keys(begin))
		if _, ok := begin[strings.ToLower(hostname)]; !ok && hostname != "" {
			for _, a := range h.Addrs {
				add(hostname, a)
			}
			taken = append(taken, strings.ToLower(hostname))
		}
		for _, e := range h.Neighbours {
			for _, name := range e.Names {
				if !slices.Contains(taken, strings.ToLower(name)) {
					add(name, e.Addr)
				}
			}
		}
		for name, list := range begin {
			for _, a := range list {
				add(name, a)
			}
		}

		file := Hosts(h)
		got := make(map[string]map[netip.Addr]bool)
		for name, list := range lookup(t, file) {
			got[name] = make(map[netip.Addr]bool)
			for _, a := range list {
				got[name][a] = true
			}
		}
		require.Equal(t, want, got)

		r := rand.New(rand.NewPCG(1, uint64(len(file))))
		r.Shuffle(len(h.Neighbours), func(i, j int) { h.Neighbours[i], h.Neighbours[j] = h.Neighbours[j], h.Neighbours[i] })
		r.Shuffle(len(h.Addrs), func(i, j int) { h.Addrs[i], h.Addrs[j] = h.Addrs[j], h.Addrs[i] })
		require.Equal(t, string(file), string(Hosts(h)))
	})
}
