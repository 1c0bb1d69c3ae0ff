// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s14: one container serves a page and passes two ports on to linked containers.
func s14(t *testing.T, w *world) {
	w.Serve(t, "--name python1", "--http 8000 --text python")
	w.Serve(t, "--name httpd1", "--http 80 --text httpd")
	w.Start(t, "--name proxy -p 8000:80 -p 8001:8001 -p 8002:8002 --link python1 --link httpd1", "sh", "-c", `
		labtool serve --http 80 --text index &
		labtool serve --http 8001 --proxy /=http://python1:8000/ &
		labtool serve --http 8002 --proxy /=http://httpd1:80/ &
		wait`)
	w.WaitLog(t, "proxy", "ready\nready\nready")
	for to, want := range map[string]string{
		"127.0.0.1:8000": "index", "127.0.0.1:8001": "python", "127.0.0.1:8002": "httpd",
	} {
		assert.Equal(t, want, fetch(t, w.Host, "http://"+to+"/"), to)
	}
	for hostPort, want := range map[string]string{"8000": "index", "8001": "python", "8002": "httpd"} {
		assert.Equal(t, want, fetch(t, w.Client, "http://"+addrPort(lab.Host4, hostPort)+"/"), hostPort)
	}
}
