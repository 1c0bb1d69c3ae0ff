// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/sandbox"
	"github.com/bpfnet/bpfnet/store"
)

// world is a host with the embedded engine on it. What the daemon does for that is played by the test:
// it records what it is asked for, and can be told to fail.
type world struct {
	*Manager
	t       *testing.T
	opts    Options
	state   string // directory of the store
	stop    func() // of Run, and all that New has made
	log     *logBuffer
	foreign policy.State

	rounds   sync.Mutex
	mu       sync.Mutex
	guarded  map[int]bool
	applied  policy.State // the last
	applies  int
	guardErr error
	applyErr error
	onApply  func() // what others do meanwhile
	unready  string // why no endpoint is ready
}

// newWorld starts the engine on an empty store.
func newWorld(t *testing.T) *world {
	t.Helper()
	lab.NeedRoot(t)
	setUp(t, "lo")
	w := &world{t: t, state: t.TempDir(), log: &logBuffer{}, guarded: make(map[int]bool)}
	devices, err := netdev.Open(netdev.Options{})
	require.NoError(t, err)
	t.Cleanup(devices.Close)
	w.opts = Options{
		Devices: devices, Dir: filepath.Join(w.state, "sandboxes"), Cgroup: testCgroup(t),
		Foreign: func() policy.State { return w.foreign },
		Guard:   w.guard, Apply: w.apply, Ready: w.ready,
		Log: slog.New(slog.NewTextHandler(w.log, nil)),
	}
	w.start()
	t.Cleanup(func() {
		if w.Manager == nil {
			w.start()
		}
		w.end()
		s := w.open()
		assert.NoError(t, Cleanup(s, devices, w.opts.Dir, w.opts.Cgroup, true))
		assert.NoError(t, s.Close())
		assert.Empty(t, ownLinks(t, devices), "links are left")
		if t.Failed() {
			t.Log(w.log.String())
		}
	})
	return w
}

func (w *world) open() *store.Store {
	w.t.Helper()
	s, err := store.Open(w.state)
	require.NoError(w.t, err)
	return s
}

// start is a start of the daemon.
func (w *world) start() {
	w.t.Helper()
	w.opts.Store = w.open()
	m, err := New(w.opts)
	require.NoError(w.t, err)
	w.Manager = m
	require.NoError(w.t, m.Restore(w.t.Context()))
	require.NoError(w.t, w.apply(w.t.Context()))
	ctx, cancel := context.WithCancel(context.Background())
	over := make(chan error, 1)
	go func() { over <- m.Run(ctx) }()
	w.stop = func() {
		cancel()
		assert.NoError(w.t, <-over)
		m.Close()
		assert.NoError(w.t, w.opts.Store.Close())
	}
}

// end is an end of the daemon, also by kill -9: nothing is written at it.
func (w *world) end() {
	w.stop()
	w.Manager = nil
}

func (w *world) restart() {
	w.t.Helper()
	w.end()
	w.start()
}

func (w *world) guard(ifindex int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.guarded[ifindex] = true
	return w.guardErr
}

func (w *world) apply(context.Context) error {
	w.mu.Lock()
	meanwhile := w.onApply
	w.mu.Unlock()
	if meanwhile != nil {
		meanwhile()
	}
	w.rounds.Lock() // one after the other, so that none brings an older state
	defer w.rounds.Unlock()
	s := w.Manager.State()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.applied = s
	w.applies++
	return w.applyErr
}

// ready is what the data path would say: it needs the guarded port of a bridge that has the MAC behind it.
func (w *world) ready(id string) (bool, string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.unready != "" {
		return false, w.unready
	}
	i := slices.IndexFunc(w.applied.Endpoints, func(e policy.Endpoint) bool { return e.ID == id })
	if i < 0 {
		return false, "unknown"
	}
	e := w.applied.Endpoints[i]
	j := slices.IndexFunc(w.applied.Networks, func(n policy.Network) bool { return n.ID == e.NetworkID })
	bridge := w.applied.Networks[j].Bridge
	snap, err := w.opts.Devices.Snapshot(map[string]bool{bridge: true}, nil)
	if err != nil {
		return false, err.Error()
	}
	for _, l := range snap.Links {
		if l.Bridge == bridge && l.PeerMAC == e.MAC {
			return w.guarded[l.Ifindex], "not guarded"
		}
	}
	return false, "no port has its MAC behind it"
}

// set changes what the world does, and gives it its old way back.
func (w *world) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

// picture is all that a verb may change.
type picture struct {
	State   policy.State
	View    View
	Own     store.Own
	Links   []string
	Routes  []string
	Sockets int
	Files   map[string]string
	Cgroups []string
	Claims  int
	InUse   map[string]int // endpoints by network, also those under way
}

func (w *world) look() picture {
	w.t.Helper()
	p := picture{State: w.State(), View: w.View(), Files: make(map[string]string), InUse: make(map[string]int)}
	var err error
	p.Own, err = w.opts.Store.Own()
	require.NoError(w.t, err)
	links, err := netlink.LinkList()
	require.NoError(w.t, err)
	for _, l := range links {
		p.Links = append(p.Links, fmt.Sprintf("%s %s %d", l.Attrs().Name, l.Type(), l.Attrs().MTU))
	}
	slices.Sort(p.Links)
	routes, err := w.opts.Devices.Routes(nil)
	require.NoError(w.t, err)
	for _, r := range routes {
		p.Routes = append(p.Routes, r.Dst.String()+" "+r.Device)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(w.t, err)
	for _, fd := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(to, "socket:") {
			p.Sockets++
		}
	}
	err = filepath.WalkDir(w.opts.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			b, err := os.ReadFile(path)
			p.Files[path] = string(b)
			return err
		}
		p.Files[path] = ""
		return nil
	})
	require.NoError(w.t, err)
	p.Cgroups = listIDs(filepath.Join(w.opts.Cgroup, cgroupDir))
	w.Manager.mu.Lock()
	defer w.Manager.mu.Unlock()
	p.Claims = len(w.claims)
	for _, n := range w.networks {
		p.InUse[n.Name] = len(n.endpoints)
	}
	return p
}

// refuses is for verbs that must fail with that text, on one line, and change nothing.
func (w *world) refuses(text string, verb func() error) {
	w.t.Helper()
	before := w.look()
	err := verb()
	require.Error(w.t, err)
	assert.Equal(w.t, text, err.Error())
	assert.NotContains(w.t, err.Error(), "\n")
	w.same(before, text)
}

// same fails with what is different now, and with nothing else: a picture is long.
func (w *world) same(before picture, what string) {
	w.t.Helper()
	text := func(p picture) []string {
		b, err := json.MarshalIndent(p, "", " ")
		require.NoError(w.t, err)
		return strings.Split(string(b), "\n")
	}
	old, now := text(before), text(w.look())
	if slices.Equal(old, now) {
		return
	}
	var diff []string
	for _, l := range old {
		if !slices.Contains(now, l) {
			diff = append(diff, "- "+l)
		}
	}
	for _, l := range now {
		if !slices.Contains(old, l) {
			diff = append(diff, "+ "+l)
		}
	}
	assert.Fail(w.t, "something has changed", "%s\n%s", what, strings.Join(diff, "\n"))
}

// run is a sandbox that the test runs: its process, and the thread that holds the namespace.
type running struct {
	api.SandboxInfo
	w      *world
	thread *sandbox.Thread
	proc   *sandbox.Process
	grant  api.SandboxGrant
	waited bool
}

var sleep = []string{"/bin/sleep", "1000"}

func (w *world) spec(name string) api.SandboxSpec {
	return api.SandboxSpec{Name: name, Command: sleep, Dir: "/", Env: []string{"PATH=/bin"}}
}

func (w *world) create(spec api.SandboxSpec) api.SandboxInfo {
	w.t.Helper()
	info, err := w.CreateSandbox(w.t.Context(), spec)
	require.NoError(w.t, err)
	return info
}

// self is the context of requests by the test process.
func self(t *testing.T) context.Context { return api.WithPeerPID(t.Context(), os.Getpid()) }

// enter makes the thread for a sandbox.
func (w *world) enter(info api.SandboxInfo) (*sandbox.Thread, int) {
	w.t.Helper()
	th := sandbox.NewThread()
	switch info.Mode {
	case api.ModeHost:
		return th, 0
	case api.ModeContainer:
		require.NoError(w.t, th.JoinNetNS(info.JoinPID))
		return th, 0
	}
	require.NoError(w.t, th.NewNetNS())
	return th, th.TID()
}

// try starts a sandbox without its process. The thread is closed if that fails.
func (w *world) try(name string) (*running, error) {
	w.t.Helper()
	info, err := w.Sandbox(w.t.Context(), api.Named{Name: name})
	require.NoError(w.t, err)
	th, tid := w.enter(info)
	grant, err := w.StartSandbox(self(w.t), api.SandboxStart{Name: name, TID: tid})
	if err != nil {
		th.Close()
		return nil, err
	}
	return &running{SandboxInfo: info, w: w, thread: th, grant: grant}, nil
}

// launch starts a sandbox with its process.
func (w *world) launch(name string) *running {
	w.t.Helper()
	r, err := w.try(name)
	require.NoError(w.t, err)
	r.begin()
	return r
}

// begin starts the process. It is killed at the test's end if it still runs.
func (r *running) begin() {
	r.w.t.Helper()
	var err error
	r.proc, err = r.thread.Start(sandbox.Command{Path: r.Command[0], Args: r.Command, Dir: "/", Cgroup: r.Cgroup, Files: r.grant.Files})
	require.NoError(r.w.t, err)
	r.w.t.Cleanup(r.wait)
	_, err = r.w.SandboxRuns(r.w.t.Context(), api.SandboxRunning{ID: r.ID, PID: r.proc.PID()})
	require.NoError(r.w.t, err)
}

// wait ends the process.
func (r *running) wait() {
	if r.waited {
		return
	}
	r.waited = true
	_ = r.proc.Signal(os.Kill)
	_, _ = r.proc.Wait()
	r.thread.Close()
}

// finish ends the process and reports it, as a runner does.
func (r *running) finish(code int) {
	r.w.t.Helper()
	r.wait()
	require.NoError(r.w.t, errors.Join(sandbox.KillCgroup(r.Cgroup), sandbox.RemoveCgroup(r.Cgroup)))
	_, err := r.w.SandboxEnded(r.w.t.Context(), api.SandboxExited{ID: r.ID, Code: code})
	require.NoError(r.w.t, err)
	r.w.lingering.Wait()
}

func (w *world) run(spec api.SandboxSpec) *running {
	w.t.Helper()
	return w.launch(w.create(spec).Name)
}

func (w *world) network(spec api.NetworkSpec) api.Created {
	w.t.Helper()
	c, err := w.CreateNetwork(w.t.Context(), spec)
	require.NoError(w.t, err)
	return c
}

// endpoint is that of a sandbox in a network, as State has it.
func (w *world) endpoint(box, network string) (policy.Endpoint, bool) {
	s := w.State()
	for _, e := range s.Endpoints {
		for _, n := range s.Networks {
			if e.Name == box && n.ID == e.NetworkID && n.Name == network {
				return e, true
			}
		}
	}
	return policy.Endpoint{}, false
}

func (w *world) addrs(box, network string) []string {
	w.t.Helper()
	e, ok := w.endpoint(box, network)
	require.True(w.t, ok, "%s is not in %s", box, network)
	var out []string
	for _, a := range e.Addrs {
		out = append(out, a.String())
	}
	return out
}

// linkOf is the host's end of an interface.
func (w *world) linkOf(box, network string) string {
	w.t.Helper()
	s := w.open()
	defer s.Close()
	own, err := s.Own()
	require.NoError(w.t, err)
	for _, e := range own.Endpoints {
		for _, b := range own.Sandboxes {
			for _, n := range own.Networks {
				if e.SandboxID == b.ID && b.Name == box && e.NetworkID == n.ID && n.Name == network {
					return e.Link
				}
			}
		}
	}
	require.FailNow(w.t, "no link", "%s in %s", box, network)
	return ""
}

// ports are the published ports of a sandbox, as State has them.
func (w *world) ports(box string) []string {
	s := w.State()
	var out []string
	for _, p := range s.Ports {
		for _, e := range s.Endpoints {
			if e.ID == p.EndpointID && e.Name == box {
				out = append(out, p.String())
			}
		}
	}
	return out
}

func (w *world) status(box string) api.Sandbox {
	w.t.Helper()
	for _, s := range w.View().Sandboxes {
		if s.Name == box {
			return s
		}
	}
	require.FailNow(w.t, "no sandbox "+box)
	return api.Sandbox{}
}

func (w *world) exists(box string) bool {
	return slices.ContainsFunc(w.View().Sandboxes, func(s api.Sandbox) bool { return s.Name == box })
}

// inside looks at a sandbox's namespace: "eth0 172.18.0.2/16", "default 172.18.0.1".
func inside(t *testing.T, pid int) []string {
	t.Helper()
	ns, err := netns.GetFromPid(pid)
	require.NoError(t, err)
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	require.NoError(t, err)
	defer h.Close()
	links, err := h.LinkList()
	require.NoError(t, err)
	var out []string
	for _, l := range links {
		if l.Type() != "veth" && l.Attrs().Name != "lo" { // gre0 and others come with the kernel
			continue
		}
		addrs, err := h.AddrList(l, netlink.FAMILY_ALL)
		require.NoError(t, err)
		for _, a := range addrs {
			if !a.IP.IsLinkLocalUnicast() {
				out = append(out, l.Attrs().Name+" "+a.IPNet.String())
			}
		}
	}
	routes, err := h.RouteList(nil, netlink.FAMILY_ALL)
	require.NoError(t, err)
	for _, r := range routes {
		if r.Gw != nil {
			out = append(out, "default "+r.Gw.String())
		}
	}
	slices.Sort(out)
	return out
}

// child is a runner that is a process of its own, and can be killed.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.Writer
	out *bufio.Scanner
	tid int
}

func newChild(t *testing.T) *child {
	t.Helper()
	c := &child{t: t, cmd: exec.Command("/proc/self/exe")}
	c.cmd.Env = append(os.Environ(), roleEnv+"=1")
	c.cmd.Stderr = os.Stderr
	in, err := c.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := c.cmd.StdoutPipe()
	require.NoError(t, err)
	c.in, c.out = in, bufio.NewScanner(out)
	require.NoError(t, c.cmd.Start())
	t.Cleanup(c.kill)
	c.tid = c.answer("TID %d")
	return c
}

func (c *child) answer(format string) (n int) {
	c.t.Helper()
	require.True(c.t, c.out.Scan(), "the runner says nothing")
	_, err := fmt.Sscanf(c.out.Text(), format, &n)
	require.NoError(c.t, err, c.out.Text())
	return n
}

// ctx is the context of its requests.
func (c *child) ctx() context.Context { return api.WithPeerPID(c.t.Context(), c.cmd.Process.Pid) }

func (c *child) start(info api.SandboxInfo, words ...string) (pid int) {
	c.t.Helper()
	_, err := fmt.Fprintln(c.in, info.Cgroup, strings.Join(words, " "))
	require.NoError(c.t, err)
	return c.answer("PID %d")
}

func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// launchChild starts a sandbox by a runner of its own.
func (w *world) launchChild(name string) (*child, int) {
	w.t.Helper()
	info, err := w.Sandbox(w.t.Context(), api.Named{Name: name})
	require.NoError(w.t, err)
	c := newChild(w.t)
	_, err = w.StartSandbox(c.ctx(), api.SandboxStart{Name: name, TID: c.tid})
	require.NoError(w.t, err)
	pid := c.start(info, info.Command...)
	_, err = w.SandboxRuns(c.ctx(), api.SandboxRunning{ID: info.ID, PID: pid})
	require.NoError(w.t, err)
	return c, pid
}

// eventually waits for what a watch sees.
func (w *world) eventually(what string, cond func() bool) {
	w.t.Helper()
	lab.Eventually(w.t, 10*time.Second, what, cond)
}

func setUp(t *testing.T, name string) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	require.NoError(t, err)
	require.NoError(t, netlink.LinkSetUp(l))
}

func ownLinks(t *testing.T, d *netdev.Devices) []string {
	t.Helper()
	list, err := d.OwnLinks()
	require.NoError(t, err)
	var out []string
	for _, l := range list {
		out = append(out, l.Name)
	}
	slices.Sort(out)
	return out
}

// testCgroup makes a cgroup of the test's own.
func testCgroup(t *testing.T) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/mounts")
	require.NoError(t, err)
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if f[2] != "cgroup2" {
			continue
		}
		dir, err := os.MkdirTemp(f[1], "bl-embedded-")
		require.NoError(t, err)
		t.Cleanup(func() {
			assert.NoError(t, errors.Join(sandbox.KillCgroup(dir), sandbox.RemoveCgroup(dir)))
		})
		return dir
	}
	require.FailNow(t, "no cgroup2 mount")
	return ""
}

type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }
func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }

// addVeth puts a pair into a namespace, whose one end has that name.
func addVeth(t *testing.T, name string, ns int) {
	t.Helper()
	h, err := netlink.NewHandleAt(netns.NsHandle(ns))
	require.NoError(t, err)
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	require.NoError(t, h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name + "p"}))
}

// fill takes all the room that a file system has left, and returns what gives it back.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	block := make([]byte, 4096)
	for {
		if _, err := f.Write(block); err != nil {
			require.ErrorIs(t, err, syscall.ENOSPC)
			return func() { assert.NoError(t, os.Remove(path)) }
		}
	}
}
