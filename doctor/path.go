// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/policy"
)

// checkMTU compares the devices of a packet's way. Between a container and its bridge nobody answers "too big":
// a pair drops what its other end does not take (is_skb_forwardable), before or behind the programs, and counts
// it nowhere. Towards an uplink the programs have the host's stack answer.
func checkMTU(f *Facts) []Finding {
	var out []Finding
	top, senders := 0, []string(nil) // what containers send at most, and the networks of those
	for _, b := range f.bridges() {
		most := 0
		for _, l := range f.Seen.Links {
			if l.Bridge == b.name {
				most = max(most, f.mtu(l.Name), f.PeerMTU[l.Ifindex])
			}
		}
		for _, l := range f.Seen.Links {
			if l.Bridge != b.name {
				continue
			}
			near, far := f.mtu(l.Name), f.PeerMTU[l.Ifindex]
			who := f.behind(l)
			switch {
			case near == 0 || near == most && (far == 0 || far == most):
			case !f.suspect("mtu %d", l.Ifindex):
			case near < most:
				out = append(out, brokenf(commandLine("ip", "link", "set", "dev", l.Name, "mtu", fmt.Sprint(most)),
					"%s, the way of %s to %s, carries packets of %d bytes, others there %d: larger ones vanish without a word", l.Name, who, b.name, near, most))
			default:
				fix := ""
				if e := f.endpoint(l.Name); e != nil && e.Source == string(policy.SourceDocker) {
					fix = commandLine("docker", "restart", e.Name)
				}
				out = append(out, brokenf(fix, "the interface of %s behind %s takes packets of %d bytes, others at %s send %d: larger ones vanish without a word; set it right inside, or start the container anew",
					who, l.Name, far, b.name, most))
			}
		}
		if own := f.mtu(b.name); most != 0 && own > most {
			out = append(out, brokenf(commandLine("ip", "link", "set", "dev", b.name, "mtu", fmt.Sprint(most)),
				"%s takes packets of %d bytes from the host, but no container there more than %d: larger ones vanish without a word", b.name, own, most))
		}
		if b.internal || most < top {
			continue
		}
		if most > top {
			top, senders = most, nil
		}
		senders = append(senders, b.networks...)
	}
	var narrow []string
	least := 0
	for _, u := range f.Seen.Uplinks {
		if u.MTU != 0 && u.MTU < top {
			narrow = append(narrow, fmt.Sprintf("%s carries packets of %d bytes", u.Name, u.MTU))
			if least == 0 || u.MTU < least {
				least = u.MTU
			}
		}
	}
	if len(narrow) > 0 {
		out = append(out, notef("", "%s, containers of %s send up to %d: those are told so by ICMP, and what ignores or filters that stays unheard; a network made with -o %s=%d sends no larger ones",
			some(narrow), some(senders), top, policy.OptMTU, least))
	}
	return one(out, "nothing is narrower than what containers send")
}

// mtu is that of a device in bytes; 0: not known.
func (f *Facts) mtu(name string) int {
	if dev := f.device(name); dev != nil {
		return dev.MTU
	}
	return 0
}

// behind names the container of a bridge port.
func (f *Facts) behind(l policy.Link) string {
	if e := f.endpoint(l.Name); e != nil {
		return e.Name
	}
	return "what is connected there"
}

// checkLeftOut: --uplink takes the place of what the daemon would find. What it leaves out has no programs: answers
// to what containers send there reach the host's stack, which knows no flow, and no port is published there.
func checkLeftOut(f *Facts) []Finding {
	covered := func(routes []string) bool {
		return len(routes) == 0 || slices.ContainsFunc(f.Seen.Uplinks, func(u policy.Uplink) bool { return slices.Contains(routes, u.Name) })
	}
	var routes6 []string
	for _, r := range f.Routes6 {
		routes6 = append(routes6, r.Device)
	}
	var cut, others []string
	for _, u := range f.LeftOut {
		if slices.Contains(f.Routes4, u.Name) && !covered(f.Routes4) || slices.Contains(routes6, u.Name) && !covered(routes6) {
			cut = append(cut, u.Name)
		} else {
			others = append(others, u.Name)
		}
	}
	var out []Finding
	if len(cut) > 0 {
		out = append(out, brokenf(f.startDaemon(f.uplinkFlags(cut)...),
			"%s has the default route, but --uplink leaves it out: containers get no answers from there, and no port is published there", some(cut)))
	}
	if len(others) > 0 {
		out = append(out, notef(f.startDaemon(f.uplinkFlags(others)...),
			"%s: an address, but left out by --uplink: containers get no answers from there, and no port is published there", some(others)))
	}
	if len(out) == 0 {
		var names []string
		for _, u := range f.Seen.Uplinks {
			names = append(names, u.Name)
		}
		if len(names) == 0 {
			return []Finding{okf("none: no device leads out of this host")}
		}
		return []Finding{okf("%s, and no other device leads out", strings.Join(names, ", "))}
	}
	return out
}

// uplinkFlags are options that add devices to those that the daemon was told of: its command line's are there
// already, its configuration's are replaced by any flag.
func (f *Facts) uplinkFlags(more []string) []string {
	var out []string
	onLine := strings.Contains(strings.Join(f.Daemon.Args, " "), "--uplink")
	if !onLine {
		for _, name := range f.Told {
			out = append(out, "--uplink", name)
		}
	}
	for _, name := range more {
		out = append(out, "--uplink", name)
	}
	return out
}
