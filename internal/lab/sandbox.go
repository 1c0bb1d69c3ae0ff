// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/bpfnet/bpfnet/api"
)

// sandboxDir is the cgroup of all sandboxes, below [Lab.Cgroup].
const sandboxDir = "bpfnet"

// StartCLI starts a command of bpfnet, as [Bpfnet.CLI] runs it, and leaves it running: a
// "run" in the foreground.
func (b *Bpfnet) StartCLI(t testing.TB, args ...string) *Process {
	t.Helper()
	cmd := b.Command(context.Background(), args...)
	p, err := b.lab.start(cmd, "bpfnet-"+args[0])
	if err != nil {
		t.Fatalf("start %v: %v", args, err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("bpfnet %s: stdout: %s\nstderr: %s", strings.Join(args, " "), tail(p.stdout), tail(p.stderr))
		}
	})
	return p
}

// Snapshot is what the daemon last told its readers.
func (b *Bpfnet) Snapshot(t testing.TB) *api.Snapshot {
	t.Helper()
	s, err := api.ReadSnapshot(b.State)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Sandbox finds a sandbox of bpfnet's own by its name or the beginning of its ID.
func (b *Bpfnet) Sandbox(t testing.TB, name string) api.Sandbox {
	t.Helper()
	for _, s := range b.Snapshot(t).Sandboxes {
		if s.Name == name || len(name) >= 12 && strings.HasPrefix(s.ID, name) {
			return s
		}
	}
	t.Fatalf("no sandbox %s", name)
	return api.Sandbox{}
}

// NS returns the network namespace of a running sandbox. Commands that run there stand in
// its cgroup, and see the host's files.
func (b *Bpfnet) NS(t testing.TB, sandbox string) *NS {
	t.Helper()
	s := b.Sandbox(t, sandbox)
	if s.PID == 0 {
		t.Fatalf("sandbox %s does not run: %+v", sandbox, s)
	}
	return b.lab.processNS(t, sandbox, strconv.Itoa(s.PID))
}

// Addrs returns the IPv4 and IPv6 addresses that a sandbox has on a network, as "network
// inspect" prints them. An address that it does not have is the zero Addr.
func (b *Bpfnet) Addrs(t testing.TB, sandbox, network string) (v4, v6 netip.Addr) {
	t.Helper()
	for _, c := range b.InspectNetwork(t, network).Containers {
		if c.Name == sandbox {
			p4, _ := netip.ParsePrefix(c.IPv4Address)
			p6, _ := netip.ParsePrefix(c.IPv6Address)
			return p4.Addr(), p6.Addr()
		}
	}
	t.Fatalf("sandbox %s is not on network %s", sandbox, network)
	return v4, v6
}

// NetworkInspect is the shape in which docker and bpfnet tell about a network.
type NetworkInspect struct {
	Name     string
	ID       string `json:"Id"`
	Driver   string
	Internal bool
	IPAM     struct {
		Config []struct{ Subnet, IPRange, Gateway string }
	}
	Containers map[string]struct{ Name, EndpointID, MacAddress, IPv4Address, IPv6Address string }
	Options    map[string]string
	Labels     map[string]string
}

// InspectNetwork is "network inspect" of one network.
func (b *Bpfnet) InspectNetwork(t testing.TB, network string) NetworkInspect {
	t.Helper()
	out := b.MustCLI(t, "network", "inspect", network)
	var all []NetworkInspect
	if err := json.Unmarshal([]byte(out), &all); err != nil || len(all) != 1 {
		t.Fatalf("network inspect %s: %v\n%s", network, err, out)
	}
	return all[0]
}

// Get runs "labtool get" in a running sandbox, by "bpfnet exec".
func (b *Bpfnet) Get(sandbox string, args ...string) (Reply, error) {
	return get(func(ctx context.Context) *exec.Cmd {
		return b.Command(ctx, slices.Concat([]string{"exec", sandbox, "labtool", "get"}, args)...)
	})
}

// MustGet is Get for exchanges that must succeed.
func (b *Bpfnet) MustGet(t testing.TB, sandbox string, args ...string) Reply {
	t.Helper()
	r, err := b.Get(sandbox, args...)
	if err != nil {
		t.Fatalf("in sandbox %s: %v: %+v", sandbox, err, r)
	}
	return r
}

// WaitLog waits until a sandbox has written text, and fails the test when it ends before,
// or after twenty seconds.
func (b *Bpfnet) WaitLog(t testing.TB, sandbox, text string) {
	t.Helper()
	Eventually(t, 20*time.Second, fmt.Sprintf("%q in the log of %s", text, sandbox), func() bool {
		s := b.Sandbox(t, sandbox) // before the look at the log
		log, err := b.Command(context.Background(), "logs", sandbox).CombinedOutput()
		if err != nil {
			t.Fatalf("logs %s: %v: %s", sandbox, err, log)
		}
		if !strings.Contains(string(log), text) && s.Status == api.StatusExited {
			t.Fatalf("sandbox %s ended before it said %q: %+v\n%s", sandbox, text, s, log)
		}
		return strings.Contains(string(log), text)
	})
}

// Serve runs a sandbox with the tool's server in it, and waits until it listens. Args are
// those of "bpfnet run"; behind "--" follow those of labtool serve. It returns the ID.
func (b *Bpfnet) Serve(t testing.TB, args ...string) string {
	t.Helper()
	args, serve := splitServe(args)
	id := b.MustCLI(t, slices.Concat([]string{"run", "-d"}, args, []string{"--", "labtool", "serve"}, serve)...)
	b.WaitLog(t, id, "ready")
	return id
}

// processNS is the network namespace of a process of the lab, with the process's cgroup.
func (l *Lab) processNS(t testing.TB, name, pid string) *NS {
	t.Helper()
	n := &NS{Name: name, Path: "/proc/" + pid + "/ns/net", lab: l}
	root, err := cgroup2Root()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(read("/proc/" + pid + "/cgroup")) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			n.cgroup = openDir(t, filepath.Join(root, path))
		}
	}
	return n
}

// Runners lists the processes that run detached sandboxes: "bpfnet-runner SOCKET ID". They
// outlive the daemon.
func (b *Bpfnet) Runners() []int {
	return processes(func(p procInfo) bool { return strings.HasPrefix(p.cmdline, "bpfnet-runner "+b.Socket+" ") })
}

// KillSandboxes ends every sandbox and every detached runner at once, with SIGKILL, as a
// crash of the machine would: nobody is told.
func (b *Bpfnet) KillSandboxes(t testing.TB) {
	t.Helper()
	// Runners first: one that outlived its process would tell the daemon.
	Eventually(t, 10*time.Second, "runners are gone", func() bool {
		left := b.Runners()
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(left) == 0
	})
	if err := killCgroup(b.lab.cgroup(sandboxDir)); err != nil {
		t.Error(err)
	}
}

// endSandboxes ends what the daemon under test would have left running.
func (b *Bpfnet) endSandboxes(t testing.TB) {
	t.Helper()
	b.KillSandboxes(t)
	if err := removeCgroup(b.lab.cgroup(sandboxDir)); err != nil {
		t.Logf("remove the sandboxes' cgroups: %v", err) // the lab's cleanup tries again
	}
}

// Belongings lists what sandboxes and networks of bpfnet's own make on the host: devices
// (by their alias, which begins with "bpfnet"), cgroups, mounts of the host's own view,
// directories of sandboxes, and runners. Sorted.
func (b *Bpfnet) Belongings(t testing.TB) []string {
	t.Helper()
	var all []string
	b.lab.Host.link(t, func(h *netlink.Handle) error {
		links, err := h.LinkList()
		for errors.Is(err, netlink.ErrDumpInterrupted) { // devices came or went meanwhile
			links, err = h.LinkList()
		}
		if err != nil {
			return err
		}
		for _, l := range links {
			a := l.Attrs()
			if strings.HasPrefix(a.Alias, "bpfnet") || strings.HasPrefix(a.Name, "bpv-") || strings.HasPrefix(a.Name, "bpn-") {
				all = append(all, "device "+a.Name)
			}
		}
		return nil
	})
	walk := func(what, root string) {
		_ = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() && path != root {
				all = append(all, what+" "+strings.TrimPrefix(path, root))
			}
			return nil
		})
	}
	walk("cgroup", b.lab.cgroup(sandboxDir))
	walk("directory", filepath.Join(b.State, "sandboxes"))
	for _, m := range mountsBelow(b.State) {
		all = append(all, "mount "+m)
	}
	for range b.Runners() {
		all = append(all, "runner")
	}
	slices.Sort(all)
	return all
}

// PathOf is where a program of [Image] is for sandboxes.
func (b *Bpfnet) PathOf(program string) string { return filepath.Join(b.tools, program) }

// ForgetNetworks does what a reboot does to the host: devices of bpfnet's own networks and
// sandboxes, pins and the sandboxes' cgroups are gone. The daemon and the sandboxes must
// have ended before.
func (b *Bpfnet) ForgetNetworks(t testing.TB) {
	t.Helper()
	for _, what := range b.Belongings(t) {
		if device, ok := strings.CutPrefix(what, "device "); ok {
			// The other end of a veth may have gone with its namespace.
			_, _ = b.lab.Host.Run(t.Context(), "ip", "link", "delete", device)
		}
	}
	if err := removeCgroup(b.lab.cgroup(sandboxDir)); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(b.lab.BPFFS)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(b.lab.BPFFS, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// KillRunner ends the parent of a sandbox's process with SIGKILL, and waits until it is
// gone. The sandbox lives on.
func (b *Bpfnet) KillRunner(t testing.TB, sandbox string) {
	t.Helper()
	stat := read(fmt.Sprintf("/proc/%d/stat", b.Sandbox(t, sandbox).PID))
	// The fourth field, behind the command in parentheses: proc_pid_stat(5).
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	runner, err := strconv.Atoi(fields[1])
	if err != nil || runner == 1 || !slices.Contains(b.Runners(), runner) {
		t.Fatalf("%s: process %d is no runner: %v", sandbox, runner, err)
	}
	_ = syscall.Kill(runner, syscall.SIGKILL)
	Eventually(t, 10*time.Second, sandbox+"'s runner is gone", func() bool { return !slices.Contains(b.Runners(), runner) })
}
