// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root. The engine runs bpfnet in docker-proxy's place for each published port: the port leads
// to the container before its process starts, an ephemeral one too, and the hook's socket is what
// keeps others off it.
func TestPortHook(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	hook := filepath.Join(l.Dir, "docker-proxy")
	t.Setenv("BPFNET_SOCKET", filepath.Join(l.Dir, "bpfnet.sock"))
	d := l.StartDocker(t, lab.DockerOpts{Proxy: true, ProxyPath: hook})
	b := l.StartBpfnet(t, d)
	require.NoError(t, os.Symlink(b.Binary(), hook))

	// The container's own program sees the port published: it dials it through the host at once.
	d.Serve(t, "--name", "web", "-p", "8080:80", "-p", "80", "-p", "8080:80/udp")
	port := strings.TrimPrefix(strings.Fields(d.MustRun(t, "port", "web", "80/tcp"))[0], "0.0.0.0:")
	ephemeral := ""
	for _, line := range strings.Fields(d.MustRun(t, "port", "web", "80/tcp")) {
		if p := strings.TrimPrefix(line, "0.0.0.0:"); p != line && p != "8080" {
			ephemeral = p
		}
	}
	require.NotEmpty(t, ephemeral, "published %s", port)
	for _, to := range []string{"8080", ephemeral} {
		r := l.Client.MustGet(t, "192.0.2.1:"+to)
		require.Equal(t, lab.Client4, netip.MustParseAddrPort(r.View.Remote).Addr(), "no proxy in between")
	}
	r := l.Client.MustGet(t, "--network", "udp", "192.0.2.1:8080")
	require.Equal(t, lab.Client4, netip.MustParseAddrPort(r.View.Remote).Addr())

	// "Address in use", in the engine's words, and the container does not start.
	_, err := d.Run("run", "-d", "--name", "second", "-p", "8080:80", "lab", "sleep", "100")
	require.ErrorContains(t, err, "already")

	// Gone with the container, and free for the next.
	d.MustRun(t, "rm", "-f", "web")
	lab.Eventually(t, 5*time.Second, "the port is no longer published", func() bool {
		out, err := b.CLI("status", "-o", "json")
		return err == nil && !strings.Contains(out, ":8080")
	})
	d.Serve(t, "--name", "third", "-p", "8080:80")
	l.Client.MustGet(t, "192.0.2.1:8080")

	// With the daemon down no container starts half: the engine is told why.
	b.Kill()
	_, err = d.Run("run", "-d", "--name", "fourth", "-p", "8081:80", "lab", "sleep", "100")
	require.ErrorContains(t, err, "the daemon is not running")
	l.Client.MustGet(t, "192.0.2.1:8080")
}
