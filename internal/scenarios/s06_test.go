// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s06: links on the default network give names, and to nobody else.
func s06(t *testing.T, w *world) {
	noSuchName(t, w.Client2, lab.Internet4)
	w.Serve(t, "--name nginx_web1", "--http 80 --text nginx")
	w.Serve(t, "--name plain --dns 203.0.113.1 --link nginx_web1", "--tcp 80")
	w.Serve(t, "--name named --dns 203.0.113.1 --link nginx_web1:www", "--tcp 80")
	w.Serve(t, "--name other --dns 203.0.113.1", "--tcp 80")
	to := w.v4(t, "nginx_web1", w.Default()).String()
	for from, names := range map[string][]string{"plain": {"nginx_web1"}, "named": {"nginx_web1", "www"}} {
		for _, name := range names {
			out := w.MustRun(t, "exec", from, "wget", "-q", "-O", "-", "http://"+name+"/")
			assert.Equal(t, "nginx", out, "%s to %s", from, name)
			assert.Contains(t, w.MustRun(t, "exec", from, "cat", "/etc/hosts"), to)
		}
	}
	for from, name := range map[string]string{"plain": "www", "other": "nginx_web1", "nginx_web1": "plain"} {
		hosts := w.MustRun(t, "exec", from, "cat", "/etc/hosts")
		assert.NotContains(t, hosts, name, from)
	}
	r, err := w.Get("other", "nginx_web1:80")
	require.Error(t, err)
	assert.Equal(t, "resolve", r.Stage, "%+v", r)
}

// Needs root. With icc off on the default network, which is the bpfnet daemon's setting, links open what
// the linked container exposes, and nothing else.
func TestMobyLinks(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	w := &site{Lab: l, d: l.StartDocker(t, lab.DockerOpts{})}
	w.b = l.StartBpfnet(t, w.d, "--default-bridge-no-icc")
	t.Run("TestLegacyLink", func(t *testing.T) {
		m := w.maps(t)
		serve := func(name string, args ...string) {
			t.Helper()
			all := append([]string{"--name", name, "--hostname", name}, args...)
			w.d.Serve(t, append(all, "--", "--tcp", "80,81", "--udp", "80,81")...)
			w.ready(t, name)
		}
		serve("child", "--expose", "80", "--expose", "80/udp", "-p", "8080:80") // what is published is exposed
		serve("parent", "--link", "child", "--link", "child:www")
		serve("other")
		addr := map[string]netip.Addr{}
		for _, name := range []string{"child", "parent", "other"} {
			addr[name], _ = w.d.Addrs(t, name, "bridge")
		}
		const noICC = "icc_disabled/container"
		from := func(name string) dialled { return dialled{from: w.d.NS(t, name), seen4: addr[name]} }

		answered(t, m, from("parent").reaches("child", first, false, addr["child"])...)
		for _, name := range []string{"child", "www"} {
			r := w.d.MustGet(t, "parent", name+":80")
			require.Equal(t, "child", r.View.Host)
			require.Equal(t, addr["parent"], clientSeen(t, r))
		}
		unanswerable(t, m, slices.Concat(
			from("parent").not(noICC, second, true, addr["child"]),
			from("child").not(noICC, both, true, addr["parent"]),
			from("parent").not(noICC, both, true, addr["other"]),
			from("other").not(noICC, both, true, addr["child"]),
		)...)
		// What is published is for everybody, by the host's address.
		for _, name := range []string{"parent", "other"} {
			answered(t, m, probe{from: w.d.NS(t, name), network: "tcp", to: at(lab.Host4, 8080), host: "child", seen: addr[name]})
		}
		// The link goes with the container.
		w.remove(t, "parent", "")
		serve("parent")
		now, _ := w.d.Addrs(t, "parent", "bridge")
		require.Equal(t, addr["parent"], now, "the same address, and no link")
		unanswerable(t, m, from("parent").not(noICC, both, true, addr["child"])...)
	})
}
