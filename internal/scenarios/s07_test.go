// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s07: containers with the host's network, with none, and with another container's.
func s07(t *testing.T, w *world) {
	idle := attachments(w.snapshot(t))
	require.Contains(t, programs(t, w.Host), lab.HostIf+" ingress", "they are found where they are")

	t.Run("host", func(t *testing.T) {
		w.Serve(t, "--net=host --name on-host", "--tcp 7100 --udp 7100")
		t.Cleanup(func() { w.MustRun(t, "rm", "--force", "on-host") })
		for _, own := range []string{lab.HostIf, lab.HostIf2, w.Bridge()} {
			assert.Contains(t, w.MustRun(t, "exec", "on-host", "ip", "-o", "link"), ": "+own)
		}
		same, err := w.Run("exec", "on-host", "ip", "-o", "addr", "show", "dev", lab.HostIf)
		require.NoError(t, err)
		assert.Contains(t, same, lab.Host4.String())
		dropped := w.dropped(t, func() {
			for _, network := range []string{"tcp", "udp"} {
				for _, to := range []string{addrPort(lab.Host4, "7100"), addrPort(lab.Host6, "7100")} {
					r := w.Client.MustGet(t, "--network", network, to)
					assert.Contains(t, []string{lab.Client4.String(), lab.Client6.String()}, remote(t, r).String())
				}
				r := w.Host.MustGet(t, "--network", network, "127.0.0.1:7100")
				assert.Equal(t, "127.0.0.1", remote(t, r).String())
			}
			// The other way round: the host's port is the container's.
			w.Host.Serve(t, "--tcp", "7101")
			w.MustGet(t, "on-host", "127.0.0.1:7101")
		})
		assert.Empty(t, dropped)
		assert.Equal(t, idle, attachments(w.snapshot(t)), "nothing of ours came with it")
	})

	t.Run("none", func(t *testing.T) {
		w.Serve(t, "--net=none --name on-none", "--tcp 80 --udp 80")
		t.Cleanup(func() { w.MustRun(t, "rm", "--force", "on-none") })
		assert.Equal(t, "lo", w.MustRun(t, "exec", "on-none", "ls", "/sys/class/net"))
		n := w.NS(t, "on-none")
		n.MustGet(t, "127.0.0.1:80")
		for _, to := range []string{"203.0.113.1:80", "192.0.2.1:80", "172.17.0.1:80", "[2001:db8:3::1]:80"} {
			r, err := n.Get(to)
			require.Error(t, err)
			assert.Contains(t, []string{"ENETUNREACH", "EADDRNOTAVAIL"}, r.Errno, "%s: %+v", to, r)
		}
		assert.Empty(t, programs(t, n))
		assert.Equal(t, idle, attachments(w.snapshot(t)), "nothing of ours came with it")
		assert.Empty(t, w.snapshot(t).Endpoints)
	})

	t.Run("container", func(t *testing.T) {
		w.Serve(t, "--name tomcat_app1 -p 8080:8080", "--tcp 8080,80 --udp 80")
		t.Cleanup(func() { w.MustRun(t, "rm", "--force", "tomcat_app1", "tomcat_app2") })
		alone := attachments(w.snapshot(t))
		w.Serve(t, "--net=container:tomcat_app1 --name tomcat_app2", "--tcp 9090 --udp 9090")

		first := w.MustRun(t, "exec", "tomcat_app1", "ip", "-o", "addr")
		assert.Equal(t, first, w.MustRun(t, "exec", "tomcat_app2", "ip", "-o", "addr"))
		assert.Contains(t, first, w.v4(t, "tomcat_app1", w.Default()).String())
		for _, network := range []string{"tcp", "udp"} {
			r := w.MustGet(t, "tomcat_app1", "--network", network, "127.0.0.1:9090")
			assert.Equal(t, "127.0.0.1", remote(t, r).String())
		}
		r := w.MustGet(t, "tomcat_app2", "127.0.0.1:8080")
		assert.Equal(t, "127.0.0.1", remote(t, r).String())
		// To the world they are one.
		w.Client2.Serve(t, "--tcp", "7000")
		for _, c := range []string{"tomcat_app1", "tomcat_app2"} {
			r := w.MustGet(t, c, addrPort(lab.Internet4, "7000"))
			assert.Equal(t, lab.HostB4, remote(t, r), "who the server saw")
		}
		published := w.Client.MustGet(t, addrPort(lab.Host4, "8080"))
		assert.Equal(t, lab.Client4, remote(t, published), "who the server saw")

		assert.Empty(t, programs(t, w.NS(t, "tomcat_app2")), "inside the namespace")
		assert.Equal(t, alone, attachments(w.snapshot(t)), "nothing of ours came with the second")
		assert.Len(t, w.snapshot(t).Endpoints, 1)
	})
}

// programs lists where BPF programs are on the devices of a namespace: tcx, xdp, or a clsact qdisc
// that could hold some.
func programs(t *testing.T, n *lab.NS) []string {
	t.Helper()
	var found []string
	err := n.Do(func() error {
		h, err := netlink.NewHandle()
		if err != nil {
			return err
		}
		defer h.Close()
		links, err := h.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			name, index := l.Attrs().Name, l.Attrs().Index
			for hook, at := range map[string]ebpf.AttachType{
				"ingress": ebpf.AttachTCXIngress, "egress": ebpf.AttachTCXEgress,
			} {
				r, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: at})
				if err != nil {
					return err
				}
				for range r.Programs {
					found = append(found, name+" "+hook)
				}
			}
			if xdp := l.Attrs().Xdp; xdp != nil && xdp.Attached {
				found = append(found, name+" xdp")
			}
			qdiscs, err := h.QdiscList(l)
			if err != nil {
				return err
			}
			for _, q := range qdiscs {
				if q.Type() == "clsact" {
					found = append(found, name+" clsact")
				}
			}
		}
		return nil
	})
	require.NoError(t, err)
	return found
}
