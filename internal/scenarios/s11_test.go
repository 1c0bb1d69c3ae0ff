// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s11: published ports on the host's loopback address, one of them chosen by the engine.
func s11(t *testing.T, w *world) {
	w.Serve(t, "--name NAME -p 18000:8000 -p 18001:8000 -p 18000:8000/udp -p 8000", "--http 8000 --udp 8000 --text hello")
	gateway := netip.MustParseAddr("172.17.0.1")

	all := strings.Split(w.MustRun(t, "port", "NAME"), "\n")
	tcp := strings.Split(w.MustRun(t, "port", "NAME", "8000"), "\n")
	var listed []netip.AddrPort
	for _, line := range tcp {
		assert.Contains(t, all, "8000/tcp -> "+line)
		p, err := netip.ParseAddrPort(strings.Replace(line, ":::", "[::]:", 1))
		require.NoError(t, err)
		listed = append(listed, p)
	}
	assert.Contains(t, all, "8000/udp -> 0.0.0.0:18000")
	assert.Len(t, all, len(tcp)+2) // UDP, once a family
	assert.Len(t, listed, 6)       // three ports, once a family
	for _, any := range []string{"0.0.0.0", "[::]"} {
		for _, p := range []string{":18000", ":18001"} {
			assert.Contains(t, listed, netip.MustParseAddrPort(any+p))
		}
	}
	chosen := slices.DeleteFunc(slices.Clone(listed), func(p netip.AddrPort) bool {
		return p.Port() == 18000 || p.Port() == 18001
	})
	require.Len(t, chosen, 2)

	for _, p := range listed {
		loopback, host := "127.0.0.1", lab.Host4
		if p.Addr().Is6() {
			loopback, host = "::1", lab.Host6
		}
		for _, a := range []netip.Addr{netip.MustParseAddr(loopback), host} {
			to := netip.AddrPortFrom(a, p.Port()).String()
			assert.Equal(t, "hello", fetch(t, w.Host, "http://"+to+"/"), "host to %s", to)
		}
		// The chosen port of a family may be another's of the other family: each is dialled on its own.
		to := netip.AddrPortFrom(host, p.Port()).String()
		assert.Equal(t, "hello", fetch(t, w.Client, "http://"+to+"/"), "client to %s", to)
	}
	assert.Equal(t, "hello", fetch(t, w.Host, "http://localhost:18000/"))

	r := w.Host.MustGet(t, "--network", "udp", "127.0.0.1:18000")
	assert.Equal(t, gateway, remote(t, r), "who the server saw")
	r = w.Host.MustGet(t, "--network", "udp", "--unconnected", "127.0.0.1:18000")
	assert.Equal(t, "127.0.0.1:18000", r.From, "who answered")
}
