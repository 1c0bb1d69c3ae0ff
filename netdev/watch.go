// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Kind says what an event is about.
type Kind uint8

// The kinds of events.
const (
	// Resync: events may have been lost; read everything again.
	Resync Kind = iota + 1
	// LinkChanged: a device was made, changed or, with Gone, removed.
	LinkChanged
	// PortChanged: a device became or changed as a port of the bridge Master or, with Gone, left it.
	PortChanged
	// AddrChanged: an address of the device came or, with Gone, went.
	AddrChanged
	// NeighChanged: a neighbour on the device was learnt, changed or, with Gone, removed.
	NeighChanged
	// RouteChanged: a route through the device (0: through several or none) changed.
	RouteChanged
)

// String returns the kind in one lower-case word.
func (k Kind) String() string {
	switch k {
	case Resync:
		return "resync"
	case LinkChanged:
		return "link"
	case PortChanged:
		return "port"
	case AddrChanged:
		return "addr"
	case NeighChanged:
		return "neigh"
	case RouteChanged:
		return "route"
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// Event is a hint that something changed. What it is now is read with Snapshot or Link.
type Event struct {
	Kind       Kind
	Gone       bool
	Ifindex    int    // 0 for Resync and some routes
	Name       string // empty if not known
	Master     int    // LinkChanged, PortChanged: the device's bridge, bond or VRF; 0 for none
	MasterName string
}

// watchBuffer is the socket's receive buffer in bytes: room for some thousand messages, the
// burst of a hundred containers starting at once.
const watchBuffer = 4 << 20

// Watch subscribes to links, addresses, neighbours and routes before it returns. Events come
// at once, not debounced; only repetitions are left out: within one message from the kernel, and of what a
// bridge told of its port last. If
// the kernel's buffer overflows because the reader is slow, a Resync event follows. The channel
// is closed when ctx ends, or, after a last Resync event, when the socket fails.
func (d *Devices) Watch(ctx context.Context) (<-chan Event, error) {
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch devices: %w", err)
	}
	// RTNLGRP_NEIGH and the others all fit into the bind mask, yet membership one by one also
	// works for groups above 32.
	for _, group := range []int{
		unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	} {
		if err := unix.SetsockoptInt(sock.GetFd(), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			sock.Close()
			return nil, fmt.Errorf("watch devices: join group %d: %w", group, err)
		}
	}
	// Without CAP_NET_ADMIN the forced size is refused; the default still works.
	if err := sock.SetReceiveBufferSize(watchBuffer, true); err != nil {
		_ = sock.SetReceiveBufferSize(watchBuffer, false)
	}

	w := &watcher{links: d.links, out: make(chan Event, 64)}
	if err := w.relearn(); err != nil {
		sock.Close()
		return nil, fmt.Errorf("watch devices: %w", err)
	}

	stop := context.AfterFunc(ctx, func() { w.close(sock) })
	go func() {
		defer close(w.out)
		defer w.close(sock)
		defer stop()
		w.run(ctx, sock)
	}()
	return w.out, nil
}

// watcher turns netlink messages into events. It is owned by one goroutine.
type watcher struct {
	links func() ([]device, error)
	names map[int]string
	ports map[int]port // as last told of, by index
	out   chan Event

	mu     sync.Mutex // held to close the socket, and to use its bare descriptor
	closed bool
}

func (w *watcher) close(sock *nl.NetlinkSocket) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		w.closed = true
		sock.Close()
	}
}

// port is what is told of a bridge port. A bridge repeats it fifteen seconds after the port has come, when
// its forward delay is over, and whenever a setting of the port's changes.
type port struct {
	device
	flags uint32 // IFF_RUNNING and IFF_LOWER_UP among them
}

func (w *watcher) relearn() error {
	w.ports = make(map[int]port)
	links, err := w.links()
	if err != nil {
		return err
	}
	w.names = make(map[int]string, len(links))
	for _, l := range links {
		w.names[l.index] = l.name
	}
	return nil
}

func (w *watcher) run(ctx context.Context, sock *nl.NetlinkSocket) {
	for {
		msgs, from, err := sock.Receive()
		switch {
		case ctx.Err() != nil:
			return
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.ENOBUFS):
			w.drain(sock)
			// Names may stay as they were: an event without one is still an event.
			_ = w.relearn()
			if !w.send(ctx, Event{Kind: Resync}) {
				return
			}
			continue
		case err != nil:
			w.send(ctx, Event{Kind: Resync})
			return
		}
		if from.Pid != 0 { // not from the kernel
			continue
		}
		var last Event
		for i := range msgs {
			ev, ok := w.parse(&msgs[i])
			if !ok || ev == last {
				continue
			}
			last = ev
			if !w.send(ctx, ev) {
				return
			}
		}
	}
}

// drain empties the socket. After an overflow the kernel goes on losing messages without
// another word until the queue has been empty once, so only then is a Resync the last word.
func (w *watcher) drain(sock *nl.NetlinkSocket) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var buf [64]byte
	for !w.closed {
		_, _, err := unix.Recvfrom(sock.GetFd(), buf[:], unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func (w *watcher) send(ctx context.Context, ev Event) bool {
	select {
	case w.out <- ev:
		return true
	case <-ctx.Done():
		return false
	}
}

// parse returns false for messages that are of no interest or cannot be read.
func (w *watcher) parse(m *syscall.NetlinkMessage) (Event, bool) {
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if len(m.Data) == 0 {
			return Event{}, false
		}
		family := m.Data[0]
		l, err := parseLink(m.Data)
		if err != nil {
			return Event{}, false
		}
		ev := Event{Kind: LinkChanged, Gone: m.Header.Type == unix.RTM_DELLINK, Ifindex: l.index, Name: l.name, Master: l.master}
		if family == unix.AF_BRIDGE {
			ev.Kind = PortChanged
			now := port{l, binary.NativeEndian.Uint32(m.Data[8:])}
			if !ev.Gone && w.ports[l.index] == now {
				return Event{}, false
			}
			w.ports[l.index] = now
		}
		if ev.Gone {
			delete(w.ports, l.index)
		}
		if ev.Kind == LinkChanged && ev.Gone {
			delete(w.names, ev.Ifindex)
		} else if ev.Name != "" {
			w.names[ev.Ifindex] = ev.Name
		}
		ev.MasterName = w.names[ev.Master]
		return ev, true

	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(m.Data) < unix.SizeofIfAddrmsg {
			return Event{}, false
		}
		idx := int(nl.DeserializeIfAddrmsg(m.Data).Index)
		return w.event(AddrChanged, m.Header.Type == unix.RTM_DELADDR, idx), true

	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		if len(m.Data) < unix.SizeofNdMsg {
			return Event{}, false
		}
		if m.Data[0] == unix.AF_BRIDGE { // forwarding database entries
			return Event{}, false
		}
		n, err := netlink.NeighDeserialize(m.Data)
		if err != nil {
			return Event{}, false
		}
		return w.event(NeighChanged, m.Header.Type == unix.RTM_DELNEIGH, n.LinkIndex), true

	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(m.Data) < unix.SizeofRtMsg {
			return Event{}, false
		}
		attrs, err := nl.ParseRouteAttr(m.Data[unix.SizeofRtMsg:])
		if err != nil {
			return Event{}, false
		}
		idx := 0
		for _, a := range attrs {
			if a.Attr.Type == unix.RTA_OIF && len(a.Value) == 4 {
				idx = int(nl.NativeEndian().Uint32(a.Value))
			}
		}
		return w.event(RouteChanged, m.Header.Type == unix.RTM_DELROUTE, idx), true
	}
	return Event{}, false
}

func (w *watcher) event(kind Kind, gone bool, ifindex int) Event {
	return Event{Kind: kind, Gone: gone, Ifindex: ifindex, Name: w.names[ifindex]}
}
