// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
)

// count is a tenth of a stated count, or all of it where BPFNET_FULL is 1.
func count(full int) int {
	if os.Getenv("BPFNET_FULL") == "1" {
		return full
	}
	return full / 10
}

// site is a lab with an engine, two dual-stack networks, blue and red, and the daemon.
type site struct {
	*lab.Lab
	d *lab.Docker // nil: bpfnet is the engine
	b *lab.Bpfnet
}

// places says where containers are.
func (w *site) places() interface {
	Addrs(t testing.TB, container, network string) (v4, v6 netip.Addr)
	NS(t testing.TB, container string) *lab.NS
} {
	if w.d == nil {
		return w.b
	}
	return w.d
}

// The IPv6 subnets of the networks; the engine chooses the IPv4 ones.
const (
	blue6 = "fd00:b1::/64"
	red6  = "fd00:4ed::/64"
)

func newSite(t *testing.T, opts lab.Opts, docker lab.DockerOpts, daemon ...string) *site {
	t.Helper()
	l := lab.New(t, opts)
	w := &site{Lab: l, d: l.StartDocker(t, docker)}
	w.networks(t)
	w.b = l.StartBpfnet(t, w.d, daemon...)
	return w
}

func (w *site) networks(t *testing.T) {
	t.Helper()
	w.d.MustRun(t, "network", "create", "-o", "com.docker.network.bridge.name=blue0", "--ipv6", "--subnet", blue6, "blue")
	w.d.MustRun(t, "network", "create", "-o", "com.docker.network.bridge.name=red0", "--ipv6", "--subnet", red6, "red")
}

// serve starts a server on TCP and UDP port 80 in a container that has its own name as host name.
func (w *site) serve(t *testing.T, name, network string, args ...string) {
	t.Helper()
	all := append([]string{"--name", name, "--hostname", name, "--network", network}, args...)
	w.d.Serve(t, append(all, "--", "--tcp", "80", "--udp", "80")...)
}

// idle starts a container that only sleeps.
func (w *site) idle(t *testing.T, name, network string, args ...string) {
	t.Helper()
	all := append([]string{"run", "-d", "--name", name, "--hostname", name, "--network", network}, args...)
	w.d.MustRun(t, append(all, lab.Image, "sleep", "100000")...)
	w.ready(t, name)
}

// ready waits until the daemon has made the container's endpoints ready.
func (w *site) ready(t *testing.T, name string) {
	t.Helper()
	lab.Eventually(t, 10*time.Second, name+" is ready", func() bool {
		s, err := api.ReadSnapshot(w.b.State)
		if err != nil {
			return false
		}
		for _, e := range s.Endpoints {
			if e.Name == name {
				return e.Ready
			}
		}
		return false
	})
}

// gateways are the addresses of a bridge.
func (w *site) gateways(t *testing.T, network string) (v4, v6 netip.Addr) {
	t.Helper()
	for field := range strings.FieldsSeq(w.d.Inspect(t, network, "{{range .IPAM.Config}}{{.Subnet}} {{end}}")) {
		p, err := netip.ParsePrefix(field)
		require.NoError(t, err)
		if p.Addr().Is4() {
			v4 = p.Masked().Addr().Next()
		} else {
			v6 = p.Masked().Addr().Next()
		}
	}
	return v4, v6
}

// maps opens the pinned maps for the rest of the test.
func (w *site) maps(t *testing.T) *maps.Maps {
	t.Helper()
	m, err := maps.Open(w.BPFFS)
	require.NoError(t, err)
	t.Cleanup(m.Close)
	return m
}

// counters are fates and drops by "name/hook".
type counters map[string]uint64

func readCounters(t *testing.T, m *maps.Maps) counters {
	t.Helper()
	c := counters{}
	fates, err := m.Fates()
	require.NoError(t, err)
	for _, f := range fates {
		c["fate "+f.Fate+"/"+f.Hook] = f.Packets
	}
	drops, err := m.Drops()
	require.NoError(t, err)
	for _, d := range drops {
		c[d.Reason+"/"+d.Hook] = d.Packets
	}
	return c
}

// since is what has been counted since before.
func since(t *testing.T, m *maps.Maps, before counters) counters {
	t.Helper()
	delta := counters{}
	for k, v := range readCounters(t, m) {
		if v != before[k] {
			delta[k] = v - before[k]
		}
	}
	return delta
}

// fast is how many packets took the fast path.
func (c counters) fast() (n uint64) {
	for k, v := range c {
		if strings.HasPrefix(k, "fate container/") || strings.HasPrefix(k, "fate uplink/") {
			n += v
		}
	}
	return n
}

// drops are the drop counters alone.
func (c counters) drops() counters {
	out := counters{}
	for k, v := range c {
		if !strings.HasPrefix(k, "fate ") {
			out[k] = v
		}
	}
	return out
}

// at joins an address and a port as clients take it.
func at(a netip.Addr, port int) string { return netip.AddrPortFrom(a, uint16(port)).String() }

// clientSeen is the client's address as the server has seen it.
func clientSeen(t *testing.T, r lab.Reply) netip.Addr {
	t.Helper()
	a, err := netip.ParseAddrPort(r.View.Remote)
	require.NoError(t, err, "%+v", r)
	return a.Addr()
}

// getOutside runs labtool get in the host's namespace, but outside of the lab's cgroup, where no sock
// program sees it.
func (w *site) getOutside(args ...string) (lab.Reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + w.Host.Path, "--", w.Tool, "get"}, args...)...)
	out, err := cmd.Output()
	var r lab.Reply
	if jsonErr := json.Unmarshal(out, &r); jsonErr != nil {
		return r, errors.Join(err, jsonErr)
	}
	_ = json.Unmarshal([]byte(r.Text), &r.View)
	return r, err
}

// dial opens a socket in a namespace; local may be empty.
func dial(ns *lab.NS, network, local, to string) (net.Conn, error) {
	var c net.Conn
	err := ns.Do(func() (err error) {
		d := net.Dialer{Timeout: 5 * time.Second}
		switch {
		case local == "":
		case strings.HasPrefix(network, "udp"):
			d.LocalAddr, err = net.ResolveUDPAddr(network, local)
		default:
			d.LocalAddr, err = net.ResolveTCPAddr(network, local)
		}
		if err == nil {
			c, err = d.Dial(network, to)
		}
		return err
	})
	return c, err
}

// conversation is an open TCP connection to a labtool serve.
type conversation struct {
	net.Conn
	in   *bufio.Reader
	view lab.View
}

func converse(t *testing.T, ns *lab.NS, to string) *conversation {
	t.Helper()
	c, err := dial(ns, "tcp", "", to)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	out := &conversation{Conn: c, in: bufio.NewReader(c)}
	require.NoError(t, c.SetDeadline(time.Now().Add(5*time.Second)))
	line, err := out.in.ReadString('\n')
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal([]byte(line), &out.view))
	return out
}

// say sends a line and wants it back.
func (c *conversation) say(t *testing.T, text string) {
	t.Helper()
	require.NoError(t, c.SetDeadline(time.Now().Add(5*time.Second)))
	_, err := fmt.Fprintln(c, text)
	require.NoError(t, err)
	line, err := c.in.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, text+"\n", line)
}

func parseAddrPort(t *testing.T, s string) netip.AddrPort {
	t.Helper()
	a, err := netip.ParseAddrPort(s)
	require.NoError(t, err)
	return a
}

// processesOf lists the host processes of the lab with that name.
func (w *site) processesOf(comm string) (pids []string) {
	name := filepath.Base(filepath.Dir(w.Cgroup))
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		dir := filepath.Join("/proc", e.Name())
		got, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil || strings.TrimSpace(string(got)) != comm {
			continue
		}
		groups, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		if strings.Contains(string(groups), name) {
			pids = append(pids, e.Name())
		}
	}
	return pids
}

// isRefusedOrSilent says that nobody answered, or the host itself did with a reset.
func isRefusedOrSilent(r lab.Reply) bool {
	return r.Errno == "ECONNREFUSED" || r.Errno == "ETIMEDOUT" || r.Errno == "EAGAIN" || r.Errno == "EHOSTUNREACH"
}
