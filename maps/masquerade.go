// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
)

// Masquerade is how the ports are used that flows are masqueraded with.
type Masquerade struct {
	Ranges  []PortRange // that ports are chosen from
	Ports   int         // of them that may be used: the others are published or reserved
	Tries   int         // of a new flow to find one
	Refused uint64      // packets of new flows that found none, since the programs were first loaded
	Used    []MasqueradeUse
}

// MasqueradeUse is how many ports an endpoint holds towards a destination: each has all ports to itself.
type MasqueradeUse struct {
	Proto    uint8
	From     netip.Addr // the host's
	To       netip.AddrPort
	Endpoint uint16 // slot
	Ports    int    // of echo requests: identifiers
}

// EchoIdentifiers is how many there are to masquerade echo requests with, towards each destination.
const EchoIdentifiers = 65535

// Masquerade reads the flows that hold masquerade ports.
func (m *Maps) Masquerade() (Masquerade, error) {
	var out Masquerade
	c, err := m.config()
	if err != nil {
		return out, err
	}
	for _, r := range c.Snat {
		if r.Count > 0 {
			out.Ranges = append(out.Ranges, PortRange{First: r.First, Count: int(r.Count)})
		}
	}
	if out.Ports, err = m.masqueradePorts(&c); err != nil {
		return out, err
	}
	tries, err := m.MasqueradeTries()
	if err != nil {
		return out, err
	}
	out.Tries, out.Refused = len(tries.Found), tries.Exhausted
	taken := make(map[MasqueradeUse]int)
	err = m.eachMasqueraded(func(h *half) {
		taken[MasqueradeUse{Proto: h.proto, From: h.newFrom.Addr(), To: h.newTo, Endpoint: h.endpoint}]++
	})
	for use, n := range taken {
		use.Ports = n
		out.Used = append(out.Used, use)
	}
	return out, err
}

// masqueradePorts is how many ports of the ranges may be used.
func (m *Maps) masqueradePorts(c *bpf.DatapathConfig) (int, error) {
	var class bpf.DatapathPortClass
	if err := m.m["port_class"].Lookup(uint32(0), &class); err != nil {
		return 0, fmt.Errorf("read port_class: %w", err)
	}
	n := 0
	for _, r := range c.Snat {
		for i := range r.Count {
			if class.Ports[uint16(uint32(r.First)+i)]&bpf.DatapathPortBitsPORT_SNAT != 0 {
				n++
			}
		}
	}
	return n, nil
}

// eachMasqueraded calls each for the opening half of every flow that holds a masquerade port or echo identifier.
func (m *Maps) eachMasqueraded(each func(*half)) error {
	const want = flowOrigin | flowSNAT
	holds := func(h *half) {
		switch h.proto {
		case unix.IPPROTO_TCP, unix.IPPROTO_UDP:
		case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
			if h.from.Port() == 0 { // no echo
				return
			}
		default:
			return
		}
		if h.flags&want == want && h.out() == bpf.DatapathHookHOOK_UPLINK {
			each(h)
		}
	}
	err := batchesUntil(m.m["flows4"], func(k *bpf.DatapathFlow4Key, v *bpf.DatapathFlow4) error {
		if v.F.Flags&want == want {
			h := half4(k, v)
			holds(&h)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return batchesUntil(m.m["flows6"], func(k *bpf.DatapathFlow6Key, v *bpf.DatapathFlow6) error {
		if v.F.Flags&want == want {
			h := half6(k, v)
			holds(&h)
		}
		return nil
	})
}
