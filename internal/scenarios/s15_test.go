// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s15: what shares the host's namespace, or a container's, is as on a machine without containers.
func s15(t *testing.T, w *world) {
	idle, quiet := attachments(w.snapshot(t)), w.forwarded(t)
	dropped := w.dropped(t, func() {
		w.Serve(t, "--network=host --name first", "--tcp 8000 --udp 8000")
		// As on any machine, a port has one owner, and an address of one's own is another port.
		w.Start(t, "--network=host --name late", "labtool", "serve", "--tcp", "8000")
		status := w.MustRun(t, "wait", "late")
		assert.Equal(t, "1", status)
		w.Serve(t, "--network=host --name second", "--tcp 8002 --udp 8002")
		w.Host.Serve(t, "--tcp", "8001", "--udp", "8001")
		for _, network := range []string{"tcp", "udp"} {
			for _, port := range []string{"8000", "8001", "8002"} {
				for _, from := range []string{"first", "second"} {
					r := w.MustGet(t, from, "--network", network, "127.0.0.1:"+port)
					assert.Equal(t, "127.0.0.1", remote(t, r).String(), "%s to %s", from, port)
				}
				for to, client := range map[string]string{
					"127.0.0.1": "127.0.0.1", "::1": "::1",
					lab.Host4.String(): lab.Host4.String(), lab.Host6.String(): lab.Host6.String(),
				} {
					r := w.Host.MustGet(t, "--network", network, "["+to+"]:"+port)
					assert.Equal(t, client, remote(t, r).String(), "host to %s, %s", to, port)
				}
				r := w.Client.MustGet(t, "--network", network, addrPort(lab.Host4, port))
				assert.Equal(t, lab.Client4, remote(t, r), port)
				r = w.Client.MustGet(t, "--network", network, addrPort(lab.Host6, port))
				assert.Equal(t, lab.Client6, remote(t, r), port)
			}
		}
		w.Client2.Serve(t, "--tcp", usualPort)
		r := w.MustGet(t, "first", addrPort(lab.Internet4, usualPort))
		assert.Equal(t, lab.HostB4, remote(t, r))
	})
	assert.Empty(t, dropped)
	assert.Equal(t, quiet, w.forwarded(t), "packets that we sent on, and flows")
	assert.Equal(t, idle, attachments(w.snapshot(t)), "nothing of ours came with them")

	w.Start(t, "--name pod", "sleep", "1000")
	w.ready(t, "pod", w.Default())
	before, quiet := attachments(w.snapshot(t)), w.forwarded(t)
	w.Serve(t, "--network=container:pod --name redis", "--tcp 6379 --listen 127.0.0.1")
	w.Start(t, "--network=container:pod --name app", "sleep", "1000")
	for _, from := range []string{"pod", "redis", "app"} {
		r := w.MustGet(t, from, "127.0.0.1:6379")
		assert.Equal(t, "127.0.0.1", remote(t, r).String(), from)
	}
	assert.Empty(t, programs(t, w.NS(t, "app")))
	assert.Equal(t, before, attachments(w.snapshot(t)))
	assert.Equal(t, quiet.flows, w.forwarded(t).flows)
	assert.Empty(t, w.snapshot(t).Ports)
	r, err := w.Host.Get(addrPort(w.v4(t, "pod", w.Default()), "6379"))
	require.Error(t, err)
	assert.Equal(t, "ECONNREFUSED", r.Errno, "it listens on 127.0.0.1 only: %+v", r)
}

// forwarded is what the data path has done to packets other than let them pass.
type forwarded struct {
	container, uplink, lo uint64 // packets redirected there
	flows                 [2]int // entries
}

func (w *world) forwarded(t *testing.T) forwarded {
	t.Helper()
	var out forwarded
	fates, err := w.maps.Fates()
	require.NoError(t, err)
	for _, f := range fates {
		switch f.Fate {
		case "container":
			out.container += f.Packets
		case "uplink":
			out.uplink += f.Packets
		case "lo":
			out.lo += f.Packets
		}
	}
	out.flows[0], out.flows[1], err = w.maps.Flows()
	require.NoError(t, err)
	return out
}
