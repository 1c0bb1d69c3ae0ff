// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

var noon = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// well are the facts of a host that is well: one network, one container, one published port.
func well() *Facts {
	entry := func(program string) []Entry {
		return []Entry{{Program: loader.Program{Name: program, Ours: program, Link: 1}, Own: true}}
	}
	return &Facts{
		Now: noon, Version: "1.0", Command: "bpfnet", Failed: map[string]error{},
		Release: "6.18", Memcg: true, BPFFS: "/sys/fs/bpf/bpfnet", BPFFSNearest: "/sys/fs/bpf", BPFFSMounted: true,
		Cgroup: "/sys/fs/cgroup", IPv6: true,
		Daemon: Daemon{Running: true, Status: api.Status{Version: "1.0", PID: 7}, Args: []string{"/usr/bin/bpfnet", "daemon", "--uplink", "eth0"}},
		Snapshot: &api.Snapshot{
			PID: 7, Written: noon.Add(-time.Second), Attach: "tcx",
			Networks:  []api.Network{{Name: "bridge", Source: "docker", Bridge: "docker0", Subnets: []string{"172.17.0.0/16"}}},
			Endpoints: []api.Endpoint{{Name: "web", Network: "bridge", SandboxID: "s", Addresses: []string{"172.17.0.2"}, Link: "veth0", Ready: true}},
			Ports:     []api.Port{{Proto: "tcp", Host: "0.0.0.0:8080", Container: "web"}},
			Attachments: []api.Attachment{
				{Program: loader.FromUplink, Device: "eth0", Hook: "ingress"}, {Program: loader.ToUplink, Device: "eth0", Hook: "egress"},
				{Program: loader.FromContainer, Device: "veth0", Hook: "ingress"}, {Program: "sock_connect4", Device: "/sys/fs/cgroup", Hook: "cgroup"},
			},
			Sources: []api.Source{{Name: "docker", Connected: true}},
		},
		Devices: []netdev.Device{
			{Ifindex: 2, Name: "eth0", MTU: 1500}, {Ifindex: 3, Name: "docker0", Kind: "bridge", MTU: 1500}, {Ifindex: 4, Name: "veth0", Master: "docker0", MTU: 1500},
		},
		Told: []string{"eth0"}, PeerMTU: map[int]int{4: 1500}, Routes4: []string{"eth0"},
		Seen: policy.Devices{
			Bridges: []policy.Bridge{{Ifindex: 3, Name: "docker0", Addrs: []netip.Prefix{netip.MustParsePrefix("172.17.0.1/16")}}},
			Links:   []policy.Link{{Ifindex: 4, Name: "veth0", Bridge: "docker0"}},
			Uplinks: []policy.Uplink{{Ifindex: 2, Name: "eth0", MTU: 1500, Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}}},
		},
		Hooks: map[HookKey][]Entry{
			{2, false}: entry(loader.FromUplink), {2, true}: entry(loader.ToUplink), {4, false}: entry(loader.FromContainer),
		},
		CgroupPrograms: []string{"sock_connect4"},
		Sysctls: map[string]string{
			"net/ipv4/ip_forward": "1", "net/ipv4/conf/docker0/forwarding": "1",
			"net/ipv4/conf/all/route_localnet": "0", "net/ipv4/conf/lo/route_localnet": "1",
			"net/ipv4/conf/all/accept_local": "0", "net/ipv4/conf/lo/accept_local": "1",
			"net/ipv4/conf/all/rp_filter": "1", // strict, and no trouble
		},
		Local: netdev.PortRange{First: 32768, Last: 60999}, SNAT: []netdev.PortRange{{First: 1024, Last: 32767}},
		Rules:   Ruleset{Read: true, Chains: ParseIPTables("iptables", "ip", "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\nCOMMIT\n")},
		Sockets: []Socket{{Proto: policy.TCP, Addr: netip.MustParseAddrPort("[::]:8080"), Process: Process{9, "dockerd"}}},
	}
}

func bad(list []Finding) []Finding {
	var out []Finding
	for _, x := range list {
		if x.State != OK {
			out = append(out, x)
		}
	}
	return out
}

const restart = "kill 7 && tail --pid=7 -f /dev/null && /usr/bin/bpfnet daemon --uplink eth0"

func TestJudge(t *testing.T) {
	require.Empty(t, bad(Judge(well())))
	require.False(t, AnyBroken(Judge(well())))
	watch := func(values ...int32) Entry {
		return Entry{Program: loader.Program{ID: 5, Name: "spy", Link: 9, Returns: loader.Returns{Values: values}}}
	}
	before := func(f *Facts, ifindex int, egress bool, e Entry) {
		k := HookKey{ifindex, egress}
		f.Hooks[k] = append([]Entry{e}, f.Hooks[k]...)
		f.LinkPins = map[uint32]string{9: "/sys/fs/bpf/spy"}
	}
	down := func(f *Facts) {
		f.Daemon = Daemon{}
	}
	for _, tc := range []struct {
		name   string
		change func(*Facts)
		check  string
		state  State
		words  string
		fix    string
	}{
		{"the kernel refuses", func(f *Facts) { f.LoadErr = errors.New("load programs: no\nway") }, "kernel", Broken, "refuses the programs: load programs: no; way", ""},
		{"a feature is missing", func(f *Facts) {
			f.Features = []loader.Feature{{Name: "BPF timers", Since: "5.15", Err: errors.New("no")}}
		}, "kernel", Broken, "BPF timers (since Linux 5.15)", ""},
		{"no bpffs, where the daemon mounts it", func(f *Facts) { f.BPFFSMounted = false }, "bpffs", Note, "the daemon mounts it", "mount -t bpf bpf /sys/fs/bpf"},
		{"no bpffs elsewhere", func(f *Facts) { f.BPFFSMounted, f.BPFFS, f.BPFFSNearest = false, "/mnt/x/y", "/mnt/x" }, "bpffs", Broken, "is in no bpffs", "mount -t bpf bpf /mnt/x"},
		{"no cgroup2", func(f *Facts) { f.CgroupErr = errors.New("cgroup2 is not mounted") }, "cgroup", Broken, "not mounted", "mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"},
		{"no SOCK_DESTROY", func(f *Facts) { f.DestroyErr = netdev.ErrNoDestroy }, "kernel", Note, "CONFIG_INET_DIAG_DESTROY", "modprobe -a tcp_diag udp_diag"},
		{"a small memlock limit", func(f *Facts) { f.Memcg, f.Memlock = false, 64<<10 }, "memlock", Note, "64 KiB", "ulimit -l unlimited"},
		{"IPv6 wanted and not there", func(f *Facts) {
			f.IPv6, f.Snapshot.Networks[0].Subnets = false, []string{"fd00::/64"}
		}, "ipv6", Broken, "fd00::/64", ""},
		{"daemon down", down, "daemon", Note, "not running, last news 1s ago", "bpfnet daemon"},
		{"daemon down, and a unit", func(f *Facts) { f.Daemon = Daemon{Unit: "bpfnet.service"} }, "daemon", Note, "not running", "systemctl start bpfnet.service"},
		{"stopped by a signal", func(f *Facts) { f.Daemon = Daemon{Stopped: 7} }, "daemon", Broken, "process 7 is stopped", "kill -CONT 7"},
		{"a network made without a daemon", func(f *Facts) {
			down(f)
			f.Seen.Bridges = append(f.Seen.Bridges, policy.Bridge{Ifindex: 9, Name: "br-0123456789ab"})
		}, "unguarded", Broken, "br-0123456789ab is guarded by nothing", "bpfnet daemon"},
		{"a network that only the Engine knows", func(f *Facts) {
			f.Seen.Bridges, f.EngineBridges = append(f.Seen.Bridges, policy.Bridge{Ifindex: 9, Name: "lan"}), []string{"lan"}
		}, "unguarded", Broken, "lan is guarded by nothing", restart},
		{"of another version", func(f *Facts) { f.Daemon.Status.Version = "0.9" }, "daemon", Note, "version 0.9 runs, this is 1.0", restart},
		{"of another version, in a unit", func(f *Facts) { f.Daemon.Status.Version, f.Daemon.Unit = "0.9", "bpfnet.service" }, "daemon", Note, "0.9", "systemctl restart bpfnet.service"},
		{"another's state", func(f *Facts) { f.Snapshot.PID = 8 }, "daemon", Note, "do --socket and --state belong together?", ""},
		{"it hangs", func(f *Facts) { f.Snapshot.Written = noon.Add(-time.Hour) }, "daemon", Note, "nothing new for 1h0m0s", restart},
		{"the Engine is gone", func(f *Facts) { f.Snapshot.Sources[0] = api.Source{Name: "docker", Detail: "refused"} }, "daemon", Note, "refused", "systemctl start docker"},
		{"a socket that nobody understands", func(f *Facts) { down(f); f.Daemon.Err = errors.New("not a bpfnet daemon") }, "daemon", Unknown, "not a bpfnet", ""},
		{"a snapshot that cannot be read", func(f *Facts) { f.SnapshotErr = errors.New("read snapshot: bad") }, "state", Note, "read snapshot: bad", restart},
		{"an endpoint that waits", func(f *Facts) {
			f.Snapshot.Endpoints[0].Ready, f.Snapshot.Endpoints[0].Why = false, "no link"
		}, "endpoints", Note, "web in bridge (no link)", "bpfnet status"},
		{"a table that fills up", func(f *Facts) { f.Fill = []maps.Fill{{Map: "flows6", Entries: 85, Max: 100}} }, "maps", Note, "85 % full", restart + " --flows 200"},
		{"what gives way when it is full", func(f *Facts) { f.Fill = []maps.Fill{{Map: "syns4", Entries: 100, Max: 100}} }, "maps", Note, "the newest push out the oldest", ""},
		{"a full table", func(f *Facts) { f.Fill = []maps.Fill{{Map: "ports", Entries: 100, Max: 100}} }, "maps", Broken, "ports is 100 % full", ""},
		{"ours is missing", func(f *Facts) { delete(f.Hooks, HookKey{2, true}) }, "attached", Broken, "to_uplink is missing on eth0", restart},
		{"ours is missing on the cgroup", func(f *Facts) { f.CgroupPrograms = nil }, "attached", Broken, "sock_connect4 is missing on /sys/fs/cgroup", restart},
		{"a link without a program", func(f *Facts) {
			f.Devices = append(f.Devices, netdev.Device{Ifindex: 5, Name: "veth1"})
			f.Seen.Links = append(f.Seen.Links, policy.Link{Ifindex: 5, Name: "veth1", Bridge: "docker0"})
		}, "attached", Broken, "no program on veth1 of docker0", restart},
		{"not pinned", func(f *Facts) { f.Hooks[HookKey{2, false}][0].Own = false }, "attached", Note, "not pinned: from_uplink on eth0", restart},
		{"a stray guard", func(f *Facts) {
			f.Hooks[HookKey{3, false}] = []Entry{{Program: loader.Program{Ours: loader.FromContainer, Link: 4}}}
		}, "strays", Broken, "left on docker0", "bpftool link detach id 4"},
		{"a stray by its pin", func(f *Facts) {
			f.Hooks[HookKey{3, true}] = []Entry{{Program: loader.Program{Ours: loader.ToUplink, Link: 4}}}
			f.LinkPins = map[uint32]string{4: "/sys/fs/bpf/old one"}
		}, "strays", Note, "to_uplink of bpfnet is left on docker0", "rm '/sys/fs/bpf/old one'"},
		{"a stray filter", func(f *Facts) {
			f.Hooks[HookKey{3, true}] = []Entry{{Program: loader.Program{Ours: loader.ToUplink}, Filter: &netdev.Filter{Pref: 2975, Handle: 0xb9f, Kind: "bpf"}}}
		}, "strays", Note, "left on docker0", "tc filter del dev docker0 egress pref 2975 handle 0xb9f bpf"},
		{"a stray device", func(f *Facts) { f.Devices[0].Alias = netdev.Alias }, "strays", Note, "eth0 was made by bpfnet", "ip link delete eth0"},
		{"a foreign program that drops", func(f *Facts) { before(f, 2, false, watch(2)) }, "foreign", Broken, `"spy" (id 5, pinned at /sys/fs/bpf/spy) on eth0 ingress runs before bpfnet's and drops all`, "rm /sys/fs/bpf/spy"},
		{"one that passes all on to the stack", func(f *Facts) { before(f, 4, false, watch(0, 7)) }, "foreign", Broken, "keeps all packets from it", "rm /sys/fs/bpf/spy"},
		{"one that drops some", func(f *Facts) { before(f, 2, false, watch(-1, 2)) }, "foreign", Note, "can keep packets from it", "rm /sys/fs/bpf/spy"},
		{"one that passes all at the way out", func(f *Facts) { before(f, 2, true, watch(0)) }, "foreign", Note, "errors about translated packets", "rm /sys/fs/bpf/spy"},
		{"a filter of another kind", func(f *Facts) {
			before(f, 2, false, Entry{Filter: &netdev.Filter{Pref: 1, Handle: 0x800, Kind: "u32"}})
		}, "foreign", Note, "the u32 filter of priority 1", "tc filter del dev eth0 ingress pref 1 handle 0x800 u32"},
		{"a filter for all that drops", func(f *Facts) {
			before(f, 2, false, Entry{Filter: &netdev.Filter{Pref: 1, Handle: 1, Kind: "matchall", Drops: true}})
		}, "foreign", Broken, "drops all packets", "tc filter del dev eth0 ingress pref 1 handle 0x1 matchall"},
		{"an uplink left out", func(f *Facts) { f.LeftOut = []policy.Uplink{{Name: "wg0"}, {Name: "wg1"}} },
			"uplinks", Note, "wg0, wg1: an address, but left out by --uplink", restart + " --uplink wg0 --uplink wg1"},
		{"the only way out left out", func(f *Facts) { f.LeftOut, f.Routes4 = []policy.Uplink{{Name: "wg0"}}, []string{"wg0"} },
			"uplinks", Broken, "wg0 has the default route, but --uplink leaves it out", restart + " --uplink wg0"},
		{"the only way out for IPv6 left out", func(f *Facts) {
			f.LeftOut, f.Routes6 = []policy.Uplink{{Name: "wg0"}}, []netdev.DefaultRoute6{{Device: "wg0"}}
		}, "uplinks", Broken, "wg0 has the default route", restart + " --uplink wg0"},
		{"one of two ways out left out, by the configuration", func(f *Facts) {
			f.LeftOut, f.Routes4, f.Daemon.Args = []policy.Uplink{{Name: "wg0"}}, []string{"wg0", "eth0"}, []string{"bpfnet", "daemon"}
		}, "uplinks", Note, "wg0: an address", "kill 7 && tail --pid=7 -f /dev/null && bpfnet daemon --uplink eth0 --uplink wg0"},
		{"a narrow way to a container", func(f *Facts) { f.Devices[2].MTU = 1400 }, "mtu", Broken,
			"veth0, the way of web to docker0, carries packets of 1400 bytes, others there 1500", "ip link set dev veth0 mtu 1500"},
		{"a narrow container", func(f *Facts) { f.PeerMTU[4], f.Snapshot.Endpoints[0].Source = 1400, "docker" }, "mtu", Broken,
			"the interface of web behind veth0 takes packets of 1400 bytes, others at docker0 send 1500", "docker restart web"},
		{"a container narrower than its neighbour", func(f *Facts) {
			f.Devices = append(f.Devices, netdev.Device{Ifindex: 5, Name: "veth1", Master: "docker0", MTU: 1300})
			f.Seen.Links = append(f.Seen.Links, policy.Link{Ifindex: 5, Name: "veth1", Bridge: "docker0"})
			f.Hooks[HookKey{5, false}], f.PeerMTU[5] = f.Hooks[HookKey{4, false}], 1300
			f.Snapshot.Attachments = append(f.Snapshot.Attachments, api.Attachment{Program: loader.FromContainer, Device: "veth1", Hook: "ingress"})
		}, "mtu", Broken, "veth1, the way of what is connected there to docker0, carries packets of 1300 bytes, others there 1500", "ip link set dev veth1 mtu 1500"},
		{"a bridge wider than its ports", func(f *Facts) { f.Devices[1].MTU = 9000 }, "mtu", Broken,
			"docker0 takes packets of 9000 bytes from the host, but no container there more than 1500", "ip link set dev docker0 mtu 1500"},
		{"a narrow uplink", func(f *Facts) { f.Seen.Uplinks[0].MTU = 1400 }, "mtu", Note,
			"eth0 carries packets of 1400 bytes, containers of bridge send up to 1500: those are told so by ICMP", ""},
		{"XDP that may drop", func(f *Facts) {
			f.Devices[0].XDP, f.XDP = 6, map[uint32]loader.Program{6: {Name: "shield", Returns: loader.Returns{Values: []int32{1, 2}}}}
		}, "xdp", Note, `"shield" (id 6) on eth0 sees packets first`, "ip link set dev eth0 xdp off"},
		{"generic XDP that drops", func(f *Facts) {
			f.Devices[0].XDP, f.Devices[0].Generic = 6, true
			f.XDP = map[uint32]loader.Program{6: {Name: "wall", Returns: loader.Returns{Values: []int32{1}}}}
		}, "xdp", Broken, "lets no packet pass", "ip link set dev eth0 xdpgeneric off"},
		{"forwarding is off", func(f *Facts) {
			f.Sysctls["net/ipv4/ip_forward"], f.Sysctls["net/ipv4/conf/docker0/forwarding"] = "0", "0"
		}, "forwarding", Broken, "IPv4 forwarding is off: nothing leaves the containers of docker0", "sysctl -w net/ipv4/ip_forward=1"},
		{"forwarding is off on one", func(f *Facts) { f.Sysctls["net/ipv4/conf/docker0/forwarding"] = "0" }, "forwarding", Broken, "off on docker0", "sysctl -w net/ipv4/conf/docker0/forwarding=1"},
		{"advertisements are not heard", func(f *Facts) {
			f.Routes6 = []netdev.DefaultRoute6{{Device: "eth0", Advertised: true}}
			f.Sysctls["net/ipv6/conf/eth0/accept_ra"], f.Sysctls["net/ipv6/conf/eth0/forwarding"] = "1", "1"
		}, "accept_ra", Broken, "eth0 forwards", "sysctl -w net/ipv6/conf/eth0/accept_ra=2"},
		{"lo takes no answers", func(f *Facts) { f.Sysctls["net/ipv4/conf/lo/accept_local"] = "0" }, "loopback", Broken, "accept_local is off", "sysctl -w net/ipv4/conf/lo/accept_local=1"},
		{"the host's ports", func(f *Facts) { f.Local.First = 30000 }, "port range", Note, "2768 of the ports", restart},
		{"few ports", func(f *Facts) { f.SNAT[0].First = 30000 }, "port range", Note, "2768 ports to masquerade with: few", "sysctl -w 'net/ipv4/ip_local_port_range=32768 60999'"},
		{"no tool", func(f *Facts) { f.Rules = Ruleset{Why: "neither nft nor iptables-save"} }, "firewall", Unknown, "neither", ""},
		{"what failed", func(f *Facts) { f.Failed["xdp"] = errors.New("no luck") }, "xdp", Unknown, "no luck", ""},
		{"an Engine with iptables", func(f *Facts) {
			f.Engines = []Engine{{PID: 3, Args: []string{"dockerd", "-H", "fd://"}, ConfigPath: "/etc/docker/daemon.json", Config: []byte(`{"mtu": 1400}`)}}
		}, "engine", Note, "dockerd (process 3) runs with iptables on", `echo '{"ip6tables":false,"iptables":false,"mtu":1400}' >/etc/docker/daemon.json && systemctl restart docker`},
		{"an Engine with iptables by its command line", func(f *Facts) {
			f.Engines = []Engine{{PID: 3, Args: []string{"dockerd", "--iptables=true", "--mtu=9"}}}
		}, "engine", Note, "iptables on", "kill 3 && tail --pid=3 -f /dev/null && dockerd --mtu=9 --iptables=false --ip6tables=false"},
		{"proxies", func(f *Facts) {
			f.Proxies = []Process{{PID: 4}, {PID: 5}}
			f.Engines = []Engine{{Args: []string{"dockerd"}, ConfigPath: "/c", Config: []byte(`{"iptables":false}`)}}
		}, "docker-proxy", Note, "processes: 2", `echo '{"iptables":false,"userland-proxy":false}' >/c && systemctl restart docker`},
		{"a port that is not held", func(f *Facts) { f.Sockets = nil }, "reservations", Note, "0.0.0.0:8080/tcp", ""},
		{"sockets that cannot be asked for", func(f *Facts) { f.Sockets, f.SocketsErr = nil, errors.New("not permitted") }, "reservations", Unknown, "not permitted", ""},
		{"a node of a swarm", func(f *Facts) {
			f.Sockets = append(f.Sockets, Socket{Proto: policy.TCP, Addr: netip.MustParseAddrPort("[::]:7946"), Process: Process{3, "dockerd"}})
		}, "swarm", Note, "mode=ingress, the default, and overlay networks are not", ""},
		{"a port of another's", func(f *Facts) { f.Sockets[0].Process = Process{12, "nginx"} }, "reservations", Broken, "nginx (process 12) listens on [::]:8080/tcp", "kill 12"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := well()
			tc.change(f)
			var found []Finding
			for _, x := range bad(Judge(f)) {
				if x.Check == tc.check {
					found = append(found, x)
				} else {
					assert.Contains(t, []string{"daemon", "leftovers"}, x.Check, "%+v", x)
				}
			}
			require.Len(t, found, 1)
			assert.Equal(t, tc.state, found[0].State)
			assert.Contains(t, found[0].Detail, tc.words)
			assert.Equal(t, tc.fix, found[0].Fix)
			assert.Equal(t, tc.state == Broken, AnyBroken(Judge(f)))
		})
	}
}

// What looks like trouble and is none.
func TestNoAlarm(t *testing.T) {
	for name, change := range map[string]func(*Facts){
		"a watcher before ours": func(f *Facts) {
			k := HookKey{2, false}
			f.Hooks[k] = append([]Entry{{Program: loader.Program{Name: "spy", Returns: loader.Returns{Values: []int32{-1}}}}}, f.Hooks[k]...)
		},
		"a wall behind ours": func(f *Facts) {
			k := HookKey{2, false}
			f.Hooks[k] = append(f.Hooks[k], Entry{Program: loader.Program{Name: "wall", Returns: loader.Returns{Values: []int32{2}}}})
		},
		"a wall where nothing of ours is": func(f *Facts) {
			f.Hooks[HookKey{3, true}] = []Entry{{Program: loader.Program{Name: "wall", Returns: loader.Returns{Values: []int32{2}}}}}
		},
		"a device that went with its container": func(f *Facts) {
			f.Snapshot.Attachments = append(f.Snapshot.Attachments, api.Attachment{Program: loader.FromContainer, Device: "veth9", Hook: "ingress"})
		},
		"an internal network that does not forward": func(f *Facts) {
			f.Snapshot.Networks[0].Internal = true
			f.Sysctls["net/ipv4/conf/docker0/forwarding"] = "0"
		},
		"accept_ra without a route that depends on it": func(f *Facts) {
			f.Sysctls["net/ipv6/conf/eth0/accept_ra"], f.Sysctls["net/ipv6/conf/eth0/forwarding"] = "1", "1"
			f.Routes6 = []netdev.DefaultRoute6{{Device: "eth0"}}
		},
		"no tcx": func(f *Facts) {
			f.Features = []loader.Feature{{Name: "tcx", Since: "6.6", Err: errors.New("no"), Without: "programs are attached as clsact filters"}}
		},
		"a bridge narrower than its ports, which the host keeps to": func(f *Facts) { f.Devices[1].MTU = 1400 },
		"a network narrower than the rest": func(f *Facts) {
			f.Devices[1].MTU, f.Devices[2].MTU, f.PeerMTU[4] = 1400, 1400, 1400
		},
		"a narrow uplink that no container sends by": func(f *Facts) {
			f.Seen.Uplinks[0].MTU, f.Snapshot.Networks[0].Internal = 1400, true
		},
		"a port that is no pair": func(f *Facts) { delete(f.PeerMTU, 4) },
		"an SCTP port": func(f *Facts) {
			f.Snapshot.Ports = append(f.Snapshot.Ports, api.Port{Proto: "sctp", Host: "0.0.0.0:9"})
		},
		"before any daemon": func(f *Facts) {
			*f = Facts{Memcg: true, IPv6: true, BPFFSMounted: true, Sysctls: map[string]string{"net/ipv4/ip_forward": "0"}, Rules: Ruleset{Read: true}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := well()
			change(f)
			for _, x := range bad(Judge(f)) {
				assert.Equal(t, "daemon", x.Check, "%+v", x)
			}
		})
	}
}

// What comes and goes is amiss only if it is so twice.
func TestSecondLook(t *testing.T) {
	stray := func(index int) *Facts {
		f := well()
		f.Devices = append(f.Devices, netdev.Device{Ifindex: index, Name: "bpv-1", Alias: netdev.Alias})
		f.Hooks[HookKey{index, false}] = []Entry{{Program: loader.Program{Ours: loader.FromContainer}}}
		f.Sockets = nil
		return f
	}
	first := stray(9)
	require.Len(t, bad(Judge(first)), 3)
	same, other := stray(9), stray(10)
	same.Suspects, other.Suspects = first.Suspected, first.Suspected
	assert.Len(t, bad(Judge(same)), 3)
	found := bad(Judge(other))
	require.Len(t, found, 1, "%+v", found)
	assert.Equal(t, "reservations", found[0].Check, "the port was free before")
}

func TestFirewall(t *testing.T) {
	inet := func(hook string, rules ...Rule) *Chain {
		return &Chain{Tool: "nft", Family: "inet", Table: "fw", Name: "c", Hook: hook, Policy: "accept", Rules: rules}
	}
	drop := Verdict{Kind: "drop"}
	fresh := Match{Field: "state", Values: []string{"new"}}
	for _, tc := range []struct {
		name   string
		chains []*Chain
		state  State
		words  string
		fix    string
	}{
		{"new ones to the host", []*Chain{inet("input", Rule{Matches: []Match{fresh}, Verdict: drop})}, Note, "containers cannot reach services of the host", `nft 'insert rule inet fw c iifname "docker0" accept'`},
		{"all to the host", []*Chain{inet("input", Rule{Matches: []Match{{Field: "iif", Values: []string{"docker0"}}}, Verdict: drop})}, Broken, "the host's own connections to containers get no answer", `nft 'insert rule inet fw c iifname "docker0" accept'`},
		{"from the host", []*Chain{inet("postrouting", Rule{Matches: []Match{{Field: "oif", Values: []string{"docker0"}}}, Verdict: drop})}, Broken, "the host cannot reach containers", `nft 'insert rule inet fw c oifname "docker0" accept'`},
		{"firewalld", []*Chain{{Tool: "nft", Family: "inet", Table: "firewalld", Name: "c", Hook: "input", Policy: "accept", Rules: []Rule{{Matches: []Match{fresh, {Field: "iif", Values: []string{"docker0"}}}, Verdict: drop}}}}, Note, "table inet firewalld", "firewall-cmd --permanent --zone=trusted --add-interface=docker0 && firewall-cmd --reload"},
		{"raw, by iptables", ParseIPTables("iptables-legacy", "ip", "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -i docker0 -j DROP\nCOMMIT\n"), Broken, "chain PREROUTING of iptables-legacy (table raw)", "iptables-legacy -t raw -I PREROUTING -i docker0 -j ACCEPT"},
		{"lo", []*Chain{inet("input", Rule{Matches: []Match{{Field: "iif", Values: []string{"lo"}}}, Verdict: drop})}, Broken, "no answer on 127.0.0.1", `nft 'insert rule inet fw c iifname "lo" accept'`},
		{"ARP", []*Chain{{Tool: "nft", Family: "arp", Table: "a", Name: "in", Hook: "input", Policy: "drop"}}, Broken, "find each other's MACs", `nft 'insert rule arp a in iifname "docker0" accept'`},
		{"the way out", []*Chain{{Tool: "nft", Family: "netdev", Table: "n", Name: "out", Hook: "egress", Policy: "accept", Devices: []string{"eth0"}, Rules: []Rule{{Handle: 4, Verdict: drop}}}}, Broken, "what containers send to the world is lost", "nft delete rule netdev n out handle 4"},
		{"the bridge's policy", []*Chain{{Tool: "nft", Family: "bridge", Table: "b", Name: "f", Hook: "forward", Policy: "drop"}}, Broken, "do not find each other's MACs", "nft 'chain bridge b f { policy accept ; }'"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := well()
			f.Rules.Chains = tc.chains
			found := checkFirewall(f)
			require.Len(t, found, 1, "%+v", found)
			assert.Equal(t, tc.state, found[0].State)
			assert.Contains(t, found[0].Detail, tc.words)
			assert.Equal(t, tc.fix, found[0].Fix)
		})
	}
	f := well()
	assert.Contains(t, checkFirewall(f)[0].Detail, "chain FORWARD of iptables (policy) drops, which is fine")

	f.Sysctls["net/bridge/bridge-nf-call-iptables"] = "1"
	assert.Equal(t, Note, checkBridgeNetfilter(f)[0].State)
	f.Seen.Bridges[0].Addrs = append(f.Seen.Bridges[0].Addrs, netip.MustParsePrefix("fd00::1/64"))
	f.Sysctls["net/bridge/bridge-nf-call-ip6tables"] = "1"
	f.Rules.Chains = append(f.Rules.Chains, ParseIPTables("ip6tables", "ip6", "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n")...)
	assert.Equal(t, Broken, checkBridgeNetfilter(f)[0].State, "neighbour discovery takes the bridge")
}

// engine28 is what iptables-save lists on a host of Engine 28, with rules of the operator's between.
const engine28 = `*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP
-A PREROUTING -d 127.0.0.1/32 ! -i lo -p tcp -m tcp --dport 81 -j DROP
-A PREROUTING -d 10.0.0.1/32 ! -i eth0 -j DROP
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-USER - [0:0]
:mine - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A FORWARD -i vm0 -o vm0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-USER -j RETURN
-A mine -j DOCKER-USER
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
-A POSTROUTING -s 10.9.0.0/16 ! -o vm0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 9000 -j DNAT --to-destination 172.17.0.3:80
COMMIT
`

func TestLeftoverRules(t *testing.T) {
	f := well()
	f.Rules.Chains = ParseIPTables("iptables", "ip", engine28)
	assert.Equal(t, "bpfnet takeover", checkLeftovers(f)[0].Fix)
	// It needs a daemon.
	f.Daemon.Running = false
	found := checkLeftovers(f)
	require.Len(t, found, 1)
	assert.Equal(t, Note, found[0].State)
	want := `printf '%s\n' '*raw' '-D PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP' COMMIT ` +
		`'*filter' '-D FORWARD -j DOCKER-USER' '-D FORWARD -j DOCKER-FORWARD' '-D FORWARD -i docker0 -o docker0 -j ACCEPT' '-D mine -j DOCKER-USER' ` +
		`'-F DOCKER' '-F DOCKER-BRIDGE' '-F DOCKER-FORWARD' '-F DOCKER-USER' '-X DOCKER' '-X DOCKER-BRIDGE' '-X DOCKER-FORWARD' '-X DOCKER-USER' COMMIT ` +
		`'*nat' '-D PREROUTING -m addrtype --dst-type LOCAL -j DOCKER' '-D OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER' ` +
		`'-D POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE' '-D POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE' ` +
		`'-F DOCKER' '-X DOCKER' COMMIT | iptables-restore --noflush`
	assert.Equal(t, want, found[0].Fix)

	// A server of the host's own behind a translation that nobody needs: broken. One of the Engine's is not.
	f.Sockets = append(f.Sockets, Socket{Proto: policy.TCP, Addr: netip.MustParseAddrPort("0.0.0.0:9000"), Process: Process{5, "dockerd"}})
	assert.Equal(t, Note, checkLeftovers(f)[0].State)
	f.Sockets[1].Process.Name = "sshd"
	assert.Equal(t, Broken, checkLeftovers(f)[0].State)
	assert.Contains(t, checkLeftovers(f)[0].Detail, "they take 9000/tcp")

	// The user's own rules stay, and what leads to them.
	f.Rules.Chains = ParseIPTables("iptables", "ip", strings.Replace(engine28, "-A DOCKER-USER -j RETURN", "-A DOCKER-USER -s 10.1.0.0/16 -j DROP", 1))
	x := checkLeftovers(f)[0]
	assert.Contains(t, x.Detail, "DOCKER-USER has rules of your own")
	assert.NotContains(t, x.Fix, "DOCKER-USER")

	// A running Engine's are not left over.
	f.Sockets = f.Sockets[:1]
	f.Rules.Chains = ParseIPTables("iptables", "ip", engine28)
	f.Engines = []Engine{{Args: []string{"dockerd"}}}
	assert.Equal(t, OK, checkLeftovers(f)[0].State)
	f.Engines[0].Args = []string{"dockerd", "--iptables=false"}
	assert.Equal(t, Note, checkLeftovers(f)[0].State)

	// Engine 29's own tables.
	f.Rules.Chains = []*Chain{{Tool: "nft", Family: "ip", Table: "docker-bridges", Name: "a"}, {Tool: "nft", Family: "ip", Table: "docker-bridges", Name: "b"}}
	found = checkLeftovers(f)
	require.Len(t, found, 1)
	assert.Equal(t, "nft delete table ip docker-bridges", found[0].Fix)

	// What others have made beside them, in forms like theirs.
	f.Engines = nil
	f.Rules.Chains = ParseIPTables("iptables", "ip", engine28)
	mine := f.Leftovers(true)[0].Remove
	foreign := strings.NewReplacer(
		":mine - [0:0]\n", ":mine - [0:0]\n:DOCKER-BLOCK - [0:0]\n",
		"-A FORWARD -j DOCKER-FORWARD\n", "-A FORWARD -j DOCKER-FORWARD\n-A FORWARD -i docker0 -o docker0 -p tcp -m tcp --dport 22 -j DROP\n"+
			"-A FORWARD ! -i docker0 -o docker0 -j DROP\n-A FORWARD -j DOCKER-BLOCK\n-A DOCKER-BLOCK -s 203.0.113.7/32 -j DROP\n",
		"-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n", "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n"+
			"-A POSTROUTING -s 10.0.3.0/24 ! -d 10.0.3.0/24 -j MASQUERADE\n-A POSTROUTING -s 10.0.3.0/24 -d 10.0.3.0/24 -j MASQUERADE\n"+
			"-A POSTROUTING -s 10.0.3.5/32 -d 10.0.3.5/32 -p tcp -m tcp --dport 80 -j MASQUERADE\n"+
			"-A POSTROUTING -s 10.8.0.0/24 -o docker0 -j MASQUERADE\n-A POSTROUTING -s 10.8.0.0/24 ! -o docker0 -j MASQUERADE\n",
	).Replace(engine28)
	require.Greater(t, len(foreign), len(engine28)+400, "both places were found")
	f.Rules.Chains = ParseIPTables("iptables", "ip", foreign)
	assert.Equal(t, mine, f.Leftovers(true)[0].Remove)

	// Swarm's are made whatever the Engine's settings say, as long as it runs.
	f.Engines = []Engine{{Args: []string{"dockerd", "--iptables=false"}}}
	ingress := "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER-INGRESS - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER-INGRESS\nCOMMIT\n"
	f.Rules.Chains = ParseIPTables("iptables", "ip", ingress)
	assert.Equal(t, OK, checkLeftovers(f)[0].State)
	f.Engines = nil
	assert.Equal(t, Note, checkLeftovers(f)[0].State)
}

func TestReversePath(t *testing.T) {
	f := well()
	f.Snapshot.Networks = append(f.Snapshot.Networks, api.Network{Name: "n2", Bridge: "br2"})
	f.Seen.Bridges = append(f.Seen.Bridges, policy.Bridge{Name: "br2"})
	f.Snapshot.Endpoints = append(f.Snapshot.Endpoints, api.Endpoint{Name: "web", Network: "n2", SandboxID: "s", Ready: true})
	x := checkReversePath(f)[0]
	assert.Equal(t, Note, x.State)
	assert.Equal(t, "sysctl -w net/ipv4/conf/docker0/rp_filter=2 && sysctl -w net/ipv4/conf/br2/rp_filter=2", x.Fix)
	f.Sysctls["net/ipv4/conf/all/rp_filter"] = "2"
	assert.Equal(t, OK, checkReversePath(f)[0].State, "loose")
}

func TestParseSockets(t *testing.T) {
	// Of a little-endian machine, as all that the programs are made for.
	list, inodes := ParseSockets("tcp", `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 123 1 x
   1: 0100007F:1F91 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 124 1 x
   2: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 125 1 x
   3: nonsense
   4: zz:1 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 126 1 x
`)
	assert.Equal(t, []string{"123", "125"}, inodes)
	assert.Equal(t, []Socket{
		{Proto: policy.TCP, Addr: netip.MustParseAddrPort("127.0.0.1:8080")},
		{Proto: policy.TCP, Addr: netip.MustParseAddrPort("[::1]:80")},
	}, list)
}

func TestCovers(t *testing.T) {
	for _, tc := range []struct {
		have, want string
		covers     bool
	}{
		{"0.0.0.0:80", "0.0.0.0:80", true},
		{"0.0.0.0:80", "192.0.2.1:80", true},
		{"192.0.2.1:80", "0.0.0.0:80", true},
		{"192.0.2.1:80", "192.0.2.2:80", false},
		{"[::]:80", "0.0.0.0:80", true},
		{"[::]:80", "[2001:db8::1]:80", true},
		{"0.0.0.0:80", "[::]:80", false},
		{"0.0.0.0:80", "0.0.0.0:81", false},
	} {
		assert.Equal(t, tc.covers, covers(netip.MustParseAddrPort(tc.have), netip.MustParseAddrPort(tc.want)), "%s %s", tc.have, tc.want)
	}
}

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{"eth0": "eth0", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$x": "'$x'", "/a/b-c_d.e": "/a/b-c_d.e"} {
		assert.Equal(t, want, Quote(in))
	}
}
