// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

const dockerfile = `FROM lab
RUN labtool get 203.0.113.1:7300 > /answer
RUN wget -q -O /page http://198.51.100.2:7301/
`

// s18: a build whose steps fetch from outside, classic or with BuildKit, which makes endpoints
// without containers and without events.
func s18(t *testing.T, w *world, buildkit string) {
	t.Setenv("DOCKER_BUILDKIT", buildkit)
	w.Client2.Serve(t, "--tcp", "7300", "--http", "7301")
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(dockerfile), 0o644))
	dropped := w.dropped(t, func() {
		w.MustRun(t, "build", "--no-cache", "-t", "built", dir)
	})
	// Before any container is started or removed, which would make the daemon look again.
	w.nothingLeft(t)
	t.Cleanup(func() { w.MustRun(t, "rmi", "--force", "built") })

	var r lab.Reply
	require.NoError(t, json.Unmarshal([]byte(w.MustRun(t, "run", "--rm", "built", "cat", "/answer")), &r))
	require.NoError(t, json.Unmarshal([]byte(r.Text), &r.View))
	assert.Equal(t, lab.HostB4, remote(t, r), "who the server saw")
	assert.Less(t, r.RTT, int64(1_000_000), "µs; TCP had to send again; drops meanwhile: %v", dropped)
	assert.Contains(t, w.MustRun(t, "run", "--rm", "built", "cat", "/page"), lab.HostB4.String())
}
