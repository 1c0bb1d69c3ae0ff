// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s13: names and aliases on a network of the user's own.
func s13(t *testing.T, w *world) {
	w.MustRun(t, "network", "create", "names")
	w.MustRun(t, "network", "create", "elsewhere")
	noSuchName(t, w.Client2, lab.Internet4) // what the strangers are left to ask
	w.Serve(t, "--name first --network names --network-alias db --network-alias storage", "--tcp 80")
	w.Serve(t, "--name second --network names --network-alias web --network-alias db", "--tcp 80")
	w.Serve(t, "--name stranger --network elsewhere --dns 203.0.113.1", "--tcp 80")
	w.Serve(t, "--name plain --dns 203.0.113.1", "--tcp 80") // on the default network

	hosts := map[string][]string{ // name: who may answer to it
		"first": {"first"}, "storage": {"first"}, "second": {"second"}, "web": {"second"}, "db": {"first", "second"},
	}
	for _, from := range []string{"first", "second"} {
		for name, who := range hosts {
			out, err := w.Run("exec", from, "ping", "-c", "1", "-W", "2", name)
			require.NoError(t, err, "%s to %s: %s", from, name, out)
			assert.Equal(t, []int{64}, ttlsIn(out), out)
			var ids []string
			for _, c := range who {
				ids = append(ids, w.MustRun(t, "exec", c, "hostname"))
			}
			assert.Contains(t, ids, w.MustGet(t, from, name+":80").View.Host, "%s to %s", from, name)
		}
	}
	for _, from := range []string{"stranger", "plain"} {
		for name := range hosts {
			r, err := w.Get(from, name+":80")
			require.Error(t, err)
			assert.Contains(t, r.Error, "no such host", "%s to %s: %+v", from, name, r)
		}
	}
}
