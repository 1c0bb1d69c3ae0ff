// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s04: two containers reach each other by alias on the container's port, and through the host's
// address on the published one.
func s04(t *testing.T, w *world) {
	w.MustRun(t, "network", "create", "testnet")
	w.Serve(t, "--name consul --network testnet -p 8500:8500 -p 8500:8500/udp --network-alias consul1",
		"--http 8500 --udp 8500 --text consul")
	w.Serve(t, "--name myservice --network testnet -p 5001:80 -p 5001:80/udp --network-alias myservice1",
		"--http 80 --udp 80 --text myservice")
	for _, c := range []struct{ from, alias, containerPort, hostPort, text string }{
		{"consul", "myservice1", "80", "5001", "myservice"},
		{"myservice", "consul1", "8500", "8500", "consul"},
		// And itself, the same ways.
		{"consul", "consul1", "8500", "8500", "consul"},
		{"myservice", "myservice1", "80", "5001", "myservice"},
	} {
		out, err := w.Run("exec", c.from, "ping", "-c", "1", "-W", "2", c.alias)
		require.NoError(t, err, out)
		assert.Equal(t, []int{64}, ttlsIn(out), out)
		for _, to := range []string{
			c.alias + ":" + c.containerPort,
			addrPort(lab.Host4, c.hostPort),
			addrPort(lab.HostB4, c.hostPort),
			addrPort(w.Gateway(t, "testnet"), c.hostPort),
		} {
			page, err := w.Run("exec", c.from, "wget", "-q", "-O", "-", "http://"+to+"/")
			if assert.NoError(t, err, "%s to %s", c.from, to) {
				assert.Equal(t, c.text, page, "%s to %s", c.from, to)
			}
			r, err := w.Get(c.from, "--network", "udp", to)
			if !assert.NoError(t, err, "%s to %s: %+v", c.from, to, r) {
				continue
			}
			assert.Equal(t, c.text, r.View.Text, "%s to %s", c.from, to)
			if c.text != c.from {
				assert.Equal(t, w.v4(t, c.from, "testnet"), remote(t, r), "%s to %s: who the server saw", c.from, to)
			}
		}
	}
}
