// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root. The thinnest path: same network, published port, masquerade.
func TestSmoke(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	b := l.StartBpfnet(t, d)
	d.Serve(t, "--name", "web", "-p", "8080:80", "--", "--tcp", "80", "--udp", "80")
	d.MustRun(t, "run", "-d", "--name", "other", "lab", "sleep", "1000")
	t.Cleanup(func() { o, _ := b.CLI("stats"); t.Log(o) })
	before := l.NFTCounters(t)
	out, err := d.Run("exec", "other", "ping", "-c", "2", "-W", "2", "172.17.0.2")
	t.Log(out)
	require.NoError(t, err)
	r := l.Client.MustGet(t, "192.0.2.1:8080")
	require.Equal(t, lab.Client4, netip.MustParseAddrPort(r.View.Remote).Addr())
	require.Empty(t, l.NFTDelta(t, before))
	l.Client2.Serve(t, "--tcp", "7000")
	out, err = d.Run("exec", "other", "labtool", "get", "198.51.100.2:7000")
	t.Log(out)
	require.NoError(t, err)
	t.Log(b.MustCLI(t, "stats"))
}
