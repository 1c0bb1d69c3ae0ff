// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
)

// defaultTimeouts are idle times of flows by name.
var defaultTimeouts = map[string]time.Duration{
	"tcp-syn":         time.Minute,                 // not answered yet
	"tcp-established": 2*time.Hour + 4*time.Minute, // RFC 5382 REQ-5: not less
	"tcp-fin":         4 * time.Minute,             // one side closed; RFC 5382 REQ-5: not less
	"tcp-closed":      time.Minute,                 // both closed, or reset
	"udp-new":         2 * time.Minute,             // RFC 4787 REQ-5: not less
	"udp":             3 * time.Minute,
	"icmp":            time.Minute, // RFC 5508 REQ-2: not less
	"other":           10 * time.Minute,
}

// TimeoutNames are the names that Config.Timeouts takes, in order.
func TimeoutNames() []string { return slices.Sorted(maps.Keys(defaultTimeouts)) }

// tick is the data path's unit of time.
const tick = 1 << 30 * time.Nanosecond

func toTicks(d time.Duration) uint32 { return uint32((d + tick - 1) / tick) }

func (c Config) timeouts() (map[string]time.Duration, error) {
	out := maps.Clone(defaultTimeouts)
	for name, d := range c.Timeouts {
		if _, ok := out[name]; !ok {
			return nil, fmt.Errorf("timeout %q: unknown; use one of %s", name, strings.Join(TimeoutNames(), ", "))
		}
		if d < tick || d > 24*time.Hour*365 {
			return nil, fmt.Errorf("timeout %s=%s: out of range; use 2s to 8760h", name, d)
		}
		out[name] = d
	}
	return out, nil
}

func tickTimeouts(t map[string]time.Duration) bpfmaps.Timeouts {
	return bpfmaps.Timeouts{
		TCPSyn: toTicks(t["tcp-syn"]), TCPEstablished: toTicks(t["tcp-established"]),
		TCPFin: toTicks(t["tcp-fin"]), TCPClosed: toTicks(t["tcp-closed"]),
		UDPNew: toTicks(t["udp-new"]), UDP: toTicks(t["udp"]),
		ICMP: toTicks(t["icmp"]), Other: toTicks(t["other"]),
	}
}

const (
	// firstPort: below, ports are for privileged sockets, and some peers look at that (RFC 4787
	// REQ-3 keeps well-known ports apart).
	firstPort = 1024
	// minMasqueradePorts is how many ports are taken at least, from the host's own range if need be.
	minMasqueradePorts = 20000
)

// masqueradePlan says which ports flows are masqueraded with: all that the host gives to no socket
// of its own. Where these are few, reserve is taken out of the host's range.
type masqueradePlan struct {
	ranges   []bpfmaps.PortRange
	reserved map[uint16]struct{} // by others: not to be used
	reserve  *netdev.PortRange   // to be added to ip_local_reserved_ports
}

func planMasquerade(local netdev.PortRange, reserved []netdev.PortRange) masqueradePlan {
	p := masqueradePlan{reserved: make(map[uint16]struct{})}
	below := max(int(local.First)-firstPort, 0)
	above := 65535 - int(local.Last)
	second := int(local.Last) + 1
	if below+above < minMasqueradePorts {
		need := min(minMasqueradePorts-below-above, local.Len()/2)
		second -= need
		p.reserve = &netdev.PortRange{First: uint16(second), Last: local.Last}
	}
	if below > 0 {
		p.ranges = append(p.ranges, bpfmaps.PortRange{First: firstPort, Count: below})
	}
	if second <= 65535 {
		p.ranges = append(p.ranges, bpfmaps.PortRange{First: uint16(second), Count: 65536 - second})
	}
	for _, r := range reserved {
		for port := int(r.First); port <= int(r.Last); port++ {
			// Our own reservation reads back joined with what it touches.
			if p.reserve != nil && port >= int(p.reserve.First) && port <= int(p.reserve.Last) {
				continue
			}
			p.reserved[uint16(port)] = struct{}{}
		}
	}
	return p
}

// covers reports whether the sorted list holds all of r.
func covers(list []netdev.PortRange, r netdev.PortRange) bool {
	return slices.ContainsFunc(list, func(have netdev.PortRange) bool {
		return have.First <= r.First && r.Last <= have.Last
	})
}

// mergeRanges adds one range to a sorted list as the kernel would print it.
func mergeRanges(list []netdev.PortRange, add netdev.PortRange) []netdev.PortRange {
	all := append(slices.Clone(list), add)
	slices.SortFunc(all, func(a, b netdev.PortRange) int { return cmp.Compare(a.First, b.First) })
	var out []netdev.PortRange
	for _, r := range all {
		if n := len(out); n > 0 && int(r.First) <= int(out[n-1].Last)+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}
