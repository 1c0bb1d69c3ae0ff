// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/bpfnet/bpfnet/loader"
	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
)

// strictRetry is how soon a namespace is looked for again in which no process was found: that of a
// container whose process is about to be made.
const strictRetry = 20 * time.Millisecond

// strictRetryMax is how long the wait grows, by doubling, for one that stays without a process.
const strictRetryMax = 10 * time.Second

// strict fills the map of strict mode. It belongs to the reconciler.
type strict struct {
	programs *loader.Strict
	writer   *bpfmaps.StrictWriter
	devices  *netdev.Devices
	cookies  map[int]uint64 // by host-side interface, whose numbers are not used again
	retry    *time.Timer
	wait     time.Duration // until the next retry
}

func (d *Daemon) openStrict() error {
	if d.cfg.StrictCgroup == "" {
		return d.loader.DetachStrict()
	}
	programs, err := d.loader.LoadStrict(d.cfg.StrictCgroup)
	if err != nil {
		return err
	}
	writer, err := bpfmaps.NewStrictWriter(programs.Sources())
	if err != nil {
		programs.Close()
		return err
	}
	d.strict = &strict{programs: programs, writer: writer, devices: d.devices, cookies: make(map[int]uint64)}
	d.strict.retry = time.AfterFunc(time.Hour, d.wake)
	return nil
}

func (s *strict) close() {
	s.retry.Stop()
	s.programs.Close()
}

// apply lets the READY endpoints use their addresses, and only then puts the programs in place: a
// container that is served does not notice.
func (s *strict) apply(t policy.Tables, devices policy.Devices) error {
	spaces := make(map[int]int)
	for _, l := range devices.Links {
		spaces[l.Ifindex] = l.PeerNS
	}
	for ifindex := range s.cookies {
		if _, ok := spaces[ifindex]; !ok {
			delete(s.cookies, ifindex)
		}
	}
	wanted := make(map[int]bool)
	for _, e := range t.Endpoints {
		if ns, ok := spaces[e.Ifindex]; ok && ns >= 0 && s.cookies[e.Ifindex] == 0 {
			wanted[ns] = true
		}
	}
	if len(wanted) > 0 {
		found, err := s.devices.Cookies(wanted)
		if err != nil {
			return fmt.Errorf("strict mode: %w", err)
		}
		for _, e := range t.Endpoints {
			if cookie := found[spaces[e.Ifindex]]; cookie != 0 && s.cookies[e.Ifindex] == 0 {
				s.cookies[e.Ifindex] = cookie
			}
		}
		if len(found) > 0 {
			s.wait = 0
		}
		if len(found) < len(wanted) {
			s.wait = min(max(2*s.wait, strictRetry), strictRetryMax)
			s.retry.Reset(s.wait)
		}
	} else {
		s.wait = 0
	}
	if err := s.writer.Apply(strictSources(t, s.cookies)); err != nil {
		return err
	}
	return s.programs.Attach()
}

// strictSources are the addresses that endpoints may use, each in its own namespace.
func strictSources(t policy.Tables, cookies map[int]uint64) map[bpfmaps.StrictSource]bool {
	out := make(map[bpfmaps.StrictSource]bool)
	for _, e := range t.Endpoints {
		cookie := cookies[e.Ifindex]
		if cookie == 0 {
			continue
		}
		for _, a := range []netip.Addr{e.Addr4, e.Addr6, linkLocal(e.MAC)} {
			if a.IsValid() {
				out[bpfmaps.StrictSource{Cookie: cookie, Prefix: netip.PrefixFrom(a, a.BitLen())}] = true
			}
		}
	}
	for s := range t.Sources {
		if cookie := cookies[t.Endpoints[s.Endpoint].Ifindex]; cookie != 0 {
			out[bpfmaps.StrictSource{Cookie: cookie, Prefix: s.Prefix}] = true
		}
	}
	return out
}

// linkLocal is the address that the kernel makes of a MAC, RFC 4291 appendix A.
func linkLocal(m policy.MAC) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]})
}
