// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/gopacket/gopacket"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// The options of Docker's bridge driver, as users set them: labels of Engine 29 on an old engine, and
// the same words for networks of bpfnet's own.

const bridgeOption, driverOption = "com.docker.network.bridge.", "com.docker.network."

var (
	directAccess = drop{"direct_access", "uplink"}
	isInternal   = drop{"internal", "container"}
	iccDisabled  = drop{"icc_disabled", "container"}
	notPublished = drop{"not_published", "uplink"}
)

// network makes a dual-stack network; number tells its subnets from others'.
func (w *world) network(t *testing.T, name string, number int, args ...string) {
	t.Helper()
	all := []string{"network", "create", "--subnet", fmt.Sprintf("10.99.%d.0/24", number), "--subnet", fmt.Sprintf("fd00:99:%d::/64", number), "-o", bridgeOption + "name=" + name + "0"}
	if w.engine.Default() == "bridge" {
		all = append(all, "--ipv6")
	}
	w.MustRun(t, append(append(all, args...), name)...)
}

// mode is the pair of labels that sets a gateway mode for both families.
func mode(m string) []string {
	return []string{"-o", bridgeOption + "gateway_mode_ipv4=" + m, "-o", bridgeOption + "gateway_mode_ipv6=" + m}
}

// shut requires that the protocols reach none of the addresses, each packet counted as that drop.
func (w *world) shut(t *testing.T, from *lab.NS, why drop, protocols []string, to ...netip.Addr) {
	t.Helper()
	delta := w.dropped(t, func() {
		var wait sync.WaitGroup
		for _, a := range to {
			for _, protocol := range protocols {
				wait.Go(func() {
					if err := unanswered(from, protocol, a); err != nil {
						t.Errorf("%s %s to %v: %v", from.Name, protocol, a, err)
					}
				})
			}
		}
		wait.Wait()
	})
	assert.Equal(t, map[drop]uint64{why: uint64(len(to) * len(protocols))}, delta, "drops of %s to %v", from.Name, to)
}

var withPorts = []string{"tcp", "udp"}

// onPorts has both of usualPort's protocols published on host ports of that number.
func onPorts(number int) string { return fmt.Sprintf("-p %d:80 -p %d:80/udp", number, number) }

// Needs root and a Docker Engine. Each gateway mode, from everywhere.
func TestOptionsModes(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	testModes(t, newWorld(t, l, dockerEngine{d}, l.StartBpfnet(t, d)))
}

// Needs root. The same for networks of bpfnet's own.
func TestOptionsModesEmbedded(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	b := l.StartBpfnet(t, nil)
	testModes(t, newWorld(t, l, embeddedEngine{b}, b))
}

func testModes(t *testing.T, w *world) {
	w.network(t, "routed", 1, mode("routed")...)
	w.network(t, "bare", 2, mode("nat-unprotected")...)
	w.network(t, "plain", 3, mode("nat")...)
	w.network(t, "alone", 4, append(mode("isolated"), "--internal")...)
	w.network(t, "mixed", 5, "-o", bridgeOption+"gateway_mode_ipv6=routed")
	for i, name := range []string{"routed", "bare", "plain", "alone", "mixed"} {
		w.Serve(t, fmt.Sprintf("--name %s-web --network %s %s", name, name, onPorts(8001+i)), "--tcp 80 --udp 80")
		w.Serve(t, fmt.Sprintf("--name %s-quiet --network %s", name, name), "--tcp 80 --udp 80")
		for _, c := range []string{"web", "quiet"} {
			w.ready(t, name+"-"+c, name)
		}
	}
	web := func(network string) []netip.Addr { return w.both(t, network+"-web", network) }
	quiet := func(network string) []netip.Addr { return w.both(t, network+"-quiet", network) }
	ns := func(container string) *lab.NS { return w.NS(t, container) }
	clients := []netip.Addr{lab.Client4, lab.Client6}
	hosts := []netip.Addr{lab.Host4, lab.Host6}
	onHost := func(t *testing.T, port int, to ...netip.Addr) {
		t.Helper()
		for _, a := range to {
			for _, network := range withPorts {
				r := w.Client.MustGet(t, "--network", network, at(a, port))
				assert.Contains(t, clients, remote(t, r))
			}
		}
	}
	noPort := func(t *testing.T, port int, to ...netip.Addr) {
		t.Helper()
		var wait sync.WaitGroup
		for _, a := range to {
			for _, network := range withPorts {
				wait.Go(func() {
					r, err := w.Client.Get("--network", network, "--timeout", noAnswer.String(), at(a, port))
					assert.Error(t, err, "%s %s port %d", network, a, port)
					assert.True(t, isRefusedOrSilent(r), "%+v", r)
				})
			}
		}
		wait.Wait()
	}

	w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	// One that finds its way in spite of having no gateway.
	ns("alone-web").MustRun(t, "ip", "route", "replace", "default", "via", "10.99.4.1")
	ns("alone-web").MustRun(t, "ip", "route", "replace", "default", "via", "fd00:99:4::1")
	t.Run("routed", func(t *testing.T) {
		open(t, w.Client, clients, web("routed")...)
		open(t, ns("plain-web"), web("plain"), web("routed")...)
		open(t, ns("bare-web"), web("bare"), web("routed")...)
		w.shut(t, w.Client, directAccess, withPorts, quiet("routed")...)
		w.shut(t, ns("plain-web"), isolated, withPorts, quiet("routed")...)
		for _, a := range quiet("routed") {
			assert.Len(t, ttls(w.Client, a, 1), 1, "ping of %s", a)
			assert.Len(t, ttls(ns("plain-web"), a, 1), 1, "ping of %s", a)
		}
		w.closed(t, ns("routed-web"), isolated, web("plain")...)
		w.shut(t, ns("alone-web"), isInternal, protocols, web("routed")...)
		noPort(t, 8001, hosts...)
		open(t, ns("routed-web"), web("routed"), lab.Client24, lab.Client26) // as itself
		open(t, w.Host, nil, web("routed")...)
	})
	t.Run("unprotected", func(t *testing.T) {
		for _, to := range [][]netip.Addr{web("bare"), quiet("bare")} {
			open(t, w.Client, clients, to...)
			open(t, ns("plain-web"), web("plain"), to...)
			open(t, ns("routed-web"), web("routed"), to...)
		}
		onHost(t, 8002, hosts...)
		open(t, ns("bare-web"), []netip.Addr{lab.HostB4, lab.HostB6}, lab.Client24, lab.Client26)
		w.closed(t, ns("bare-web"), isolated, quiet("plain")...)
	})
	t.Run("nat", func(t *testing.T) {
		w.closed(t, w.Client, directAccess, web("plain")...)
		w.closed(t, ns("bare-web"), isolated, web("plain")...)
		onHost(t, 8003, hosts...)
	})
	t.Run("isolated", func(t *testing.T) {
		open(t, ns("alone-web"), web("alone"), quiet("alone")...)
		w.closed(t, w.Client, directAccess, web("alone")...)
		w.closed(t, ns("plain-web"), drop{"internal", "container"}, web("alone")...)
		w.shut(t, w.Host, drop{"internal", "to_container"}, protocols, web("alone")...)
		gw4, gw6 := netip.MustParseAddr("10.99.4.1"), netip.MustParseAddr("fd00:99:4::1")
		w.Host.Serve(t, "--tcp", usualPort, "--udp", usualPort)
		open(t, w.Host, nil, gw4, gw6)
		w.closed(t, ns("alone-web"), isInternal, gw4, gw6, lab.Host4, lab.Host6)
		w.closed(t, ns("alone-web"), isInternal, lab.Client24, lab.Client26)
		noPort(t, 8004, hosts...)
	})
	t.Run("by family", func(t *testing.T) {
		to := web("mixed")
		w.closed(t, w.Client, directAccess, to[0])
		open(t, w.Client, clients, to[1])
		onHost(t, 8005, lab.Host4)
		noPort(t, 8005, lab.Host6)
		open(t, ns("mixed-web"), []netip.Addr{lab.HostB4, to[1]}, lab.Client24, lab.Client26)
	})
	t.Run("not the gateway", func(t *testing.T) {
		// moby's TestRoutedNonGateway: the default route is by the other network, ports are open all the same.
		w.Serve(t, "--name twice --network plain -p 8006:80 -p 8006:80/udp", "--tcp 80 --udp 80")
		w.MustRun(t, "network", "connect", "routed", "twice")
		w.ready(t, "twice", "routed")
		out := w.MustRun(t, "exec", "twice", "ip", "route", "show", "default")
		require.Contains(t, out, "10.99.3.1")
		to := w.both(t, "twice", "routed")
		open(t, w.Client, clients, to...)
		open(t, ns("routed-web"), web("routed"), to...)
		w.closed(t, w.Client, directAccess, w.both(t, "twice", "plain")...)
		onHost(t, 8006, hosts...)
	})
	require.Empty(t, w.snapshot(t).Problems)
}

// Needs root and a Docker Engine. Trusted devices, direct routing, marks set before and behind bpfnet,
// and an address to masquerade with: one host, three daemons after each other.
func TestOptionsDirect(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	b := l.StartBpfnet(t, d)
	w := newWorld(t, l, dockerEngine{d}, b)
	clients2 := []netip.Addr{lab.Client24, lab.Client26}
	clients := []netip.Addr{lab.Client4, lab.Client6}
	foreign4, foreign6 := netip.MustParseAddr("203.0.113.50"), netip.MustParseAddr("2001:db8:50::1")
	w.network(t, "plain", 1)
	w.network(t, "trusting", 2, "-o", bridgeOption+"trusted_host_interfaces="+lab.HostIf2+":plain0")
	w.network(t, "local", 3, "-o", driverOption+"host_ipv4="+lab.Host4.String(), "-o", driverOption+"host_ipv6="+lab.Host6.String())
	w.network(t, "foreign", 4, "-o", driverOption+"host_ipv4="+foreign4.String(), "-o", driverOption+"host_ipv6="+foreign6.String())
	w.network(t, "unmasked", 5, "-o", bridgeOption+"enable_ip_masquerade=false")
	for i, name := range []string{"plain", "trusting", "local", "foreign", "unmasked"} {
		w.Serve(t, fmt.Sprintf("--name %s --network %s %s", name, name, onPorts(8001+i)), "--tcp 80 --udp 80")
		w.ready(t, name, name)
	}
	w.Serve(t, "--name quiet --network trusting", "--tcp 80 --udp 80")
	w.ready(t, "quiet", "trusting")
	quiet := w.both(t, "quiet", "trusting")
	to := func(name string) []netip.Addr { return w.both(t, name, name) }
	openPorts := func(t *testing.T, from *lab.NS, seen []netip.Addr, addrs ...netip.Addr) {
		t.Helper()
		for _, a := range addrs {
			for _, network := range withPorts {
				r := from.MustGet(t, "--network", network, addrPort(a, usualPort))
				assert.Contains(t, seen, remote(t, r))
			}
		}
	}

	t.Run("trusted interface", func(t *testing.T) {
		openPorts(t, w.Client2, clients2, to("trusting")...)
		openPorts(t, w.NS(t, "plain"), to("plain"), to("trusting")...) // its bridge is trusted too
		w.shut(t, w.Client2, directAccess, []string{"icmp"}, to("trusting")...)
		w.closed(t, w.Client2, directAccess, quiet...)
		w.closed(t, w.Client, directAccess, to("trusting")...)
		w.closed(t, w.NS(t, "local"), isolated, to("trusting")...)
		w.closed(t, w.Client2, directAccess, to("plain")...)
	})
	t.Run("masquerade source", func(t *testing.T) {
		for _, a := range []netip.Prefix{netip.PrefixFrom(foreign4, 32), netip.PrefixFrom(foreign6, 128)} {
			via := lab.HostB4
			if a.Addr().Is6() {
				via = lab.HostB6
			}
			w.Client2.AddRoute(t, a, via)
		}
		w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
		open(t, w.NS(t, "local"), []netip.Addr{lab.Host4, lab.Host6}, clients2...)
		open(t, w.NS(t, "foreign"), []netip.Addr{foreign4, foreign6}, clients2...)
		open(t, w.NS(t, "plain"), []netip.Addr{lab.HostB4, lab.HostB6}, clients2...)
		open(t, w.NS(t, "unmasked"), to("unmasked"), clients2...)
		var told []string
		for _, p := range w.snapshot(t).Problems {
			told = append(told, p.Network+" "+p.Setting)
		}
		assert.Equal(t, []string{"docker/foreign " + driverOption + "host_ipv4", "docker/foreign " + driverOption + "host_ipv6"}, told)
	})

	b.Stop(t)
	b = l.StartBpfnet(t, d, "--allow-direct-routing")
	t.Run("direct routing", func(t *testing.T) {
		for _, name := range []string{"plain", "trusting"} {
			openPorts(t, w.Client, clients, to(name)...)
			openPorts(t, w.NS(t, "local"), to("local"), to(name)...)
		}
		w.shut(t, w.Client, directAccess, []string{"icmp"}, to("plain")...)
		w.closed(t, w.Client, directAccess, quiet...)
		w.closed(t, w.NS(t, "local"), isolated, quiet...)
	})
	b.Stop(t)
	l.StartBpfnet(t, d, "--bridge-accept-fwmark", "0x100/0xff00")
	t.Run("mark", func(t *testing.T) {
		behind := drop{"direct_access", "to_container"}
		// The host forwards what the daemon leaves to it: its own rules must let it pass.
		for _, tables := range []string{"iptables", "ip6tables"} {
			w.Host.MustRun(t, tables, "-I", "FORWARD", "-i", lab.HostIf, "-j", "ACCEPT")
		}
		w.closed(t, w.Client, behind, quiet...)
		for _, tables := range []string{"iptables", "ip6tables"} {
			w.Host.MustRun(t, tables, "-t", "mangle", "-A", "PREROUTING", "-i", lab.HostIf, "-j", "MARK", "--set-mark", "0x123")
		}
		open(t, w.Client, clients, quiet...)
		conv := converse(t, w.Client, at(quiet[0], 80))
		m := w.maps
		before := readCounters(t, m)
		conv.say(t, "what follows is the fast path's")
		assert.Zero(t, since(t, m, before)["fate stack/uplink"])
		for _, a := range quiet { // not marked: the FORWARD policy's
			for _, protocol := range protocols {
				assert.NoError(t, unanswered(w.Client2, protocol, a))
			}
		}
		for _, tables := range []string{"iptables", "ip6tables"} {
			w.Host.MustRun(t, tables, "-t", "mangle", "-F")
			w.Host.MustRun(t, tables, "-D", "FORWARD", "-i", lab.HostIf, "-j", "ACCEPT")
		}
		conv.say(t, "and stays so")
		// Another program sets it before us: no packet goes by the stack, whose FORWARD policy is DROP.
		markBefore(t, w.Host, lab.HostIf2, 0x100)
		before = readCounters(t, m)
		open(t, w.Client2, clients2, quiet...)
		open(t, w.Client2, clients2, to("plain")...)
		assert.Zero(t, since(t, m, before)["fate stack/uplink"])
	})
}

// markBefore has a program of somebody else's mark all that comes in by a device, before bpfnet sees it.
func markBefore(t *testing.T, n *lab.NS, ifname string, mark int32) {
	t.Helper()
	const markOffset = 8 // in struct __sk_buff
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.StoreImm(asm.R1, markOffset, int64(mark), asm.Word),
		asm.Mov.Imm(asm.R0, -1), // TCX_NEXT
		asm.Return(),
	}})
	require.NoError(t, err)
	t.Cleanup(func() { prog.Close() })
	index := n.Ifindex(t, ifname)
	require.NoError(t, n.Do(func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	}))
}

// Needs root and a Docker Engine. Links between containers that are kept apart, and the rest of what the
// default network cannot be told by an engine without iptables.
func TestOptionsLinks(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{ExtraArgs: []string{"--ipv6", "--fixed-cidr-v6", "fd00:d0c::/64"}})
	w := newWorld(t, l, dockerEngine{d}, l.StartBpfnet(t, d, "--default-bridge-no-icc", "--default-bridge-no-masquerade", "--default-bridge-ip", lab.HostB4.String()))
	w.Serve(t, "--name db --expose 80 --expose 80/udp", "--tcp 80,81 --udp 80")
	w.Serve(t, "--name web --link db:store -p 8080:80", "--tcp 80")
	w.Start(t, "--name other -p 0.0.0.0:8081:80", "sleep", "100000")
	for _, name := range []string{"db", "web", "other"} {
		w.ready(t, name, "bridge")
	}
	db, web := w.both(t, "db", "bridge"), w.both(t, "web", "bridge")
	// Over IPv4: Docker's links know no other.
	for _, network := range withPorts {
		r := w.NS(t, "web").MustGet(t, "--network", network, addrPort(db[0], usualPort))
		assert.Equal(t, web[0], remote(t, r))
	}
	delta := w.dropped(t, func() {
		_, err := w.NS(t, "web").Get("--timeout", noAnswer.String(), at(db[0], 81))
		require.Error(t, err, "not exposed")
	})
	assert.Equal(t, map[drop]uint64{iccDisabled: 1}, delta)
	w.closed(t, w.NS(t, "web"), iccDisabled, db[1])
	w.MustGet(t, "web", "store:80") // names are the Engine's own doing
	w.shut(t, w.NS(t, "web"), iccDisabled, []string{"icmp"}, db...)
	w.closed(t, w.NS(t, "db"), iccDisabled, web...)
	w.closed(t, w.NS(t, "other"), iccDisabled, db...)

	// The default host address is on one uplink; who asks for all has all.
	w.Client2.MustGet(t, at(lab.HostB4, 8080))
	for _, a := range []netip.Addr{lab.Host4, lab.Host6} {
		delta := w.dropped(t, func() {
			_, err := w.Client.Get("--timeout", noAnswer.String(), at(a, 8080))
			require.Error(t, err)
		})
		assert.Equal(t, map[drop]uint64{notPublished: 1}, delta, "%s", a)
	}
	var hosts []string
	for _, p := range w.snapshot(t).Ports {
		hosts = append(hosts, p.Host)
	}
	assert.Contains(t, hosts, "0.0.0.0:8081")
	assert.Contains(t, hosts, lab.HostB4.String()+":8080")
	assert.NotContains(t, hosts, "0.0.0.0:8080")

	// No masquerade: the answer finds its way by the lab's routes.
	w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	open(t, w.NS(t, "web"), web, lab.Client24)

	conv := converse(t, w.NS(t, "web"), at(db[0], 80))
	conv.say(t, "while it is linked")
	w.MustRun(t, "rm", "-f", "db")
	w.Serve(t, "--name db2 --expose 80", "--tcp 80 --udp 80") // it may have db's address
	w.ready(t, "db2", "bridge")
	w.closed(t, w.NS(t, "web"), iccDisabled, w.both(t, "db2", "bridge")...)
}

// Needs root and a Docker Engine. A network by the name of docker_gwbridge is one like any other: it
// masquerades, and keeps its containers apart.
func TestOptionsGwbridge(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	w := newWorld(t, l, dockerEngine{d}, l.StartBpfnet(t, d))
	w.MustRun(t, "network", "create", "--subnet", "10.99.9.0/24", "-o", bridgeOption+"name=docker_gwbridge",
		"-o", bridgeOption+"enable_icc=false", "-o", bridgeOption+"enable_ip_masquerade=true", "docker_gwbridge")
	w.MustRun(t, "network", "create", "--internal", "within")
	for i, name := range []string{"one", "two"} {
		w.Serve(t, fmt.Sprintf("--name %s --network docker_gwbridge %s", name, onPorts(8001+i)), "--tcp 80 --udp 80")
		w.MustRun(t, "network", "connect", "within", name)
		w.ready(t, name, "docker_gwbridge")
		w.ready(t, name, "within")
	}
	one, two := w.NS(t, "one"), w.v4(t, "two", "docker_gwbridge")
	w.closed(t, one, iccDisabled, two)
	open(t, one, nil, w.v4(t, "two", "within"))
	w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	open(t, one, []netip.Addr{lab.HostB4}, lab.Client24)
	assert.Equal(t, lab.Client4, remote(t, w.Client.MustGet(t, at(lab.Host4, 8002))))
	assert.Equal(t, w.v4(t, "one", "docker_gwbridge"), remote(t, one.MustGet(t, at(lab.Host4, 8002))), "published ports are for all")
	w.closed(t, w.Client, directAccess, w.v4(t, "one", "within"), two)
}

// Needs root and a Docker Engine. What is published on a loopback address is the host's alone: a
// neighbour's crafted packet to it ends at the uplink.
func TestOptionsLoopback(t *testing.T) {
	l := lab.New(t, lab.Opts{Sysctls: map[string]string{"net.ipv4.conf.all.route_localnet": "1"}})
	d := l.StartDocker(t, lab.DockerOpts{})
	w := newWorld(t, l, dockerEngine{d}, l.StartBpfnet(t, d))
	w.network(t, "blue", 1)
	w.Serve(t, "--name web --network blue -p 127.0.0.2:8080:80 -p 127.0.0.2:8080:80/udp -p [::1]:8080:80", "--tcp 80 --udp 80")
	w.Start(t, "--name neighbour --network blue", "sleep", "100000")
	w.ready(t, "web", "blue")
	w.ready(t, "neighbour", "blue")
	for _, a := range []string{"127.0.0.2:8080", "[::1]:8080"} {
		w.Host.MustGet(t, a)
	}
	// Not the neighbour's own search for duplicates of its address.
	inside := w.NS(t, "web").Capture(t, "eth0", func(p gopacket.Packet) bool { return p.TransportLayer() != nil })
	local4, local6 := netip.MustParseAddrPort("127.0.0.2:8080"), netip.MustParseAddrPort("[::1]:8080")
	up := packet.MAC(w.Client.MAC(t, lab.ClientIf), w.Host.MAC(t, lab.HostIf))
	from4, from6 := netip.AddrPortFrom(lab.Client4, 4000), netip.AddrPortFrom(lab.Client6, 4000)
	frames := [][]byte{packet.TCP(from4, local4, up), packet.UDP(from4, local4, up), packet.TCP(from6, local6, up)}
	before := len(inside.Frames())
	delta := w.dropped(t, func() {
		w.Client.SendFrames(t, lab.ClientIf, frames)
		lab.Eventually(t, 5*time.Second, "the packets are counted", func() bool {
			return w.drops(t)[drop{"loopback_address", "uplink"}] >= uint64(len(frames))
		})
	})
	assert.Equal(t, map[drop]uint64{{"loopback_address", "uplink"}: uint64(len(frames))}, delta)
	n := w.NS(t, "neighbour")
	own4, own6 := w.Addrs(t, "neighbour", "blue")
	bridge := packet.MAC(n.MAC(t, "eth0"), w.Host.MAC(t, "blue0"))
	delta = w.dropped(t, func() {
		n.SendFrames(t, "eth0", [][]byte{
			packet.TCP(netip.AddrPortFrom(own4, 4000), local4, bridge), packet.TCP(netip.AddrPortFrom(own6, 4000), local6, bridge),
		})
		lab.Eventually(t, 5*time.Second, "the packets are counted", func() bool {
			return w.drops(t)[drop{"loopback_address", "container"}] >= 2
		})
	})
	assert.Equal(t, map[drop]uint64{{"loopback_address", "container"}: 2}, delta)
	assert.Len(t, inside.Frames(), before, "nothing came through")
	w.Host.MustGet(t, "127.0.0.2:8080")
	lab.Eventually(t, 5*time.Second, "the capture sees what is allowed", func() bool { return len(inside.Frames()) > before })
}

// Needs root and a Docker Engine. Settings that cannot be served are told of once each, by network and
// label; what is left of them is never more open than asked for, and everything else works.
func TestOptionsBadInput(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	b := l.StartBpfnet(t, d)
	w := newWorld(t, l, dockerEngine{d}, b)
	gone := netip.MustParseAddr("192.0.2.77")
	w.Host.AddAddr(t, lab.HostIf, netip.PrefixFrom(gone, 32))
	w.network(t, "unknown", 1, "-o", bridgeOption+"gateway_mode_ipv4=wide-open")
	w.network(t, "lonely", 2, "-o", bridgeOption+"gateway_mode_ipv6=isolated")
	w.network(t, "both", 3, append(mode("routed"), "--internal")...)
	w.network(t, "device", 4, "-o", bridgeOption+"trusted_host_interfaces=up0:nosuch0")
	w.network(t, "source", 5, "-o", driverOption+"host_ipv4=203.0.113.99")
	w.network(t, "useless", 6, "-o", driverOption+"host_ipv6="+lab.Host6.String(), "-o", bridgeOption+"enable_ip_masquerade=false")
	w.network(t, "binding", 7, "-o", bridgeOption+"host_binding_ipv4="+gone.String())
	networks := []string{"unknown", "lonely", "both", "device", "source", "useless", "binding"}
	for i, name := range networks {
		w.Serve(t, fmt.Sprintf("--name %s --network %s %s", name, name, onPorts(8001+i)), "--tcp 80 --udp 80")
		w.ready(t, name, name)
	}
	w.Serve(t, fmt.Sprintf("--name address --network unknown -p %s:8020:80", gone), "--tcp 80 --udp 80")
	w.ready(t, "address", "unknown")
	w.Host.MustRun(t, "ip", "addr", "del", gone.String()+"/32", "dev", lab.HostIf)

	want := map[string]string{ // network and setting: what is said
		"docker/unknown " + bridgeOption + "gateway_mode_ipv4":      `"wide-open" is no gateway mode`,
		"docker/lonely " + bridgeOption + "gateway_mode_ipv6":       "isolated is for networks made with --internal",
		"docker/both " + bridgeOption + "gateway_mode_ipv4":         "routed contradicts --internal",
		"docker/both " + bridgeOption + "gateway_mode_ipv6":         "routed contradicts --internal",
		"docker/device " + bridgeOption + "trusted_host_interfaces": `no device "nosuch0"`,
		"docker/source " + driverOption + "host_ipv4":               "203.0.113.99 is no address of this host",
		"docker/useless " + driverOption + "host_ipv6":              "masquerading is off",
		"docker/binding " + bridgeOption + "host_binding_ipv4":      "192.0.2.77 is no address of this host",
		"docker/unknown port 192.0.2.77:8020->80/tcp of address":    "192.0.2.77 is no address of this host",
	}
	var status struct{ Problems []api.Problem }
	lab.Eventually(t, 10*time.Second, "all problems are told of", func() bool {
		require.NoError(t, json.Unmarshal([]byte(b.MustCLI(t, "status", "-o", "json")), &status))
		return len(status.Problems) == len(want)
	})
	table, log := b.MustCLI(t, "status"), b.Log()
	for _, p := range status.Problems {
		key := p.Network + " " + p.Setting
		require.Contains(t, want, key)
		assert.Contains(t, p.Problem, want[key])
		var inTable, inLog int
		for line := range strings.Lines(table) {
			if strings.HasPrefix(line, p.Setting+" ") && strings.Contains(line, " "+p.Network+" ") {
				inTable++
				assert.Contains(t, line, p.Problem+"; "+p.Instead)
			}
		}
		for line := range strings.Lines(log) {
			if strings.Contains(line, "network="+p.Network+" ") && strings.Contains(line, p.Setting) && strings.Contains(line, "level=WARN") {
				inLog++
			}
		}
		assert.Equal(t, 1, inTable, "%s in\n%s", key, table)
		assert.Equal(t, 1, inLog, "%s in the log", key)
	}

	for _, name := range networks {
		if name == "device" {
			continue // the other device that it names is there, and trusted
		}
		w.closed(t, w.Client, directAccess, w.both(t, name, name)...)
	}
	w.shut(t, w.Client, directAccess, []string{"icmp"}, w.both(t, "device", "device")...)
	for i, name := range networks {
		if name == "lonely" || name == "both" || name == "binding" {
			for _, a := range []netip.Addr{lab.Host4, lab.Host6} {
				_, err := w.Client.Get("--timeout", noAnswer.String(), at(a, 8001+i))
				require.Error(t, err, name)
			}
			continue
		}
		for _, a := range []netip.Addr{lab.Host4, lab.Host6} {
			w.Client.MustGet(t, at(a, 8001+i))
		}
	}
	w.Client2.Serve(t, "--tcp", usualPort, "--udp", usualPort)
	open(t, w.NS(t, "unknown"), []netip.Addr{lab.HostB4, lab.HostB6}, lab.Client24, lab.Client26)
	open(t, w.NS(t, "useless"), w.both(t, "useless", "useless"), lab.Client24, lab.Client26)

	// What is mended is told of no more.
	w.Host.AddAddr(t, lab.HostIf, netip.PrefixFrom(gone, 32))
	lab.Eventually(t, 10*time.Second, "the address is back", func() bool { return len(w.snapshot(t).Problems) == len(want)-2 })
	w.Client.MustGet(t, at(gone, 8020))
	w.Client.MustGet(t, at(gone, 8007))
}

// Needs root and a Docker Engine, which runs bpfnet in docker-proxy's place. A container starts also where
// its port is not to be on the host: the hook is told so, and the socket that it leaves is nobody's to reach.
func TestOptionsHook(t *testing.T) {
	w := newHookedSite(t, lab.Opts{}, "--default-bridge-ip", lab.Host4.String())
	w.d.MustRun(t, append(append([]string{"network", "create", "--ipv6", "--subnet", "fd00:99:1::/64"}, mode("routed")...), "routed")...)
	w.d.MustRun(t, "network", "create", "-o", bridgeOption+"gateway_mode_ipv4=isolated", "lonely") // not internal
	m := w.maps(t)
	for i, network := range []string{"routed", "lonely", "bridge"} {
		w.serve(t, "on-"+network, network, "-p", fmt.Sprintf("%d:80", 8001+i))
		w.ready(t, "on-"+network)
	}
	v4, v6 := w.d.Addrs(t, "on-routed", "routed")
	for _, to := range []netip.Addr{v4, v6} {
		assert.Contains(t, []netip.Addr{lab.Client4, lab.Client6}, clientSeen(t, w.Client.MustGet(t, at(to, 80))))
	}
	assert.Equal(t, lab.Client4, clientSeen(t, w.Client.MustGet(t, at(lab.Host4, 8003))))
	for _, to := range []string{at(lab.Host4, 8001), at(lab.Host6, 8001), at(lab.Host4, 8002), at(lab.HostB4, 8003)} {
		before := readCounters(t, m)
		_, err := w.Client.Get("--timeout", noAnswer.String(), to)
		require.Error(t, err, to)
		require.Equal(t, counters{"not_published/uplink": 1}, since(t, m, before).drops(), to)
	}
}
