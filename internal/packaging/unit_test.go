// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// host is a lab whose daemon has what its unit gives it, and no more.
type host struct {
	*lab.Lab
	b *lab.Bpfnet
}

const blue6 = "fd00:b:1::"

// socketGroup is one that root is not in, and that may ask the daemon by its socket.
const socketGroup = "65533"

func newHost(t *testing.T) *host {
	t.Helper()
	l := lab.New(t, lab.Opts{})
	h := &host{Lab: l}
	h.b = l.StartBpfnetVia(t, h.confined(t), nil, "--shield", "--socket-group", socketGroup)
	h.b.MustCLI(t, "network", "create", "--subnet", "172.30.0.0/16", "--subnet", blue6+"/64", "blue")
	return h
}

// confined is the program that gives the daemon what the unit gives it, without some capabilities.
func (h *host) confined(t *testing.T, without ...string) []string {
	t.Helper()
	return []string{h.Tool, "confine", "--without", strings.Join(without, ","), abs(t, unit)}
}

// serve runs a sandbox with servers on TCP and UDP port 80.
func (h *host) serve(t *testing.T, name string, args ...string) {
	t.Helper()
	h.b.Serve(t, append(append([]string{"--name", name}, args...), "--", "--tcp", "80", "--udp", "80")...)
}

// clear removes all sandboxes.
func (h *host) clear(t *testing.T) {
	t.Helper()
	for _, s := range h.b.Snapshot(t).Sandboxes {
		h.b.MustCLI(t, "rm", "--force", s.Name)
	}
}

// needs says of each capability of the unit what is not to be had without it.
var needs = []struct {
	capability string
	implied    string // by this capability: both are left away
	fails      string // what is said then
	// try wants what needs the capability of a daemon that has started.
	try func(t *testing.T, h *host) error
}{
	{"CAP_NET_ADMIN", "", `missing CAP_NET_ADMIN`, nil},
	{"CAP_BPF", "CAP_SYS_ADMIN", `missing CAP_BPF`, nil},
	{"CAP_PERFMON", "CAP_SYS_ADMIN", `missing CAP_PERFMON`, nil},
	{"CAP_SYS_ADMIN", "", `enter namespace: operation not permitted`, func(t *testing.T, h *host) error {
		_, err := h.b.CLI("run", "--rm", "--network", "blue", "--", "true")
		return err
	}},
	{"CAP_CHOWN", "", `chown .*bpfnet\.sock: operation not permitted`, nil},
	{"CAP_SYS_PTRACE", "", `who asks is in another PID namespace`, func(t *testing.T, h *host) error {
		_, err := h.b.CLI("network", "create", "green")
		if err == nil {
			h.b.MustCLI(t, "network", "rm", "green")
		}
		return err
	}},
	{"CAP_NET_BIND_SERVICE", "", `permission denied`, func(t *testing.T, h *host) error {
		_, err := h.b.CLI("run", "--rm", "--network", "blue", "-p", "80:80", "--", "true")
		return err
	}},
	{"CAP_KILL", "", `operation not permitted`, func(t *testing.T, h *host) error {
		h.b.MustCLI(t, "run", "-d", "--name", "other", "--network", "blue", "--",
			"/usr/bin/setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/sleep", "1000")
		lab.Eventually(t, 10*time.Second, "the sandbox's process has another user", func() bool {
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.b.Sandbox(t, "other").PID))
			return strings.Contains(string(status), "Uid:\t65534") && strings.Contains(string(status), "sleep")
		})
		_, err := h.b.CLI("stop", "other")
		return err
	}},
	{"CAP_DAC_READ_SEARCH", "", `the owner is not named`, func(t *testing.T, h *host) error {
		// Where that user may execute it.
		tool := filepath.Join(h.Dir, "labtool")
		require.NoError(t, copyFile(h.Tool, tool, 0o755))
		owner := h.Host.Start(t, "setpriv", "--reuid=65534", "--clear-groups", tool, "serve", "--tcp", "8085")
		owner.WaitOutput(t, "ready")
		defer owner.Kill()
		_, err := h.b.CLI("run", "--rm", "--network", "blue", "-p", "8085:80", "--", "true")
		require.ErrorContains(t, err, "8085")
		if want := fmt.Sprintf("labtool (pid %d)", owner.PID()); !strings.Contains(err.Error(), want) {
			return fmt.Errorf("the owner is not named: %w", err)
		}
		return nil
	}},
	{"CAP_NET_RAW", "", `packet socket: operation not permitted`, comeBack},
}

// comeBack has an address come back with another MAC, and wants its neighbour to be told.
func comeBack(t *testing.T, h *host) error {
	const again = blue6 + "50"
	h.serve(t, "peer", "--network", "blue")
	h.serve(t, "old", "--network", "blue", "--ip", "172.30.0.50", "--ip6", again)
	h.b.MustGet(t, "peer", netip.AddrPortFrom(netip.MustParseAddr(again), 80).String())
	h.b.MustCLI(t, "rm", "--force", "old")
	// The MAC is made of the IPv4 address.
	_, err := h.b.CLI("run", "-d", "--name", "new", "--network", "blue", "--ip", "172.30.0.51", "--ip6", again, "--", "sleep", "1000")
	if err != nil {
		return err
	}
	peer := h.b.NS(t, "peer")
	refused := regexp.MustCompile(`packet socket: [a-z ]*`)
	said := ""
	lab.Eventually(t, 10*time.Second, "the neighbour is told of the new MAC", func() bool {
		said = refused.FindString(h.b.Log())
		return said != "" || strings.Contains(peer.MustRun(t, "ip", "-6", "neigh", "show", again), "02:42:ac:1e:00:33")
	})
	if said != "" {
		return errors.New(said)
	}
	return nil
}

func copyFile(from, to string, mode os.FileMode) error {
	raw, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, raw, mode)
}

// Needs root. A daemon with just what the unit gives it does all that it is there for, and is refused nothing.
func TestUnitSuffices(t *testing.T) {
	h := newHost(t)
	h.Client2.Serve(t, "--tcp", "7000")
	h.serve(t, "web", "--network", "blue", "-p", "80:80", "-p", "80:80/udp")
	h.serve(t, "peer", "--network", "blue")
	h.b.MustCLI(t, "network", "create", "--subnet", "172.31.0.0/16", "only4")
	h.serve(t, "relayed", "--network", "only4", "-p", "81:80")
	serves := func() {
		t.Helper()
		for _, to := range []netip.Addr{lab.Host4, lab.Host6} {
			for _, network := range []string{"tcp", "udp"} {
				r := h.Client.MustGet(t, "--network", network, netip.AddrPortFrom(to, 80).String())
				assert.Contains(t, []netip.Addr{lab.Client4, lab.Client6}, netip.MustParseAddrPort(r.View.Remote).Addr(), "published port")
			}
		}
		r := h.b.MustGet(t, "peer", netip.AddrPortFrom(lab.Internet4, 7000).String())
		assert.Equal(t, lab.HostB4, netip.MustParseAddrPort(r.View.Remote).Addr(), "masquerade")
		h.Host.MustGet(t, "127.0.0.1:80") // programs at the cgroup
		h.b.MustGet(t, "peer", "web:80")
		h.Client.MustGet(t, netip.AddrPortFrom(lab.Host6, 81).String()) // the relay
		h.b.MustCLI(t, "deny", "add", lab.Client4.String())
		_, err := h.Client.Get("--timeout", "300ms", lab.Host4.String()+":80")
		assert.Error(t, err, "the shield keeps it out")
		h.b.MustCLI(t, "deny", "rm", lab.Client4.String())
		assert.Equal(t, "ok", h.b.MustCLI(t, "exec", "web", "echo", "ok"))
		assert.Contains(t, h.b.MustCLI(t, "status"), "native, on 2 of 2 uplinks")
	}
	serves()
	h.b.Restart(t)
	serves()
	info, err := os.Stat(h.b.Socket)
	require.NoError(t, err)
	assert.Equal(t, socketGroup, fmt.Sprint(groupOf(info)))
	h.clear(t)
	for _, n := range needs {
		if n.try == nil {
			continue
		}
		assert.NoError(t, n.try(t, h), n.capability)
		h.clear(t)
	}
	assert.NotRegexp(t, `not permitted|permission denied|level=ERROR`, h.b.Log())
}

// Needs root and a Docker Engine. The same with the Engine's containers.
func TestUnitSufficesForDocker(t *testing.T) {
	if os.Getenv("BPFNET_FULL") == "" {
		t.Skip("at full counts only: an Engine takes ten seconds, and asks no more of the daemon than a socket and two files")
	}
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	h := &host{Lab: l}
	h.b = l.StartBpfnetVia(t, h.confined(t), d, "--strict-cgroup", filepath.Join(l.Cgroup, "containers"))
	d.MustRun(t, "network", "create", "blue")
	d.Serve(t, "--name", "web", "--network", "blue", "-p", "80:80", "--", "--tcp", "80")
	d.Serve(t, "--name", "peer", "--network", "blue", "--", "--tcp", "80")
	l.Client.MustGet(t, lab.Host4.String()+":80")
	l.Host.MustGet(t, "127.0.0.1:80")
	d.MustGet(t, "peer", "web:80")
	d.MustRun(t, "restart", "--time", "0", "web")
	h.b.Restart(t)
	lab.Eventually(t, 10*time.Second, "the published port answers again", func() bool {
		_, err := l.Client.Get("--timeout", "300ms", lab.Host4.String()+":80")
		return err == nil
	})
	assert.NotRegexp(t, `not permitted|permission denied|level=ERROR`, h.b.Log())
}

// Needs root. The unit gives no capability that nothing needs: without each of them something named fails.
func TestUnitGivesNothingUnneeded(t *testing.T) {
	given := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindStringSubmatch(read(t, unit))
	require.NotNil(t, given)
	h := newHost(t)
	var shown []string
	for _, n := range needs {
		shown = append(shown, n.capability)
		t.Run(n.capability, func(t *testing.T) {
			h.b.Stop(t)
			without := []string{n.capability}
			if n.implied != "" {
				without = append(without, n.implied)
			}
			err := h.b.StartVia(t, h.confined(t, without...)...)
			if err == nil && n.try != nil {
				err = n.try(t, h)
			}
			require.Error(t, err)
			assert.Regexp(t, n.fails, err.Error())
			t.Log(err)
			// As it should be, for the next one.
			if !strings.HasPrefix(err.Error(), "bpfnet ended") {
				h.b.Stop(t)
			}
			require.NoError(t, h.b.StartVia(t, h.confined(t)...))
			h.clear(t)
		})
	}
	assert.ElementsMatch(t, strings.Fields(given[1]), shown, "a capability whose need is not shown")
	// The comment tells of each.
	for _, n := range needs {
		assert.Regexp(t, `(?m)^# [A-Z_, ]*`+n.capability, read(t, unit))
	}
}

// Needs root. Nor does it allow a kind of sockets that nothing needs.
func TestUnitFamilies(t *testing.T) {
	line := regexp.MustCompile(`(?m)^RestrictAddressFamilies=(.*)$`)
	text := read(t, unit)
	given := line.FindStringSubmatch(text)
	require.NotNil(t, given)
	families := strings.Fields(given[1])
	if os.Getenv("BPFNET_FULL") == "" { // the one that is easily forgotten
		families = []string{"AF_PACKET"}
	}
	h := newHost(t)
	for _, family := range families {
		t.Run(family, func(t *testing.T) {
			h.b.Stop(t)
			others := slices.DeleteFunc(strings.Fields(given[1]), func(f string) bool { return f == family })
			without := filepath.Join(h.Dir, "without.service")
			require.NoError(t, os.WriteFile(without, []byte(line.ReplaceAllString(text, "RestrictAddressFamilies="+strings.Join(others, " "))), 0o600))
			err := h.b.StartVia(t, h.Tool, "confine", without)
			switch {
			case err != nil: // it does not start
				assert.ErrorContains(t, err, "address family not supported")
			case family == "AF_INET6":
				// A host without IPv6 looks like that: the port is not held there, and nobody is told.
				h.b.MustCLI(t, "run", "-d", "--name", "held", "--network", "blue", "-p", "8080:80", "--", "sleep", "1000")
				require.ErrorIs(t, bind(h, "tcp4"), syscall.EADDRINUSE)
				assert.NoError(t, bind(h, "tcp6"))
				h.b.Stop(t)
			default: // AF_PACKET
				assert.ErrorContains(t, comeBack(t, h), "address family not supported")
				h.b.Stop(t)
			}
			require.NoError(t, h.b.StartVia(t, h.confined(t)...))
			if family == "AF_INET6" {
				assert.ErrorIs(t, bind(h, "tcp6"), syscall.EADDRINUSE, "held again")
			}
			h.clear(t)
		})
	}
}

// bind takes the host's port 8080 for a moment.
func bind(h *host, network string) error {
	return h.Host.Do(func() error {
		l, err := net.Listen(network, ":8080")
		if err != nil {
			return err
		}
		return l.Close()
	})
}

// Needs root. The kernel itself wants these for loading the programs, and does not want CAP_SYS_ADMIN: what the daemon says
// that it misses before it tries is so.
func TestLoadingNeeds(t *testing.T) {
	h := &host{Lab: lab.New(t, lab.Opts{})}
	self, err := os.Executable()
	require.NoError(t, err)
	load := func(without ...string) error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		argv := append(h.confined(t, append(without, "CAP_SYS_ADMIN")...), self)
		cmd := h.Host.Command(ctx, argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), loadIn+"="+h.BPFFS)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	for _, capability := range []string{"CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"} {
		err := load(capability)
		require.Error(t, err, capability)
		assert.Regexp(t, `not permitted|permission denied`, err.Error(), capability)
	}
	assert.NoError(t, load())
}

// What systemd itself thinks of the unit: a line that is lost shows here.
func TestUnitExposure(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "bpfnet.service")
	require.NoError(t, os.WriteFile(path, []byte(read(t, unit)), 0o600))
	out, err := exec.Command(analyze, "security", "--offline=yes", "--no-pager", "--threshold=76", path).CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, settings := range []string{"NoNewPrivileges", "MemoryDenyWriteExecute", "RestrictRealtime", "RestrictSUIDSGID", "LockPersonality", "SystemCallArchitectures"} {
		line := slices.IndexFunc(strings.Split(string(out), "\n"), func(l string) bool {
			return strings.Contains(l, settings+"=") && strings.HasPrefix(strings.TrimSpace(l), "✓")
		})
		assert.GreaterOrEqual(t, line, 0, "%s:\n%s", settings, out)
	}
}
