// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// bindable tries to serve a port on the host, as any program would, and gives it back.
func (w *site) bindable(t *testing.T, proto, family, port string) error {
	t.Helper()
	p := w.Host.Start(t, w.Tool, "serve", "--"+proto, port, "--family", family)
	var failed error
	lab.Eventually(t, 10*time.Second, "the host's program listens, or is refused", func() bool {
		exited := p.Exited()
		if strings.Contains(p.Stdout(), "ready") {
			return true
		}
		if exited {
			failed = fmt.Errorf("%s", p.Stderr())
		}
		return exited
	})
	p.Kill()
	return failed
}

// Needs root. A published port is held: programs of the host get "address in use", and bpfnet gets it
// from them, by the name of the process. What is unpublished, or ended, is free.
func TestOwnReservations(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp", "-p", "192.0.2.1:8090:80")
	each := func(f func(proto, family string)) {
		for _, proto := range []string{"tcp", "udp"} {
			for _, family := range []string{"4", "6"} {
				f(proto, family)
			}
		}
	}
	each(func(proto, family string) {
		assert.ErrorContains(t, w.bindable(t, proto, family, "8080"), "address already in use", "%s%s", proto, family)
	})
	// Held on one address, the port is free on others.
	assert.ErrorContains(t, w.bindable(t, "tcp", "4", "8090"), "address already in use")
	assert.NoError(t, w.bindable(t, "tcp", "6", "8090"))
	assert.NoError(t, w.bindable(t, "udp", "4", "8090"))
	w.Host.Serve(t, "--tcp", "8090", "--listen", "198.51.100.1")

	// The other way round: the host's program was first.
	each(func(proto, family string) {
		port := map[string]string{"tcp4": "8100", "tcp6": "8101", "udp4": "8102", "udp6": "8103"}[proto+family]
		p := w.Host.Serve(t, "--"+proto, port, "--family", family)
		before := w.b.Belongings(t)
		_, err := w.b.CLI("run", "-d", "--name", "late", "--network", "blue", "-p", port+":80/"+proto, "--", "sleep", "1000")
		require.Error(t, err)
		assert.Contains(t, err.Error(), port)
		assert.Contains(t, err.Error(), proto)
		assert.Contains(t, err.Error(), "labtool", "the process's name")
		assert.Contains(t, err.Error(), strconv.Itoa(p.PID()), "and its ID")
		_, err = w.b.CLI("publish", "web", port+":80/"+proto)
		require.Error(t, err)
		assert.Contains(t, err.Error(), strconv.Itoa(p.PID()))
		assert.NotContains(t, w.b.MustCLI(t, "port", "web"), port, "not even for the other family")
		p.Kill()
		if s := w.b.Snapshot(t).Sandboxes; len(s) > 1 {
			w.b.MustCLI(t, "rm", "late") // as with Docker, "run -d" may leave what it has created
		}
		w.belongs(t, before)
		w.b.MustCLI(t, "publish", "web", port+":80/"+proto)
		assert.ErrorContains(t, w.bindable(t, proto, family, port), "address already in use")
		w.b.MustCLI(t, "unpublish", "web", port+":80/"+proto)
		assert.NoError(t, w.bindable(t, proto, family, port))
	})

	// Free when the sandbox has gone, whatever went through it, and not for long.
	w.Client.MustGet(t, at(lab.Host4, 8080))
	w.b.MustCLI(t, "rm", "-f", "web")
	each(func(proto, family string) { assert.NoError(t, w.bindable(t, proto, family, "8080")) })
	w.sandbox(t, "again", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.Client.MustGet(t, at(lab.Host4, 8080))
}

// Needs root. Ports are published and taken back on a running sandbox, and hold from when the command
// has returned.
func TestOwnPublishWhileRunning(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue", "-p", "8080:80")
	v4, v6 := w.b.Addrs(t, "web", "blue")
	peer := func(network string, to netip.Addr, port int) lab.Reply {
		r := w.Client.MustGet(t, "--network", network, at(to, port))
		assert.Contains(t, []netip.Addr{lab.Client4, lab.Client6}, clientSeen(t, r), "its own address is kept")
		return r
	}
	for i := range count(100) {
		port := 18000 + i
		spec := strconv.Itoa(port) + ":80"
		w.b.MustCLI(t, "publish", "web", spec, spec+"/udp")
		// The very first packet: no retry is needed.
		for _, network := range []string{"tcp", "udp"} {
			assert.Equal(t, at(v4, 80), peer(network, lab.Host4, port).View.Local)
			assert.Equal(t, at(v6, 80), peer(network, lab.Host6, port).View.Local)
		}
		w.Host.MustGet(t, at(lab.Host4, port))
		w.Host.MustGet(t, fmt.Sprintf("127.0.0.1:%d", port))
	}
	listed := w.b.MustCLI(t, "port", "web")
	assert.Contains(t, listed, "80/tcp -> 0.0.0.0:18000")
	assert.Contains(t, listed, "80/udp -> [::]:18000")
	assert.Contains(t, listed, "80/tcp -> 0.0.0.0:8080")

	// What goes through another port goes on.
	other := converse(t, w.Client, at(lab.Host4, 8080))
	w.b.MustCLI(t, "unpublish", "web", "18000:80")
	r, err := w.Client.Get("--timeout", noAnswer.String(), at(lab.Host4, 18000))
	require.Error(t, err)
	assert.True(t, isRefusedOrSilent(r), "%+v", r)
	other.say(t, "hello")
	assert.NotContains(t, w.b.MustCLI(t, "port", "web"), "80/tcp -> 0.0.0.0:18000")
	peer("udp", lab.Host4, 18000) // another port

	// One of the engine's choice; after a restart of the sandbox only those it was made with.
	w.b.MustCLI(t, "publish", "web", "80")
	w.b.MustCLI(t, "stop", "web")
	assert.Empty(t, w.b.Snapshot(t).Ports)
	w.b.MustCLI(t, "start", "web")
	// Its log tells of the first run too.
	lab.Eventually(t, 20*time.Second, "the restarted server answers", func() bool {
		_, err := w.Client.Get("--timeout", noAnswer.String(), at(lab.Host4, 8080))
		return err == nil
	})
	peer("tcp", lab.Host4, 8080)
}

// Needs root. Networks come to a running sandbox and leave it, without a packet's delay.
func TestOwnConnectWhileRunning(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue", "-p", "8080:80")
	w.sandbox(t, "far", "red")
	far := w.b.NS(t, "far")
	stay := converse(t, w.Client, at(lab.Host4, 8080))
	before := w.b.Belongings(t)
	for range count(50) {
		w.b.MustCLI(t, "network", "connect", "--alias", "shop", "red", "web")
		v4, v6 := w.b.Addrs(t, "web", "red")
		for _, a := range []netip.Addr{v4, v6} {
			far.MustGet(t, at(a, 80))
			far.MustGet(t, "--network", "udp", at(a, 80))
		}
		w.b.MustGet(t, "far", "shop:80")
		w.b.MustGet(t, "web", "far:80")
		stay.say(t, "hello")
		w.b.MustCLI(t, "network", "disconnect", "red", "web")
		require.Error(t, unansweredError(far, v4))
		assert.Equal(t, before, w.b.Belongings(t))
		stay.say(t, "hello again")
	}
}

// unansweredError is how an attempt to reach an address ended.
func unansweredError(from *lab.NS, a netip.Addr) error {
	_, err := from.Get("--timeout", noAnswer.String(), at(a, 80))
	return err
}

// Needs root. The default network can be removed, and is there again for who asks for none.
func TestOwnDefaultNetwork(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	w := &site{Lab: l, b: l.StartBpfnet(t, nil)}
	was := w.b.InspectNetwork(t, "bpfnet")
	require.Len(t, was.IPAM.Config, 2)
	assert.Equal(t, "172.17.0.0/16", was.IPAM.Config[0].Subnet, "alone on a host it has Docker's")
	v6 := netip.MustParsePrefix(was.IPAM.Config[1].Subnet)
	assert.True(t, netip.MustParsePrefix("fd00::/8").Contains(v6.Addr()) && v6.Bits() == 64, "%v: RFC 4193", v6)

	w.b.MustCLI(t, "run", "-d", "--name", "web", "--", "sleep", "1000")
	assert.Equal(t, 1, w.outcome(t, "network", "rm", "bpfnet").code, "it is in use")
	w.b.MustCLI(t, "rm", "-f", "web")
	w.b.MustCLI(t, "network", "rm", "bpfnet")
	assert.Empty(t, w.b.Belongings(t))
	w.b.MustCLI(t, "run", "--rm", "--", "true")
	assert.Equal(t, "172.17.0.0/16", w.b.InspectNetwork(t, "bpfnet").IPAM.Config[0].Subnet)
	w.b.MustCLI(t, "network", "rm", "bpfnet")
	w.b.Restart(t)
	assert.Equal(t, "172.17.0.0/16", w.b.InspectNetwork(t, "bpfnet").IPAM.Config[0].Subnet)
}
