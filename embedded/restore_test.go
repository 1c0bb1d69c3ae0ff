// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/sandbox"
	"github.com/bpfnet/bpfnet/store"
)

// change writes into the store while no daemon runs.
func (w *world) change(f func(own store.Own) store.Batch) {
	w.t.Helper()
	s := w.open()
	own, err := s.Own()
	require.NoError(w.t, err)
	require.NoError(w.t, s.Write(f(own)))
	require.NoError(w.t, s.Close())
}

func killPID(t *testing.T, pid int) {
	t.Helper()
	p, err := os.FindProcess(pid)
	require.NoError(t, err)
	require.NoError(t, p.Kill())
}

// deleteLink removes a device behind the engine's back, if it has not gone with its namespace.
func deleteLink(t *testing.T, name string) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return
	}
	require.NoError(t, err)
	if err := netlink.LinkDel(l); !errors.Is(err, unix.ENODEV) {
		require.NoError(t, err)
	}
}

// Needs root: a restart of the daemon changes nothing for sandboxes that run, and it still hears of their
// ends.
func TestAdopt(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/24"), prefix("fd00:19::/64")}})
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "n1"}, {Network: DefaultNetwork}}
	spec.Publish = []api.PortSpec{publish(t, "8080:80"), {Proto: "tcp", Target: 80}}
	w.create(spec)
	runner, pid := w.launchChild("web")
	spec = w.spec("friend")
	spec.Mode, spec.Join = api.ModeContainer, "web"
	friend := w.run(spec)
	w.create(w.spec("coming"))
	coming, err := w.try("coming")
	require.NoError(t, err)

	before := w.look()
	w.restart()
	w.same(before, "a restart")
	seen := inside(t, pid)
	_, err = net.Listen("tcp", "127.0.0.1:8080")
	assert.ErrorContains(t, err, "address already in use", "held again")

	// What the ports were chosen for is known too.
	_, err = w.UnpublishPorts(t.Context(), api.PortChange{Name: "web", Ports: []api.PortSpec{{Proto: "tcp", First: 49153, Target: 80}}})
	require.NoError(t, err)
	assert.Equal(t, []string{"0.0.0.0:8080->80/tcp", "[::]:8080->80/tcp"}, w.ports("web"))
	w.disconnect("web", DefaultNetwork)
	w.connect("web", DefaultNetwork)
	assert.Equal(t, len(seen), len(inside(t, pid)))

	coming.begin()
	assert.Equal(t, api.StatusRunning, w.status("coming").Status)
	w.restart()
	killPID(t, pid)
	runner.kill()
	w.eventually("the end of web is noticed", func() bool { return w.status("web").Status == api.StatusExited })
	w.eventually("it is cleared up", func() bool { return len(ownLinks(t, w.opts.Devices)) == 3 })
	coming.finish(0)
	friend.finish(0)
}

// Needs root: sandboxes that ended while no daemon ran.
func TestBury(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/24")}})
	pids := make(map[string]int)
	infos := make(map[string]api.SandboxInfo)
	for _, name := range []string{"told", "silent", "gone"} {
		spec := w.spec(name)
		spec.Networks = []api.Attach{{Network: "n1"}}
		spec.Publish = []api.PortSpec{{Proto: "tcp", Target: 80}}
		spec.AutoRemove = name == "gone"
		infos[name] = w.create(spec)
		c, pid := w.launchChild(name)
		pids[name] = pid
		defer c.kill()
		if name != "told" {
			c.start(infos[name], sleep...) // a second process, which is left
		}
	}
	spec := w.spec("stays")
	spec.Networks = []api.Attach{{Network: "n1"}}
	stays := w.run(spec)
	assert.Contains(t, hosts(t, stays), "told")
	for _, rm := range []bool{false, true} {
		spec := w.spec(fmt.Sprintf("begun-%v", rm))
		spec.AutoRemove = rm
		w.create(spec)
		c := newChild(t)
		_, err := w.StartSandbox(c.ctx(), api.SandboxStart{Name: spec.Name, TID: c.tid})
		require.NoError(t, err)
		defer c.kill()
	}

	w.end()
	for _, pid := range pids {
		killPID(t, pid)
	}
	killRunners(t, w)
	require.NoError(t, sandbox.WriteExit(infos["told"].Dir, 5))
	w.start()

	assert.Equal(t, 5, *w.status("told").ExitCode)
	assert.Empty(t, w.status("told").Why)
	assert.NoFileExists(t, filepath.Join(infos["told"].Dir, "exit"), "it is not for the next run")
	s := w.status("silent")
	assert.Equal(t, api.StatusExited, s.Status)
	assert.Nil(t, s.ExitCode)
	assert.Equal(t, "its process ended while no daemon ran", s.Why)
	assert.False(t, w.exists("gone"))
	assert.NoDirExists(t, infos["gone"].Dir)
	for _, i := range infos {
		assert.NoDirExists(t, i.Cgroup, "what was left in it has been ended")
	}
	assert.Equal(t, api.StatusCreated, w.status("begun-false").Status)
	assert.False(t, w.exists("begun-true"))
	assert.Len(t, w.State().Endpoints, 1)
	assert.Len(t, ownLinks(t, w.opts.Devices), 3)
	assert.NotContains(t, hosts(t, stays), "told")
	spec.Name = "next"
	next := w.run(spec)
	assert.Equal(t, []string{"172.19.0.6"}, w.addrs("next", "n1"), "their addresses rest")
	next.finish(0)
	w.launch("silent").finish(0)
	stays.finish(0)
}

// killRunners kills the runners of sandboxes that are recorded.
func killRunners(t *testing.T, w *world) {
	t.Helper()
	s := w.open()
	defer s.Close()
	own, err := s.Own()
	require.NoError(t, err)
	for _, b := range own.Sandboxes {
		if b.Runner.PID == 0 || b.Runner.PID == os.Getpid() {
			continue
		}
		p, err := sandbox.Open(sandbox.ID(b.Runner))
		if err != nil {
			continue
		}
		require.NoError(t, p.Signal(9))
		<-p.Done()
		p.Close()
	}
}

// Needs root: the host was restarted. Networks are as before; sandboxes are listed as ended, and can be
// started.
func TestReboot(t *testing.T) {
	for _, how := range []string{"another boot", "all bridges gone"} {
		t.Run(how, func(t *testing.T) {
			w := newWorld(t)
			w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/24"), prefix("fd00:19::/64")}, Internal: true, Options: map[string]string{policy.OptMTU: "1400", policy.OptBridge: "bpn-mine"}})
			for _, name := range []string{"web", "rm"} {
				spec := w.spec(name)
				spec.Networks = []api.Attach{{Network: DefaultNetwork}, {Network: "n1", IP4: addr("172.19.0.7")}}
				spec.Publish = []api.PortSpec{publish(t, "8080:80")}
				if name == "rm" {
					spec.Publish, spec.AutoRemove = nil, true
					spec.Networks[1].IP4 = netip.Addr{}
				}
				w.run(spec).wait()
			}
			networks := w.State().Networks
			bridges := ownLinks(t, w.opts.Devices)
			bridges = slices.DeleteFunc(bridges, func(l string) bool { return strings.HasPrefix(l, linkPrefix) })
			mtu := w.look().Links
			w.end()
			for _, name := range ownLinks(t, w.opts.Devices) {
				if how == "another boot" && strings.HasPrefix(name, bridgePrefix) {
					continue // so that it is the boot ID that tells
				}
				deleteLink(t, name)
			}
			if how == "another boot" {
				w.change(func(own store.Own) (b store.Batch) {
					for _, s := range own.Sandboxes {
						s.Main.BootID, s.Runner.BootID = "00000000-0000-0000-0000-000000000000", "00000000-0000-0000-0000-000000000000"
						b.Sandboxes = append(b.Sandboxes, s)
					}
					return b
				})
			}
			w.start()
			assert.Equal(t, networks, w.State().Networks)
			assert.Equal(t, bridges, ownLinks(t, w.opts.Devices))
			assert.Contains(t, mtu, "bpn-mine bridge 1400")
			assert.Contains(t, w.look().Links, "bpn-mine bridge 1400")
			s := w.status("web")
			assert.Equal(t, api.StatusExited, s.Status)
			assert.Equal(t, "the host was restarted", s.Why)
			assert.Nil(t, s.ExitCode)
			assert.False(t, w.exists("rm"))
			assert.Empty(t, w.State().Endpoints)
			web := w.launch("web")
			assert.Equal(t, "172.19.0.7", w.addrs("web", "n1")[0])
			assert.Len(t, w.ports("web"), 2)
			web.finish(0)
		})
	}
}

// Needs root: what a kill -9 between two steps leaves behind, in the kernel or in the store.
func TestCrash(t *testing.T) {
	w := newWorld(t)
	n1 := w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/24")}})
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "n1"}}
	spec.Publish = []api.PortSpec{publish(t, "8080:80")}
	web := w.run(spec)
	settled := w.look()

	d := w.opts.Devices
	veth := netdev.VethSpec{Host: "bpv-00000000001", Name: "eth5", MAC: [6]byte{2, 0x42, 1}}
	_, err := d.EnsureBridge(netdev.BridgeSpec{Name: "bpn-00000000001", Addrs: []netip.Prefix{prefix("10.7.0.1/24")}})
	require.NoError(t, err)
	ns, err := netdev.OpenNetNS(fmt.Sprintf("/proc/%d/ns/net", web.proc.PID()))
	require.NoError(t, err)
	defer ns.Close()

	// Before the store was written: a bridge, a link (plugged in or not), files, a cgroup with a process.
	_, err = d.CreateVeth(ns, veth)
	require.NoError(t, err)
	veth.Host, veth.Name, veth.MAC[5] = "bpv-00000000002", "eth6", 9
	_, err = d.CreateVeth(ns, veth)
	require.NoError(t, err)
	require.NoError(t, d.PlugIn(ns, veth, "bpn-00000000001"))
	id := strings.Repeat("0", 64)
	require.NoError(t, os.MkdirAll(filepath.Join(w.opts.Dir, id), 0o755))
	th := sandbox.NewThread()
	p, err := th.Start(sandbox.Command{Path: sleep[0], Args: sleep, Dir: "/", Cgroup: filepath.Join(w.opts.Cgroup, cgroupDir, id)})
	require.NoError(t, err)
	w.end()
	// Somebody else's stays.
	addVeth(t, "bpv-foreign", int(ns.Fd()))
	require.NoError(t, os.MkdirAll(filepath.Join(w.opts.Dir, "mine"), 0o755))
	w.start()
	code, err := p.Wait()
	require.NoError(t, err)
	assert.Equal(t, 137, code)
	th.Close()
	assert.DirExists(t, filepath.Join(w.opts.Dir, "mine"))
	require.NoError(t, os.Remove(filepath.Join(w.opts.Dir, "mine")))
	w.same(settled, "strays")

	// A veth of ours that is in the namespace's end only by its name is known again.
	assert.Contains(t, inside(t, web.proc.PID()), "eth0 172.19.0.2/24")

	// Records that belong to nothing, and releases that are over.
	w.end()
	w.change(func(own store.Own) store.Batch {
		stray := own.Endpoints[0]
		stray.ID, stray.SandboxID = strings.Repeat("1", 64), strings.Repeat("2", 64)
		lost := own.Endpoints[0]
		lost.ID, lost.NetworkID = strings.Repeat("3", 64), strings.Repeat("4", 64)
		return store.Batch{
			Endpoints: []store.Endpoint{stray, lost},
			Releases: []store.Release{
				{NetworkID: n1.ID, Addr: addr("172.19.0.3"), At: time.Now().Add(-time.Hour)},
				{NetworkID: strings.Repeat("4", 64), Addr: addr("10.0.0.3"), At: time.Now()},
			},
		}
	})
	w.start()
	w.same(settled, "stray records")

	// The link is gone, and the process lives: so does the sandbox, without that interface.
	w.end()
	deleteLink(t, w.linkOf("web", "n1"))
	w.start()
	assert.Empty(t, w.State().Endpoints)
	assert.Equal(t, api.StatusRunning, w.status("web").Status)
	assert.Contains(t, w.log.String(), "an interface of a sandbox is gone")
	w.connect("web", "n1")
	assert.Equal(t, []string{"172.19.0.3"}, w.addrs("web", "n1"))
	assert.Len(t, w.ports("web"), 1)

	// The bridge is gone, and everything of it lives: it comes back, and its links are ports of it.
	w.end()
	bridge := "bpn-" + n1.ID[:11]
	deleteLink(t, bridge)
	w.start()
	e, _ := w.endpoint("web", "n1")
	ok, why := w.ready(e.ID)
	assert.True(t, ok, why)

	// A program of the host has the port by now.
	w.end()
	server, err := net.Listen("tcp", "0.0.0.0:8080")
	require.NoError(t, err)
	w.start()
	assert.Contains(t, w.log.String(), "it is served all the same")
	assert.Len(t, w.ports("web"), 1)
	server.Close()
	web.finish(0)
}

// Needs root: a network whose bridge cannot be made stops nobody else.
func TestRestoreForeignBridge(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "n1", Options: map[string]string{policy.OptBridge: "br-one"}})
	w.network(api.NetworkSpec{Name: "n2", Options: map[string]string{policy.OptBridge: "br-two"}})
	w.end()
	deleteLink(t, "br-one")
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br-one"
	require.NoError(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "br-peer"}))
	w.start()
	assert.Contains(t, w.log.String(), "a device of that name exists and is no bridge but a veth")
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "n2"}}
	w.run(spec).finish(0)
	deleteLink(t, "br-one")
	w.restart()
	spec.Name, spec.Networks[0].Network = "other", "n1"
	w.run(spec).finish(0)
}

// Needs root: cleanup leaves nothing, and ends nobody unasked.
func TestCleanup(t *testing.T) {
	w := newWorld(t)
	links := w.look().Links
	w.create(w.spec("idle"))
	w.run(w.spec("db"))
	web := w.run(w.spec("web"))
	w.end()
	s := w.open()
	clean := func(force bool) error {
		return Cleanup(s, w.opts.Devices, w.opts.Dir, w.opts.Cgroup, force)
	}
	own, err := s.Own()
	require.NoError(t, err)
	assert.EqualError(t, clean(false), "sandboxes run: db, web; stop them first, or use --force to end them")
	same, err := s.Own()
	require.NoError(t, err)
	assert.Equal(t, own, same)
	assert.Len(t, inside(t, web.proc.PID()), 6)
	for range 2 {
		require.NoError(t, clean(true))
		own, err = s.Own()
		require.NoError(t, err)
		assert.Equal(t, store.Own{}, own)
		assert.NoDirExists(t, w.opts.Dir)
		assert.NoDirExists(t, filepath.Join(w.opts.Cgroup, cgroupDir))
	}
	require.NoError(t, s.Close())
	code, err := web.proc.Wait()
	require.NoError(t, err)
	assert.Equal(t, 137, code)
	w.start()
	assert.Equal(t, links, w.look().Links)
}

// many is how many sandboxes there are in TestManyStored; see BPFNET_FULL.
func many() int {
	if os.Getenv("BPFNET_FULL") == "1" {
		return 1000
	}
	return 100
}

// Needs root: a start with many endpoints that are in use. The issue allows a second for a thousand, the
// data path included.
func TestManyStored(t *testing.T) {
	w := newWorld(t)
	n := w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("10.0.0.0/16")}})
	th := sandbox.NewThread()
	defer th.Close()
	require.NoError(t, th.NewNetNS())
	ns, err := netdev.OpenNetNS(fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), th.TID()))
	require.NoError(t, err)
	defer ns.Close()
	main, err := sandbox.Identify(os.Getpid())
	require.NoError(t, err)

	var batch store.Batch
	a := addr("10.0.0.1")
	for i := range many() {
		a = a.Next()
		b := store.Sandbox{
			ID: newID(), Name: fmt.Sprintf("box%d", i), Networks: []store.Attach{{NetworkID: n.ID}}, Command: sleep, Dir: "/",
			Status: api.StatusRunning, Main: store.Process(main), Runner: store.Process(main),
		}
		e := &endpoint{net: w.networks[n.ID], Endpoint: store.Endpoint{
			ID: newID(), NetworkID: n.ID, SandboxID: b.ID, Addrs: []netip.Addr{a}, Name: fmt.Sprintf("eth%d", i),
		}}
		e.MAC, e.Link = macFor(e), linkPrefix+e.ID[:idInName]
		batch.Sandboxes = append(batch.Sandboxes, b)
		batch.Endpoints = append(batch.Endpoints, e.Endpoint)
		_, err := w.opts.Devices.CreateVeth(ns, e.veth())
		require.NoError(t, err)
		require.NoError(t, w.opts.Devices.PlugIn(ns, e.veth(), e.net.Bridge))
	}
	w.end()
	w.change(func(store.Own) store.Batch { return batch })
	begin := time.Now()
	w.start()
	took := time.Since(begin)
	assert.Len(t, w.State().Endpoints, many())
	t.Logf("%d endpoints: %v", many(), took)
	assert.Less(t, took, time.Second)
	w.end()
	// None of them has a process of its own to be ended.
	w.change(func(own store.Own) (b store.Batch) {
		for _, s := range own.Sandboxes {
			b.DeleteSandboxes = append(b.DeleteSandboxes, s.ID)
		}
		return b
	})
	w.start()
	assert.Empty(t, w.State().Endpoints)
}
