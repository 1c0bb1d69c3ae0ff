// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/daemon"
	"github.com/bpfnet/bpfnet/doctor"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/store"
)

var update = flag.Bool("update", false, "write golden files instead of comparing with them")

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// world is an App whose effects end in a temporary directory and in these fields.
type world struct {
	App
	t      *testing.T
	dir    string
	out    bytes.Buffer
	errs   bytes.Buffer
	daemon *daemon.Config // of the last run
	pid    int            // of the one process that lives
	calls  []string

	counters  fakeCounters
	openErr   error
	removeErr error
	sysctlErr error
	ownErr    error
	handover  doctor.Handover
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir()}
	w.App = App{
		Stdout: &w.out, Stderr: &w.errs,
		Now:        func() time.Time { return now },
		ProcStatus: filepath.Join(w.dir, "status"),
		ProcMounts: "/proc/mounts",
		Version:    "1.2.3",
		Environ:    func() []string { return []string{"PATH=/usr/bin:/bin", "A=1"} },
		Getwd:      func() (string, error) { return "/tmp", nil },
		ReadConfig: func(path string) ([]byte, error) {
			if path == defaultConfig { // the machine's
				return nil, fs.ErrNotExist
			}
			return os.ReadFile(path)
		},
		Alive:   func(pid int, startTime uint64) bool { return pid == w.pid && startTime == 99 },
		HasLink: func(ifindex int) bool { return ifindex == 12 },
		RunDaemon: func(_ context.Context, cfg daemon.Config) error {
			w.daemon = &cfg
			return nil
		},
		OpenCounters: func(bpffs string) (counters, error) {
			assert.Equal(t, w.bpffs(), bpffs)
			return w.counters, w.openErr
		},
		RemovePrograms: func(p loader.Paths) error {
			assert.Equal(t, w.bpffs(), p.BPFFS)
			w.calls = append(w.calls, "remove programs")
			return w.removeErr
		},
		Handover: func(context.Context) (doctor.Handover, error) { return w.handover, nil },
		HandFlows: func(string) (int, error) {
			w.calls = append(w.calls, "hand flows over")
			return 3, nil
		},
		CloseForward: func(_ context.Context, to doctor.Handover) error {
			w.calls = append(w.calls, fmt.Sprintf("close FORWARD %t %t", to.V4, to.V6))
			return nil
		},
		RemoveOwn: func(_ *store.Store, dir, _ string, force bool) error {
			assert.Equal(t, filepath.Join(w.state(), daemon.SandboxDir), dir)
			w.calls = append(w.calls, fmt.Sprintf("remove own, force %t", force))
			if force {
				return nil
			}
			return w.ownErr
		},
		RestoreSysctls: func(changes []store.Change) error {
			w.calls = append(w.calls, fmt.Sprintf("restore %v", changes))
			return w.sysctlErr
		},
	}
	w.may(0x1ffffffffff)
	return w
}

func (w *world) state() string  { return filepath.Join(w.dir, "state") }
func (w *world) socket() string { return filepath.Join(w.dir, "sock") }
func (w *world) bpffs() string  { return filepath.Join(w.dir, "bpffs") }

// may sets the capabilities of the process.
func (w *world) may(effective uint64) {
	w.t.Helper()
	text := fmt.Sprintf("Name:\tbpfnet\nCapPrm:\t%016x\nCapEff:\t%016x\n", 0, effective)
	require.NoError(w.t, os.WriteFile(w.ProcStatus, []byte(text), 0o600))
}

// run runs a command line with the world's paths.
func (w *world) run(args ...string) (status int, stdout, stderr string) {
	w.t.Helper()
	return w.bare(append(w.flags(), args...)...)
}

// flags lead to the world. They come first: run and exec take what follows.
func (w *world) flags() []string {
	return []string{"--state", w.state(), "--socket", w.socket(), "--bpffs", w.bpffs()}
}

func (w *world) bare(args ...string) (status int, stdout, stderr string) {
	w.t.Helper()
	w.out.Reset()
	w.errs.Reset()
	status = w.Run(w.t.Context(), args)
	return status, w.out.String(), w.errs.String()
}

// must runs a command line that succeeds.
func (w *world) must(args ...string) string {
	w.t.Helper()
	status, out, errs := w.run(args...)
	require.Zero(w.t, status, errs)
	assert.Empty(w.t, errs)
	return out
}

// fails runs a command line that fails with one line, and returns that.
func (w *world) fails(status int, args ...string) string {
	w.t.Helper()
	got, out, errs := w.run(args...)
	assert.Equal(w.t, status, got)
	assert.Empty(w.t, out)
	require.True(w.t, strings.HasSuffix(errs, "\n"))
	assert.Equal(w.t, 1, strings.Count(errs, "\n"), errs)
	assert.True(w.t, strings.HasPrefix(errs, "bpfnet: "), errs)
	return strings.TrimSuffix(errs, "\n")
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *update {
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
		return
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, string(want), got, "%s is stale: go test ./cmd/bpfnet -update", path)
}

// TestReference writes the commands' help into the documentation.
func TestReference(t *testing.T) {
	var doc strings.Builder
	doc.WriteString("# Commands\n\nMade from `--help` by `make generate`.\n")
	var visit func(path []string, cmd *cobra.Command)
	visit = func(path []string, cmd *cobra.Command) {
		status, out, errs := newWorld(t).bare(append(path, "--help")...)
		require.Zero(t, status, errs)
		fmt.Fprintf(&doc, "\n## %s\n\n```\n%s```\n", cmd.CommandPath(), out)
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() && sub.Name() != "help" {
				visit(append(path[:len(path):len(path)], sub.Name()), sub)
			}
		}
	}
	visit(nil, newWorld(t).command())
	golden(t, "../../docs/generated/cli.md", doc.String())
}

func TestHelpIsShownWithoutCommand(t *testing.T) {
	for _, args := range [][]string{nil, {"network"}} {
		status, out, errs := newWorld(t).bare(args...)
		assert.Zero(t, status)
		assert.Empty(t, errs)
		assert.Contains(t, out, "Available Commands:")
	}
}

func TestUsageErrors(t *testing.T) {
	for line, want := range map[string]string{
		"stat":                              `bpfnet: unknown command "stat"; did you mean nat, start, stats, status, stop?; see "bpfnet --help"`,
		"frobnicate":                        `bpfnet: unknown command "frobnicate"; see "bpfnet --help"`,
		"network alow a b":                  `bpfnet: network: unknown command "alow"; did you mean allow?; see "bpfnet network --help"`,
		"network allow a":                   `bpfnet: network allow: missing the second network; see "bpfnet network allow --help"`,
		"network allow":                     `bpfnet: network allow: missing the first network and the second network; see "bpfnet network allow --help"`,
		"network allow a b c":               `bpfnet: network allow: unexpected argument "c"; see "bpfnet network allow --help"`,
		"network allow a a":                 `bpfnet: network allow: "a" twice: want two different networks; see "bpfnet network allow --help"`,
		"stats --wat":                       `bpfnet: stats: unknown flag: --wat; see "bpfnet stats --help"`,
		"stats a b":                         `bpfnet: stats: unexpected argument "b"; see "bpfnet stats --help"`,
		"stats -o yaml":                     `bpfnet: stats: --output "yaml": want text or json; see "bpfnet stats --help"`,
		"status x":                          `bpfnet: status: unexpected argument "x"; see "bpfnet status --help"`,
		"version x":                         `bpfnet: version: unexpected argument "x"; see "bpfnet version --help"`,
		"stats --state= ":                   `bpfnet: stats: --state: empty path; see "bpfnet stats --help"`,
		"daemon --flows many":               `bpfnet: daemon: invalid argument "many" for "--flows" flag: strconv.ParseInt: parsing "many": invalid syntax; see "bpfnet daemon --help"`,
		"daemon --endpoint-flows -1":        `bpfnet: daemon: --endpoint-flows -1: want a positive number; see "bpfnet daemon --help"`,
		"daemon --flows -1":                 `bpfnet: daemon: --flows -1: want a positive number; see "bpfnet daemon --help"`,
		"daemon --link-type tap":            `bpfnet: daemon: --link-type "tap": want auto, veth or netkit; see "bpfnet daemon --help"`,
		"daemon --attach xdp":               `bpfnet: daemon: --attach "xdp": want tcx or clsact; see "bpfnet daemon --help"`,
		"daemon --relay some":               `bpfnet: daemon: --relay "some": want own, all or none; see "bpfnet daemon --help"`,
		"daemon --relay=":                   `bpfnet: daemon: --relay "": want own, all or none; see "bpfnet daemon --help"`,
		"daemon --docker tcp://1.2.3.4":     `bpfnet: daemon: --docker "tcp://1.2.3.4": want unix:///PATH or off; see "bpfnet daemon --help"`,
		"daemon --docker unix://run/x.sock": `bpfnet: daemon: --docker "unix://run/x.sock": want unix:///PATH or off; see "bpfnet daemon --help"`,
		"daemon --timeout udp":              `bpfnet: daemon: --timeout "udp": want NAME=DURATION; see "bpfnet daemon --help"`,
		"daemon --timeout udq=1m":           `bpfnet: daemon: --timeout "udq=1m": no such timeout; the nearest names are udp, icmp, other; see "bpfnet daemon --help"`,
		"daemon --timeout udp=5":            `bpfnet: daemon: --timeout "udp=5": want a duration like 30s, 5m or 2h4m; see "bpfnet daemon --help"`,
		"daemon --timeout udp=-5s":          `bpfnet: daemon: --timeout "udp=-5s": want a duration like 30s, 5m or 2h4m; see "bpfnet daemon --help"`,
		"daemon --log-level loud":           `bpfnet: daemon: --log-level "loud": want one of debug, error, info, warn; see "bpfnet daemon --help"`,
		"daemon --metrics-limit 0":          `bpfnet: daemon: --metrics-limit 0: want a positive number; see "bpfnet daemon --help"`,
		"daemon --metrics-listen :9633":     `bpfnet: daemon: --metrics-listen ":9633": want ADDR:PORT, like 127.0.0.1:9633 or [::]:9633; see "bpfnet daemon --help"`,
		"daemon --uplink=":                  `bpfnet: daemon: --uplink: empty name; see "bpfnet daemon --help"`,
	} {
		t.Run(line, func(t *testing.T) {
			w := newWorld(t)
			status, out, errs := w.bare(strings.Fields(line)...)
			assert.Equal(t, 2, status)
			assert.Empty(t, out)
			assert.Equal(t, want+"\n", errs)
			assert.Nil(t, w.daemon)
			assert.Empty(t, w.calls)
		})
	}
}

func TestErrorIsOneLine(t *testing.T) {
	w := newWorld(t)
	w.RunDaemon = func(context.Context, daemon.Config) error {
		return errors.Join(errors.New("one"), errors.New("two"))
	}
	assert.Equal(t, "bpfnet: daemon: one; two", w.fails(1, "daemon"))
}

func TestVersion(t *testing.T) {
	assert.Equal(t, "bpfnet 1.2.3\n", newWorld(t).must("version"))
	assert.Equal(t, "bpfnet 1.2.3\n", newWorld(t).must("--version"))
}

func TestDaemonConfig(t *testing.T) {
	w := newWorld(t)
	cgroup, err := w.findCgroup()
	require.NoError(t, err, "this test needs cgroup2 mounted")
	w.must("daemon")
	require.NotNil(t, w.daemon)
	paths := daemon.Paths{State: w.state(), Socket: w.socket(), BPFFS: w.bpffs(), Cgroup: cgroup}
	assert.Equal(t, paths, w.daemon.Paths)
	assert.Equal(t, "unix:///run/docker.sock", w.daemon.Docker)
	assert.Equal(t, "1.2.3", w.daemon.Version)
	assert.Empty(t, w.daemon.Uplinks)
	assert.Equal(t, daemon.RelayOwn, w.daemon.Relay)
	assert.NotNil(t, w.daemon.Banner)
	w.daemon.Logger.Info("to stderr")
	assert.Contains(t, w.errs.String(), "to stderr")

	w.must("daemon", "--docker", "off", "--uplink", "eth0", "--uplink", "wg0", "--attach", "clsact", "--flows", "1000",
		"--timeout", "udp=5m", "--timeout", "tcp-syn=10s", "--ip-forward-no-drop", "--default-bridge-no-masquerade",
		"--default-bridge-no-icc", "--relay", "all", "--log-level", "error", "--cgroup", cgroup+"/",
		"--metrics-listen", "127.0.0.1:9633", "--metrics-limit", "5", "--endpoint-flows", "300")
	got := *w.daemon
	got.Logger.Info("not to stderr")
	assert.Empty(t, w.errs.String())
	got.Logger, got.Banner = nil, nil
	assert.Equal(t, daemon.Config{
		Paths: paths, Docker: "off", Uplinks: []string{"eth0", "wg0"}, Attach: "clsact", LinkType: "auto", Flows: 1000,
		Timeouts:        map[string]time.Duration{"udp": 5 * time.Minute, "tcp-syn": 10 * time.Second},
		IPForwardNoDrop: true, DefaultBridgeNoMasquerade: true, DefaultBridgeNoICC: true, Relay: daemon.RelayAll, Version: "1.2.3",
		MetricsListen: netip.MustParseAddrPort("127.0.0.1:9633"), MetricsLimit: 5,
		EndpointFlows: 300,
	}, got)
}

func TestMissingCapabilities(t *testing.T) {
	const netAdmin, sysAdmin, perfmon, bpf = 1 << 12, 1 << 21, 1 << 38, 1 << 39
	for _, c := range []struct {
		have    uint64
		missing string
	}{
		{0, "CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON"},
		{netAdmin, "CAP_BPF, CAP_PERFMON"},
		{netAdmin | bpf, "CAP_PERFMON"},
		{bpf | perfmon, "CAP_NET_ADMIN"},
		{sysAdmin, "CAP_NET_ADMIN"},
		{netAdmin | sysAdmin, ""},
		{netAdmin | bpf | perfmon, ""},
	} {
		for _, verb := range []string{"daemon", "cleanup"} {
			w := newWorld(t)
			w.may(c.have)
			if c.missing == "" {
				w.must(verb)
				continue
			}
			assert.Equal(t, "bpfnet: "+verb+": not permitted: missing "+c.missing+"; run this as root", w.fails(1, verb))
			assert.Nil(t, w.daemon)
			assert.Empty(t, w.calls)
		}
	}
}

func TestCgroup(t *testing.T) {
	w := newWorld(t)
	w.ProcMounts = filepath.Join(w.dir, "mounts")
	mounts := "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n"
	require.NoError(t, os.WriteFile(w.ProcMounts, []byte(mounts), 0o600))
	got := w.fails(1, "daemon")
	assert.Contains(t, got, "bpfnet: daemon: cgroup2 is not mounted")
	assert.Contains(t, got, "mount -t cgroup2")
	assert.Contains(t, got, "--cgroup")
	assert.Nil(t, w.daemon)
	w.must("cleanup") // what is not there needs no cleaning

	assert.Equal(t, fmt.Sprintf("bpfnet: daemon: --cgroup %s: not a directory of cgroup2; name one below its mount", w.dir),
		w.fails(1, "daemon", "--cgroup", w.dir))
	assert.Equal(t, "bpfnet: daemon: --cgroup /nowhere: no such file or directory", w.fails(1, "daemon", "--cgroup", "/nowhere"))

	assert.Equal(t, "/mnt/a b", cgroupMount(mounts+"none /mnt/a\\040b cgroup2 rw 0 0\nnone /second cgroup2 rw 0 0\n"))
}

// handler allows what it does not refuse.
type handler struct {
	api.Handler // nil: what no command of this package's asks for
	pid         int
	refuse      error
	allowed     map[api.Pair]bool
}

func (h *handler) Status(context.Context) (api.Status, error) { return api.Status{PID: h.pid}, nil }

func (h *handler) set(p api.Pair, to bool) (bool, error) {
	changed := h.allowed[p] != to
	if h.refuse == nil {
		h.allowed[p] = to
	}
	return changed, h.refuse
}

func (h *handler) Allow(_ context.Context, p api.Pair) (bool, error)    { return h.set(p, true) }
func (h *handler) Disallow(_ context.Context, p api.Pair) (bool, error) { return h.set(p, false) }

// serve has a daemon listen until the returned function is called.
func (w *world) serve(h api.Handler) (stop func()) {
	w.t.Helper()
	l, err := api.Listen(w.socket(), "")
	require.NoError(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- api.NewServer(h).Run(ctx, l) }()
	return func() {
		cancel()
		assert.NoError(w.t, <-done)
	}
}

func TestNetworkAllowAndDisallow(t *testing.T) {
	w := newWorld(t)
	assert.Equal(t, "bpfnet: network allow: the daemon is not running: nothing listens on "+w.socket()+
		`; start it with "bpfnet daemon", or name its socket with --socket`, w.fails(1, "network", "allow", "fe", "be"))

	h := &handler{allowed: make(map[api.Pair]bool)}
	defer w.serve(h)()
	assert.Equal(t, "fe and be may talk now\n", w.must("network", "allow", "fe", "be"))
	assert.Equal(t, "fe and be might talk already\n", w.must("network", "allow", "fe", "be"))
	assert.Equal(t, map[api.Pair]bool{{A: "fe", B: "be"}: true}, h.allowed)
	assert.Equal(t, "fe and be are isolated now\n", w.must("network", "disallow", "fe", "be"))
	assert.Equal(t, "fe and be were isolated already\n", w.must("network", "disallow", "fe", "be"))

	h.refuse = &api.UnknownError{What: "network", Name: "bee", Nearest: []string{"be", "fe"}}
	assert.Equal(t, `bpfnet: network allow: network "bee": no such network; the nearest names are be, fe`,
		w.fails(1, "network", "allow", "fe", "bee"))
	h.refuse = &api.UnknownError{What: "network", Name: "bee"}
	assert.Equal(t, `bpfnet: network disallow: network "bee": no such network; no network is known yet`,
		w.fails(1, "network", "disallow", "fe", "bee"))
}

func TestCleanup(t *testing.T) {
	w := newWorld(t)
	leave := func() {
		t.Helper()
		st, err := store.Open(w.state())
		require.NoError(t, err)
		require.NoError(t, st.SetSysctls([]store.Change{{Path: "p", Old: "0", New: "1"}}))
		require.NoError(t, st.Close())
		require.NoError(t, api.WriteSnapshot(w.state(), &api.Snapshot{}))
		w.calls = nil
	}
	left := func() []string {
		t.Helper()
		var names []string
		entries, err := os.ReadDir(w.state())
		require.NoError(t, err)
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}

	leave()
	out := w.must("cleanup")
	assert.Equal(t, []string{"remove own, force false", "restore [{p 0 1 false}]", "remove programs"}, w.calls)
	assert.Equal(t, "restored settings: 1\nremoved programs, links and maps: "+w.bpffs()+"\nremoved state: "+w.state()+"\n", out)
	assert.Empty(t, left())

	// Once more: nothing is there, and that is no error.
	w.must("cleanup")
	require.NoError(t, os.Remove(w.state()))
	assert.Equal(t, "removed programs, links and maps: "+w.bpffs()+"\n", w.must("cleanup"))
	assert.NoDirExists(t, w.state())

	// What fails can be tried again.
	leave()
	w.sysctlErr = errors.New("read-only")
	assert.Equal(t, "bpfnet: cleanup: restore settings: read-only; the rest is left as it was, try again", w.fails(1, "cleanup"))
	assert.Equal(t, []string{"remove own, force false", "restore [{p 0 1 false}]"}, w.calls)
	w.sysctlErr, w.removeErr, w.calls = nil, errors.New("busy"), nil
	status, _, errs := w.run("cleanup")
	assert.Equal(t, 1, status)
	assert.Equal(t, "bpfnet: cleanup: remove programs: busy\n", errs)
	assert.Equal(t, []string{store.FileName, api.SnapshotName}[0], left()[1])
	w.removeErr = nil
	w.must("cleanup")
	assert.Empty(t, left())

	// Sandboxes run: nothing is changed, unless they are to end.
	leave()
	w.calls, w.ownErr = nil, errors.New("sandboxes run: web")
	assert.Equal(t, "bpfnet: cleanup: sandboxes run: web", w.fails(1, "cleanup"))
	assert.Equal(t, []string{"remove own, force false"}, w.calls)
	w.must("cleanup", "--force")
	assert.Empty(t, left())
}

func TestCleanupIsRefusedWhileADaemonRuns(t *testing.T) {
	w := newWorld(t)
	stop := w.serve(&handler{})
	assert.Equal(t, "bpfnet: cleanup: a daemon listens on "+w.socket()+"; stop it first", w.fails(1, "cleanup"))
	stop()
	st, err := store.Open(w.state())
	require.NoError(t, err)
	assert.Equal(t, "bpfnet: cleanup: a daemon uses the state "+w.state()+"; stop it first", w.fails(1, "cleanup"))
	require.NoError(t, st.Close())
	assert.Empty(t, w.calls)
	w.must("cleanup")
}

func TestCleanupKeepsDamagedState(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(w.state(), store.FileName)
	require.NoError(t, os.Mkdir(w.state(), 0o755))
	require.NoError(t, os.WriteFile(path, []byte("nonsense"), 0o600))
	got := w.fails(1, "cleanup")
	assert.Contains(t, got, "bpfnet: cleanup: state file "+path+": damaged")
	assert.Contains(t, got, "mv "+path)
	assert.FileExists(t, path)
	assert.Empty(t, w.calls)
}

func TestCleanupRemovesNoFileThatIsNoSocket(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, os.WriteFile(w.socket(), nil, 0o600))
	st, err := store.Open(w.state())
	require.NoError(t, err)
	require.NoError(t, st.Close())
	w.must("cleanup")
	assert.FileExists(t, w.socket())
}

// What becomes of Docker's networks: nothing is done that opens them unasked, and an Engine that goes on
// keeps forwarding and gets the flows.
func TestCleanupForDocker(t *testing.T) {
	w := newWorld(t)
	leave := func() {
		t.Helper()
		st, err := store.Open(w.state())
		require.NoError(t, err)
		require.NoError(t, st.SetSysctls([]store.Change{
			{Path: "net/ipv4/ip_forward", Old: "0", New: "1"},
			{Path: "net/ipv4/conf/eth0/forwarding", Old: "0", New: "1", Side: true},
			{Path: "net/ipv6/conf/all/forwarding", Old: "0", New: "1"},
			{Path: "net/ipv6/conf/eth0/accept_ra", Old: "1", New: "2"},
			{Path: "net/bridge/bridge-nf-call-iptables", Old: "1", New: "0"},
		}))
		require.NoError(t, st.Close())
		w.calls = nil
	}
	leave()
	w.handover = doctor.Handover{V4: true, Open: []string{"red (IPv4)", "red (IPv6)"}}
	assert.Contains(t, w.fails(1, "cleanup"), "without rules of an Engine these networks would stand open: red (IPv4), red (IPv6);")
	assert.Empty(t, w.calls)
	w.handover.V4 = false
	out := w.must("cleanup", "--leave-open")
	assert.NotContains(t, out, "handed")
	assert.Len(t, w.calls, 3, "all settings go back: %v", w.calls)

	leave()
	w.handover = doctor.Handover{V4: true}
	out = w.must("cleanup")
	assert.Equal(t, []string{
		"remove own, force false", "close FORWARD true false",
		"restore [{net/ipv6/conf/all/forwarding 0 1 false} {net/ipv6/conf/eth0/accept_ra 1 2 false} {net/bridge/bridge-nf-call-iptables 1 0 false}]",
		"hand flows over", "remove programs",
	}, w.calls)
	assert.Contains(t, out, "flows handed to netfilter: 3\n")

	// Forwarding that somebody else turned on is no business of ours.
	leave()
	st, err := store.Open(w.state())
	require.NoError(t, err)
	require.NoError(t, st.SetSysctls([]store.Change{{Path: "p", Old: "0", New: "1"}}))
	require.NoError(t, st.Close())
	w.handover = doctor.Handover{V4: true, V6: true}
	w.must("cleanup")
	assert.Equal(t, []string{"remove own, force false", "restore [{p 0 1 false}]", "hand flows over", "remove programs"}, w.calls)
}
