// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"net/netip"

	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
)

// bury ends what went through endpoints and published ports that are gone: flows, and the host's own
// connections, which no packet of anybody would end. The maps hold neither the old nor a successor.
func (d *Daemon) bury(g bpfmaps.Gone) error {
	for _, a := range g.Addrs {
		// Its engine still tells of it, so this is somebody's trouble.
		if _, there := d.tables.Addrs[a]; there {
			d.log.Info("an endpoint is not served any more as it was", "address", a, "waiting", d.tables.Waiting)
		}
	}
	// At the daemon's start expireLoop purges as soon as it can: no round waits seconds for the kernel to
	// look at a program. Until then the data path drops what would follow such a flow.
	if d.loader.CanSweep() {
		if err := d.purge(); err != nil {
			return err
		}
	}
	n, err := d.endSockets(g)
	if n > 0 {
		d.log.Debug("ended sockets of the host whose container or port is gone", "count", n)
	}
	if err != nil && err.Error() != d.sockets { // they time out; nothing else waits for it
		d.log.Warn("sockets of the host to containers that are gone are not ended, and time out", "err", err)
		d.sockets = err.Error()
	}
	return nil
}

// endSockets ends the sockets that are connected to a container that is gone, and those that were sent to
// a container by a published port that no longer leads there.
func (d *Daemon) endSockets(g bpfmaps.Gone) (n int, err error) {
	gone := make(map[netip.Addr]bool)
	for _, a := range g.Addrs {
		gone[a] = true
	}
	peers := append([]netip.Addr(nil), g.Addrs...)
	cookies := make(map[uint64]bool)
	left := make(map[bpfmaps.GonePort]bool)
	var errs []error
	for _, p := range g.Ports {
		if !gone[p.Target.Addr()] {
			left[p] = true
		}
	}
	if len(left) > 0 {
		known := make(map[netip.Addr]bool)
		err := d.loader.Maps().EachDialled(func(s bpfmaps.Dialled) {
			if !leadsBy(left, s) {
				return
			}
			cookies[s.Cookie] = true
			if a := s.Target.Addr(); !known[a] {
				known[a] = true
				peers = append(peers, a)
			}
		})
		errs = append(errs, err)
	}
	if len(peers) == 0 {
		return 0, errors.Join(errs...)
	}
	sockets, err := netdev.SocketsTo(peers)
	errs = append(errs, err)
	for _, s := range sockets {
		if !gone[s.Peer.Addr()] && !cookies[s.Cookie] {
			continue
		}
		if err := s.Destroy(); err != nil {
			errs = append(errs, err)
			continue
		}
		n++
	}
	return n, errors.Join(errs...)
}

// leadsBy reports whether one of the ports had sent the socket where it is.
func leadsBy(ports map[bpfmaps.GonePort]bool, s bpfmaps.Dialled) bool {
	p := bpfmaps.GonePort{Target: s.Target}
	p.Proto = s.Proto
	for _, a := range []netip.Addr{s.To.Addr(), unspecified(s.To.Addr())} {
		p.Host = netip.AddrPortFrom(a, s.To.Port())
		if ports[p] {
			return true
		}
	}
	return false
}

// unspecified is the address that stands for all of a's family.
func unspecified(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}
