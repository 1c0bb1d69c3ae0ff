// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"slices"
	"strings"
)

// checkKernel: the programs themselves are the test. Which feature is missing is asked for a kernel
// that refuses them.
func checkKernel(f *Facts) []Finding {
	var lacks, ways []string
	for _, x := range f.Features {
		switch {
		case x.Err != nil && x.Without == "":
			lacks = append(lacks, fmt.Sprintf("%s (since Linux %s): %s", x.Name, x.Since, oneLine(x.Err.Error())))
		case x.Err != nil:
			ways = append(ways, fmt.Sprintf("no %s (since Linux %s): %s", x.Name, x.Since, x.Without))
		}
	}
	var out []Finding
	if f.LoadErr != nil {
		out = append(out, brokenf("", "Linux %s refuses the programs: %s", f.Release, oneLine(f.LoadErr.Error())))
	} else {
		out = append(out, okf("Linux %s takes the programs", f.Release))
	}
	for _, l := range lacks {
		out = append(out, brokenf("", "missing: %s", l))
	}
	for _, w := range ways {
		out = append(out, okf("%s", w))
	}
	if f.DestroyErr != nil {
		out = append(out, notef("modprobe -a tcp_diag udp_diag", "sockets of the host to a container that is gone wait for their timeout: %s", oneLine(f.DestroyErr.Error())))
	}
	return out
}

func checkBPFFS(f *Facts) []Finding {
	const usual = "/sys/fs/bpf"
	switch {
	case f.BPFFSMounted:
		return []Finding{okf("%s is in a bpffs", f.BPFFS)}
	case strings.HasPrefix(f.BPFFS+"/", usual+"/"):
		return []Finding{notef("mount -t bpf bpf "+usual, "no bpffs at %s; the daemon mounts it when it starts", usual)}
	}
	return []Finding{brokenf(commandLine("mount", "-t", "bpf", "bpf", f.BPFFSNearest), "%s is in no bpffs, so that the daemon cannot pin anything there", f.BPFFS)}
}

func checkCgroup(f *Facts) []Finding {
	if f.CgroupErr != nil {
		return []Finding{brokenf("mkdir -p /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup", "%s", oneLine(f.CgroupErr.Error()))}
	}
	return []Finding{okf("%s is of cgroup2", f.Cgroup)}
}

// needMemlock is what the programs and maps take at the smallest size, on kernels before 5.11.
const needMemlock = 64 << 20

func checkMemlock(f *Facts) []Finding {
	if f.Memcg {
		return []Finding{okf("this kernel counts the maps' memory against cgroups, not against the memlock limit")}
	}
	if f.Memlock < needMemlock {
		return []Finding{notef("ulimit -l unlimited", "the limit is %d KiB; the daemon raises it, if it may (CAP_SYS_RESOURCE)", f.Memlock>>10)}
	}
	return []Finding{okf("the limit is %d KiB", f.Memlock>>10)}
}

func checkIPv6(f *Facts) []Finding {
	if f.IPv6 {
		return []Finding{okf("the kernel has IPv6")}
	}
	for _, b := range f.bridges() {
		if n := f.network(b.name); n != nil {
			for _, s := range n.Subnets {
				if strings.Contains(s, ":") {
					return []Finding{brokenf("", "network %s has the subnet %s, but the kernel runs without IPv6 (ipv6.disable=1)", n.Name, s)}
				}
			}
		}
	}
	return []Finding{okf("the kernel runs without IPv6; IPv4 is served")}
}

// sysctl reads a value; empty: the kernel has none.
func (f *Facts) sysctl(path string) string { return f.Sysctls[path] }

func setSysctl(path, value string) string {
	// With slashes, as a device's name may have dots.
	return commandLine("sysctl", "-w", path+"="+value)
}

// checkForwarding: no packet of ours is forwarded by the stack, but the route lookup of the programs is
// refused for a device that does not forward, and then the way out of a container ends there.
func checkForwarding(f *Facts) []Finding {
	var out []Finding
	for _, v := range []struct {
		family, all, one string
		has              func(bridge) bool
	}{
		{"IPv4", "net/ipv4/ip_forward", "net/ipv4/conf/%s/forwarding", func(b bridge) bool { return b.v4.IsValid() }},
		{"IPv6", "net/ipv6/conf/all/forwarding", "net/ipv6/conf/%s/forwarding", func(b bridge) bool { return b.v6.IsValid() }},
	} {
		var off []bridge
		for _, b := range f.bridges() {
			if v.has(b) && !b.internal && f.sysctl(fmt.Sprintf(v.one, b.name)) == "0" {
				off = append(off, b)
			}
		}
		switch {
		case f.sysctl(v.all) == "0" && f.Snapshot == nil:
			out = append(out, okf("%s forwarding is off; the daemon turns it on when it starts", v.family))
		case len(off) == 0:
		case f.sysctl(v.all) == "0":
			out = append(out, brokenf(setSysctl(v.all, "1"), "%s forwarding is off: nothing leaves the containers of %s for the world", v.family, some(names(off))))
		default:
			var fix []string
			for _, b := range off {
				fix = append(fix, setSysctl(fmt.Sprintf(v.one, b.name), "1"))
			}
			out = append(out, brokenf(both(fix), "%s forwarding is off on %s: nothing leaves the containers there for the world", v.family, some(names(off))))
		}
	}
	return one(out, "on, as far as networks need it")
}

// checkReversePath: packets are taken before the check, on uplinks and between containers. What the
// stack sees from a container is what it sends to the host: from an address of another network of its
// own, strict mode drops that.
func checkReversePath(f *Facts) []Finding {
	strict := func(device string) bool {
		v := max(f.sysctl("net/ipv4/conf/all/rp_filter"), f.sysctl("net/ipv4/conf/"+device+"/rp_filter"))
		return v == "1"
	}
	homes := make(map[string][]string) // networks of a sandbox
	if f.Snapshot != nil {
		for _, e := range f.Snapshot.Endpoints {
			homes[e.SandboxID] = append(homes[e.SandboxID], e.Network)
		}
	}
	var on []bridge
	for _, b := range f.bridges() {
		if n := f.network(b.name); n != nil && strict(b.name) {
			for _, networks := range homes {
				if len(networks) > 1 && slices.Contains(networks, n.Name) {
					on = append(on, b)
					break
				}
			}
		}
	}
	if len(on) > 0 {
		var fix []string
		for _, b := range on {
			fix = append(fix, setSysctl("net/ipv4/conf/"+b.name+"/rp_filter", "2"))
		}
		return []Finding{notef(both(fix), "strict on %s: containers that are in several networks cannot reach the host itself from an address of another one", some(names(on)))}
	}
	var ups []string
	for _, u := range f.Seen.Uplinks {
		if strict(u.Name) {
			ups = append(ups, u.Name)
		}
	}
	if len(ups) > 0 {
		return []Finding{okf("strict on %s, which is fine: bpfnet takes its packets before that", some(ups))}
	}
	return []Finding{okf("in nobody's way")}
}

// checkRouterAdverts: a device that forwards does not listen to router advertisements, unless
// accept_ra is 2. The default route that came from one is forgotten when its time is up.
func checkRouterAdverts(f *Facts) []Finding {
	var out []Finding
	for _, r := range f.Routes6 {
		conf := "net/ipv6/conf/" + r.Device + "/"
		if r.Advertised && f.sysctl(conf+"accept_ra") == "1" && f.sysctl(conf+"forwarding") == "1" {
			out = append(out, brokenf(setSysctl(conf+"accept_ra", "2"),
				"%s forwards and therefore ignores router advertisements: the IPv6 default route that came from one ends with its lifetime", r.Device))
		}
	}
	return one(out, "no default route depends on advertisements that nobody listens to")
}

// checkLoopback: the way of from_host, for sockets bound to a loopback address and processes outside of
// the cgroup (adr/0001).
func checkLoopback(f *Facts) []Finding {
	if f.Snapshot == nil {
		return []Finding{okf("the daemon sets route_localnet and accept_local on lo when it starts")}
	}
	var off, fix []string
	for _, name := range []string{"route_localnet", "accept_local"} {
		if f.sysctl("net/ipv4/conf/all/"+name) == "0" && f.sysctl("net/ipv4/conf/lo/"+name) == "0" {
			off = append(off, name)
			fix = append(fix, setSysctl("net/ipv4/conf/lo/"+name, "1"))
		}
	}
	if len(off) > 0 {
		return []Finding{brokenf(both(fix), "%s is off on lo: programs of the host that are bound to 127.0.0.1 get no answer from published ports", strings.Join(off, " and "))}
	}
	return []Finding{okf("route_localnet and accept_local are on, on lo")}
}

// fewPorts is when masquerading begins to run out where many clients talk to one server.
const fewPorts = 10000

// checkPortRange: a port that flows are masqueraded with should be no port that the kernel gives to the
// host's own sockets.
func checkPortRange(f *Facts) []Finding {
	reserved := func(port int) bool {
		for _, r := range f.Reserved {
			if port >= int(r.First) && port <= int(r.Last) {
				return true
			}
		}
		return false
	}
	shared, usable := 0, 0
	for _, r := range f.SNAT {
		for port := int(r.First); port <= int(r.Last); port++ {
			usable++
			if port >= int(f.Local.First) && port <= int(f.Local.Last) && !reserved(port) {
				shared++
			}
		}
	}
	switch {
	case len(f.SNAT) == 0:
		return []Finding{okf("net.ipv4.ip_local_port_range is %d-%d; the daemon masquerades with others", f.Local.First, f.Local.Last)}
	case shared > 0 && f.Daemon.Running:
		return []Finding{notef(f.startDaemon(), "%d of the ports that flows are masqueraded with are the host's own by net.ipv4.ip_local_port_range (%d-%d); the daemon follows within a minute", shared, f.Local.First, f.Local.Last)}
	case shared > 0:
		return []Finding{notef(f.startDaemon(), "%d of the ports that flows are masqueraded with are the host's own by net.ipv4.ip_local_port_range (%d-%d): a program of the host can find its port taken", shared, f.Local.First, f.Local.Last)}
	case usable < fewPorts:
		return []Finding{notef(setSysctl("net/ipv4/ip_local_port_range", "32768 60999"), "%d ports to masquerade with: few, as net.ipv4.ip_local_port_range (%d-%d) leaves no more", usable, f.Local.First, f.Local.Last)}
	}
	return []Finding{okf("%d ports to masquerade with, none of which the host gives to its own sockets", usable)}
}
