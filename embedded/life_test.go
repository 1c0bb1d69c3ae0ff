// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/sandbox"
	"github.com/bpfnet/bpfnet/store"
)

func publish(t *testing.T, text string) api.PortSpec {
	t.Helper()
	var p api.PortSpec
	var first, target int
	_, err := fmt.Sscanf(text, "%d:%d", &first, &target)
	require.NoError(t, err)
	p.Proto, p.First, p.Last, p.Target = "tcp", uint16(first), uint16(first), uint16(target)
	return p
}

// Needs root: a sandbox from its making to its end, by a runner that reports, twice.
func TestLife(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/16"), prefix("fd00:19::/64")}})
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "n1", IP4: addr("172.19.0.9"), Aliases: []string{"www"}}}
	spec.Publish = []api.PortSpec{publish(t, "8080:80")}
	spec.Hostname = "the-web"
	spec.DNS = []netip.Addr{addr("192.0.2.53")}
	info := w.create(spec)
	assert.Equal(t, api.StatusCreated, info.Status)
	assert.Equal(t, filepath.Join(w.opts.Dir, info.ID), info.Dir)
	assert.Equal(t, filepath.Join(w.opts.Cgroup, "bpfnet", info.ID), info.Cgroup)
	created := w.look()

	for _, v6 := range []string{"fd00:19::2", "fd00:19::3"} {
		applies := w.applies
		r := w.launch("web")
		assert.Equal(t, applies+2, w.applies, "one for the start, one for readers")
		assert.Equal(t, []string{"172.19.0.9", v6}, w.addrs("web", "n1"))
		e, _ := w.endpoint("web", "n1")
		assert.Equal(t, policy.MAC{0x02, 0x42, 172, 19, 0, 9}, e.MAC)
		assert.Equal(t, info.ID, e.SandboxID)
		assert.Equal(t, []string{"0.0.0.0:8080->80/tcp", "[::]:8080->80/tcp"}, w.ports("web"))
		assert.Equal(t, []string{
			"default 172.19.0.1", "default fd00:19::1",
			"eth0 172.19.0.9/16", "eth0 " + v6 + "/64", "lo 127.0.0.1/8", "lo ::1/128",
		}, inside(t, r.proc.PID()))
		_, err := net.Listen("tcp", "127.0.0.1:8080")
		assert.ErrorContains(t, err, "address already in use", "the port is held")

		s := w.status("web")
		assert.Equal(t, api.StatusRunning, s.Status)
		assert.Equal(t, r.proc.PID(), s.PID)
		assert.Equal(t, []string{"n1"}, s.Networks)
		assert.Equal(t, []string{"www"}, w.View().Aliases[e.ID])
		hosts, err := os.ReadFile(r.grant.Files["/etc/hosts"])
		require.NoError(t, err)
		assert.Contains(t, string(hosts), "172.19.0.9\tthe-web\n"+v6+"\tthe-web\n172.19.0.9\tweb www\n")
		resolv, err := os.ReadFile(r.grant.Files["/etc/resolv.conf"])
		require.NoError(t, err)
		assert.Contains(t, string(resolv), "nameserver 192.0.2.53\n")

		applies = w.applies
		r.finish(3)
		assert.Equal(t, applies+1, w.applies)
		s = w.status("web")
		assert.Equal(t, api.StatusExited, s.Status)
		assert.Equal(t, 3, *s.ExitCode)
		assert.False(t, s.Ended.IsZero())
		waited, err := w.WaitSandbox(t.Context(), api.Named{Name: "web"})
		require.NoError(t, err)
		assert.Equal(t, api.SandboxWaited{Code: 3}, waited)
		l, err := net.Listen("tcp", "127.0.0.1:8080")
		require.NoError(t, err, "the port is free")
		l.Close()

		again, err := w.SandboxEnded(t.Context(), api.SandboxExited{ID: r.ID, Code: 9})
		require.NoError(t, err)
		assert.False(t, again.Changed)
		assert.Equal(t, 3, *w.status("web").ExitCode)
	}

	_, err := w.RemoveSandbox(t.Context(), api.SandboxRemoval{Name: info.ID[:7]})
	require.NoError(t, err)
	end := w.look()
	assert.Empty(t, end.State.Endpoints)
	assert.Empty(t, end.Own.Sandboxes)
	assert.Equal(t, created.Links, end.Links)
	assert.Equal(t, created.Sockets, end.Sockets)
	assert.Len(t, end.Files, 1, "the directory of all")
	assert.Empty(t, end.Cgroups)
	assert.Len(t, end.Own.Releases, 3, "its addresses rest")
}

// Needs root: --rm, of which nothing is left, and a made-up name.
func TestAutoRemove(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.Default(t.Context()))
	spec := w.spec("")
	spec.AutoRemove = true
	info := w.create(spec)
	assert.Regexp(t, `^[a-z]+_[a-z]+$`, info.Name)
	assert.Equal(t, info.ID[:12], info.Hostname)
	r := w.launch(info.Name)
	assert.True(t, prefix("172.17.0.0/16").Contains(addr(w.addrs(info.Name, DefaultNetwork)[0])))
	hosts, err := os.ReadFile(r.grant.Files["/etc/hosts"])
	require.NoError(t, err)
	assert.NotContains(t, string(hosts), info.Name, "on the default network only the hostname")

	code := make(chan int, 1)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		waited, err := w.WaitSandbox(t.Context(), api.Named{Name: info.Name})
		assert.NoError(t, err)
		code <- waited.Code
	})
	applies := w.applies
	r.finish(7)
	assert.Equal(t, applies+1, w.applies)
	waiting.Wait()
	if c := <-code; c != 7 {
		// It came after the end: then there is nothing to wait for.
		assert.Zero(t, c)
	}
	assert.False(t, w.exists(info.Name))
	assert.NoDirExists(t, info.Dir)
	again, err := w.SandboxEnded(t.Context(), api.SandboxExited{ID: info.ID, Code: 7})
	require.NoError(t, err)
	assert.False(t, again.Changed)
}

// Needs root: the modes that are not networks.
func TestModes(t *testing.T) {
	w := newWorld(t)
	spec := w.spec("own")
	own := w.run(spec)
	spec = w.spec("friend")
	spec.Mode, spec.Join = api.ModeContainer, "own"
	info := w.create(spec)
	assert.Equal(t, own.proc.PID(), info.JoinPID)
	assert.Equal(t, own.Hostname, info.Hostname)
	friend := w.launch("friend")
	assert.Equal(t, own.grant.Files, friend.grant.Files)
	assert.Equal(t, inside(t, own.proc.PID()), inside(t, friend.proc.PID()))

	spec = w.spec("alone")
	spec.Mode = api.ModeNone
	alone := w.run(spec)
	assert.Equal(t, []string{"lo 127.0.0.1/8", "lo ::1/128"}, inside(t, alone.proc.PID()))
	hosts, err := os.ReadFile(alone.grant.Files["/etc/hosts"])
	require.NoError(t, err)
	assert.Contains(t, string(hosts), "localhost")

	spec = w.spec("open")
	spec.Mode = api.ModeHost
	open := w.run(spec)
	assert.Empty(t, open.grant.Files)
	assert.Empty(t, open.Hostname)
	spec.Name, spec.DNS = "named", []netip.Addr{addr("192.0.2.53")}
	named := w.run(spec)
	assert.Len(t, named.grant.Files, 1)
	named.finish(0)

	own.finish(0)
	assert.Equal(t, []string{"lo 127.0.0.1/8", "lo ::1/128"}, inside(t, friend.proc.PID()), "it lives on with lo only")
	assert.Equal(t, api.StatusRunning, w.status("friend").Status)
	friend.finish(0)
	w.refuses(`sandbox "friend": shares the network of sandbox "own", which does not run; start that first`, func() error {
		_, err := w.StartSandbox(self(t), api.SandboxStart{Name: "friend"})
		return err
	})
	_, err = w.RemoveSandbox(t.Context(), api.SandboxRemoval{Name: "own"})
	require.NoError(t, err)
	w.refuses(`sandbox "friend": the sandbox `+own.ID[:12]+`, whose network it shares, has been removed`, func() error {
		_, err := w.StartSandbox(self(t), api.SandboxStart{Name: "friend"})
		return err
	})
	for _, r := range []*running{alone, open} {
		r.finish(0)
	}
}

// Needs root: an address that was given back is not given again at once, also after a restart.
func TestAddressesRest(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/29")}})
	spec := w.spec("a1")
	spec.Networks = []api.Attach{{Network: "n1"}}
	for i, want := range []string{"172.19.0.2", "172.19.0.3", "172.19.0.4"} {
		r := w.launch(w.create(spec).Name)
		assert.Equal(t, []string{want}, w.addrs("a1", "n1"), i)
		r.finish(0)
		_, err := w.RemoveSandbox(t.Context(), api.SandboxRemoval{Name: "a1"})
		require.NoError(t, err)
		if i == 1 {
			w.restart()
		}
	}
	own, err := w.opts.Store.Own()
	require.NoError(t, err)
	assert.Len(t, own.Releases, 3)

	// With nothing else left, the one that was released longest ago is taken, and rests no more.
	for _, name := range []string{"b1", "b2", "b3"} {
		spec.Name = name
		w.run(spec)
	}
	assert.Equal(t, []string{"172.19.0.5"}, w.addrs("b1", "n1"))
	assert.Equal(t, []string{"172.19.0.6"}, w.addrs("b2", "n1"))
	assert.Equal(t, []string{"172.19.0.2"}, w.addrs("b3", "n1"))
	own, err = w.opts.Store.Own()
	require.NoError(t, err)
	assert.Len(t, own.Releases, 2)
}

// Needs root: the process dies, its runner before or after it, and nobody reports.
func TestDeaths(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.Default(t.Context()))
	quiet := w.look()
	ended := func(name string) func() bool {
		return func() bool { return w.status(name).Status == api.StatusExited && len(ownLinks(t, w.opts.Devices)) == 1 }
	}

	w.create(w.spec("one"))
	runner, pid := w.launchChild("one")
	process, err := sandbox.Identify(pid)
	require.NoError(t, err)
	runner.kill()
	assert.Equal(t, api.StatusRunning, w.status("one").Status, "it lives without its runner")
	_, err = w.StopSandbox(t.Context(), api.SandboxStop{Name: "one", Grace: 10 * time.Second})
	require.NoError(t, err)
	assert.False(t, process.Alive())
	assert.True(t, ended("one")())
	s := w.status("one")
	assert.Nil(t, s.ExitCode)
	assert.Equal(t, "the process that ran it was killed", s.Why)
	assert.NoDirExists(t, s.Cgroup)
	waited, err := w.WaitSandbox(t.Context(), api.Named{Name: "one"})
	require.NoError(t, err)
	assert.Equal(t, unknownCode, waited.Code)

	// The code comes late, from a runner that was slow.
	late, err := w.SandboxEnded(t.Context(), api.SandboxExited{ID: s.ID, Code: 143})
	require.NoError(t, err)
	assert.True(t, late.Changed)
	assert.Equal(t, 143, *w.status("one").ExitCode)
	assert.Empty(t, w.status("one").Why)

	// First the process, then the runner; what the process has left dies too, and the code is in the file.
	info := w.create(w.spec("two"))
	c := newChild(t)
	_, err = w.StartSandbox(c.ctx(), api.SandboxStart{Name: "two", TID: c.tid})
	require.NoError(t, err)
	pid = c.start(info, sleep...)
	c.start(info, sleep...)
	_, err = w.SandboxRuns(c.ctx(), api.SandboxRunning{ID: info.ID, PID: pid})
	require.NoError(t, err)
	require.NoError(t, sandbox.WriteExit(info.Dir, 42))
	p, err := os.FindProcess(pid)
	require.NoError(t, err)
	require.NoError(t, p.Kill())
	c.kill()
	w.eventually("two has ended", ended("two"))
	w.eventually("its cgroup is gone", func() bool { _, err := os.Stat(info.Cgroup); return os.IsNotExist(err) })
	assert.Equal(t, 42, *w.status("two").ExitCode)

	// The runner dies with no process: as before the start, or gone if it was one of --rm.
	for _, rm := range []bool{false, true} {
		spec := w.spec("three")
		spec.AutoRemove = rm
		info = w.create(spec)
		c = newChild(t)
		_, err = w.StartSandbox(c.ctx(), api.SandboxStart{Name: "three", TID: c.tid})
		require.NoError(t, err)
		w.refuses(`sandbox "three": is being started; try again in a moment`, func() error {
			_, err := w.StopSandbox(t.Context(), api.SandboxStop{Name: "three"})
			return err
		})
		c.start(info, sleep...) // and nobody knows
		c.kill()
		w.eventually("three is taken back", func() bool {
			return (!w.exists("three") || w.status("three").Status == api.StatusCreated) && len(ownLinks(t, w.opts.Devices)) == 1
		})
		w.eventually("its cgroup is gone", func() bool { _, err := os.Stat(info.Cgroup); return os.IsNotExist(err) })
		assert.Equal(t, !rm, w.exists("three"))
		if !rm {
			w.eventually("it can be removed", func() bool {
				_, err := w.RemoveSandbox(t.Context(), api.SandboxRemoval{Name: "three"})
				return err == nil
			})
		}
	}

	for _, name := range []string{"one", "two"} {
		_, err := w.RemoveSandbox(t.Context(), api.SandboxRemoval{Name: name})
		require.NoError(t, err)
	}
	now := w.look()
	assert.Equal(t, quiet.Sockets, now.Sockets)
	assert.Equal(t, quiet.State, now.State)
}

// Needs root: the runner and the watch tell of one end at the same moment.
func TestEndsTwice(t *testing.T) {
	w := newWorld(t)
	for i := range 10 {
		name := fmt.Sprintf("s%d", i)
		spec := w.spec(name)
		spec.AutoRemove = i%2 == 0
		info := w.create(spec)
		c, pid := w.launchChild(name)
		p, err := os.FindProcess(pid)
		require.NoError(t, err)
		var both sync.WaitGroup
		both.Go(func() {
			assert.NoError(t, p.Kill())
			c.kill()
		})
		both.Go(func() {
			_, err := w.SandboxEnded(t.Context(), api.SandboxExited{ID: info.ID, Code: i})
			assert.NoError(t, err)
		})
		both.Wait()
		w.eventually("it has ended", func() bool { return len(ownLinks(t, w.opts.Devices)) == 1 })
		if !spec.AutoRemove {
			w.eventually("the code is known", func() bool { s := w.status(name); return s.ExitCode != nil && *s.ExitCode == i })
		}
	}
}

// Needs root: stop asks first, and then does not ask; rm wants force for what runs.
func TestStopAndRemove(t *testing.T) {
	w := newWorld(t)
	w.foreign.Endpoints = []policy.Endpoint{{ID: "e", Name: "theirs", SandboxID: strings.Repeat("ab", 32)}}
	w.create(w.spec("web"))
	runner, _ := w.launchChild("web")
	w.create(w.spec("stubborn"))
	other, pid := w.launchChild("stubborn")
	stop(t, pid)

	w.refuses(`sandbox "web": runs; stop it first, or use --force`, func() error {
		_, err := w.RemoveSandbox(t.Context(), api.SandboxRemoval{Name: "web"})
		return err
	})
	w.refuses(`sandbox "theirs": is a container of Docker; use "docker rm theirs"`, func() error {
		_, err := w.RemoveSandbox(t.Context(), api.SandboxRemoval{Name: "theirs"})
		return err
	})
	w.refuses(`sandbox "`+strings.Repeat("ab", 6)+`": is a container of Docker; use "docker stop theirs"`, func() error {
		_, err := w.StopSandbox(t.Context(), api.SandboxStop{Name: strings.Repeat("ab", 6)})
		return err
	})
	w.refuses(`sandbox "wob": no such sandbox; the nearest names are web, stubborn`, func() error {
		_, err := w.WaitSandbox(t.Context(), api.Named{Name: "wob"})
		return err
	})
	runner.kill()
	other.kill()
	_, err := w.StopSandbox(t.Context(), api.SandboxStop{Name: "stubborn", Grace: 50 * time.Millisecond})
	require.NoError(t, err)
	assert.Equal(t, api.StatusExited, w.status("stubborn").Status)
	_, err = w.StopSandbox(t.Context(), api.SandboxStop{Name: "stubborn"})
	require.NoError(t, err, "of one that has ended")
	_, err = w.RemoveSandbox(t.Context(), api.SandboxRemoval{Name: "web", Force: true})
	require.NoError(t, err)
	assert.False(t, w.exists("web"))
}

// stop has a process not notice any signal but SIGKILL.
func stop(t *testing.T, pid int) {
	t.Helper()
	p, err := os.FindProcess(pid)
	require.NoError(t, err)
	require.NoError(t, p.Signal(syscall.SIGSTOP))
}

// Needs root: names, IDs and the beginnings of IDs.
func TestNames(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.Default(t.Context()))
	var ids []string
	for i := range 20 {
		ids = append(ids, w.create(w.spec(fmt.Sprintf("box%d", i))).ID)
	}
	for _, id := range ids {
		for _, n := range []int{64, 40, 12} {
			got, err := w.Sandbox(t.Context(), api.Named{Name: id[:n]})
			require.NoError(t, err)
			assert.Equal(t, id, got.ID)
		}
	}
	// Of twenty IDs, two begin with the same of sixteen digits.
	first := make(map[byte][]string)
	for _, id := range ids {
		first[id[0]] = append(first[id[0]], id)
	}
	for digit, list := range first {
		_, err := w.Sandbox(t.Context(), api.Named{Name: string(digit)})
		if len(list) == 1 {
			assert.NoError(t, err)
			continue
		}
		require.ErrorContains(t, err, fmt.Sprintf(`sandbox "%c": several IDs begin so: `, digit))
		for _, id := range list {
			assert.ErrorContains(t, err, id[:12])
		}
	}
	_, err := w.Sandbox(t.Context(), api.Named{Name: ""})
	var unknown *api.UnknownError
	assert.True(t, errors.As(err, &unknown))
	n, err := w.findNetwork("default", docker("x"))
	require.NoError(t, err)
	assert.Equal(t, DefaultNetwork, n.Name)
}

// Needs root: many at once, in one network and with ports to choose; nobody gets what another has.
func TestParallel(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/16"), prefix("fd00:19::/64")}})
	const boxes = 16
	var all sync.WaitGroup
	started := make([]*running, boxes)
	for i := range boxes {
		all.Go(func() {
			spec := w.spec("")
			spec.Networks = []api.Attach{{Network: "n1"}, {Network: DefaultNetwork}}
			spec.Publish = []api.PortSpec{{Proto: "tcp", Target: 80}, {Proto: "udp", First: 7000, Last: 7100, Target: 53}}
			info, err := w.CreateSandbox(t.Context(), spec)
			if !assert.NoError(t, err) {
				return
			}
			r, err := w.try(info.Name)
			if assert.NoError(t, err) {
				r.begin()
				started[i] = r
			}
		})
	}
	all.Wait()
	require.False(t, t.Failed())
	s := w.State()
	assert.Equal(t, 2*boxes, len(s.Endpoints))
	assert.Equal(t, 4*boxes, len(s.Ports))
	seen := make(map[string]bool)
	for _, e := range s.Endpoints {
		for _, a := range e.Addrs {
			assert.False(t, seen[a.String()], a)
			seen[a.String()] = true
		}
	}
	for _, p := range s.Ports {
		key := p.Proto.String() + p.Host.String()
		assert.False(t, seen[key], key)
		seen[key] = true
	}
	own, err := w.opts.Store.Own()
	require.NoError(t, err)
	assert.Len(t, own.Endpoints, 2*boxes)
	for _, r := range started {
		hosts, err := os.ReadFile(r.grant.Files["/etc/hosts"])
		require.NoError(t, err)
		for _, other := range started {
			assert.Contains(t, string(hosts), "\t"+other.Name+"\n")
		}
	}
	for _, r := range started {
		all.Go(func() { r.finish(0) })
	}
	all.Wait()
	end := w.look()
	assert.Empty(t, end.State.Endpoints)
	assert.Len(t, end.Links, 3, "lo and the bridges")
	assert.Zero(t, end.Claims)
	own, err = w.opts.Store.Own()
	require.NoError(t, err)
	assert.Empty(t, own.Endpoints)
	for _, b := range own.Sandboxes {
		assert.Equal(t, store.Process{}, b.Main)
		assert.Equal(t, api.StatusExited, b.Status)
	}
}
