// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

var loopback6 = netip.IPv6Loopback()

// How the Engine may hold published ports.
const (
	noProxy     = "no-proxy"        // userland-proxy: false
	ownProxy    = "bpfnet-as-proxy" // bpfnet in docker-proxy's place
	engineProxy = "docker-proxy"
)

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
// with and without the Engine's userland proxy: bpfnet relays where no packet can be sent.
func TestProxy4To6(t *testing.T) {
	for _, mode := range []string{noProxy, ownProxy, engineProxy} {
		t.Run(mode, func(t *testing.T) {
			w, gateway := plainSite(t, mode)
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
