// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// published waits until the daemon leads all host ports to the container, and it is ready.
func (w *site) published(t *testing.T, container string, ports ...string) {
	t.Helper()
	lab.Eventually(t, 10*time.Second, container+" is published", func() bool {
		s, err := api.ReadSnapshot(w.b.State)
		if err != nil {
			return false
		}
		led := map[string]bool{}
		for _, p := range s.Ports {
			if p.Container == container {
				led[p.Host+"/"+p.Proto] = true
			}
		}
		for _, p := range ports {
			if !led["0.0.0.0:"+p] {
				return false
			}
		}
		return slices.ContainsFunc(s.Endpoints, func(e api.Endpoint) bool { return e.Name == container && e.Ready })
	})
}

// forgotten waits until the daemon publishes nothing of the container.
func (w *site) forgotten(t *testing.T, container string) {
	t.Helper()
	lab.Eventually(t, 10*time.Second, container+" is published no more", func() bool {
		s, err := api.ReadSnapshot(w.b.State)
		return err == nil && !slices.ContainsFunc(s.Ports, func(p api.Port) bool { return p.Container == container })
	})
}

// a caller is a place from which a published port is dialled.
type caller struct {
	name string
	from *lab.NS
	args []string
	// connected is set where the socket itself was sent to the container: it ends with it, and its program
	// has to dial again.
	connected bool
}

// callers are all kinds of places; port is dialled at each address that leads there.
func (w *site) callers(t *testing.T, network string, port int) []caller {
	t.Helper()
	near, far := w.d.NS(t, "near"), w.d.NS(t, "far")
	blue4, blue6 := w.gateways(t, "blue")
	red4, red6 := w.gateways(t, "red")
	args := func(a string, more ...string) []string {
		return slices.Concat([]string{"--network", network}, more, []string{a})
	}
	all := []caller{
		{"remote", w.Client, args(at(lab.Host4, port)), false},
		{"remote v6", w.Client, args(at(lab.Host6, port)), false},
		{"near by host address", near, args(at(lab.Host4, port)), false},
		{"near by gateway v6", near, args(at(blue6, port)), false},
		{"far by gateway", far, args(at(red4, port)), false},
		{"far by neighbour's gateway", far, args(at(blue4, port)), false},
		{"far by host address v6", far, args(at(lab.Host6, port)), false},
		{"far by gateway v6", far, args(at(red6, port)), false},
		{"host", w.Host, args(fmt.Sprintf("127.0.0.1:%d", port)), true},
		{"host v6", w.Host, args(fmt.Sprintf("[::1]:%d", port)), true},
		{"host by its address", w.Host, args(at(lab.Host4, port)), true},
		{"host by a mapped address", w.Host, args(fmt.Sprintf("127.0.0.1:%d", port), "--mapped"), true},
		// Translated on lo: the socket is not what was sent elsewhere.
		{"host bound to loopback", w.Host, args(fmt.Sprintf("127.0.0.1:%d", port), "--bind", "127.0.0.1:0"), false},
	}
	if network == "udp" {
		for _, c := range slices.Clone(all) {
			all = append(all, caller{c.name + " unconnected", c.from, append([]string{"--unconnected"}, c.args...), false})
		}
	}
	return all
}

func (c caller) talk(t *testing.T, timeout time.Duration) *lab.Talk {
	t.Helper()
	return c.from.Talk(t, append([]string{"--timeout", timeout.String()}, c.args...)...)
}

// isReset says that a connection ended, by a reset or by the kernel's word, and did not hang.
func isReset(r lab.Reply) bool {
	return slices.Contains([]string{"ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "EPIPE"}, r.Errno)
}

// Needs root and a Docker Engine. A container with published ports goes and another one, with another
// address, publishes the same host ports: nobody's socket stays with the old one. The container's ports
// have other numbers than the host's (moby#53384).
func TestHygieneGone(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	// Each of many sockets is to hear that nobody is there; the kernel tells a peer six times in a row.
	w.Host.Sysctl(t, "net.ipv4.icmp_ratelimit", "0")
	w.Host.Sysctl(t, "net.ipv6.icmp.ratelimit", "0")
	w.idle(t, "near", "blue")
	w.idle(t, "far", "red")
	publish := []string{"-p", "5300:80/udp", "-p", "8088:80"}
	start := func(t *testing.T, name, network string) {
		t.Helper()
		w.serve(t, name, network, publish...)
		w.published(t, name, "5300/udp", "8088/tcp")
	}
	networks := []string{"blue", "red"}

	t.Run("UDP", func(t *testing.T) {
		start(t, "udp0", networks[0])
		callers := w.callers(t, "udp", 5300)
		talks := map[string]*lab.Talk{}
		for _, c := range callers {
			talks[c.name] = c.talk(t, 3*time.Second)
			r := talks[c.name].Say(t, "hello")
			require.Equal(t, "udp0", r.View.Host, "%s: %+v", c.name, r)
		}
		for i := range 3 {
			old, next := fmt.Sprintf("udp%d", i), fmt.Sprintf("udp%d", i+1)
			w.d.MustRun(t, "rm", "-f", old)
			w.forgotten(t, old)
			// Nobody is there, and who sends nevertheless learns it: no flow leads into the void.
			for _, c := range callers {
				if strings.HasSuffix(c.name, "unconnected") { // such a socket is never told
					talks[c.name].Send(t, "anybody?")
					continue
				}
				r := talks[c.name].Say(t, "anybody?")
				assert.Contains(t, []string{"ECONNREFUSED", "ECONNABORTED", "EDESTADDRREQ"}, r.Errno, "%s: %+v", c.name, r)
			}
			start(t, next, networks[(i+1)%2])
			for _, c := range callers {
				if c.connected {
					talks[c.name] = c.talk(t, 3*time.Second)
				}
				r := talks[c.name].Say(t, "hello")
				assert.Equal(t, next, r.View.Host, "%s: the next packet reaches the successor: %+v", c.name, r)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(talks)) {
			talks[name].Close()
		}
		w.d.MustRun(t, "rm", "-f", "udp3")
		w.forgotten(t, "udp3")
	})

	// The program ends, and its kernel says so; or its container is taken off the network, and nobody does.
	for _, way := range []string{"rm", "disconnect"} {
		t.Run("TCP "+way, func(t *testing.T) {
			start(t, "tcp", "blue")
			v4, v6 := w.d.Addrs(t, "tcp", "blue")
			callers := append(w.callers(t, "tcp", 8088),
				caller{"host by container address", w.Host, []string{at(v4, 80)}, true},
				caller{"host by container address v6", w.Host, []string{at(v6, 80)}, true})
			talks := map[string]*lab.Talk{}
			for _, c := range callers {
				talks[c.name] = c.talk(t, 10*time.Second)
				require.Equal(t, "tcp", talks[c.name].First.View.Host, "%s: %+v", c.name, talks[c.name].First)
			}
			stays := w.Client2.Serve(t, "--tcp", "7000")
			other := w.Host.Talk(t, at(lab.Client24, 7000))
			self := w.Host.Talk(t, at(lab.Host4, w.hostServer(t)))
			if way == "rm" {
				w.d.MustRun(t, "rm", "-f", "tcp")
			} else {
				w.d.MustRun(t, "network", "disconnect", "blue", "tcp")
			}
			w.forgotten(t, "tcp")
			for _, c := range callers {
				r := talks[c.name].Say(t, "hello")
				if way == "rm" && r.Errno == "" { // its end was announced; whoever goes on is told again
					lab.Eventually(t, 5*time.Second, c.name+" is told again", func() bool {
						r = talks[c.name].Say(t, "hello")
						return r.Errno != ""
					})
				}
				assert.True(t, isReset(r), "%s: %+v", c.name, r)
			}
			// Others' sockets are nobody's business.
			assert.Equal(t, "hello", other.Say(t, "hello").Text)
			assert.Equal(t, "hello", self.Say(t, "hello").Text)
			stays.Kill()
			if way == "disconnect" {
				w.d.MustRun(t, "rm", "-f", "tcp")
			}
		})
	}
}

// hostServer is the port of a server of the host itself.
func (w *site) hostServer(t *testing.T) int {
	t.Helper()
	const port = 9321
	w.Host.Serve(t, "--tcp", fmt.Sprint(port))
	return port
}
