// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
)

func (w *world) connect(box, network string, ip ...string) {
	w.t.Helper()
	a := api.Attach{Network: network}
	if len(ip) > 0 {
		a.IP4 = addr(ip[0])
	}
	_, err := w.Connect(w.t.Context(), api.Connection{Sandbox: box, Attach: a})
	require.NoError(w.t, err)
}

func (w *world) disconnect(box, network string) {
	w.t.Helper()
	_, err := w.Disconnect(w.t.Context(), api.Connection{Sandbox: box, Attach: api.Attach{Network: network}})
	require.NoError(w.t, err)
}

func hosts(t *testing.T, r *running) string {
	t.Helper()
	b, err := os.ReadFile(r.grant.Files["/etc/hosts"])
	require.NoError(t, err)
	return string(b)
}

// Needs root: interfaces come and go while the sandbox runs; default route and published ports go with the
// gateway endpoint, which is the one with more families, then the first by name, and never an internal one.
func TestConnect(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "mid", Subnets: []netip.Prefix{prefix("10.2.0.0/24")}})
	w.network(api.NetworkSpec{Name: "first", Subnets: []netip.Prefix{prefix("10.1.0.0/24")}, Options: map[string]string{policy.OptHostBinding: "127.0.0.1"}})
	w.network(api.NetworkSpec{Name: "dual", Subnets: []netip.Prefix{prefix("10.3.0.0/24"), prefix("fd00:3::/64")}})
	w.network(api.NetworkSpec{Name: "closed", Subnets: []netip.Prefix{prefix("10.0.0.0/24")}, Internal: true})
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "mid"}}
	spec.Publish = []api.PortSpec{{Proto: "tcp", Target: 80}, publish(t, "8080:81")}
	web := w.run(spec)
	spec.Name, spec.Publish = "db", nil
	db := w.run(spec)
	assert.Contains(t, hosts(t, web), "10.2.0.3\tdb\n")
	held := w.look().Sockets
	assert.Equal(t, []string{"0.0.0.0:8080->81/tcp", "0.0.0.0:49153->80/tcp"}, w.ports("web"))

	w.connect("web", "closed")
	assert.Equal(t, []string{"default 10.2.0.1", "eth0 10.2.0.2/24", "eth1 10.0.0.2/24", "lo 127.0.0.1/8", "lo ::1/128"}, inside(t, web.proc.PID()))
	assert.Equal(t, []string{"0.0.0.0:8080->81/tcp", "0.0.0.0:49153->80/tcp"}, w.ports("web"))

	w.connect("web", "first", "10.1.0.9")
	assert.Contains(t, inside(t, web.proc.PID()), "default 10.1.0.1")
	assert.NotContains(t, inside(t, web.proc.PID()), "default 10.2.0.1")
	assert.Equal(t, []string{"127.0.0.1:8080->81/tcp", "127.0.0.1:49153->80/tcp"}, w.ports("web"), "by that network's default address, and the same number")
	e, _ := w.endpoint("web", "first")
	assert.Equal(t, e.ID, w.State().Ports[0].EndpointID)
	l, err := net.Listen("tcp", "127.0.0.2:8080")
	require.NoError(t, err, "what was on all addresses is free on others")
	l.Close()

	w.connect("web", "dual")
	assert.Contains(t, inside(t, web.proc.PID()), "default 10.3.0.1")
	assert.Contains(t, inside(t, web.proc.PID()), "default fd00:3::1")
	assert.Contains(t, inside(t, web.proc.PID()), "eth3 10.3.0.2/24")
	assert.Equal(t, []string{"0.0.0.0:8080->81/tcp", "0.0.0.0:49153->80/tcp", "[::]:8080->81/tcp", "[::]:49153->80/tcp"}, w.ports("web"))
	assert.Equal(t, held+2, w.look().Sockets)
	assert.Equal(t, []string{"mid", "closed", "first", "dual"}, w.status("web").Networks)

	w.disconnect("web", "mid")
	assert.NotContains(t, hosts(t, web), "\tdb")
	assert.NotContains(t, hosts(t, db), "\tweb")
	w.disconnect("web", "dual")
	assert.Equal(t, []string{"default 10.1.0.1", "eth1 10.0.0.2/24", "eth2 10.1.0.9/24", "lo 127.0.0.1/8", "lo ::1/128"}, inside(t, web.proc.PID()))
	assert.Equal(t, []string{"127.0.0.1:8080->81/tcp", "127.0.0.1:49153->80/tcp"}, w.ports("web"))
	w.connect("web", "mid")
	assert.Contains(t, inside(t, web.proc.PID()), "eth0 10.2.0.4/24", "the lowest name that is free; the address rests")
	assert.Contains(t, hosts(t, db), "10.2.0.4\tweb\n")

	for _, n := range []string{"mid", "first"} {
		w.disconnect("web", n)
	}
	assert.Equal(t, []string{"eth1 10.0.0.2/24", "lo 127.0.0.1/8", "lo ::1/128"}, inside(t, web.proc.PID()))
	assert.Empty(t, w.ports("web"))
	assert.Equal(t, held-2, w.look().Sockets)
	w.disconnect("web", "closed")
	w.connect("web", "mid")
	assert.Len(t, w.ports("web"), 2, "they come back")

	// One that does not run has a wish.
	w.create(w.spec("later"))
	w.connect("later", "first", "10.1.0.77")
	w.disconnect("later", DefaultNetwork)
	later := w.launch("later")
	assert.Equal(t, []string{"10.1.0.77"}, w.addrs("later", "first"))
	assert.Len(t, w.status("later").Networks, 1)
	for _, r := range []*running{web, db, later} {
		r.finish(0)
	}
	assert.Equal(t, held-2, w.look().Sockets)
}

// Needs root: what cannot be connected, disconnected, or published.
func TestConnectRefused(t *testing.T) {
	w := newWorld(t)
	w.foreign = policy.State{
		Networks:  []policy.Network{{ID: "d1", Name: "theirs"}},
		Endpoints: []policy.Endpoint{{ID: "e1", NetworkID: "d1", Name: "box", SandboxID: "b1"}},
	}
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/24")}})
	w.network(api.NetworkSpec{Name: "n2", Subnets: []netip.Prefix{prefix("10.2.0.0/24")}})
	w.network(api.NetworkSpec{Name: "pool"})
	w.network(api.NetworkSpec{Name: "inner", Internal: true})
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "n1"}}
	web := w.run(spec)
	spec.Name, spec.Publish = "db", []api.PortSpec{publish(t, "8080:80")}
	db := w.run(spec)
	spec = w.spec("closed")
	spec.Networks = []api.Attach{{Network: "inner"}}
	closed := w.run(spec)
	for name, mode := range map[string]string{"hosty": api.ModeHost, "none": api.ModeNone, "friend": api.ModeContainer} {
		spec = w.spec(name)
		spec.Mode = mode
		if mode == api.ModeContainer {
			spec.Join = "web"
		}
		w.create(spec)
	}
	w.run(w.spec("dead")).finish(0)

	for _, c := range []struct{ box, network, ip, text string }{
		{"dead", "n2", "", `sandbox "dead": has ended; start it first`},
		{"hosty", "n2", "", `sandbox "hosty": has the host's network, and cannot be connected to another`},
		{"none", "n2", "", `sandbox "none": was made to have no network, and cannot be connected to one`},
		{"friend", "n2", "", `sandbox "friend": shares the network of sandbox "web"; connect that`},
		{"web", "n1", "", `sandbox "web": is in network "n1" already`},
		{"web", "n3", "", `network "n3": no such network; the nearest names are n1, n2, inner`},
		{"web", "theirs", "", `network "theirs": is a network of Docker; use "docker network connect theirs web"`},
		{"box", "n1", "", `sandbox "box": is a container of Docker; use "docker network connect n1 box"`},
		{"wub", "n1", "", `sandbox "wub": no such sandbox; the nearest names are web, db, dead`},
		{"web", "pool", "172.17.0.9", `sandbox "web": address 172.17.0.9: network "pool" has a subnet of bpfnet's choice; a fixed address needs one that was made with --subnet`},
		{"web", "n2", "10.3.0.9", `sandbox "web": address 10.3.0.9: outside of network "n2", which has 10.2.0.0/24; choose an address in it`},
		{"web", "n2", "10.2.0.1", `sandbox "web": address 10.2.0.1: reserved as the gateway of subnet 10.2.0.0/24; choose another`},
		{"web", "n2", "10.2.0.255", `sandbox "web": address 10.2.0.255: reserved as the broadcast address of subnet 10.2.0.0/24; choose another`},
		{"closed", "n1", "172.19.0.2", `sandbox "closed": address 172.19.0.2: is taken in network "n1" by sandbox "web"; choose another, or none to get one that is free`},
	} {
		w.refuses(c.text, func() error {
			a := api.Attach{Network: c.network}
			if c.ip != "" {
				a.IP4 = addr(c.ip)
			}
			_, err := w.Connect(t.Context(), api.Connection{Sandbox: c.box, Attach: a})
			return err
		})
	}
	for _, c := range []struct{ box, network, text string }{
		{"web", "n2", `sandbox "web": is not in network "n2"`},
		{"web", "theirs", `network "theirs": is a network of Docker; use "docker network disconnect theirs web"`},
		{"box", "theirs", `sandbox "box": is a container of Docker; use "docker network disconnect theirs box"`},
		{"none", "n1", `sandbox "none": is not in network "n1"`},
	} {
		w.refuses(c.text, func() error {
			_, err := w.Disconnect(t.Context(), api.Connection{Sandbox: c.box, Attach: api.Attach{Network: c.network}})
			return err
		})
	}
	for _, c := range []struct {
		box  string
		port api.PortSpec
		text string
	}{
		{"dead", publish(t, "9000:80"), `sandbox "dead": does not run; start it first`},
		{"hosty", publish(t, "9000:80"), `sandbox "hosty": has no network of its own, so that nothing can be published`},
		{"closed", publish(t, "9000:80"), `sandbox "closed": is in no network that leads out of the host; connect it to one that is not internal`},
		{"db", publish(t, "8080:81"), `sandbox "db": port 8080:81/tcp: is published already, as 8080:80/tcp; unpublish that first, or publish another port`},
		{"web", publish(t, "8080:81"), `sandbox "web": host port 0.0.0.0:8080/tcp: is published by sandbox "db" (0.0.0.0:8080->80/tcp); publish another port, or none to get one that is free`},
		{"web", api.PortSpec{Proto: "icmp", Target: 8}, `sandbox "web": unknown protocol "icmp": use tcp, udp or sctp`},
		{"box", publish(t, "9000:80"), `sandbox "box": is a container of Docker; use "docker run -p PORTS box"`},
	} {
		w.refuses(c.text, func() error {
			_, err := w.PublishPorts(t.Context(), api.PortChange{Name: c.box, Ports: []api.PortSpec{c.port}})
			return err
		})
	}
	w.refuses(`sandbox "db": does not publish 8081:80/tcp; it publishes 80/tcp -> 0.0.0.0:8080`, func() error {
		_, err := w.UnpublishPorts(t.Context(), api.PortChange{Name: "db", Ports: []api.PortSpec{publish(t, "8081:80")}})
		return err
	})

	// What fails on the way is taken back.
	connect := func() error {
		_, err := w.Connect(t.Context(), api.Connection{Sandbox: "db", Attach: api.Attach{Network: "n2", IP4: addr("10.2.0.7")}})
		return err
	}
	for change, text := range map[*error]string{
		&w.guardErr: `sandbox "db": guard interface `,
		&w.applyErr: `sandbox "db": the data path does not follow: assert.AnError general error for testing`,
	} {
		before := w.look()
		w.set(func() { *change = assert.AnError })
		assert.ErrorContains(t, connect(), text)
		w.set(func() { *change = nil })
		w.same(before, text)
		require.NoError(t, w.apply(t.Context()))
	}
	w.set(func() { w.unready = "no programs" })
	w.refuses(`sandbox "db": the data path does not serve eth1 in network "n2": no programs`, connect)
	w.set(func() { w.unready = "" })
	assert.Contains(t, inside(t, db.proc.PID()), "default 172.19.0.1")
	w.set(func() { w.applyErr = assert.AnError })
	w.refuses(`sandbox "db": the data path does not follow: `+assert.AnError.Error(), func() error {
		_, err := w.PublishPorts(t.Context(), api.PortChange{Name: "db", Ports: []api.PortSpec{publish(t, "9000:90")}})
		return err
	})
	w.set(func() { w.applyErr = nil })
	require.NoError(t, connect())
	for _, r := range []*running{web, db, closed} {
		r.finish(0)
	}
}

// Needs root: ports of a sandbox that runs, and that they come back with it.
func TestPublish(t *testing.T) {
	w := newWorld(t)
	web := w.run(w.spec("web"))
	before := w.look()
	change := func(verb func(api.PortChange) (api.PublishedPorts, error), ports ...api.PortSpec) []string {
		t.Helper()
		p, err := verb(api.PortChange{Name: "web", Ports: ports})
		require.NoError(t, err)
		return p.Ports
	}
	add := func(c api.PortChange) (api.PublishedPorts, error) { return w.PublishPorts(t.Context(), c) }
	remove := func(c api.PortChange) (api.PublishedPorts, error) { return w.UnpublishPorts(t.Context(), c) }

	assert.Equal(t, []string{"80/tcp -> 0.0.0.0:8080", "80/tcp -> [::]:8080", "53/udp -> 127.0.0.1:5300"},
		change(add, publish(t, "8080:80"), api.PortSpec{Proto: "udp", Host: addr("127.0.0.1"), First: 5300, Target: 53}))
	assert.Equal(t, []string{"0.0.0.0:8080->80/tcp", "[::]:8080->80/tcp", "127.0.0.1:5300->53/udp"}, w.ports("web"))
	assert.Equal(t, w.State(), w.applied)
	assert.Equal(t, []string{"90/tcp -> 0.0.0.0:49153", "90/tcp -> [::]:49153"}, change(add, api.PortSpec{Proto: "tcp", Target: 90}))
	assert.Equal(t, []string{"91/tcp -> 0.0.0.0:8081", "91/tcp -> [::]:8081"},
		change(add, api.PortSpec{Proto: "tcp", First: 8080, Last: 8090, Target: 91}), "the lowest of the range that is free")

	web.finish(0)
	web = w.launch("web")
	assert.Len(t, w.ports("web"), 7)
	assert.Equal(t, []string{"90/tcp -> 0.0.0.0:49153", "90/tcp -> [::]:49153"}, change(remove, publish(t, "49153:90")), "by the number that was chosen")
	assert.Equal(t, []string{"80/tcp -> 0.0.0.0:8080", "80/tcp -> [::]:8080"}, change(remove, api.PortSpec{Proto: "tcp", Target: 80}))
	assert.Len(t, change(remove, publish(t, "8081:91"), api.PortSpec{Proto: "udp", Target: 53}), 3)
	after := w.look()
	assert.Equal(t, before.Sockets, after.Sockets)
	assert.Empty(t, after.State.Ports)
	assert.Empty(t, after.Own.Sandboxes[0].Publish)
	assert.Zero(t, after.Claims)
	web.finish(0)

	// -P publishes what is exposed, unless -p has it.
	spec := w.spec("all")
	spec.PublishAll = true
	spec.Expose = []api.PortSpec{{Proto: "tcp", Target: 80}, {Proto: "tcp", Target: 90}}
	spec.Publish = []api.PortSpec{publish(t, "8080:80")}
	all := w.run(spec)
	assert.Equal(t, []string{"0.0.0.0:8080->80/tcp", "0.0.0.0:49153->90/tcp", "[::]:8080->80/tcp", "[::]:49153->90/tcp"}, w.ports("all"))
	all.finish(0)
}

// Needs root: a sandbox whose process keeps the daemon from writing its hosts file does no harm to others.
func TestHostsUnwritable(t *testing.T) {
	w := newWorld(t)
	w.network(api.NetworkSpec{Name: "net1"})
	spec := w.spec("stubborn")
	spec.Networks = []api.Attach{{Network: "net1"}}
	stubborn := w.run(spec)
	f, err := os.Open(stubborn.grant.Files["/etc/hosts"])
	require.NoError(t, err)
	defer f.Close()
	immutable := func(flags int) error { return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags) }
	require.NoError(t, immutable(unix.STATX_ATTR_IMMUTABLE)) // FS_IMMUTABLE_FL has the same value
	defer func() { assert.NoError(t, immutable(0)) }()

	spec.Name = "web"
	web := w.run(spec)
	assert.Contains(t, hosts(t, web), "\tstubborn\n")
	assert.NotContains(t, hosts(t, stubborn), "\tweb\n")
	assert.Contains(t, w.log.String(), "write a sandbox's hosts file")
	web.finish(0)
}
