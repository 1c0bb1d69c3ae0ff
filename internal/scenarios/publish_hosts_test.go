// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// hostPorts are the host's addresses and ports where a container's port is published, as the Engine tells it.
func (w *site) hostPorts(t *testing.T, name, port string) []netip.AddrPort {
	t.Helper()
	var out []netip.AddrPort
	for _, line := range strings.Fields(w.d.MustRun(t, "port", name, port)) {
		p, err := netip.ParseAddrPort(strings.Replace(line, ":::", "[::]:", 1))
		require.NoError(t, err)
		out = append(out, p)
	}
	return out
}

// answers requires that who listens at an address is that container, or nobody.
func answers(t *testing.T, from *lab.NS, name string, to ...string) {
	t.Helper()
	for _, a := range to {
		for _, network := range []string{"tcp", "udp"} {
			args := []string{"--network", network, a}
			if name == "" {
				args = append([]string{"--timeout", noAnswer.String()}, args...)
			}
			r, err := from.Get(args...)
			if name == "" {
				assert.Error(t, err, "%s %s to %s: %+v", from.Name, network, a, r)
			} else if assert.NoError(t, err, "%s %s to %s: %+v", from.Name, network, a, r) {
				assert.Equal(t, name, r.View.Host, "%s %s to %s", from.Name, network, a)
			}
		}
	}
}

// publishBoth is -p for TCP and UDP.
func publishBoth(ports ...string) []string {
	var out []string
	for _, p := range ports {
		out = append(out, "-p", p, "-p", p+"/udp")
	}
	return out
}

// Needs root and a Docker Engine. Which of the host's addresses a published port stands for: all of both
// families, all of one, exactly one, the network's default one, those that the host gains later.
func TestPublishedHostAddresses(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	w.d.MustRun(t, "network", "create", "--ipv6", "--subnet", "fd00:b0::/64",
		"-o", "com.docker.network.bridge.host_binding_ipv4="+lab.HostB4.String(), "bound")
	one6 := fmt.Sprintf("[%s]", lab.Host6)
	w.serve(t, "web", "blue", publishBoth("0.0.0.0:8081:80", "[::]:8082:80",
		lab.Host4.String()+":8083:80", one6+":8084:80", "127.0.0.1:8085:80", "[::1]:8086:80")...)
	w.serve(t, "all", "blue", publishBoth("8080:80", "8090:80")...)
	w.serve(t, "bound", "bound", publishBoth("8087:80")...)

	answers(t, w.Client, "all", at(lab.Host4, 8080), at(lab.Host6, 8080), at(lab.HostB4, 8080), at(lab.HostB6, 8080), at(lab.Host4, 8090))
	answers(t, w.Host, "all", "127.0.0.1:8080", "127.0.0.5:8080", "[::1]:8080", at(lab.HostB6, 8090))
	answers(t, w.Client, "web", at(lab.Host4, 8081), at(lab.HostB4, 8081), at(lab.Host6, 8082), at(lab.HostB6, 8082),
		at(lab.Host4, 8083), at(lab.Host6, 8084))
	answers(t, w.Host, "web", "127.0.0.1:8085", "[::1]:8086", "127.0.0.1:8081", "[::1]:8082")
	answers(t, w.Client, "bound", at(lab.HostB4, 8087))
	answers(t, w.Client, "", at(lab.Host6, 8081), at(lab.Host4, 8082), at(lab.HostB4, 8083), at(lab.HostB6, 8084),
		at(lab.Host4, 8085), at(lab.Host6, 8086), at(lab.Host4, 8087), at(lab.Host6, 8087))
	answers(t, w.Host, "", "[::1]:8085", "127.0.0.1:8086", "127.0.0.1:8083")

	// An address that the host gains is one of all, for TCP and UDP, with no packet's delay once it is served.
	new4, new6 := netip.MustParseAddr("192.0.2.77"), netip.MustParseAddr("2001:db8:1::77")
	w.Host.AddAddr(t, lab.HostIf, netip.PrefixFrom(new4, 24))
	w.Host.AddAddr(t, lab.HostIf, netip.PrefixFrom(new6, 64))
	w.hostAddress(t, new4)
	w.hostAddress(t, new6)
	answers(t, w.Client, "all", at(new4, 8080), at(new6, 8080))
	answers(t, w.Client, "", at(new4, 8083), at(new6, 8084))

	// One that the host does not have is refused by the Engine, until it has it.
	later := netip.MustParseAddr("192.0.2.78")
	args := append([]string{"run", "-d", "--name", "later", "--hostname", "later"}, publishBoth(later.String()+":8088:80")...)
	args = append(args, lab.Image, "labtool", "serve", "--tcp", "80", "--udp", "80")
	_, err := w.d.Run(args...)
	require.Error(t, err)
	w.d.MustRun(t, "rm", "later")
	w.Host.AddAddr(t, lab.HostIf, netip.PrefixFrom(later, 24))
	w.hostAddress(t, later)
	w.d.MustRun(t, args...)
	w.d.WaitLog(t, "later", "ready")
	answers(t, w.Client, "later", at(later, 8088))
	answers(t, w.Client, "", at(lab.Host4, 8088))
}

// hostAddress waits until the data path knows an address of the host.
func (w *site) hostAddress(t *testing.T, a netip.Addr) {
	t.Helper()
	lab.Eventually(t, 10*time.Second, fmt.Sprintf("%s is known", a), func() bool {
		r, err := w.Client.Get("--timeout", noAnswer.String(), at(a, 8080))
		return err == nil && r.View.Host == "all"
	})
}

// Needs root and a Docker Engine. Host ports out of ranges, of the Engine's choice, and several that lead to
// one container port: each is the one that "docker port" tells.
func TestPublishedRanges(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	// Two containers share a range: first come, first served.
	for _, name := range []string{"one", "two"} {
		w.serve(t, name, "blue", "-p", "9000-9001:80", "-p", "9000-9001:80/udp")
	}
	for i, name := range []string{"one", "two"} {
		for _, p := range w.hostPorts(t, name, "80/tcp") {
			assert.EqualValues(t, 9000+i, p.Port(), name)
		}
		answers(t, w.Client, name, at(lab.Host4, 9000+i), at(lab.Host6, 9000+i))
	}
	_, err := w.d.Run("run", "-d", "-p", "9000-9001:80", lab.Image, "sleep", "1000")
	require.Error(t, err, "the range is used up")

	// One to one, two on one, and of the Engine's choice: exposed, and plain.
	w.d.Serve(t, "--name", "many", "--hostname", "many", "--network", "blue", "-p", "9100-9102:80-82", "-p", "9110:80", "-p", "9111:80",
		"-p", "81", "-p", "9100-9102:80-82/udp", "--expose", "83", "-P", "--", "--tcp", "80,81,82,83", "--udp", "80,81,82")
	for i := range 3 {
		for _, to := range []netip.Addr{lab.Host4, lab.Host6} {
			for _, network := range []string{"tcp", "udp"} {
				r := w.Client.MustGet(t, "--network", network, at(to, 9100+i))
				assert.EqualValues(t, 80+i, netip.MustParseAddrPort(r.View.Local).Port())
			}
		}
	}
	for _, port := range []int{9110, 9111} {
		for _, to := range []netip.Addr{lab.Host4, lab.Host6} {
			assert.Equal(t, "many", w.Client.MustGet(t, at(to, port)).View.Host)
		}
	}
	for _, port := range []string{"81/tcp", "83/tcp"} {
		listed := w.hostPorts(t, "many", port)
		listed = slices.DeleteFunc(listed, func(p netip.AddrPort) bool { return p.Port() == 9101 })
		require.Len(t, listed, 2, "one each family, whatever its number: %s", port)
		for _, p := range listed {
			to := map[bool]netip.Addr{true: lab.Host4, false: lab.Host6}[p.Addr().Is4()]
			r := w.Client.MustGet(t, at(to, int(p.Port())))
			assert.Equal(t, "many", r.View.Host)
			assert.Equal(t, strings.TrimSuffix(port, "/tcp"), fmt.Sprint(netip.MustParseAddrPort(r.View.Local).Port()))
		}
	}
}

// After moby's test of that name: ports of the Engine's choice on all addresses and on one do not collide.
func TestMixAnyWithSpecificHostAddrs(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	for i := range 3 {
		w.serve(t, fmt.Sprintf("any%d", i), "blue", "-p", "80", "-p", "80/udp")
		w.serve(t, fmt.Sprintf("one%d", i), "blue", "-p", "127.0.0.1::80", "-p", "127.0.0.1::80/udp")
	}
	seen := make(map[string]string)
	for i := range 3 {
		for _, kind := range []string{"any", "one"} {
			name := fmt.Sprintf("%s%d", kind, i)
			for _, proto := range []string{"tcp", "udp"} {
				for _, p := range w.hostPorts(t, name, "80/"+proto) {
					to := "127.0.0.1"
					if p.Addr().Is6() {
						to = "::1"
					}
					key := fmt.Sprintf("%s %s %d", proto, to, p.Port())
					assert.Empty(t, seen[key], "%s has %s too", name, key)
					seen[key] = name
					r := w.Host.MustGet(t, "--network", proto, addrPort(netip.MustParseAddr(to), fmt.Sprint(p.Port())))
					assert.Equal(t, name, r.View.Host, key)
					if kind == "any" && p.Addr().Is4() {
						assert.Equal(t, name, w.Client.MustGet(t, "--network", proto, at(lab.Host4, int(p.Port()))).View.Host)
					}
				}
			}
		}
	}
}

// After moby's test of that name: one host port on two loopback addresses leads to two containers.
func TestPortMappingOnDistinctLoopbackAddrs(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	w.serve(t, "two", "blue", publishBoth("127.0.1.2:8080:80", lab.Host4.String()+":8080:80")...)
	w.serve(t, "three", "blue", publishBoth("127.0.1.3:8080:80", lab.HostB4.String()+":8080:80")...)
	answers(t, w.Host, "two", "127.0.1.2:8080", at(lab.Host4, 8080))
	answers(t, w.Host, "three", "127.0.1.3:8080", at(lab.HostB4, 8080))
	answers(t, w.Host, "", "127.0.0.1:8080")
	answers(t, w.Client, "two", at(lab.Host4, 8080))
	answers(t, w.Client, "three", at(lab.HostB4, 8080))
}
