// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/sandbox"
	"github.com/bpfnet/bpfnet/store"
)

// Needs root: what is refused when a sandbox is made.
func TestCreateSandboxRefused(t *testing.T) {
	w := newWorld(t)
	w.foreign = policy.State{
		Networks:  []policy.Network{{ID: "d1", Name: "theirs"}},
		Endpoints: []policy.Endpoint{{ID: "e1", NetworkID: "d1", Name: "box", SandboxID: "b1"}},
		Ports:     []policy.Port{{Proto: policy.TCP, Host: netip.MustParseAddrPort("0.0.0.0:9090"), EndpointID: "e1", Target: 90}},
	}
	w.network(api.NetworkSpec{Name: "net1", Subnets: []netip.Prefix{prefix("172.19.0.0/24")}})
	w.network(api.NetworkSpec{Name: "pool"})
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "net1"}}
	spec.Publish = []api.PortSpec{publish(t, "8080:80")}
	web := w.run(spec)
	w.create(w.spec("idle"))
	server, err := net.Listen("tcp", "0.0.0.0:7070")
	require.NoError(t, err)
	defer server.Close()
	comm, err := os.ReadFile("/proc/self/comm")
	require.NoError(t, err)

	for _, c := range []struct {
		change func(*api.SandboxSpec)
		text   string
	}{
		{func(s *api.SandboxSpec) { s.Name = "web" }, `sandbox "web": bpfnet has one of that name; choose another`},
		{func(s *api.SandboxSpec) { s.Name = "box" }, `sandbox "box": Docker has one of that name; choose another`},
		{func(s *api.SandboxSpec) { s.Name = "-x" }, `sandbox "-x": is no name; use two or more of a-z, A-Z, 0-9, _, . and -, a letter or digit first`},
		{func(s *api.SandboxSpec) { s.Command = nil }, `sandbox: no command is given`},
		{func(s *api.SandboxSpec) { s.Dir = "tmp" }, `working directory "tmp": is not absolute`},
		{func(s *api.SandboxSpec) { s.Hostname = strings.Repeat("h", 65) }, `hostname "` + strings.Repeat("h", 65) + `": is longer than 64 characters`},
		{func(s *api.SandboxSpec) { s.Hostname = "two words" }, `hostname "two words": is no name of a host; use letters, digits, dots, - and _`},
		{func(s *api.SandboxSpec) { s.DNS = []netip.Addr{addr("0.0.0.0")} }, `name server "0.0.0.0": is no address of one`},
		{func(s *api.SandboxSpec) { s.Mode = "bridge" }, `mode "bridge": not known; use host, none or container`},
		{func(s *api.SandboxSpec) { s.Mode = "host"; s.Networks = []api.Attach{{Network: "net1"}} },
			`network "net1": cannot go together with --network host`},
		{func(s *api.SandboxSpec) { s.Mode = "none"; s.Publish = []api.PortSpec{publish(t, "1000:80")} },
			`ports: nothing can be published with --network none, which has no network of its own`},
		{func(s *api.SandboxSpec) { s.Mode, s.Join, s.PublishAll = "container", "web", true },
			`ports: nothing can be published with --network container:web, which has no network of its own`},
		{func(s *api.SandboxSpec) { s.Mode, s.Join, s.Hostname = "container", "web", "x" },
			`hostname "x": is the other sandbox's with --network container:web`},
		{func(s *api.SandboxSpec) { s.Mode, s.Join = "container", "idle" },
			`sandbox "idle": does not run, so its network cannot be shared; start it first`},
		{func(s *api.SandboxSpec) { s.Mode, s.Join = "container", "wib" }, `sandbox "wib": no such sandbox; the nearest names are web, idle`},
		{func(s *api.SandboxSpec) { s.Mode, s.Join = "container", "box" },
			`sandbox "box": is a container of Docker; use "docker run --network container:box"`},
		{func(s *api.SandboxSpec) { s.Networks = []api.Attach{{Network: "net2"}} }, `network "net2": no such network; the nearest names are net1, bpfnet, pool`},
		{func(s *api.SandboxSpec) { s.Networks = []api.Attach{{Network: "theirs"}} },
			`network "theirs": is a network of Docker; use "docker run --network theirs"`},
		{func(s *api.SandboxSpec) { s.Networks = []api.Attach{{Network: "net1"}, {Network: "net1"}} },
			`network "net1": the sandbox is in it already; name it once`},
		{func(s *api.SandboxSpec) { s.Networks = []api.Attach{{Network: "net1", Aliases: []string{"a b"}}} },
			`alias "a b": is no name of a host; use letters, digits, dots, - and _`},
		{func(s *api.SandboxSpec) { s.Networks = []api.Attach{{Network: "pool", IP4: addr("172.17.0.9")}} },
			`sandbox "new": address 172.17.0.9: network "pool" has a subnet of bpfnet's choice; a fixed address needs one that was made with --subnet`},
		{func(s *api.SandboxSpec) { s.Networks = []api.Attach{{Network: "net1", IP6: addr("fd00::9")}} },
			`sandbox "new": address fd00::9: network "net1" has no subnet of its family`},
		{func(s *api.SandboxSpec) { s.Networks = []api.Attach{{Network: "net1", IP4: addr("172.20.0.9")}} },
			`sandbox "new": address 172.20.0.9: outside of network "net1", which has 172.19.0.0/24; choose an address in it`},
		{func(s *api.SandboxSpec) { s.Networks = []api.Attach{{Network: "net1", IP4: addr("172.19.0.2")}} },
			`sandbox "new": address 172.19.0.2: is taken in network "net1" by sandbox "web"; choose another, or none to get one that is free`},
		{func(s *api.SandboxSpec) { s.Publish = []api.PortSpec{publish(t, "1000:80"), publish(t, "1000:81")} },
			`port 1000:81/tcp: is asked for twice; give it once`},
		{func(s *api.SandboxSpec) { s.Publish = []api.PortSpec{{Proto: "tcp", First: 20, Last: 10, Target: 80}} },
			`host ports 20-10/tcp: is no range; write the lower one first, from 1 on`},
		{func(s *api.SandboxSpec) { s.Publish = []api.PortSpec{{Proto: "tcp", First: 20}} }, `port 20:0/tcp: the sandbox's port is missing`},
		{func(s *api.SandboxSpec) { s.Publish = []api.PortSpec{publish(t, "8080:81")} },
			`sandbox "new": host port 0.0.0.0:8080/tcp: is published by sandbox "web" (0.0.0.0:8080->80/tcp); publish another port, or none to get one that is free`},
		{func(s *api.SandboxSpec) { s.Publish = []api.PortSpec{publish(t, "9090:81")} },
			`sandbox "new": host port 0.0.0.0:9090/tcp: is published by Docker's container "box" (0.0.0.0:9090->90/tcp); publish another port, or none to get one that is free`},
		{func(s *api.SandboxSpec) { s.Publish = []api.PortSpec{publish(t, "7070:81")} },
			fmt.Sprintf(`sandbox "new": host port 0.0.0.0:7070/tcp: in use by %s (pid %d); stop that, or publish another port`, strings.TrimSpace(string(comm)), os.Getpid())},
		{func(s *api.SandboxSpec) {
			s.Publish = []api.PortSpec{{Proto: "tcp", Host: addr("203.0.113.7"), First: 1000, Target: 80}}
		}, `sandbox "new": host address 203.0.113.7: is none of this host's; publish on one that is, or with 0.0.0.0 on all`},
		{func(s *api.SandboxSpec) {
			s.Publish = []api.PortSpec{{Proto: "tcp", First: 8080, Last: 8080, Target: 80}, {Proto: "tcp", First: 7070, Last: 7070, Target: 81}}
		},
			`sandbox "new": host port 0.0.0.0:8080/tcp: is published by sandbox "web" (0.0.0.0:8080->80/tcp); publish another port, or none to get one that is free`},
	} {
		spec := w.spec("new")
		c.change(&spec)
		w.refuses(c.text, func() error {
			_, err := w.CreateSandbox(t.Context(), spec)
			return err
		})
	}
	web.finish(0)
}

// Needs root: a start that fails at each of its steps leaves the sandbox as it was.
func TestStartRefused(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.Default(t.Context()))
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/24"), prefix("fd00:19::/64")}})
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "n1", IP4: addr("172.19.0.9")}, {Network: DefaultNetwork}}
	spec.Publish = []api.PortSpec{publish(t, "8080:80"), publish(t, "8081:81")}
	w.create(spec)
	start := func() error {
		r, err := w.try("web")
		if err == nil {
			r.thread.Close()
		}
		return err
	}

	// What was free when it was made is not any more.
	server, err := net.Listen("tcp", "127.0.0.1:8081")
	require.NoError(t, err)
	assert.ErrorContains(t, start(), `sandbox "web": host port 0.0.0.0:8081/tcp: in use by `)
	w.refuses(start().Error(), start)
	server.Close()
	other := w.spec("thief")
	other.Networks = []api.Attach{{Network: "n1", IP4: addr("172.19.0.9")}}
	thief := w.run(other)
	w.refuses(`sandbox "web": address 172.19.0.9: is taken in network "n1" by sandbox "thief"; choose another, or none to get one that is free`, start)
	thief.finish(0)

	w.refuses(`sandbox "web": namespace /proc/`+fmt.Sprint(os.Getpid())+`/task/`+fmt.Sprint(os.Getpid())+`/ns/net: is the host's; a sandbox needs one of its own`, func() error {
		_, err := w.StartSandbox(self(t), api.SandboxStart{Name: "web", TID: os.Getpid()})
		return err
	})
	w.refuses(`sandbox "web": it is not known which process asks; start it over the daemon's unix socket`, func() error {
		_, err := w.StartSandbox(t.Context(), api.SandboxStart{Name: "web", TID: 1})
		return err
	})
	w.refuses(`sandbox "web": open namespace /proc/`+fmt.Sprint(os.Getpid())+`/task/0/ns/net: no such file or directory`, func() error {
		_, err := w.StartSandbox(self(t), api.SandboxStart{Name: "web"})
		return err
	})

	for change, text := range map[*error]string{
		&w.guardErr: `sandbox "web": guard interface bpv-`,
		&w.applyErr: `sandbox "web": the data path does not follow: ` + assert.AnError.Error(),
	} {
		before := w.look()
		w.set(func() { *change = assert.AnError })
		assert.ErrorContains(t, start(), text)
		w.set(func() { *change = nil })
		w.same(before, text)
	}
	w.set(func() { w.unready = "no programs" })
	w.refuses(`sandbox "web": the data path does not serve eth0 in network "n1": no programs`, start)
	w.set(func() { w.unready = "" })

	// A device of the same name in the namespace.
	th := sandbox.NewThread()
	require.NoError(t, th.NewNetNS())
	addDevice(t, fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), th.TID()), "eth1")
	before := w.look()
	_, err = w.StartSandbox(self(t), api.SandboxStart{Name: "web", TID: th.TID()})
	assert.ErrorContains(t, err, "the sandbox has a device eth1 already")
	w.same(before, "a device is in the way")
	th.Close()

	// The command cannot be executed: the runner takes the start back.
	before = w.look()
	r, err := w.try("web")
	require.NoError(t, err)
	w.refuses(`sandbox "web": is being started; try again in a moment`, start)
	_, err = w.SandboxEnded(t.Context(), api.SandboxExited{ID: r.ID, Unstarted: true})
	require.NoError(t, err)
	r.thread.Close()
	w.same(before, "unstarted")

	r = w.launch("web")
	w.refuses(`sandbox "web": runs already; stop it first`, start)
	w.refuses(`sandbox "web": has no start under way`, func() error {
		_, err := w.SandboxRuns(t.Context(), api.SandboxRunning{ID: r.ID, PID: os.Getpid()})
		return err
	})
	r.finish(0)
}

// addDevice puts a device into a namespace.
func addDevice(t *testing.T, ns, name string) {
	t.Helper()
	f, err := os.Open(ns)
	require.NoError(t, err)
	defer f.Close()
	addVeth(t, name, int(f.Fd()))
}

// full is what the store says when its disk is.
func (w *world) full() string {
	return `write state: state file ` + filepath.Join(w.state, store.FileName) + `: the disk is full (no space left on device): free space there and try again`
}

// Needs root: the disk is full. What does not fit any more is refused with these words, and changes nothing.
func TestDiskFull(t *testing.T) {
	w := newWorld(t)
	w.end()
	ram := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", ram, "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { assert.NoError(t, unix.Unmount(ram, 0)) })
	disk := w.state
	w.state = ram
	w.start()
	t.Cleanup(func() {
		w.end()
		s := w.open()
		assert.NoError(t, Cleanup(s, w.opts.Devices, w.opts.Dir, w.opts.Cgroup, true))
		require.NoError(t, s.Close())
		w.state = disk
	})
	w.network(api.NetworkSpec{Name: "n1"})
	big := strings.Repeat("x", 64<<10) // more than the pages that are free within the file
	spec := w.spec("idle")
	spec.Networks = []api.Attach{{Network: "n1"}}
	spec.Publish = []api.PortSpec{publish(t, "8080:80")}
	spec.Env = []string{big}
	w.create(spec)
	applied := w.applied

	free := fill(t, ram)
	w.refuses(`network "n2": `+w.full(), func() error {
		_, err := w.CreateNetwork(t.Context(), api.NetworkSpec{Name: "n2", Labels: map[string]string{"a": big}})
		return err
	})
	w.refuses(`sandbox "new": `+w.full(), func() error {
		spec.Name, spec.Publish = "new", nil
		_, err := w.CreateSandbox(t.Context(), spec)
		return err
	})
	w.refuses(`sandbox "idle": `+w.full(), func() error {
		_, err := w.try("idle")
		return err
	})
	assert.Equal(t, applied, w.applied, "the data path was not asked")
	free()
	w.launch("idle").finish(0)
}

// Needs root: the store refuses at each verb that writes. The sandbox runs on as it did; its end, which
// has happened anyway, is written with the next change.
func TestStoreFails(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/24")}})
	w.network(api.NetworkSpec{Name: "n2", Options: map[string]string{policy.OptHostBinding: "127.0.0.1"}})
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "n1"}}
	spec.Publish = []api.PortSpec{publish(t, "8080:80")}
	web := w.run(spec)
	w.create(w.spec("idle"))
	pending, err := w.try("idle")
	require.NoError(t, err)
	ctx := t.Context()
	broken := func(verb func() error) {
		t.Helper()
		require.NoError(t, w.opts.Store.Close())
		assert.ErrorContains(t, verb(), "database not open")
		w.opts.Store = w.open()
		w.Manager.o.Store = w.opts.Store
	}
	for _, verb := range []func() error{
		func() error { _, err := w.CreateNetwork(ctx, api.NetworkSpec{Name: "n3"}); return err },
		func() error { _, err := w.RemoveNetwork(ctx, api.Named{Name: "n2"}); return err },
		func() error { _, err := w.CreateSandbox(ctx, w.spec("new")); return err },
		func() error {
			_, err := w.Connect(ctx, api.Connection{Sandbox: "web", Attach: api.Attach{Network: "n2"}})
			return err
		},
		func() error {
			_, err := w.Disconnect(ctx, api.Connection{Sandbox: "web", Attach: api.Attach{Network: "n1"}})
			return err
		},
		func() error {
			_, err := w.PublishPorts(ctx, api.PortChange{Name: "web", Ports: []api.PortSpec{publish(t, "9000:90")}})
			return err
		},
		func() error {
			_, err := w.UnpublishPorts(ctx, api.PortChange{Name: "web", Ports: []api.PortSpec{publish(t, "8080:80")}})
			return err
		},
		func() error {
			_, err := w.SandboxRuns(ctx, api.SandboxRunning{ID: pending.ID, PID: web.proc.PID()})
			return err
		},
	} {
		before := w.look()
		broken(verb)
		w.same(before, "the store did not take it")
	}
	_, err = w.SandboxEnded(ctx, api.SandboxExited{ID: pending.ID, Unstarted: true})
	require.NoError(t, err)
	pending.thread.Close()
	before := w.look()
	broken(func() error { _, err := w.RemoveSandbox(ctx, api.SandboxRemoval{Name: "idle"}); return err })
	w.same(before, "the store did not take it")

	require.NoError(t, w.opts.Store.Close())
	web.finish(4)
	assert.Equal(t, api.StatusExited, w.status("web").Status)
	assert.Len(t, ownLinks(t, w.opts.Devices), 3, "the bridges")
	w.opts.Store = w.open()
	w.Manager.o.Store = w.opts.Store
	own, err := w.opts.Store.Own()
	require.NoError(t, err)
	assert.Len(t, own.Endpoints, 1, "not written yet")
	_, err = w.RemoveSandbox(ctx, api.SandboxRemoval{Name: "idle"})
	require.NoError(t, err)
	own, err = w.opts.Store.Own()
	require.NoError(t, err)
	assert.Empty(t, own.Endpoints)
	assert.Equal(t, 4, *own.Sandboxes[0].ExitCode)
}

// Needs root: the data path's tables have an end, which another engine's things count for too.
func TestTablesFull(t *testing.T) {
	w := newWorld(t)
	for i := range policy.MaxNetworks - 2 {
		w.foreign.Networks = append(w.foreign.Networks, policy.Network{ID: fmt.Sprint("d", i), Name: fmt.Sprint("theirs", i)})
	}
	w.foreign.Endpoints = []policy.Endpoint{{ID: "e1", NetworkID: "d0", Name: "box", SandboxID: "b1"}}
	for i := range policy.MaxPorts - 3 {
		host := netip.AddrPortFrom(addr("192.0.2.77"), uint16(i+1))
		w.foreign.Ports = append(w.foreign.Ports, policy.Port{Proto: policy.TCP, Host: host, EndpointID: "e1", Target: 80})
	}
	w.network(api.NetworkSpec{Name: "last"})
	w.refuses(`network "more": there are 1023 networks, which is all that the data path serves; remove one first`, func() error {
		_, err := w.CreateNetwork(t.Context(), api.NetworkSpec{Name: "more"})
		return err
	})
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "last"}}
	web := w.run(spec)
	w.refuses(`sandbox "web": port 127.0.0.1:8082:80/tcp: there are 16383 published ports, and the data path serves 16383; unpublish some first`, func() error {
		c := api.PortChange{Name: "web"}
		for _, port := range []uint16{8080, 8081, 8082} {
			c.Ports = append(c.Ports, api.PortSpec{Proto: "tcp", Host: addr("127.0.0.1"), First: port, Target: 80})
		}
		_, err := w.PublishPorts(t.Context(), c)
		return err
	})
	web.finish(0)
}
