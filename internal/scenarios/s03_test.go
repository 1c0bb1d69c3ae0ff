// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s03: a reverse proxy finds its backend by the container's name.
func s03(t *testing.T, w *world) {
	w.MustRun(t, "network", "create", "web")
	w.Serve(t, "--name dashboard --network web", "--http 9090 --text from-the-dashboard")
	w.Serve(t, "--name proxy --network web -p 8080:80",
		"--http 80 --text from-the-proxy --proxy /api=http://dashboard:9090/")

	for _, from := range []*lab.NS{w.Client, w.Client2} {
		assert.Equal(t, "from-the-dashboard", fetch(t, from, "http://"+addrPort(lab.Host4, "8080")+"/api"), from.Name)
		assert.Equal(t, "from-the-proxy", fetch(t, from, "http://"+addrPort(lab.Host4, "8080")+"/"), from.Name)
	}
}
