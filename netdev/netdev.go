// SPDX-License-Identifier: Apache-2.0

// Package netdev is the only user of netlink in this project. It shows what the kernel's
// host namespace holds (bridges, their ports, uplinks, addresses), reports when that
// changes, makes the bridges and pairs of devices that join sandboxes to the host, and
// writes the few sysctls that this and forwarding need.
//
// It knows nothing of Docker, of eBPF or of what is done with a device. "The host
// namespace" is the network namespace of the thread that calls Open, Watch or a sysctl
// function: for the daemon that is the one it was started in.
package netdev

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// dumpRetries bounds how often a dump that the kernel marked as interrupted is made again.
// One retry is nearly always enough; many interfaces coming up at once can need a few.
const dumpRetries = 20

// Options of Open.
type Options struct {
	// Uplinks are the devices to take as uplinks instead of those found. Each must exist
	// when Open is called; one that vanishes later is left out. Optional.
	Uplinks []string
	// LinkType is what CreateVeth makes: LinkAuto, LinkVeth or LinkNetkit. Optional: LinkVeth.
	LinkType string
}

// Devices reads and changes the host namespace through netlink sockets of its own. It is safe
// for concurrent use.
type Devices struct {
	ns      *os.File // the host namespace
	handle  *netlink.Handle
	queries *nl.SocketHandle // checks strictly, so that the kernel filters (NETLINK_GET_STRICT_CHK)
	// deleting is apart because the end of a device takes tens of milliseconds, and a handle does one
	// thing at a time.
	deleting *netlink.Handle
	uplinks  []string
	linkType string
	noNetkit atomic.Bool // the kernel has said so

	tableMu sync.Mutex
	table   *table

	mu    sync.Mutex
	asked map[int]peer // by the index of the near end, as of the last snapshot
}

// peer is the far end of a pair in another namespace.
type peer struct {
	ns, ifindex int
	mac         policy.MAC
}

// Open binds to the calling thread's network namespace. It fails if an uplink named in the
// options does not exist (the error lists the nearest names) or cannot be one, and if the kernel does
// not have the link type that they ask for.
func Open(opts Options) (*Devices, error) {
	if opts.LinkType == LinkNetkit {
		if err := ProbeNetkit(); err != nil {
			return nil, fmt.Errorf("link type %s: %w; use %s or %s", LinkNetkit, err, LinkAuto, LinkVeth)
		}
	}
	d := &Devices{uplinks: slices.Clone(opts.Uplinks), linkType: opts.LinkType}
	if err := d.open(); err != nil {
		d.Close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	links, err := d.links()
	if err == nil {
		err = checkUplinks(d.uplinks, links)
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Devices) open() (err error) {
	if d.ns, err = OpenNetNS(threadNetNS); err != nil {
		return err
	}
	if d.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	if d.deleting, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return err
	}
	if d.table, err = openTable(); err != nil {
		return err
	}
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	d.queries = &nl.SocketHandle{Socket: sock}
	return unix.SetsockoptInt(sock.GetFd(), unix.SOL_NETLINK, unix.NETLINK_GET_STRICT_CHK, 1)
}

// Close closes the sockets. Nothing in the kernel depends on them.
func (d *Devices) Close() {
	for _, h := range []*netlink.Handle{d.handle, d.deleting} {
		if h != nil {
			h.Close()
		}
	}
	if d.queries != nil {
		d.queries.Close()
	}
	if d.table != nil {
		d.tableMu.Lock()
		d.table.sock.Close()
		d.tableMu.Unlock()
	}
	if d.ns != nil {
		d.ns.Close()
	}
}

// Snapshot reads all devices. served holds the names of the bridges whose ports are wanted;
// such a bridge need not exist. All bridges are listed, served or not.
//
// The lists are sorted by interface index. A far end in another namespace is asked for its MAC, one by
// one, unless settled says of the near end that the MAC of the last snapshot will do: it can change
// between the making of a container's link and its start. Optional: nothing is settled.
func (d *Devices) Snapshot(served map[string]bool, settled func(ifindex int) bool) (policy.Devices, error) {
	links, addrs, err := d.current()
	if err != nil {
		return policy.Devices{}, err
	}
	d.mu.Lock()
	last := d.asked
	d.mu.Unlock()
	asked := make(map[int]peer, len(last))
	out := assemble(links, addrs, served, d.uplinks, func(l *device) policy.MAC {
		p, known := last[l.index]
		if !known || p.ns != l.peerNS || p.ifindex != l.peer || settled == nil || !settled(l.index) {
			p = peer{l.peerNS, l.peer, d.peerMAC(l.peerNS, l.peer)}
		}
		asked[l.index] = p
		return p.mac
	})
	d.mu.Lock()
	d.asked = asked
	d.mu.Unlock()
	return out, nil
}

// Link reads one bridge port by its index: the quick way after an event. ok is false if the
// device is gone or is no port of a bridge.
func (d *Devices) Link(ifindex int) (link policy.Link, ok bool, err error) {
	l, err := d.linkByIndex(ifindex)
	if err != nil || l == nil || l.master == 0 {
		return policy.Link{}, false, err
	}
	br, err := d.linkByIndex(l.master)
	if err != nil || br == nil || br.kind != "bridge" {
		return policy.Link{}, false, err
	}
	link = policy.Link{Ifindex: l.index, Name: l.name, Bridge: br.name, PeerNS: l.peerNS}
	if l.hasPeer() {
		if l.peerNS >= 0 {
			link.PeerMAC = d.peerMAC(l.peerNS, l.peer)
		} else if p, err := d.linkByIndex(l.peer); err == nil && p != nil {
			link.PeerMAC = p.mac
		}
	}
	return link, true, nil
}

// device is what this package reads of a link.
type device struct {
	index    int
	name     string
	kind     string // "bridge", "veth", …; "device" for hardware
	mac      policy.MAC
	mtu      int
	up       bool
	own      bool // has our alias
	loopback bool
	ethernet bool
	master   int // 0 for none
	peer     int // IFLA_LINK: the peer's or the lower device's index
	peerNS   int // namespace id of peer, -1 if it is this one
}

// hasPeer reports whether the device is one end of a pair.
func (d *device) hasPeer() bool {
	return (d.kind == "veth" || d.kind == "netkit") && d.peer != 0
}

// address is an address of a device of this namespace.
type address struct {
	index  int
	prefix netip.Prefix // the address itself and its prefix length
}

func (d *Devices) links() ([]device, error) {
	devs, err := retry("list links", d.linkList)
	if err != nil {
		return nil, err
	}
	slices.SortFunc(devs, func(a, b device) int { return cmp.Compare(a.index, b.index) })
	return devs, nil
}

// skipStats is RTEXT_FILTER_SKIP_STATS of linux/rtnetlink.h.
const skipStats = 1 << 3

// linkList dumps links without their counters, which are half of a message.
func (d *Devices) linkList() ([]device, error) {
	msgs, err := d.getLink(unix.NLM_F_DUMP, 0)
	if err != nil {
		return nil, err
	}
	list := make([]device, 0, len(msgs))
	for _, m := range msgs {
		dev, err := parseLink(m)
		if err != nil {
			return nil, err
		}
		list = append(list, dev)
	}
	return list, nil
}

// getLink asks for links: all of them by a dump, or the one with the index.
func (d *Devices) getLink(flags, ifindex int, more ...nl.NetlinkRequestData) ([][]byte, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, flags)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: d.queries}
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(ifindex)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
	for _, m := range more {
		req.AddData(m)
	}
	return req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
}

// addrs dumps the addresses of all devices, or of one. None are no error, nor is a device that is gone.
func (d *Devices) addrs(ifindex int) ([]address, error) {
	var list []address
	// One by one: from Linux 6.9 on, only a dump of all families waits for the kernel's lock on devices.
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		part, err := retry("list addresses", func() ([]address, error) { return d.addrList(family, ifindex) })
		if err != nil && !(ifindex != 0 && errors.Is(err, unix.ENODEV)) {
			return nil, err
		}
		list = append(list, part...)
	}
	return list, nil
}

func (d *Devices) addrList(family, ifindex int) ([]address, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETADDR, unix.NLM_F_DUMP)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: d.queries}
	msg := nl.NewIfAddrmsg(family)
	msg.Index = uint32(ifindex)
	req.AddData(msg)
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWADDR)
	if err != nil {
		return nil, err
	}
	list := make([]address, 0, len(msgs))
	for _, m := range msgs {
		a, err := parseAddress(m)
		if err != nil {
			return nil, err
		}
		if a.prefix.IsValid() {
			list = append(list, a)
		}
	}
	return list, nil
}

// linkByIndex returns nil if there is no such device.
func (d *Devices) linkByIndex(ifindex int) (*device, error) {
	msgs, err := d.getLink(unix.NLM_F_ACK, ifindex)
	if errors.Is(err, unix.ENODEV) || err == nil && len(msgs) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read link %d: %w", ifindex, err)
	}
	dev, err := parseLink(msgs[0])
	if err != nil {
		return nil, fmt.Errorf("read link %d: %w", ifindex, err)
	}
	return &dev, nil
}

// peerMAC asks for a device of another namespace. It returns the zero MAC if the namespace or the device is gone:
// the next snapshot will not hold the link.
func (d *Devices) peerMAC(nsid, ifindex int) policy.MAC {
	dev, _ := d.far(nsid, ifindex)
	return dev.mac
}

// far reads a device of another namespace without entering it; false: it cannot, as one of the two is gone.
func (d *Devices) far(nsid, ifindex int) (device, bool) {
	msgs, err := d.getLink(unix.NLM_F_ACK, ifindex, nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, nl.Uint32Attr(uint32(nsid))))
	if err != nil || len(msgs) == 0 {
		return device{}, false
	}
	dev, err := parseLink(msgs[0])
	if err != nil {
		return device{}, false
	}
	return dev, true
}

// retry repeats a dump that was interrupted by a change: its result may lack entries.
func retry[T any](what string, dump func() ([]T, error)) ([]T, error) {
	var err error
	for range dumpRetries {
		var list []T
		if list, err = dump(); err == nil {
			return list, nil
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return nil, fmt.Errorf("%s: %w", what, err)
}
