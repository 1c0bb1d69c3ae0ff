// SPDX-License-Identifier: Apache-2.0

package doctor_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/doctor"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/loader"
)

func TestMain(m *testing.M) { lab.Main(m) }

// patient is a host that the doctor looks at.
type patient struct {
	*lab.Lab
	b *lab.Bpfnet
}

// look runs the doctor, and holds that the exit status says whether something is broken.
func (p patient) look(t *testing.T) []doctor.Finding {
	t.Helper()
	out, err := p.b.CLI("doctor", "-o", "json")
	var list []doctor.Finding
	require.NoError(t, json.Unmarshal([]byte(out), &list), "%v\n%s", err, out)
	require.Equal(t, doctor.AnyBroken(list), err != nil, "%v", err)
	return list
}

// amiss are the findings that are not ok.
func amiss(list []doctor.Finding) []doctor.Finding {
	var out []doctor.Finding
	for _, x := range list {
		if x.State != doctor.OK {
			out = append(out, x)
		}
	}
	return out
}

func (p patient) healthy(t *testing.T) {
	t.Helper()
	require.Empty(t, amiss(p.look(t)))
}

// sole wants exactly one finding, of this check.
func (p patient) sole(t *testing.T, check string, state doctor.State, words string) doctor.Finding {
	t.Helper()
	list := amiss(p.look(t))
	require.Len(t, list, 1, "%+v", list)
	require.Equal(t, check, list[0].Check, "%+v", list)
	assert.Equal(t, state, list[0].State, "%+v", list)
	assert.Contains(t, list[0].Detail, words)
	return list[0]
}

// mend runs the command that a finding names, in the host's namespace.
func (p patient) mend(t *testing.T, x doctor.Finding) {
	t.Helper()
	require.NotEmpty(t, x.Fix, "%+v", x)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, err := p.Host.Run(ctx, "sh", "-c", x.Fix)
	require.NoError(t, err)
}

// mendByDaemon runs a command that ends in a daemon in the foreground.
func (p patient) mendByDaemon(t *testing.T, x doctor.Finding) {
	t.Helper()
	require.NotEmpty(t, x.Fix, "%+v", x)
	proc := p.Host.Start(t, "sh", "-c", x.Fix)
	lab.Eventually(t, 20*time.Second, "the daemon serves again: "+x.Fix, func() bool {
		return strings.Contains(proc.Stdout()+proc.Stderr(), "Stopping the daemon")
	})
}

// attachTCX puts a program before all others on a device, which returns one of the values, and pins it.
func (p patient) attachTCX(t *testing.T, device, pin string, values ...int32) {
	t.Helper()
	ifindex := p.Host.Ifindex(t, device)
	require.NoError(t, p.Host.Do(func() error {
		insns := asm.Instructions{asm.Mov.Imm(asm.R0, values[0])}
		for _, v := range values[1:] {
			insns = append(insns, asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), asm.JNE.Imm(asm.R2, 77777, "end"), asm.Mov.Imm(asm.R0, v))
		}
		insns = append(insns, asm.Return().WithSymbol("end"))
		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "intruder", Type: ebpf.SchedCLS, License: "GPL", Instructions: insns})
		if err != nil {
			return err
		}
		defer prog.Close()
		k, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
		if err != nil {
			return err
		}
		defer k.Close()
		return k.Pin(pin)
	}))
}

// Needs root. Everything that the doctor finds is brought about, found, mended by the command that it
// prints, and gone. Before, between and after, the host is well and the doctor says nothing.
func TestDoctor(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	p := patient{l, l.StartBpfnet(t, d)}
	d.MustRun(t, "network", "create", "--ipv6", "--subnet", "fd00:5::/64", "--subnet", "172.31.0.0/24", "--gateway", "172.31.0.1",
		"-o", "com.docker.network.bridge.name=mine", "net1")
	d.Serve(t, "--name", "web", "--network", "net1", "-p", "8080:80")
	gateway := netip.MustParseAddr("172.31.0.1")
	serve := func(t *testing.T) { // what the doctor vouches for
		t.Helper()
		l.Client.MustGet(t, "192.0.2.1:8080")
		l.Host.MustGet(t, "192.0.2.1:8080")
		l.Host.MustGet(t, "--bind", "127.0.0.1:0", "127.0.0.1:8080")
	}
	serve(t)
	p.healthy(t)

	t.Run("what is fine", func(t *testing.T) {
		// FORWARD drops in the lab as it is.
		for _, x := range p.look(t) {
			if x.Check == "firewall" {
				assert.Contains(t, x.Detail, "which is fine")
			}
		}
		// Strict reverse path filtering does no harm, nor does a firewall that names ports.
		l.Host.Sysctl(t, "net.ipv4.conf.all.rp_filter", "1")
		defer l.Host.Sysctl(t, "net.ipv4.conf.all.rp_filter", "0")
		for _, rule := range []string{
			"add table inet ports", "add chain inet ports input { type filter hook input priority 10 ; policy drop ; }",
			"add rule inet ports input ct state established,related accept", "add rule inet ports input iif lo accept",
			"add rule inet ports input meta l4proto { icmp, ipv6-icmp } accept", "add rule inet ports input tcp dport { 22, 80 } accept",
		} {
			l.Host.MustRun(t, "nft", rule)
		}
		defer l.Host.MustRun(t, "nft", "delete table inet ports")
		serve(t)
		d.MustRun(t, "exec", "web", "ping", "-c1", "-W3", "203.0.113.1")
		p.healthy(t)
	})

	t.Run("a program before ours", func(t *testing.T) {
		pin := filepath.Join(l.BPFFS, "foreign")
		p.attachTCX(t, lab.HostIf, pin, 2)
		_, err := l.Client.Get("--timeout", "500ms", "192.0.2.1:8080")
		require.Error(t, err, "it is in the way")
		x := p.sole(t, "foreign", doctor.Broken, `"intruder"`)
		assert.Contains(t, x.Detail, "on up0 ingress runs before bpfnet's and drops all packets")
		p.mend(t, x)
		p.healthy(t)
		serve(t)

		p.attachTCX(t, lab.HostIf, pin, 0)
		p.mend(t, p.sole(t, "foreign", doctor.Broken, "keeps all packets from it"))
		p.attachTCX(t, lab.HostIf, pin, -1, 2)
		p.mend(t, p.sole(t, "foreign", doctor.Note, "can keep packets from it"))
		// One that only watches is nobody's trouble.
		p.attachTCX(t, lab.HostIf, pin, -1)
		p.healthy(t)
		require.NoError(t, os.Remove(pin))
	})

	t.Run("firewall", func(t *testing.T) {
		table := func(t *testing.T, hook string, rules ...string) {
			t.Helper()
			l.Host.MustRun(t, "nft", "add table inet fw")
			t.Cleanup(func() { l.Host.MustRun(t, "nft", "delete table inet fw") })
			l.Host.MustRun(t, "nft", fmt.Sprintf("add chain inet fw c { type filter hook %s priority 10 ; policy accept ; }", hook))
			for _, r := range rules {
				l.Host.MustRun(t, "nft", "add rule inet fw c "+r)
			}
		}
		t.Run("answers", func(t *testing.T) {
			table(t, "input", `iifname "mine" drop`)
			_, err := l.Host.Get("--timeout", "500ms", "192.0.2.1:8080")
			require.Error(t, err)
			x := p.sole(t, "firewall", doctor.Broken, "the host's own connections to containers get no answer: chain c of the nft table inet fw drops it")
			p.mend(t, x)
			p.healthy(t)
			serve(t)
		})
		t.Run("services of the host", func(t *testing.T) {
			table(t, "input", "ct state established accept", "iif lo accept", `ip saddr 172.16.0.0/12 drop`, "ip6 saddr fd00::/8 drop")
			l.Host.Serve(t, "--tcp", "99")
			_, err := d.Get("web", "--timeout", "500ms", gateway.String()+":99")
			require.Error(t, err)
			p.mend(t, p.sole(t, "firewall", doctor.Note, "containers cannot reach services of the host itself"))
			p.healthy(t)
			d.MustGet(t, "web", gateway.String()+":99")
		})
		t.Run("output", func(t *testing.T) {
			table(t, "output", `oifname { "br-*", "docker0", "mine" } reject`)
			_, err := l.Host.Get("--timeout", "500ms", "192.0.2.1:8080")
			require.Error(t, err)
			p.mend(t, p.sole(t, "firewall", doctor.Broken, "the host cannot reach containers"))
			p.healthy(t)
			serve(t)
		})
		t.Run("iptables", func(t *testing.T) {
			l.Host.MustRun(t, "iptables", "-A", "INPUT", "-s", "172.31.0.0/24", "-m", "comment", "--comment", "it's \"mine\"", "-j", "DROP")
			defer func() {
				l.Host.MustRun(t, "iptables", "-F", "INPUT")
			}()
			x := p.sole(t, "firewall", doctor.Broken, "chain INPUT of iptables drops it")
			p.mend(t, x)
			p.healthy(t)
			serve(t)
		})
		t.Run("ARP on the bridge", func(t *testing.T) {
			l.Host.MustRun(t, "nft", "add chain bridge lab arps { type filter hook forward priority 0 ; }")
			defer l.Host.MustRun(t, "nft", "delete chain bridge lab arps")
			l.Host.MustRun(t, "nft", "add rule bridge lab arps ether type arp drop")
			p.mend(t, p.sole(t, "firewall", doctor.Broken, "do not find each other's MACs: chain arps of the nft table bridge lab"))
			p.healthy(t)
		})
		t.Run("on a container's link", func(t *testing.T) {
			veth := p.port(t, "mine")
			l.Host.MustRun(t, "nft", "add table netdev fw")
			defer l.Host.MustRun(t, "nft", "delete table netdev fw")
			l.Host.MustRun(t, "nft", fmt.Sprintf("add chain netdev fw c { type filter hook ingress device %q priority 0 ; policy drop ; }", veth))
			p.mend(t, p.sole(t, "firewall", doctor.Broken, "a container does not find its neighbours' MACs: chain c of the nft table netdev fw (policy)"))
			p.healthy(t)
		})
	})

	t.Run("forwarding", func(t *testing.T) {
		l.Host.Sysctl(t, "net.ipv4.conf.mine.forwarding", "0")
		_, err := d.Get("web", "--timeout", "500ms", "203.0.113.1:80")
		require.Error(t, err)
		x := p.sole(t, "forwarding", doctor.Broken, "IPv4 forwarding is off on mine")
		p.mend(t, x)
		p.healthy(t)
		d.MustRun(t, "exec", "web", "ping", "-c1", "-W3", "203.0.113.1")
	})

	t.Run("reverse path of a container with two networks", func(t *testing.T) {
		d.MustRun(t, "network", "connect", "bridge", "web")
		defer d.MustRun(t, "network", "disconnect", "bridge", "web")
		lab.Eventually(t, 10*time.Second, "the daemon knows of both", func() bool { return len(p.b.Snapshot(t).Endpoints) == 2 })
		l.Host.Sysctl(t, "net.ipv4.conf.all.rp_filter", "1")
		defer l.Host.Sysctl(t, "net.ipv4.conf.all.rp_filter", "0")
		p.mend(t, p.sole(t, "rp_filter", doctor.Note, "strict on docker0, mine"))
		p.healthy(t)
	})

	t.Run("strays", func(t *testing.T) {
		l.Host.MustRun(t, "ip", "link", "add", "bpv-stray", "type", "veth", "peer", "name", "stray1")
		l.Host.MustRun(t, "ip", "link", "set", "bpv-stray", "alias", "bpfnet")
		p.mend(t, p.sole(t, "strays", doctor.Note, "bpv-stray was made by bpfnet"))
		p.healthy(t)

		// A program of another instance that is gone, on a device that nobody serves.
		other := filepath.Join(l.BPFFS, "other")
		l.Host.MustRun(t, "ip", "link", "add", "guest", "type", "veth", "peer", "name", "guest1")
		defer l.Host.MustRun(t, "ip", "link", "delete", "guest")
		ifindex := l.Host.Ifindex(t, "guest")
		require.NoError(t, l.Host.Do(func() error {
			o, err := loader.Load(loader.Options{Paths: loader.Paths{BPFFS: other}, Attach: "tcx", Flows: 1024})
			if err != nil {
				return err
			}
			defer o.Close()
			return o.Attach(loader.FromContainer, ifindex)
		}))
		x := p.sole(t, "strays", doctor.Broken, "from_container of bpfnet is left on guest")
		p.mend(t, x)
		p.healthy(t)
	})

	t.Run("ours is missing", func(t *testing.T) {
		p.detach(t, loader.FromUplink, lab.HostIf)
		x := p.sole(t, "attached", doctor.Broken, "from_uplink is missing on up0")
		p.mendByDaemon(t, x)
		p.healthy(t)
		serve(t)
	})

	// From here on the daemon under test is one that a printed command has started: it is found again
	// by its socket, and ended by its process ID.
	t.Run("without a daemon", func(t *testing.T) {
		p.endDaemon(t)
		p.sole(t, "daemon", doctor.Note, "the network runs on")
		serve(t)

		others := func(list []doctor.Finding) []doctor.Finding {
			var out []doctor.Finding
			for _, x := range amiss(list) {
				if x.Check != "daemon" {
					out = append(out, x)
				}
			}
			return out
		}
		for _, c := range []struct {
			sysctl, bad, check, words string
			state                     doctor.State
		}{
			{"net.ipv4.ip_forward", "0", "forwarding", "IPv4 forwarding is off: nothing leaves the containers", doctor.Broken},
			{"net.ipv4.conf.lo.route_localnet", "0", "loopback", "route_localnet is off on lo", doctor.Broken},
			{"net.bridge.bridge-nf-call-ip6tables", "1", "bridge netfilter", "on mine, containers do not find each other's MACs by IPv6", doctor.Broken},
			{"net.bridge.bridge-nf-call-iptables", "1", "bridge netfilter", "multicast and broadcast", doctor.Note},
			{"net.ipv4.ip_local_port_range", "20000 60999", "port range", "are the host's own", doctor.Note},
		} {
			before := l.Host.GetSysctl(t, c.sysctl)
			l.Host.Sysctl(t, c.sysctl, c.bad)
			list := others(p.look(t))
			require.Len(t, list, 1, "%s: %+v", c.sysctl, list)
			assert.Equal(t, c.check, list[0].Check)
			assert.Equal(t, c.state, list[0].State)
			assert.Contains(t, list[0].Detail, c.words)
			if c.check == "port range" {
				l.Host.Sysctl(t, c.sysctl, before) // the daemon mends it: below
				continue
			}
			p.mend(t, list[0])
			require.Empty(t, others(p.look(t)), c.sysctl)
		}
		serve(t)

		// A running daemon would set accept_ra, where it was the one to turn forwarding on.
		l.Host.Sysctl(t, "net.ipv6.conf.up0.accept_ra", "1")
		require.Empty(t, others(p.look(t)), "no route depends on it")
		l.Host.MustRun(t, "ip", "-6", "route", "add", "default", "via", "2001:db8:1::2", "dev", "up0", "metric", "2000", "proto", "ra")
		list := others(p.look(t))
		require.Len(t, list, 1, "%+v", list)
		assert.Equal(t, doctor.Broken, list[0].State)
		assert.Contains(t, list[0].Detail, "up0 forwards and therefore ignores router advertisements")
		p.mend(t, list[0])
		require.Empty(t, others(p.look(t)))

		// A container that starts now has no program on its link.
		d.MustRun(t, "run", "-d", "--name", "late", "--network", "net1", lab.Image, "sleep", "1000")
		list = others(p.look(t))
		require.Len(t, list, 1, "%+v", list)
		assert.Equal(t, doctor.Broken, list[0].State)
		assert.Contains(t, list[0].Detail, "no program on veth")
		// Docker's own socket is nowhere in what the daemon leaves behind: the command's default is the usual one.
		list[0].Fix += " --docker " + d.Host
		p.mendByDaemon(t, list[0])
		lab.Eventually(t, 10*time.Second, "the late container is served", func() bool { return len(amiss(p.look(t))) == 0 })
		d.MustRun(t, "rm", "-f", "late")
	})

	t.Run("a port that a host program took", func(t *testing.T) {
		d.Kill(t) // the container lives on, its reservation does not
		lab.Eventually(t, 10*time.Second, "the reservation is seen to be gone", func() bool {
			for _, x := range p.look(t) {
				if x.Check == "reservations" && x.State == doctor.Note {
					return strings.Contains(x.Detail, "0.0.0.0:8080/tcp")
				}
			}
			return false
		})
		l.Host.Serve(t, "--tcp", "8080")
		var found doctor.Finding
		for _, x := range p.look(t) {
			if x.Check == "reservations" {
				found = x
			}
		}
		require.Equal(t, doctor.Broken, found.State)
		assert.Contains(t, found.Detail, "labtool (process ")
		p.mend(t, found)
		for _, x := range p.look(t) {
			if x.Check == "reservations" {
				assert.Equal(t, doctor.Note, x.State)
			}
		}
	})
	p.endDaemon(t)
}

// Needs root. An Engine that ran with iptables is replaced by one without: what it left is found, told
// from what a running one uses, taken away by the printed command, and nothing of others with it.
func TestLeftovers(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	old := l.StartDocker(t, lab.DockerOpts{IPTables: true, Proxy: true})
	old.MustRun(t, "network", "create", "net1")
	old.Serve(t, "--name", "web", "--network", "net1", "-p", "8080:80", "-p", "127.0.0.1:8081:80")
	old.Serve(t, "--name", "plain", "-p", "9000:80")
	p := patient{l, l.StartBpfnet(t, old)}

	// It runs: its rules are its own.
	byCheck := func() map[string]doctor.Finding {
		out := make(map[string]doctor.Finding)
		for _, x := range p.look(t) {
			out[x.Check] = x
		}
		return out
	}
	found := byCheck()
	assert.Equal(t, doctor.OK, found["leftovers"].State, "%+v", found["leftovers"])
	assert.Equal(t, doctor.Note, found["engine"].State)
	assert.Contains(t, found["engine"].Detail, "runs with iptables on")
	assert.Equal(t, doctor.Note, found["docker-proxy"].State)
	assert.Equal(t, doctor.OK, found["firewall"].State, "%+v", found["firewall"])
	l.Client.MustGet(t, "192.0.2.1:8080")

	// It ends, and leaves its rules as an Engine does. So do the operator's own.
	old.MustRun(t, "rm", "-f", "plain")
	old.Kill(t)
	own := [][]string{
		{"-A", "INPUT", "-p", "tcp", "-m", "comment", "--comment", "it's mine", "--dport", "25", "-j", "DROP"},
		{"-t", "nat", "-A", "POSTROUTING", "-s", "10.9.0.0/16", "-o", "up1", "-j", "MASQUERADE"},
		{"-A", "FORWARD", "-i", "vm0", "-o", "up0", "-j", "ACCEPT"},
	}
	for _, rule := range own {
		l.Host.MustRun(t, "iptables", rule...)
	}
	l.Host.MustRun(t, "iptables", "-I", "DOCKER-USER", "-s", "10.8.0.0/16", "-j", "DROP")
	// A port that is not published any more, and the host's own server there.
	l.Host.MustRun(t, "iptables", "-t", "nat", "-A", "DOCKER", "!", "-i", "docker0", "-p", "tcp", "--dport", "9000", "-j", "DNAT", "--to-destination", "172.17.0.9:80")
	lab.Eventually(t, 10*time.Second, "the leftovers are seen", func() bool { return byCheck()["leftovers"].State == doctor.Note })
	server := l.Host.Serve(t, "--tcp", "9000")
	_, err := l.Client.Get("--timeout", "500ms", "192.0.2.1:9000")
	require.Error(t, err, "the old rule takes it")
	x := byCheck()["leftovers"]
	require.Equal(t, doctor.Broken, x.State, "%+v", x)
	assert.Contains(t, x.Detail, "they take 9000/tcp from the program of the host that listens there")
	assert.Contains(t, x.Detail, "DOCKER-USER has rules of your own")
	p.mend(t, x)
	require.Equal(t, doctor.OK, byCheck()["leftovers"].State)
	l.Client.MustGet(t, "192.0.2.1:9000")
	l.Client.MustGet(t, "192.0.2.1:8080")
	server.Stop(t)

	left := l.Host.MustRun(t, "iptables-save")
	for _, words := range []string{"it\\'s mine", "10.9.0.0/16", "-i vm0", ":FORWARD DROP", "-A DOCKER-USER -s 10.8.0.0/16"} {
		assert.Contains(t, left, words)
	}
	for _, line := range strings.Split(left, "\n") {
		assert.False(t, strings.Contains(line, "DOCKER") && !strings.Contains(line, "DOCKER-USER"), line)
		assert.NotContains(t, line, "172.1")
	}

	// The one that takes over leaves the rules alone.
	l.StartDocker(t, lab.DockerOpts{})
	found = byCheck()
	assert.Equal(t, doctor.OK, found["engine"].State, "%+v", found["engine"])
	assert.Equal(t, doctor.OK, found["leftovers"].State, "%+v", found["leftovers"])
}

// Needs root. What does not fit beside the others: filters of clsact, XDP, a full table, pins whose state
// is gone, tools that fail.
func TestOddities(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	p := patient{l, l.StartBpfnet(t, nil, "--docker", "off", "--attach", "clsact", "--flows", "64")}
	p.healthy(t)

	t.Run("filters", func(t *testing.T) {
		ifindex := l.Host.Ifindex(t, lab.HostIf)
		add := func(pref uint16, value int32) {
			require.NoError(t, l.Host.Do(func() error {
				prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
					Name: "sieve", Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, value), asm.Return()},
				})
				if err != nil {
					return err
				}
				defer prog.Close()
				h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
				if err != nil {
					return err
				}
				defer h.Close()
				return h.FilterAdd(&netlink.BpfFilter{
					FilterAttrs: netlink.FilterAttrs{
						LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: pref,
					},
					Fd: prog.FD(), Name: "sieve.o", DirectAction: true,
				})
			}))
		}
		add(7, 2)
		x := p.sole(t, "foreign", doctor.Broken, `the filter "sieve.o" of priority 7`)
		assert.Contains(t, x.Detail, "on up0 ingress runs before bpfnet's and drops all packets")
		p.mend(t, x)
		p.healthy(t)
		add(7, -1)
		p.healthy(t) // it lets all on
		add(9000, 2)
		p.healthy(t) // behind ours it is the operator's business
		for _, pref := range []string{"7", "9000"} {
			l.Host.MustRun(t, "tc", "filter", "del", "dev", "up0", "ingress", "pref", pref)
		}
	})

	t.Run("XDP", func(t *testing.T) {
		attach := func(flags link.XDPAttachFlags, pin string, value int32) {
			ifindex := l.Host.Ifindex(t, lab.HostIf)
			require.NoError(t, l.Host.Do(func() error {
				prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
					Name: "wall", Type: ebpf.XDP, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, value), asm.Return()},
				})
				if err != nil {
					return err
				}
				defer prog.Close()
				k, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: ifindex, Flags: flags})
				if err != nil {
					return err
				}
				defer k.Close()
				return k.Pin(pin)
			}))
		}
		pin := filepath.Join(l.BPFFS, "wall")
		attach(link.XDPGenericMode, pin, 1)
		p.mend(t, p.sole(t, "xdp", doctor.Broken, `the generic XDP program "wall"`))
		p.healthy(t)
		attach(link.XDPGenericMode, pin, 2)
		p.healthy(t) // it lets all pass
		require.NoError(t, os.Remove(pin))
	})

	t.Run("a held link", func(t *testing.T) {
		// Not pinned: a process holds it, this one.
		ifindex := l.Host.Ifindex(t, lab.HostIf)
		var k link.Link
		require.NoError(t, l.Host.Do(func() error {
			prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
				Name: "holder", Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
			})
			if err != nil {
				return err
			}
			defer prog.Close()
			k, err = link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: ebpf.AttachTCXIngress})
			return err
		}))
		x := p.sole(t, "foreign", doctor.Broken, fmt.Sprintf("of process %d (doctor.test)", os.Getpid()))
		assert.Equal(t, fmt.Sprintf("kill %d", os.Getpid()), x.Fix)
		require.NoError(t, k.Close())
		p.healthy(t)
	})

	t.Run("a full table", func(t *testing.T) {
		// The host's own echo requests take an entry each: by another address every time.
		l.Client2.MustRun(t, "ip", "route", "add", "local", "203.0.113.128/25", "dev", "lo")
		for i := range 110 {
			l.Host.MustRun(t, "ping", "-c1", "-W1", fmt.Sprintf("203.0.113.%d", 129+i))
		}
		list := amiss(p.look(t))
		require.Len(t, list, 1, "%+v", list)
		assert.Equal(t, "maps", list[0].Check)
		assert.Equal(t, doctor.Note, list[0].State)
		assert.Contains(t, list[0].Detail, "flows4 is 8")
		assert.Contains(t, list[0].Fix, "--flows 128")
		p.mendByDaemon(t, list[0])
		p.healthy(t)
	})

	t.Run("tools that fail", func(t *testing.T) {
		dir := filepath.Join(l.Dir, "tools")
		require.NoError(t, os.Mkdir(dir, 0o755))
		// One that hangs is given up.
		require.NoError(t, os.WriteFile(filepath.Join(dir, "nft"), []byte("#!/bin/sh\nexec /bin/sleep 300\n"), 0o755))
		for _, name := range []string{"iptables-save", "ip6tables-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
			require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho no such luck >&2\nexit 3\n"), 0o755))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		cmd := l.HostCommand(ctx, p.b.Binary(), "doctor", "-o", "json", "--state", p.b.State, "--socket", p.b.Socket, "--bpffs", l.BPFFS, "--cgroup", l.Cgroup)
		cmd.Env = append(os.Environ(), "PATH="+dir)
		out, err := cmd.Output()
		require.NoError(t, err, "what is unknown is not broken")
		var list []doctor.Finding
		require.NoError(t, json.Unmarshal(out, &list))
		list = amiss(list)
		require.Len(t, list, 2, "%+v", list)
		for i, check := range []string{"firewall", "leftovers"} {
			assert.Equal(t, check, list[i].Check)
			assert.Equal(t, doctor.Unknown, list[i].State)
			assert.Contains(t, list[i].Detail, "ip6tables-save: exit status 3: no such luck")
			assert.Contains(t, list[i].Detail, "nft: no answer within 5s")
		}
	})

	t.Run("pins without state", func(t *testing.T) {
		p.endDaemon(t)
		require.NoError(t, os.RemoveAll(p.b.State))
		list := amiss(p.look(t))
		require.Len(t, list, 3, "%+v", list)
		assert.Equal(t, "daemon", list[0].Check)
		assert.Equal(t, "state", list[1].Check)
		assert.Contains(t, list[1].Detail, "there is no state of the daemon that did so")
		assert.Equal(t, "strays", list[2].Check, "the default network's bridge")
		p.mend(t, list[1])
		p.mend(t, list[2])
		list = amiss(p.look(t))
		require.Len(t, list, 1, "%+v", list)
		assert.Equal(t, "daemon", list[0].Check, "it has never run")
	})

	t.Run("a damaged state file", func(t *testing.T) {
		require.NoError(t, os.MkdirAll(p.b.State, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(p.b.State, "state.db"), []byte("not a store"), 0o600))
		list := amiss(p.look(t))
		require.Len(t, list, 2, "%+v", list)
		assert.Equal(t, "state", list[1].Check)
		assert.Equal(t, doctor.Broken, list[1].State)
		p.mend(t, list[1])
		require.Len(t, amiss(p.look(t)), 1)
	})
}

// Needs root. A host with sandboxes of bpfnet's own is well, and so it is while they come and go, and
// with the daemon down apart from that.
func TestOwnSandboxes(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	p := patient{l, l.StartBpfnet(t, nil, "--docker", "off")}
	p.healthy(t)
	p.b.MustCLI(t, "network", "create", "--ipv6", "net1")
	p.b.Serve(t, "--name", "web", "--network", "net1", "-p", "8080:80", "-p", "8080:80/udp")
	p.healthy(t)
	l.Client.MustGet(t, "192.0.2.1:8080")

	done := make(chan error, 1)
	go func() {
		var errs []error
		for range 8 {
			_, err := p.b.CLI("run", "--rm", "--", "true")
			errs = append(errs, err)
		}
		done <- errors.Join(errs...)
	}()
	for running := true; running; {
		select {
		case err := <-done:
			require.NoError(t, err)
			running = false
		default:
			for _, x := range amiss(p.look(t)) {
				assert.NotEqual(t, doctor.Broken, x.State, "%+v", x)
				assert.Equal(t, "endpoints", x.Check, "%+v", x)
			}
		}
	}
	p.healthy(t)

	// The sandbox of a daemon that is down keeps its network; its ports are held by nobody.
	p.b.Kill()
	list := amiss(p.look(t))
	require.Len(t, list, 2, "%+v", list)
	assert.Equal(t, "daemon", list[0].Check)
	assert.Equal(t, "reservations", list[1].Check)
	assert.Equal(t, doctor.Note, list[1].State)
	l.Client.MustGet(t, "192.0.2.1:8080")
	p.mendByDaemon(t, list[0])
	p.healthy(t)
	p.b.MustCLI(t, "rm", "-f", "web")
	p.healthy(t)
	p.endDaemon(t)
}

// port names a port of a bridge.
func (p patient) port(t *testing.T, bridge string) string {
	t.Helper()
	out := p.Host.MustRun(t, "ip", "-o", "link", "show", "master", bridge)
	_, rest, _ := strings.Cut(out, ": ")
	name, _, _ := strings.Cut(rest, "@")
	require.NotEmpty(t, name)
	return name
}

// detach takes a link off its device behind the daemon's back.
func (p patient) detach(t *testing.T, program, device string) {
	t.Helper()
	path := filepath.Join(p.BPFFS, "links", fmt.Sprintf("%s-%d", program, p.Host.Ifindex(t, device)))
	k, err := link.LoadPinnedLink(path, nil)
	require.NoError(t, err)
	require.NoError(t, errors.Join(k.Detach(), k.Close()))
}

// endDaemon ends the daemon that listens on the lab's socket, if one does.
func (p patient) endDaemon(t *testing.T) {
	t.Helper()
	c, err := api.Dial(t.Context(), p.b.Socket)
	if errors.Is(err, api.ErrNotRunning) {
		return
	}
	require.NoError(t, err)
	st, err := c.Status(t.Context())
	require.NoError(t, err)
	require.NoError(t, syscall.Kill(st.PID, syscall.SIGTERM))
	lab.Eventually(t, 20*time.Second, "end of the daemon", func() bool {
		_, err := api.Dial(t.Context(), p.b.Socket)
		return errors.Is(err, api.ErrNotRunning)
	})
}
