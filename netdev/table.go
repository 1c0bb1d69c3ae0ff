// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"cmp"
	"encoding/binary"
	"errors"
	"maps"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// table holds the links and addresses of the namespace between two dumps of them all. A dump takes the kernel's lock on
// devices once for some dozens of links, and waits each time for whoever moves a device between namespaces.
// The news of a change is in the socket before the kernel lets go of that lock, so what has happened before
// a look at the socket is seen by that look, as by a dump.
type table struct {
	sock  *nl.NetlinkSocket
	links map[int]device // nil: not known
	// Those of which the news does not tell enough: they are read one by one.
	doubtful map[int]bool
	// Addresses by device, IPv4 first, otherwise as the kernel lists them. nil: not known. Those of devices that
	// there is any news of are listed anew: a link-local one comes with its link, and is announced later.
	addrs map[int][]address
	moved map[int]bool
}

// maxDoubtful is how many links are read one by one; if there are more, all are dumped.
const maxDoubtful = 16

func openTable() (*table, error) {
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	for _, group := range []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR} {
		if err := unix.SetsockoptInt(sock.GetFd(), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			sock.Close()
			return nil, err
		}
	}
	if err := sock.SetReceiveBufferSize(watchBuffer, true); err != nil {
		_ = sock.SetReceiveBufferSize(watchBuffer, false)
	}
	return &table{sock: sock}, nil
}

// Forget has the next snapshot dump all links and addresses, whatever was announced.
func (d *Devices) Forget() {
	d.tableMu.Lock()
	defer d.tableMu.Unlock()
	d.table.lose()
}

// lose has all be dumped again: what is known is not enough.
func (t *table) lose() { t.links, t.addrs = nil, nil }

// current returns all links and all addresses, sorted by the devices' index; IPv4 addresses before all others.
func (d *Devices) current() ([]device, []address, error) {
	d.tableMu.Lock()
	defer d.tableMu.Unlock()
	d.table.catchUp()
	links, err := d.currentLinks()
	if err != nil {
		return nil, nil, err
	}
	addrs, err := d.currentAddrs()
	return links, addrs, err
}

func (d *Devices) currentAddrs() ([]address, error) {
	t := d.table
	if t.addrs == nil || len(t.moved) > maxDoubtful {
		// What the socket tells from here on is looked at by the next call.
		t.addrs, t.moved = nil, make(map[int]bool)
		list, err := d.addrs(0)
		if err != nil {
			return nil, err
		}
		t.addrs = make(map[int][]address)
		for _, a := range list {
			t.addrs[a.index] = append(t.addrs[a.index], a)
		}
	}
	for index := range t.moved {
		list, err := d.addrs(index)
		if err != nil {
			t.addrs = nil
			return nil, err
		}
		if delete(t.addrs, index); len(list) > 0 {
			t.addrs[index] = list
		}
	}
	clear(t.moved)
	var v4, v6 []address
	for _, index := range slices.Sorted(maps.Keys(t.addrs)) {
		for _, a := range t.addrs[index] {
			if a.prefix.Addr().Is4() {
				v4 = append(v4, a)
			} else {
				v6 = append(v6, a)
			}
		}
	}
	return append(v4, v6...), nil
}

func (d *Devices) currentLinks() ([]device, error) {
	t := d.table
	if t.links == nil || len(t.doubtful) > maxDoubtful {
		list, err := d.links()
		if err != nil {
			return nil, err
		}
		t.links, t.doubtful = make(map[int]device, len(list)), make(map[int]bool)
		for _, l := range list {
			t.links[l.index] = l
		}
		// News from before the dump is repeated up to the present; lost news has the next look dump again.
		if t.catchUp(); t.links == nil {
			return list, nil
		}
	}
	for index := range t.doubtful {
		l, err := d.linkByIndex(index)
		if err != nil {
			t.links = nil
			return nil, err
		}
		if l == nil {
			delete(t.links, index)
		} else {
			t.links[index] = *l
		}
	}
	clear(t.doubtful)
	return slices.SortedFunc(maps.Values(t.links), func(a, b device) int { return cmp.Compare(a.index, b.index) }), nil
}

// catchUp takes in what the socket holds. The links are unknown afterwards if some of it is lost.
func (t *table) catchUp() {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := unix.Recvfrom(t.sock.GetFd(), buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return
		case errors.Is(err, unix.ENOBUFS): // more is lost until the socket has been empty
			t.lose()
			continue
		case err != nil:
			t.lose()
			return
		}
		if k, ok := from.(*unix.SockaddrNetlink); !ok || k.Pid != 0 || t.links == nil && t.addrs == nil {
			continue
		}
		if n > len(buf) {
			t.lose()
			continue
		}
		msgs, err := syscall.ParseNetlinkMessage(buf[:n])
		if err != nil {
			t.lose()
			continue
		}
		for i := range msgs {
			t.take(&msgs[i])
		}
	}
}

// take takes in one message.
func (t *table) take(m *syscall.NetlinkMessage) {
	gone := m.Header.Type == unix.RTM_DELLINK
	switch m.Header.Type {
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(m.Data) < unix.SizeofIfAddrmsg {
			t.lose()
		} else if t.addrs != nil {
			t.moved[int(int32(binary.NativeEndian.Uint32(m.Data[4:])))] = true
		}
		return
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
	default:
		return
	}
	l, err := parseLink(m.Data)
	if err != nil {
		t.lose()
		return
	}
	if t.addrs != nil && m.Data[0] == unix.AF_UNSPEC {
		t.moved[l.index] = true
	}
	if t.links == nil {
		return
	}
	old, known := t.links[l.index]
	switch {
	case m.Data[0] != unix.AF_UNSPEC: // of a bridge port, and only what is the bridge's
		if gone || !known || old.master != l.master {
			t.doubtful[l.index] = true
		}
		return
	case gone:
		delete(t.links, l.index)
		delete(t.doubtful, l.index)
		// Its other end learns without news that it has gone, maybe to another namespace.
		for _, index := range []int{old.peer, l.peer} {
			if p, ok := t.links[index]; ok && p.hasPeer() && p.peer == l.index {
				t.doubtful[index] = true
			}
		}
		return
	case l.mtu == 0: // drivers of radios send less than all
		t.doubtful[l.index] = true
		return
	}
	t.links[l.index] = l
	delete(t.doubtful, l.index)
	// The end that was made first was announced without the other. One that comes back is not announced by
	// the other either.
	if p, ok := t.links[l.peer]; ok && l.hasPeer() && l.peerNS < 0 && p.kind == l.kind {
		p.peer, p.peerNS = l.index, -1
		t.links[l.peer] = p
	}
}
