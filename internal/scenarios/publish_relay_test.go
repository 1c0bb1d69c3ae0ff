// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/relay"
)

var loopback6 = netip.IPv6Loopback()

// How the Engine may hold published ports.
const (
	noProxy     = "no-proxy"        // userland-proxy: false
	ownProxy    = "bpfnet-as-proxy" // bpfnet in docker-proxy's place
	engineProxy = "docker-proxy"
)

// relayAll has the daemon relay for the Engine's containers too.
var relayAll = []string{"--relay", "all"}

// plainSite is a site with a network that has IPv4 only, beside the usual ones.
func plainSite(t *testing.T, mode string, daemon ...string) (w *site, gateway netip.Addr) {
	t.Helper()
	l := lab.New(t, lab.Opts{})
	opts := lab.DockerOpts{Proxy: mode != noProxy}
	hook := filepath.Join(l.Dir, "docker-proxy")
	if mode == ownProxy {
		opts.ProxyPath = hook
		t.Setenv("BPFNET_SOCKET", filepath.Join(l.Dir, "bpfnet.sock"))
	}
	w = &site{Lab: l, d: l.StartDocker(t, opts)}
	w.networks(t)
	w.b = l.StartBpfnet(t, w.d, daemon...)
	require.NoError(t, os.Symlink(w.b.Binary(), hook))
	w.d.MustRun(t, "network", "create", "-o", "com.docker.network.bridge.name=plain0", "plain")
	gateway, v6 := w.gateways(t, "plain")
	require.True(t, gateway.Is4() && !v6.IsValid())
	return w, gateway
}

// relayed requires that TCP and UDP reach the container at an IPv6 address of the host, and that it sees its gateway.
func relayed(t *testing.T, from *lab.NS, to netip.Addr, port int, gateway netip.Addr, name string, protocols ...string) {
	t.Helper()
	for _, network := range protocols {
		r, err := from.Get("--network", network, at(to, port))
		if assert.NoError(t, err, "%s %s to %s: %+v", from.Name, network, at(to, port), r) {
			assert.Equal(t, name, r.View.Host)
			assert.Equal(t, gateway, clientSeen(t, r), "who the server saw")
		}
	}
}

// Needs root and a Docker Engine. A container with IPv4 only is published on IPv6 addresses of the host,
// with the Engine's userland proxy, bpfnet in its place, and where asked for without: a process relays where no
// packet can be sent.
func TestProxy4To6(t *testing.T) {
	for _, mode := range []string{noProxy, ownProxy, engineProxy} {
		t.Run(mode, func(t *testing.T) {
			var args []string
			if mode == noProxy {
				args = relayAll
			}
			w, gateway := plainSite(t, mode, args...)
			both := []string{"tcp", "udp"}
			w.serve(t, "web", "plain", "-p", "8080:80", "-p", "8080:80/udp", "-p", "[::1]:8081:80", "-p", "[::1]:8081:80/udp",
				"-p", fmt.Sprintf("[%s]:8082:80", lab.Host6), "-p", fmt.Sprintf("[%s]:8082:80/udp", lab.Host6), "-p", "0.0.0.0:8083:80")
			w.idle(t, "peer", "blue")
			peer := w.d.NS(t, "peer")
			_, blueGateway := w.gateways(t, "blue")

			relayed(t, w.Client, lab.Host6, 8080, gateway, "web", both...)
			relayed(t, w.Client2, lab.HostB6, 8080, gateway, "web", both...)
			relayed(t, w.Client, lab.Host6, 8082, gateway, "web", both...)
			for _, port := range []int{8080, 8081} {
				relayed(t, w.Host, loopback6, port, gateway, "web", both...)
			}
			for _, to := range []netip.Addr{lab.Host6, lab.HostB6, blueGateway} {
				relayed(t, w.Host, to, 8080, gateway, "web", both...)
				relayed(t, peer, to, 8080, gateway, "web", "tcp")
				// docker-proxy of Engine 20.10 answers from an address that was not asked.
				if mode != engineProxy || to == blueGateway {
					relayed(t, peer, to, 8080, gateway, "web", "udp")
				}
			}
			relayed(t, w.Host, lab.Host6, 8082, gateway, "web", both...)

			// Host sockets that are not led past the relay: unconnected UDP, and what no hook sees.
			r := w.Host.MustGet(t, "--network", "udp", "--unconnected", at(lab.Host6, 8080))
			assert.Equal(t, at(lab.Host6, 8080), r.From)
			r, err := w.getOutside(at(loopback6, 8081))
			require.NoError(t, err)
			assert.Equal(t, gateway, clientSeen(t, r))

			// No more than was asked for.
			for _, to := range []string{at(lab.Host6, 8081), at(lab.HostB6, 8082), at(lab.Host6, 8083)} {
				r, err := w.Client.Get("--timeout", noAnswer.String(), to)
				require.Error(t, err, "%s: %+v", to, r)
			}
			r, err = w.Host.Get("--timeout", noAnswer.String(), at(loopback6, 8082))
			require.Error(t, err, "%+v", r)

			// IPv4 goes past the relay.
			r = w.Client.MustGet(t, at(lab.Host4, 8080))
			assert.Equal(t, lab.Client4, clientSeen(t, r))
			if status := w.b.MustCLI(t, "status"); mode == noProxy {
				assert.Contains(t, status, "[::1]:8081/tcp")
				assert.Len(t, w.processesOf("bpfnet-relay"), 1)
			} else {
				assert.NotContains(t, status, "RELAYED", "the proxy has the port")
				assert.Empty(t, w.processesOf("bpfnet-relay"))
			}
		})
	}
}

// relayPID is the relay's process, by what it tells of itself.
func (w *site) relayPID(t *testing.T) int {
	t.Helper()
	st, err := relay.Ask(w.b.State)
	require.NoError(t, err)
	require.NotNil(t, st, "no relay runs")
	return st.PID
}

// Needs root and a Docker Engine. What goes through the relay goes on while the daemon is killed and while
// it is down; the next daemon finds the relay again; what ends the relay is the last port's end, and cleanup.
func TestRelayOutlivesDaemon(t *testing.T) {
	w, gateway := plainSite(t, noProxy, relayAll...)
	w.serve(t, "web", "plain", "-p", "8080:80", "-p", "8080:80/udp")
	relayed(t, w.Client, lab.Host6, 8080, gateway, "web", "tcp")
	pid := w.relayPID(t)
	var streams []*lab.Stream
	for _, network := range []string{"tcp", "udp"} {
		streams = append(streams, w.Client.Stream(t, "--network", network, "--interval", "5ms", "--duration", "5m", at(lab.Host6, 8080)))
	}
	w.b.Kill()
	relayed(t, w.Client, lab.Host6, 8080, gateway, "web", "tcp", "udp")
	assert.Contains(t, w.b.MustCLI(t, "status"), "[::]:8080/udp")
	w.b.Start(t)
	relayed(t, w.Client, lab.Host6, 8080, gateway, "web", "tcp", "udp")
	w.b.Restart(t)
	relayed(t, w.Client, lab.Host6, 8080, gateway, "web", "tcp", "udp")
	assert.Equal(t, pid, w.relayPID(t), "it is the same process")
	for _, s := range streams {
		sum := s.Finish(t)
		assert.Zero(t, sum.Lost+sum.Corrupt+sum.Resets, "%+v", sum)
		assert.Greater(t, sum.Received, int64(20))
	}

	// A relay that is killed is started again, and serves the same.
	require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
	lab.Eventually(t, 10*time.Second, "another relay serves", func() bool {
		st, err := relay.Ask(w.b.State)
		return err == nil && st != nil && st.PID != pid && len(st.Ports) == 2
	})
	relayed(t, w.Client, lab.Host6, 8080, gateway, "web", "tcp", "udp")

	// An internal network is closed here too, whoever would serve it.
	w.d.MustRun(t, "network", "create", "--internal", "--ipv6", "--subnet", "fd00:17::/64", "inner")
	w.idle(t, "inside", "inner")
	_, inner := w.gateways(t, "inner")
	m := w.maps(t)
	before := readCounters(t, m)
	r, err := w.d.NS(t, "inside").Get("--timeout", noAnswer.String(), at(inner, 8080))
	require.Error(t, err, "%+v", r)
	assert.Equal(t, counters{"internal/container": 1}, since(t, m, before).drops())

	// The port follows the container over a restart, and another one takes it over.
	w.d.MustRun(t, "restart", "-t", "0", "web")
	w.ready(t, "web")
	lab.Eventually(t, 10*time.Second, "web is served again", func() bool {
		_, err := w.Client.Get("--timeout", noAnswer.String(), at(lab.Host6, 8080))
		return err == nil
	})
	for i := range count(50) {
		w.d.MustRun(t, "rm", "-f", "web")
		// With IPv6 it is the Engine that binds [::]:8080.
		w.serve(t, "web", map[bool]string{true: "blue", false: "plain"}[i%2 == 0], "-p", "8080:80", "-p", "8080:80/udp")
	}
	w.d.MustRun(t, "rm", "-f", "web")
	lab.Eventually(t, 10*time.Second, "the relay has ended", func() bool {
		st, err := relay.Ask(w.b.State)
		return err == nil && st == nil && len(w.processesOf("bpfnet-relay")) == 0
	})
	assert.NoError(t, w.bindable(t, "tcp", "6", "8080"))

	// What a program of the host has stays its own, and is said.
	w.Host.Serve(t, "--tcp", "8085", "--family", "6")
	w.serve(t, "web", "plain", "-p", "8085:80", "-p", "8086:80")
	relayed(t, w.Host, loopback6, 8086, gateway, "web", "tcp")
	taken := regexp.MustCompile(`port \[::\]:8085->80/tcp of web .*in use by labtool`)
	lab.Eventually(t, 10*time.Second, "status tells of the round that has found it taken", func() bool {
		return taken.MatchString(w.b.MustCLI(t, "status"))
	})

	w.b.Stop(t)
	relayed(t, w.Client, lab.Host6, 8086, gateway, "web", "tcp")
	w.b.MustCLI(t, "cleanup", "--leave-open")
	assert.NoFileExists(t, filepath.Join(w.b.State, relay.SocketName))
	// A cgroup with a process in it cannot be removed.
	assert.NoDirExists(t, filepath.Join(w.Cgroup, "bpfnet-relay"))
}

// Needs root. A sandbox with IPv4 only is published on all addresses too. Its IPv6 port is held while no
// daemon runs, and free when it is unpublished.
func TestOwnRelay(t *testing.T) {
	w := newOwnSite(t)
	w.b.MustCLI(t, "network", "create", "--subnet", "172.29.0.0/24", "plain")
	gateway := netip.MustParseAddr("172.29.0.1")
	w.sandbox(t, "web", "plain", "-p", "8080:80", "-p", "8080:80/udp", "-p", "[::1]:8081:80")
	both := []string{"tcp", "udp"}
	assert.Contains(t, w.b.MustCLI(t, "port", "web"), "80/tcp -> [::]:8080")
	relayed(t, w.Client, lab.Host6, 8080, gateway, "web", both...)
	relayed(t, w.Host, loopback6, 8080, gateway, "web", both...)
	relayed(t, w.Host, loopback6, 8081, gateway, "web", "tcp")
	pid := w.relayPID(t)
	stream := w.Client.Stream(t, "--interval", "5ms", "--duration", "5m", at(lab.Host6, 8080))

	w.b.Kill()
	for _, proto := range both {
		assert.ErrorContains(t, w.bindable(t, proto, "6", "8080"), "address already in use", proto)
	}
	relayed(t, w.Client, lab.Host6, 8080, gateway, "web", both...)
	w.b.Start(t)
	assert.NotContains(t, w.b.Log(), "hold a published port again")
	relayed(t, w.Client, lab.Host6, 8080, gateway, "web", both...)
	assert.Equal(t, pid, w.relayPID(t))
	sum := stream.Finish(t)
	assert.Zero(t, sum.Lost+sum.Corrupt+sum.Resets, "%+v", sum)

	// Published and taken back while it runs, from the command's return on.
	w.b.MustCLI(t, "publish", "web", "8090:80")
	relayed(t, w.Client, lab.Host6, 8090, gateway, "web", "tcp")
	w.b.MustCLI(t, "unpublish", "web", "8090:80")
	assert.NoError(t, w.bindable(t, "tcp", "6", "8090"))
	w.Host.Serve(t, "--tcp", "8091", "--family", "6")
	_, err := w.b.CLI("publish", "web", "8091:80")
	assert.ErrorContains(t, err, "labtool", "a program of the host has it")

	// In a network with IPv6 it needs no relay, and without it does again.
	w.b.MustCLI(t, "network", "connect", "blue", "web")
	r := w.Client.MustGet(t, at(lab.Host6, 8080))
	assert.Equal(t, lab.Client6, clientSeen(t, r))
	assert.ErrorContains(t, w.bindable(t, "tcp", "6", "8080"), "address already in use")
	w.b.MustCLI(t, "network", "disconnect", "blue", "web")
	relayed(t, w.Client, lab.Host6, 8080, gateway, "web", both...)

	w.b.MustCLI(t, "rm", "-f", "web")
	for _, proto := range both {
		assert.NoError(t, w.bindable(t, proto, "6", "8080"))
	}
	st, err := relay.Ask(w.b.State)
	require.NoError(t, err)
	assert.Nil(t, st, "there is nothing to relay")
}

// Needs root and a Docker Engine. Published ports move with the endpoint that is the container's way out, as
// networks come and go: to one with more families, whose IPv6 port the Engine binds. Nothing of bpfnet's is in its
// way, and without a userland proxy nobody has that port while the container has IPv4 only.
func TestPublishedFollowsGateway(t *testing.T) {
	w, _ := plainSite(t, noProxy)
	w.d.MustRun(t, "network", "create", "--internal", "--ipv6", "--subnet", "fd00:17::/64", "a-inner")
	w.serve(t, "still", "plain", "-p", "8090:80", "-p", "8090:80/udp")
	w.serve(t, "web", "plain", "-p", "8080:80", "-p", "8080:80/udp", "-p", "[::1]:8081:80", "-p", "[::1]:8081:80/udp")
	both := []string{"tcp", "udp"}
	reaches := func(network string) {
		t.Helper()
		v4, _ := w.d.Addrs(t, "web", network)
		for _, proto := range both {
			lab.Eventually(t, 10*time.Second, proto+" reaches the container on "+network, func() bool {
				r, err := w.Client.Get("--network", proto, "--timeout", noAnswer.String(), at(lab.Host4, 8080))
				return err == nil && r.View.Local == at(v4, 80) && clientSeen(t, r) == lab.Client4
			})
		}
	}
	unheld := func() {
		t.Helper()
		for _, proto := range both {
			lab.Eventually(t, 10*time.Second, "[::]:8080/"+proto+" is nobody's", func() bool { return w.bindable(t, proto, "6", "8080") == nil })
		}
	}
	reaches("plain")
	unheld()
	answers(t, w.Client, "", at(lab.Host6, 8080))
	answers(t, w.Host, "", at(loopback6, 8080), at(loopback6, 8081))
	for range count(50) {
		// More families first: the way out, and the ports, go to blue.
		w.d.MustRun(t, "network", "connect", "blue", "web")
		reaches("blue")
		for _, proto := range both {
			r := w.Client.MustGet(t, "--network", proto, at(lab.Host6, 8080))
			assert.Equal(t, lab.Client6, clientSeen(t, r), "no relay in between")
		}
		// An internal network is never the way out, whatever its name.
		w.d.MustRun(t, "network", "connect", "a-inner", "web")
		reaches("blue")
		w.d.MustRun(t, "network", "disconnect", "a-inner", "web")
		// Back to IPv4 alone.
		w.d.MustRun(t, "network", "disconnect", "blue", "web")
		reaches("plain")
		unheld()
	}
	assert.Empty(t, w.processesOf("bpfnet-relay"))
	// At once, although the Engine has bound the port for IPv4 just now.
	for _, proto := range both {
		for _, from := range []*lab.NS{w.Client, w.Host} {
			_, err := from.Get("--network", proto, "--timeout", noAnswer.String(), at(lab.Host6, 8090))
			require.ErrorContains(t, err, "connection refused", "%s: %s over IPv6", from.Name, proto)
		}
	}
	// Only in the internal one, it publishes nothing.
	w.d.MustRun(t, "network", "connect", "a-inner", "web")
	w.d.MustRun(t, "network", "disconnect", "plain", "web")
	lab.Eventually(t, 10*time.Second, "nothing of web's is published", func() bool {
		return !slices.ContainsFunc(w.b.Snapshot(t).Ports, func(p api.Port) bool { return p.Container == "web" })
	})
	answers(t, w.Client, "", at(lab.Host4, 8080), at(lab.Host6, 8080))
}
