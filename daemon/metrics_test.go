// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/docker"
	"github.com/bpfnet/bpfnet/relay"
)

// A relay that hangs does not hold the other metrics up.
func TestRelayThatHangs(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, relay.SocketName)) // nobody accepts
	require.NoError(t, err)
	defer l.Close()
	began := time.Now()
	_, err = relayMetrics(dir)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	assert.Less(t, time.Since(began), 8*time.Second)
}

// An engine that is lost shows at once, not with the next snapshot.
func TestSourcesAreLive(t *testing.T) {
	engine, err := docker.New(docker.Options{Host: "unix://" + t.TempDir() + "/none.sock"})
	require.NoError(t, err)
	written := time.Unix(100, 0)
	d := &Daemon{docker: engine}
	assert.Nil(t, d.liveSnapshot())
	d.snapshot = &api.Snapshot{Written: written, Sources: []api.Source{{Name: "docker", Connected: true}}}
	got := d.liveSnapshot().Sources
	require.Len(t, got, 2)
	assert.False(t, got[0].Connected, got[0].Name)
	assert.Equal(t, api.Source{Name: "netlink", Connected: true, LastSync: written}, got[1])
	assert.True(t, d.snapshot.Sources[0].Connected, "readers' own is left alone")
}
