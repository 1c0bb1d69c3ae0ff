// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// newOwnSite is a lab without Docker: blue and red are networks of bpfnet's own.
func newOwnSite(t *testing.T, daemon ...string) *site {
	t.Helper()
	return ownSite(t, lab.New(t, lab.Opts{}), daemon...)
}

// ownSite is the same in a lab that is there already.
func ownSite(t *testing.T, l *lab.Lab, daemon ...string) *site {
	t.Helper()
	w := &site{Lab: l, b: l.StartBpfnet(t, nil, daemon...)}
	for name, subnets := range map[string][2]string{"blue": {"172.30.0.0/16", blue6}, "red": {"172.31.0.0/16", red6}} {
		w.b.MustCLI(t, "network", "create", "-o", "com.docker.network.bridge.name="+name+"0", "--subnet", subnets[0], "--subnet", subnets[1], name)
	}
	return w
}

// sandbox starts a server on TCP and UDP port 80 in a sandbox that has its own name as host name.
func (w *site) sandbox(t *testing.T, name, network string, args ...string) {
	t.Helper()
	all := append([]string{"--name", name, "--hostname", name, "--network", network}, args...)
	w.b.Serve(t, append(all, "--", "--tcp", "80", "--udp", "80")...)
}

// placed is what a sandbox has that must outlive the daemon.
type placed struct {
	V4, V6 netip.Addr
	PID    int
	Ports  string // as "bpfnet port" prints them
	Inside string // as the sandbox itself sees its interfaces
}

func (w *site) placed(t *testing.T, name, network string) placed {
	t.Helper()
	p := placed{PID: w.b.Sandbox(t, name).PID, Ports: w.b.MustCLI(t, "port", name)}
	p.V4, p.V6 = w.b.Addrs(t, name, network)
	p.Inside = w.b.MustCLI(t, "exec", name, "ip", "-o", "addr")
	return p
}

// rows decodes the output of a listing with "-o json".
func rows(t *testing.T, out string) []map[string]any {
	t.Helper()
	var all []map[string]any
	require.NoError(t, json.Unmarshal([]byte(out), &all), out)
	return all
}

// belongs waits until bpfnet keeps no more on the host than before.
func (w *site) belongs(t *testing.T, before []string) {
	t.Helper()
	var now []string
	defer func() {
		if t.Failed() {
			t.Logf("before %s\nnow %s", strings.Join(before, ", "), strings.Join(now, ", "))
		}
	}()
	lab.Eventually(t, 10*time.Second, "nothing of the sandboxes is left", func() bool {
		now = w.b.Belongings(t)
		return slices.Equal(before, now)
	})
}
