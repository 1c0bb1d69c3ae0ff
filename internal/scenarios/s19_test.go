// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// s19: a container without a network, and veths that its operator adds by hand: on a bridge of his own
// nothing of ours is in the way; on Docker's, nobody knows who that is, until he says so.
func s19(t *testing.T, w *world) {
	w.Start(t, "--net=none --name lone", "sleep", "1000")
	w.Serve(t, "--name web", "--tcp 80 --udp 80")
	w.ready(t, "web", w.Default())
	lone, web := w.NS(t, "lone"), w.both(t, "web", w.Default())
	host := func(args ...string) { w.Host.MustRun(t, "ip", args...) }
	join := func(device, inside, bridge string, addrs ...string) {
		t.Helper()
		host("link", "add", device, "type", "veth", "peer", "name", inside, "netns", lone.Path)
		t.Cleanup(func() { host("link", "del", device) })
		lone.Sysctl(t, "net.ipv6.conf."+inside+".disable_ipv6", "0") // the Engine's default without a network
		for _, a := range addrs {
			lone.MustRun(t, "ip", "addr", "add", a, "dev", inside, "nodad")
		}
		host("link", "set", device, "master", bridge, "up")
		lone.MustRun(t, "ip", "link", "set", inside, "up")
	}

	// His own bridge.
	host("link", "add", "lan0", "type", "bridge")
	t.Cleanup(func() { host("link", "del", "lan0") })
	host("addr", "add", "203.0.113.65/28", "dev", "lan0")
	host("link", "set", "lan0", "up")
	join("hand0", "eth0", "lan0", "203.0.113.66/28")
	w.Host.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	lone.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	dropped := w.dropped(t, func() {
		for _, network := range []string{"tcp", "udp"} {
			lone.MustGet(t, "--network", network, "203.0.113.65:80")
			w.Host.MustGet(t, "--network", network, "203.0.113.66:80")
		}
	})
	assert.Empty(t, dropped)
	assert.NotContains(t, strings.Join(attachments(w.snapshot(t)), "\n"), "hand0")
	_, err := w.bpfnet.CLI("endpoint", "allow", "hand0", "203.0.113.66")
	require.ErrorContains(t, err, "is no port of a served network's bridge")

	// Docker's.
	join("hand1", "eth1", w.Bridge(), "172.17.0.200/16", "fd00:d0c::200/64")
	lone.MustRun(t, "ip", "route", "add", "default", "via", "172.17.0.1")
	lone.MustRun(t, "ip", "-6", "route", "add", "default", "via", "fd00:d0c::1")
	hand := []netip.Addr{netip.MustParseAddr("172.17.0.200"), netip.MustParseAddr("fd00:d0c::200")}
	w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	closed := func() {
		t.Helper()
		w.closed(t, lone, drop{"not_ready", "container"}, web...)
		w.closed(t, lone, drop{"not_ready", "container"}, lab.Client24, lab.Client26, lab.Host4)
		w.closed(t, w.NS(t, "web"), drop{"not_ready", "to_container"}, hand...)
		w.closed(t, w.Host, drop{"not_ready", "to_container"}, hand...)
	}
	closed()

	for _, bad := range []struct {
		args []string
		text string
	}{
		{[]string{"hand2", "172.17.0.200"}, `device "hand2": no such device`},
		{[]string{"hand1", "172.18.0.200"}, "is not in network bridge"},
		{[]string{"hand1", "172.17.0.1"}, "is the gateway of network bridge"},
		{[]string{"hand1", web[0].String()}, "is that of web"},
		{[]string{"hand1", "172.17.0.200", "172.17.0.201"}, "a second one of its family"},
		{[]string{"hand1", "172.17.0.200", "--mac", "nonsense"}, `mac "nonsense": want one like`},
	} {
		_, err := w.bpfnet.CLI(append([]string{"endpoint", "allow"}, bad.args...)...)
		require.ErrorContains(t, err, bad.text)
	}
	closed()

	w.bpfnet.MustCLI(t, "endpoint", "allow", "hand1", hand[0].String(), hand[1].String())
	t.Cleanup(func() { w.bpfnet.MustCLI(t, "endpoint", "disallow", "hand1") })
	served := func() {
		t.Helper()
		open(t, lone, hand, web...)
		open(t, w.NS(t, "web"), web, hand...)
		open(t, w.Host, nil, hand...)
		open(t, lone, []netip.Addr{lab.HostB4, lab.HostB6}, lab.Client24, lab.Client26)
	}
	served()
	w.bpfnet.Restart(t)
	served()
	// Its own addresses only.
	lone.MustRun(t, "ip", "addr", "add", "172.17.0.201/16", "dev", "eth1")
	spoofed := w.dropped(t, func() {
		_, err := lone.Get("--bind", "172.17.0.201:0", "--timeout", noAnswer.String(), addrPort(web[0], usualPort))
		assert.Error(t, err)
	})
	assert.Contains(t, spoofed, drop{"spoofed_address", "container"})
	w.bpfnet.MustCLI(t, "endpoint", "disallow", "hand1")
	closed()
}
