// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TunIf is the name of a tun link at both ends.
const TunIf = "tun0"

// The addresses of the tun link.
var (
	Tun4    = netip.MustParseAddr("203.0.113.129") // of Host
	Tun6    = netip.MustParseAddr("2001:db8:4::1")
	Remote4 = netip.MustParseAddr("203.0.113.130") // of the machine at the other end
	Remote6 = netip.MustParseAddr("2001:db8:4::2")
)

// Tun connects one more machine to the host by a pair of tun devices, which have no Ethernet
// header, as a VPN or a mobile network would. All routes of that machine lead to the host. An
// mtu of 0 stands for 1500 bytes. A lab has one such link.
//
// The devices carry no offloads: what the host would segment later is segmented before it
// comes to the device, and every checksum is complete.
func (l *Lab) Tun(t testing.TB, mtu int) *NS {
	t.Helper()
	remote := l.NewNS(t, "remote")
	if mtu == 0 {
		mtu = 1500
	}
	a := l.Host.tun(t, mtu, addr(Tun4, 25), addr(Tun6, 64))
	b := remote.tun(t, mtu, addr(Remote4, 25), addr(Remote6, 64))
	var wait sync.WaitGroup
	for _, way := range [][2]*os.File{{a, b}, {b, a}} {
		wait.Go(func() {
			if err := carry(way[0], way[1]); err != nil {
				t.Errorf("tun link: %v", err)
			}
		})
	}
	t.Cleanup(func() {
		// Closing ends the reads, and the devices with them.
		if err := errors.Join(a.Close(), b.Close()); err != nil {
			t.Errorf("tun link: %v", err)
		}
		wait.Wait()
	})
	remote.routeByDefault(t, Tun4, Tun6)
	return remote
}

// carry copies packets from one device to the other until either is closed. What waits for it
// waits in the device's own queue, which is bounded.
func carry(from, to *os.File) error {
	buf := make([]byte, 1<<16)
	for {
		size, err := from.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		_, err = to.Write(buf[:size])
		switch {
		case errors.Is(err, os.ErrClosed):
			return nil
		case errors.Is(err, unix.EIO), errors.Is(err, unix.EINVAL):
			// The device is down, or the packet is neither IPv4 nor IPv6: lost, as on a wire.
		case err != nil:
			return fmt.Errorf("write: %w", err)
		}
	}
}

// tun makes a tun device, which lives as long as the file is open.
func (n *NS) tun(t testing.TB, mtu int, addrs ...netip.Prefix) *os.File {
	t.Helper()
	var file *os.File
	err := n.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		req, err := unix.NewIfreq(TunIf)
		if err == nil {
			req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err == nil { // only now: the poller does not take a tun without a device
			err = unix.SetNonblock(fd, true)
		}
		if err != nil {
			unix.Close(fd)
			return err
		}
		file = os.NewFile(uintptr(fd), "/dev/net/tun")
		return nil
	})
	if err != nil {
		t.Fatalf("make tun device in %s: %v", n.Name, err)
	}
	n.link(t, func(h *netlink.Handle) error {
		link, err := h.LinkByName(TunIf)
		if err != nil {
			return err
		}
		return h.LinkSetMTU(link, mtu)
	})
	n.setUp(t, TunIf, addrs...)
	return file
}
