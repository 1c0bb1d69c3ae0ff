// SPDX-License-Identifier: Apache-2.0

package docker

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// startEngine starts a real Engine in a lab and follows it.
func startEngine(t *testing.T, args ...string) (l *lab.Lab, d *lab.Docker, s *Source, states <-chan policy.State) {
	t.Helper()
	l = lab.New(t, lab.Opts{})
	d = l.StartDocker(t, lab.DockerOpts{ExtraArgs: args})
	// Only events and our own hints are to be seen, not the periodic read.
	s, states = follow(t, Options{Host: d.Host, Resync: time.Hour})
	await(t, states, "the default bridge", func(st policy.State) bool {
		return len(st.Networks) == 1 && st.Networks[0].Bridge == "docker0" && len(st.Endpoints) == 0
	})
	return l, d, s, states
}

// ports shows the ports with their endpoints as container@network.
func ports(st policy.State) string {
	nets := make(map[string]string)
	for _, n := range st.Networks {
		nets[n.ID] = n.Name
	}
	eps := make(map[string]string)
	for _, e := range st.Endpoints {
		eps[e.ID] = e.Name + "@" + nets[e.NetworkID]
	}
	var s []string
	for _, p := range st.Ports {
		s = append(s, p.String()+" "+eps[p.EndpointID])
	}
	return strings.Join(s, ", ")
}

// Needs root, dockerd and busybox: the life of containers of a real Engine.
func TestRealEngine(t *testing.T) {
	_, d, _, states := startEngine(t)
	d.MustRun(t, "network", "create", "--ipv6", "--subnet", "172.30.1.0/24", "--subnet", "fd00:30:1::/64", "zdual")
	d.MustRun(t, "network", "create", "--subnet", "172.30.2.0/24", "-o", "com.docker.network.bridge.host_binding_ipv4=127.0.0.1", "alone")
	d.MustRun(t, "network", "create", "--internal", "inside")
	st, _ := await(t, states, "networks", func(st policy.State) bool { return len(st.Networks) == 4 })
	for _, n := range st.Networks {
		require.Equal(t, n.Name == "inside", n.Internal, n.Name)
	}

	// A start: the fixed port first, all ports after.
	id := d.MustRun(t, "run", "-d", "--name", "web", "--network", "zdual", "--label", labelAllowed+"=10.9.0.0/16",
		"-p", "8080:80", "-p", "0.0.0.0:8443:443", "-p", "81/udp", lab.Image, "sleep", "1000")
	fixed := "0.0.0.0:8080->80/tcp web@zdual, 0.0.0.0:8443->443/tcp web@zdual, [::]:8080->80/tcp web@zdual"
	await(t, states, "fixed ports alone", func(st policy.State) bool { return ports(st) == fixed })
	udp := d.MustRun(t, "port", "web", "81/udp")
	st, between := await(t, states, "all ports", func(st policy.State) bool { return strings.HasPrefix(ports(st), fixed+", ") })
	require.Empty(t, between)
	for line := range strings.Lines(udp) {
		line = strings.Replace(strings.TrimSpace(line), ":::", "[::]:", 1)
		require.Contains(t, ports(st), line+"->81/udp")
	}
	require.Len(t, st.Ports, 5)
	require.Len(t, st.Endpoints, 1)
	ep := st.Endpoints[0]
	v4, v6 := d.Addrs(t, "web", "zdual")
	require.Equal(t, id, ep.SandboxID)
	require.ElementsMatch(t, []any{v4, v6}, []any{ep.Addrs[0], ep.Addrs[1]})
	require.Equal(t, d.NS(t, "web").MAC(t, "eth0").String(), ep.MAC.String())
	require.Equal(t, "10.9.0.0/16", ep.Allowed[0].String())

	// Another network that would be chosen by name has fewer families; the internal one never.
	d.MustRun(t, "network", "connect", "alone", "web")
	d.MustRun(t, "network", "connect", "inside", "web")
	st, _ = await(t, states, "three endpoints", func(st policy.State) bool { return len(st.Endpoints) == 3 })
	for _, e := range st.Endpoints {
		require.Equal(t, id, e.SandboxID)
	}
	require.True(t, strings.HasPrefix(ports(st), fixed))
	// Without the gateway its ports move on, to where this network binds them.
	d.MustRun(t, "network", "disconnect", "zdual", "web")
	want := "0.0.0.0:8443->443/tcp web@alone, 127.0.0.1:8080->80/tcp web@alone, "
	st, _ = await(t, states, "ports moved", func(st policy.State) bool { return strings.HasPrefix(ports(st), want) })
	require.Contains(t, ports(st), d.MustRun(t, "port", "web", "81/udp")+"->81/udp web@alone")
	d.MustRun(t, "network", "disconnect", "alone", "web")
	await(t, states, "internal networks publish nothing", func(st policy.State) bool {
		return len(st.Endpoints) == 1 && len(st.Ports) == 0
	})
	d.MustRun(t, "network", "connect", "alone", "web")
	await(t, states, "ports back", func(st policy.State) bool { return strings.HasPrefix(ports(st), want) })

	// Pausing changes nothing, renaming only the name, sharing adds no endpoint.
	d.MustRun(t, "pause", "web")
	d.MustRun(t, "unpause", "web")
	d.MustRun(t, "run", "-d", "--name", "side", "--network", "container:web", lab.Image, "sleep", "1000")
	d.MustRun(t, "rename", "web", "shop")
	st, before := await(t, states, "renamed", func(st policy.State) bool { return strings.Contains(ports(st), "shop@alone") })
	require.Len(t, st.Endpoints, 2)
	for _, b := range before {
		require.Len(t, b.Endpoints, 2)
		require.Len(t, b.Ports, 3)
	}
	d.MustRun(t, "rm", "-f", "side")

	// A restart, a death and a removal.
	d.MustRun(t, "restart", "-t", "0", "shop")
	await(t, states, "stopped", func(st policy.State) bool { return len(st.Endpoints)+len(st.Ports) == 0 })
	await(t, states, "started again", func(st policy.State) bool { return len(st.Endpoints) == 2 && len(st.Ports) == 3 })
	d.MustRun(t, "kill", "shop")
	await(t, states, "dead", func(st policy.State) bool { return len(st.Endpoints)+len(st.Ports) == 0 })
	d.MustRun(t, "rm", "shop")

	// A start that fails must not take the port from its owner.
	d.MustRun(t, "run", "-d", "--name", "owner", "-p", "9000:80", lab.Image, "sleep", "1000")
	const owner = "0.0.0.0:9000->80/tcp owner@bridge, [::]:9000->80/tcp owner@bridge" // the latter by the relay
	await(t, states, "owner", func(st policy.State) bool { return ports(st) == owner })
	_, err := d.Run("run", "-d", "--name", "thief", "-p", "9000:80", lab.Image, "sleep", "1000")
	require.Error(t, err)
	d.MustRun(t, "network", "rm", "alone")
	_, before = await(t, states, "network removed", func(st policy.State) bool { return len(st.Networks) == 3 && len(st.Endpoints) == 1 })
	for _, b := range before {
		require.Equal(t, owner, ports(b))
	}
}

// Needs root, dockerd and busybox: an Engine that restarts under its containers (live-restore)
// sends no events about them, and the state is found again as it was.
func TestRealEngineRestart(t *testing.T) {
	_, d, s, states := startEngine(t, "--live-restore")
	d.MustRun(t, "run", "-d", "--name", "web", "-p", "8080:80", "-p", "81", lab.Image, "sleep", "1000")
	was, _ := await(t, states, "started", func(st policy.State) bool { return len(st.Ports) == 4 }) // two by the relay
	d.Kill(t)
	lab.Eventually(t, 10*time.Second, "disconnected", func() bool { return !s.Status().Connected })
	require.Contains(t, s.Status().LastError, d.Socket)
	d.Start(t)
	lab.Eventually(t, 30*time.Second, "connected", func() bool { return s.Status().Connected })
	now, before := await(t, states, "restored", func(policy.State) bool { return true })
	require.Empty(t, before)
	require.Equal(t, ports(was), ports(now))
	require.Equal(t, was.Endpoints[0].MAC, now.Endpoints[0].MAC)
}

// boottime is the clock of /proc/uptime.
func boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

// Needs root, dockerd and busybox: fixed ports are known before the container's own program
// runs, also when several containers start at once. The program tells when that was.
func TestFixedPortsBeforeProcess(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	s, err := New(Options{Host: d.Host})
	require.NoError(t, err)
	var mu sync.Mutex
	known := make(map[uint16]time.Duration)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- s.Run(ctx, func(st policy.State) {
			at := boottime()
			mu.Lock()
			defer mu.Unlock()
			for _, p := range st.Ports {
				if _, seen := known[p.Host.Port()]; !seen {
					known[p.Host.Port()] = at
				}
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
	})
	<-s.Ready()

	const n = 8
	var wg sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		wg.Go(func() {
			_, errs[i] = d.Run("run", "-d", "--name", fmt.Sprint("c", i), "-p", fmt.Sprintf("%d:80", 7000+i),
				lab.Image, "sh", "-c", "cat /proc/uptime; exec sleep 1000")
		})
	}
	wg.Wait()
	for i := range n {
		require.NoError(t, errs[i])
		name := fmt.Sprint("c", i)
		d.WaitLog(t, name, ".")
		out := d.MustRun(t, "logs", name)
		sec, err := strconv.ParseFloat(strings.Fields(out)[0], 64)
		require.NoError(t, err)
		ran := time.Duration(sec * float64(time.Second)) // rounded down to 10 ms
		mu.Lock()
		at, ok := known[uint16(7000+i)]
		mu.Unlock()
		require.True(t, ok, name)
		require.Less(t, at, ran, name)
		t.Logf("%s: port known %v before its program ran", name, ran-at)
	}
}

// Needs root, dockerd and busybox: an image build has an endpoint, but neither a container nor
// an event. Only the kernel tells, and it tells before the Engine does.
func TestImageBuild(t *testing.T) {
	t.Setenv("DOCKER_BUILDKIT", "1")
	l, d, s, states := startEngine(t)
	var events <-chan netdev.Event
	require.NoError(t, l.Host.Do(func() error {
		dev, err := netdev.Open(netdev.Options{})
		if err != nil {
			return err
		}
		t.Cleanup(dev.Close)
		events, err = dev.Watch(t.Context())
		return err
	}))
	go func() {
		for ev := range events {
			if ev.MasterName != "" {
				s.Refresh(ev.MasterName)
			}
		}
	}()

	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM "+lab.Image+"\nRUN sleep 3; ip addr show eth0\n"), 0o600))
	built := make(chan error, 1)
	go func() {
		_, err := d.Run("build", "--network", "default", dir)
		built <- err
	}()
	st, _ := await(t, states, "the build's endpoint", func(st policy.State) bool { return len(st.Endpoints) == 1 })
	select {
	case err := <-built:
		require.FailNow(t, "the build has ended already", "%v", err)
	default:
	}
	require.Empty(t, d.MustRun(t, "ps", "-aq"), "no container")
	ep := st.Endpoints[0]
	require.True(t, strings.HasPrefix(ep.Addrs[0].String(), "172.17.0."), ep.Addrs[0])
	require.False(t, ep.MAC.IsZero())
	_, before := await(t, states, "its end", func(st policy.State) bool { return len(st.Endpoints) == 0 })
	for _, b := range before {
		require.Equal(t, ep.ID, b.Endpoints[0].ID)
		require.Equal(t, ep.Addrs, b.Endpoints[0].Addrs)
	}
	require.NoError(t, <-built)
}
