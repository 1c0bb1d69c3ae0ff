// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// natUse is what the tests read of "bpfnet nat -o json".
type natUse struct {
	Ports        int
	Refused      uint64
	Ranges       []string
	Destinations []struct {
		Proto         string
		From          netip.Addr
		To            flowEnd
		Taken, Room   int
		Full, Refusal float64
		Most          string
		MostTaken     int `json:"most_taken"`
	}
}

func (w *site) nat(t *testing.T, args ...string) (out natUse) {
	t.Helper()
	text := w.b.MustCLI(t, append([]string{"nat", "-o", "json"}, args...)...)
	require.NoError(t, json.Unmarshal([]byte(text), &out), text)
	return out
}

// Needs root. Connections hold a port each towards their destination. Of a range of 20,000, the smallest that there is, most are
// taken towards one: it comes first, and what was refused is told.
func TestMasqueradeUse(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	l.Host.Sysctl(t, "net.ipv4.ip_local_port_range", "1024 65535")
	w := ownSite(t, l)
	w.sandbox(t, "web", "blue", "-p", "50000:80")
	w.sandbox(t, "db", "red")
	far := w.Client2.Serve(t, "--tcp", "7000")
	defer far.Kill()
	web, db := w.b.NS(t, "web"), w.b.NS(t, "db")
	require.Empty(t, w.nat(t).Destinations)

	for range 5 {
		converse(t, web, at(lab.Client24, 7000))
	}
	converse(t, db, at(lab.Client24, 7000))
	require.Len(t, ttls(db, lab.Client24, 1), 1)
	got := w.nat(t)
	assert.Equal(t, []string{"45536-65535"}, got.Ranges)
	assert.Equal(t, 19_999, got.Ports, "one is published")
	require.Len(t, got.Destinations, 2)
	d := got.Destinations[0]
	assert.Equal(t, [3]any{"tcp", lab.HostB4, flowEnd{Addr: lab.Client24, Port: 7000}}, [3]any{d.Proto, d.From, d.To})
	assert.Equal(t, [4]any{6, 19_999, "web", 5}, [4]any{d.Taken, d.Room, d.Most, d.MostTaken})
	assert.Less(t, d.Refusal, 1e-6)
	assert.Equal(t, [3]any{"icmp", 1, "db"}, [3]any{got.Destinations[1].Proto, got.Destinations[1].Taken, got.Destinations[1].Most})

	m := w.maps(t)
	begun := readCounters(t, m)
	from, _ := w.b.Addrs(t, "db", "red")
	rawUDP(t, openSocket(t, db, false, unix.SOCK_RAW, unix.IPPROTO_RAW), 25_000, from, netip.AddrPortFrom(lab.Client24, 7001))
	got = w.nat(t, "--limit", "1")
	require.Len(t, got.Destinations, 1)
	d = got.Destinations[0]
	assert.Equal(t, [2]any{"udp", uint16(7001)}, [2]any{d.Proto, d.To.Port})
	assert.Greater(t, d.Full, 0.9)
	assert.Greater(t, d.Refusal, 0.03)
	assert.Equal(t, d.Taken, d.MostTaken)
	refused := since(t, m, begun)["snat_exhausted/container"]
	assert.NotZero(t, refused)
	assert.Equal(t, refused, got.Refused)
	assert.Equal(t, 25_000, d.Taken+int(refused), "each has a port, or is refused")
	text := w.b.MustCLI(t, "nat", "--limit", "1")
	assert.Contains(t, text, fmt.Sprintf("Ports:     19999 towards each destination (45536-65535)\nRefused:   %d packets (snat_exhausted)\n", refused))
	assert.Contains(t, text, "and 2 more")
	assert.True(t, slices.ContainsFunc(strings.Split(text, "\n"), func(l string) bool {
		return strings.HasPrefix(l, "udp ") && strings.Contains(l, fmt.Sprintf("%v:7001", lab.Client24)) && strings.Contains(l, "db (")
	}), text)
}
