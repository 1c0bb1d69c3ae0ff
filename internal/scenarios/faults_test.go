// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// A row of the table in docs/operations.md: what is wrong, the one command that shows it, and what it prints.
type symptom struct{ fault, command, prints string }

// symptoms reads the table.
func symptoms(t *testing.T) (out []symptom) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("..", "..", "docs", "operations.md"))
	require.NoError(t, err)
	_, section, found := strings.Cut(string(raw), "\n## What is wrong, by the command that shows it\n")
	require.True(t, found)
	section, _, _ = strings.Cut(section, "\n#")
	for line := range strings.Lines(section) {
		cells := strings.Split(strings.TrimSpace(line), " | ")
		if len(cells) != 3 || !strings.HasPrefix(cells[1], "`bpfnet ") {
			continue
		}
		out = append(out, symptom{
			strings.TrimPrefix(cells[0], "| "), strings.Trim(cells[1], "`"), strings.Trim(strings.TrimSuffix(cells[2], " |"), "`"),
		})
	}
	return out
}

// fault is something that a user of the host does, by a user's means.
type fault struct {
	daemon []string // flags; those with the same share a host
	before func(t *testing.T, w *site)
	make   func(t *testing.T, w *site)
	mend   func(t *testing.T, w *site)
}

// try is an attempt of a container's process that need not succeed.
func try(t *testing.T, ns *lab.NS, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := ns.Run(ctx, name, args...)
	if err != nil {
		var exit *exec.ExitError
		require.ErrorAs(t, err, &exit)
	}
}

// from has a container ping an address once.
func from(name string, args ...string) func(*testing.T, *site) {
	return func(t *testing.T, w *site) {
		try(t, w.b.NS(t, name), "ping", append([]string{"-c", "1", "-W", "1"}, args...)...)
	}
}

// host runs a command of the host's.
func host(line string) func(*testing.T, *site) {
	return func(t *testing.T, w *site) {
		f := strings.Fields(line)
		w.Host.MustRun(t, f[0], f[1:]...)
	}
}

// toMany sends a datagram each from a container to as many ports or addresses.
func toMany(name, shell string) func(*testing.T, *site) {
	return func(t *testing.T, w *site) { try(t, w.b.NS(t, name), "bash", "-c", shell) }
}

// large has a container send the client a packet of 1500 bytes that must not be cut. The error holds what ping says.
func large(t *testing.T, ns *lab.NS) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := ns.Run(ctx, "ping", "-c", "1", "-W", "1", "-M", "do", "-s", "1472", lab.Client4.String())
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// linkOf is the host side of a container's link.
func (w *site) linkOf(t *testing.T, name string) string {
	t.Helper()
	snap, err := api.ReadSnapshot(w.b.State)
	require.NoError(t, err)
	i := slices.IndexFunc(snap.Endpoints, func(e api.Endpoint) bool { return e.Name == name })
	require.GreaterOrEqual(t, i, 0)
	return snap.Endpoints[i].Link
}

var faults = map[string]fault{
	"two containers in networks that may not talk": {make: from("web", "172.31.0.2")},
	"two containers in a network with `enable_icc=false`": {
		before: func(t *testing.T, w *site) {
			w.b.MustCLI(t, "network", "create", "--subnet", "172.29.0.0/24", "-o", "com.docker.network.bridge.enable_icc=false", "apart")
			w.sandbox(t, "apart1", "apart")
			w.sandbox(t, "apart2", "apart")
		},
		make: from("apart1", "172.29.0.3"),
	},
	"a container in an internal network, to the world": {
		before: func(t *testing.T, w *site) {
			w.b.MustCLI(t, "network", "create", "--internal", "--subnet", "172.28.0.0/24", "inside")
			w.sandbox(t, "inside1", "inside")
		},
		make: func(t *testing.T, w *site) {
			ns := w.b.NS(t, "inside1")
			ns.MustRun(t, "ip", "route", "add", "default", "via", "172.28.0.1")
			try(t, ns, "ping", "-c", "1", "-W", "1", lab.Client4.String())
		},
	},
	"somebody outside dials a container's own address": {
		make: func(t *testing.T, w *site) {
			w.Client.MustRun(t, "ip", "route", "replace", "172.30.0.0/16", "via", lab.Host4.String())
			try(t, w.Client, "ping", "-c", "1", "-W", "1", "172.30.0.2")
		},
	},
	"a container sends from an address that is not its own": {
		make: func(t *testing.T, w *site) {
			ns := w.b.NS(t, "web")
			ns.MustRun(t, "ip", "addr", "add", "172.30.9.9/32", "dev", "eth0")
			try(t, ns, "ping", "-c", "1", "-W", "1", "-I", "172.30.9.9", lab.Client4.String())
		},
	},
	"a container has changed its MAC": {
		make: func(t *testing.T, w *site) {
			ns := w.b.NS(t, "db")
			ns.MustRun(t, "ip", "link", "set", "eth0", "address", "02:00:00:00:00:99")
			try(t, ns, "ping", "-c", "1", "-W", "1", lab.Client4.String())
		},
	},
	"a packet from outside with an address of a container": {
		make: func(t *testing.T, w *site) {
			w.Client.MustRun(t, "ip", "addr", "add", "172.30.0.2/32", "dev", "lo")
			w.Client.MustRun(t, "ip", "route", "replace", lab.Host4.String()+"/32", "dev", lab.ClientIf, "src", "172.30.0.2")
			_, err := w.Client.Get("--network", "tcp", "--timeout", "500ms", at(lab.Host4, 8080))
			require.Error(t, err)
		},
		mend: func(t *testing.T, w *site) {
			w.Client.MustRun(t, "ip", "route", "del", lab.Host4.String()+"/32", "dev", lab.ClientIf)
			w.Client.MustRun(t, "ip", "addr", "del", "172.30.0.2/32", "dev", "lo")
		},
	},
	"two machines outside use this host as a router": {
		make: func(t *testing.T, w *site) {
			host("iptables -P FORWARD ACCEPT")(t, w)
			try(t, w.Client, "ping", "-c", "1", "-W", "1", lab.Client24.String())
		},
	},
	"the source is in the deny list": {
		daemon: []string{"--shield", "--shield-syn-rate", "1"},
		make: func(t *testing.T, w *site) {
			w.b.MustCLI(t, "deny", "add", lab.Client4.String())
			try(t, w.Client, "ping", "-c", "1", "-W", "1", lab.Host4.String())
		},
		mend: func(t *testing.T, w *site) { w.b.MustCLI(t, "deny", "rm", lab.Client4.String()) },
	},
	"one client opens connections faster than `--shield-syn-rate`": {
		daemon: []string{"--shield", "--shield-syn-rate", "1"},
		make: func(t *testing.T, w *site) {
			for range 20 {
				_, _ = w.Client.Get("--network", "tcp", "--timeout", "100ms", at(lab.Host4, 8080))
			}
		},
	},
	"a container has as many flows as `--endpoint-flows` allows": {
		daemon: []string{"--attach", "clsact", "--endpoint-flows", "8"},
		make:   toMany("web", "for p in {1..20}; do echo >/dev/udp/"+lab.Client4.String()+"/$p; done"),
	},
	"the flow table is full": {
		daemon: []string{"--flows", "64", "--timeout", "udp-new=1m"},
		make:   toMany("web", "for p in {1..200}; do echo >/dev/udp/"+lab.Client4.String()+"/$p; done"),
	},
	"a destination takes more connections than there are ports to masquerade with": {
		daemon: []string{"--timeout", "udp-new=1m"},
		before: func(t *testing.T, w *site) { w.Client.Serve(t, "--udp", "9") },
		make:   toMany("web", "for p in {1..700}; do echo >/dev/udp/"+lab.Client4.String()+"/9; done"),
	},
	"forwarding is switched off": {
		make: host("sysctl -q -w net.ipv4.ip_forward=0"),
		mend: host("sysctl -q -w net.ipv4.ip_forward=1"),
	},
	"a filter of somebody else's drops packets before bpfnet sees them": {
		daemon: []string{"--attach", "clsact", "--endpoint-flows", "8"},
		before: func(t *testing.T, w *site) {
			source := filepath.Join(w.Dir, "wall.c")
			require.NoError(t, os.WriteFile(source, []byte("__attribute__((section(\"tc\"))) int wall(void *skb) { return 2; }\n"), 0o600))
			w.Host.MustRun(t, "clang-14", "-target", "bpf", "-O2", "-c", source, "-o", w.Dir+"/wall.o")
		},
		make: func(t *testing.T, w *site) {
			// tc makes directories for pins in bpffs, and leaves them there: one of its own takes them away with it.
			w.Host.MustRun(t, "unshare", "--mount", "sh", "-ec", "mount -t bpf bpf /sys/fs/bpf; exec tc filter add dev up0 ingress pref 1 bpf da obj "+w.Dir+"/wall.o sec tc")
		},
		mend: host("tc filter del dev up0 ingress pref 1"),
	},
	"the host's firewall closes it to containers": {
		make: func(t *testing.T, w *site) {
			for _, line := range []string{
				"nft add table inet strict", "nft add chain inet strict in { type filter hook input priority 0 ; policy drop ; }",
				"nft add rule inet strict in iifname up0 accept", "nft add rule inet strict in iifname lo accept",
			} {
				host(line)(t, w)
			}
		},
		mend: host("nft delete table inet strict"),
	},
	"rules of an Engine that ran with iptables on": {
		make: func(t *testing.T, w *site) {
			for _, line := range []string{"-N DOCKER", "-A FORWARD -o docker0 -j DOCKER", "-t nat -N DOCKER", "-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER"} {
				host("iptables "+line)(t, w)
			}
		},
		mend: func(t *testing.T, w *site) {
			for _, line := range []string{"-F FORWARD", "-X DOCKER", "-t nat -F PREROUTING", "-t nat -X DOCKER"} {
				host("iptables "+line)(t, w)
			}
		},
	},
	"the port is published on another address": {
		before: func(t *testing.T, w *site) { w.sandbox(t, "local", "blue", "-p", "127.0.0.1:8090:80") },
		make: func(t *testing.T, w *site) {
			_, err := w.Client.Get("--network", "tcp", "--timeout", "1s", at(lab.Host4, 8090))
			require.Error(t, err)
		},
	},
	"a container's link carries less than it sends (`ip link set … mtu`)": {
		make: func(t *testing.T, w *site) {
			w.Host.MustRun(t, "ip", "link", "set", w.linkOf(t, "web"), "mtu", "1400")
			require.Error(t, large(t, w.b.NS(t, "web")), "a large packet vanishes")
			require.Error(t, large(t, w.b.NS(t, "web")), "and is told of to nobody: the next one vanishes too")
			w.b.NS(t, "web").MustRun(t, "ping", "-c", "1", "-W", "2", lab.Client4.String())
		},
		mend: func(t *testing.T, w *site) {
			w.Host.MustRun(t, "ip", "link", "set", w.linkOf(t, "web"), "mtu", "1500")
			require.NoError(t, large(t, w.b.NS(t, "web")))
		},
	},
	"an uplink carries less than containers send": {
		make: func(t *testing.T, w *site) {
			w.Host.MustRun(t, "ip", "link", "set", lab.HostIf, "mtu", "1400")
			require.ErrorContains(t, large(t, w.b.NS(t, "web")), "mtu")
		},
		mend: host("ip link set " + lab.HostIf + " mtu 1500"),
	},
	"`--uplink` leaves out the device that has the default route": {
		daemon: []string{"--uplink", lab.HostIf2},
		before: host("ip route replace default via " + lab.Client24.String()),
		make: func(t *testing.T, w *site) {
			_, err := w.Client.Get("--network", "tcp", "--timeout", "1s", at(lab.Host4, 8080))
			require.Error(t, err, "the port is not published there")
			_, err = w.b.NS(t, "web").Run(t.Context(), "ping", "-c", "1", "-W", "1", lab.Client4.String())
			require.Error(t, err, "nor do answers come from there")
			host("ip route replace default via "+lab.Client4.String())(t, w)
		},
		mend: host("ip route replace default via " + lab.Client24.String()),
	},
	"`--uplink` leaves out a device that leads to others": {
		daemon: []string{"--uplink", lab.HostIf2},
		before: host("ip route replace default via " + lab.Client4.String()),
		make:   host("ip route replace default via " + lab.Client24.String()),
		mend:   host("ip route replace default via " + lab.Client4.String()),
	},
	"the daemon is down": {
		make: func(t *testing.T, w *site) { w.b.Stop(t) },
		mend: func(t *testing.T, w *site) { w.b.Start(t) },
	},
	"the Docker Engine is down": {
		daemon: []string{"--docker", "unix:///run/bl-no-engine.sock"},
	},
}

// Needs root. Each fault in the table of docs/operations.md is made, and the command that stands there prints what stands
// there, and did not before.
func TestFaults(t *testing.T) {
	table := symptoms(t)
	require.GreaterOrEqual(t, len(table), 20)
	hosts := make(map[string][]symptom)
	for _, s := range table {
		f, known := faults[s.fault]
		require.True(t, known, "nobody makes the fault %q", s.fault)
		key := strings.Join(f.daemon, " ")
		hosts[key] = append(hosts[key], s)
	}
	require.Len(t, table, len(faults), "each fault is in the table once")
	for key, list := range hosts {
		t.Run("daemon "+key, func(t *testing.T) {
			l := lab.New(t, lab.Opts{})
			if slices.ContainsFunc(list, func(s symptom) bool { return strings.Contains(s.prints, "snat_exhausted") }) {
				// What others have reserved is not masqueraded with: 135 ports are left.
				l.Host.Sysctl(t, "net.ipv4.ip_local_reserved_ports", "1024-32767,61000-65400")
			}
			w := ownSite(t, l, strings.Fields(key)...)
			w.sandbox(t, "web", "blue", "-p", "8080:80")
			w.sandbox(t, "db", "red")
			for _, s := range list {
				t.Run(s.fault, func(t *testing.T) { w.shows(t, s, faults[s.fault]) })
			}
		})
	}
}

// shows makes a fault, and sees that the command tells of it then and not before.
func (w *site) shows(t *testing.T, s symptom, f fault) {
	if f.before != nil {
		f.before(t, w)
	}
	ask := func() string {
		out, err := w.b.CLI(strings.Fields(s.command)[1:]...)
		if err != nil { // doctor has a status of its own for what is broken
			out += err.Error()
		}
		return out
	}
	if f.make != nil && f.mend != nil || strings.HasPrefix(s.command, "bpfnet drops") {
		assert.NotContains(t, ask(), s.prints, "before")
	}
	if f.make != nil {
		f.make(t, w)
	}
	var out string
	defer func() {
		if t.Failed() {
			t.Logf("%s:\n%s", s.command, out)
		}
	}()
	lab.Eventually(t, 10*time.Second, fmt.Sprintf("%q prints %q", s.command, s.prints), func() bool {
		out = ask()
		return strings.Contains(out, s.prints)
	})
	if f.mend != nil {
		f.mend(t, w)
	}
}
