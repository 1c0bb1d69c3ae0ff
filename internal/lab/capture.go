// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
)

// Frame is one captured Ethernet frame.
type Frame struct {
	gopacket.Packet
	// Outgoing is set when the interface sent the frame, not received it.
	Outgoing bool
	// PartialChecksum is set when the kernel had not completed the transport checksum:
	// the field holds the pseudo header's sum only, and says nothing about correctness.
	PartialChecksum bool
}

// Capture collects the frames of one interface.
type Capture struct {
	fd     int
	filter func(gopacket.Packet) bool
	stop   chan struct{}
	done   chan struct{}
	once   sync.Once

	mu     sync.Mutex
	frames []Frame
	err    error
}

// Capture begins to collect the frames that pass an interface of the namespace, in both
// directions, and for which filter holds; a nil filter takes all. It has begun when
// Capture returns, and ends with the test.
func (n *NS) Capture(t testing.TB, ifname string, filter func(gopacket.Packet) bool) *Capture {
	t.Helper()
	c := &Capture{filter: filter, stop: make(chan struct{}), done: make(chan struct{})}
	var err error
	if c.fd, err = n.packetSocket(t, ifname, unix.ETH_P_ALL); err != nil {
		t.Fatalf("capture on %s: %v", ifname, err)
	}
	go c.collect()
	t.Cleanup(func() {
		c.Stop()
		if c.err != nil {
			t.Errorf("capture on %s: %v", ifname, c.err)
		}
	})
	return c
}

// packetSocket opens an AF_PACKET socket on an interface of the namespace. Protocol is
// in host byte order; 0 receives nothing.
func (n *NS) packetSocket(t testing.TB, ifname string, protocol uint16) (int, error) {
	t.Helper()
	index := n.Ifindex(t, ifname)
	fd := -1
	err := n.Do(func() (err error) {
		// Bound before it has a protocol, a socket would see all interfaces for a moment.
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		err = errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1),
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20),
			unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: index, Protocol: htons(protocol)}),
		)
		if err != nil {
			unix.Close(fd)
		}
		return err
	})
	return fd, err
}

// htons returns v in network byte order.
func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (c *Capture) collect() {
	defer close(c.done)
	buf := make([]byte, 1<<17) // segmentation offload makes frames of up to 64 KiB
	oob := make([]byte, 256)
	for {
		select {
		case <-c.stop:
			return
		default:
		}
		const wait = 20 // ms, the longest that Stop has to wait
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}, wait)
		if err != nil && err != unix.EINTR {
			c.err = err
			return
		}
		for {
			size, oobSize, _, from, err := unix.Recvmsg(c.fd, buf, oob, unix.MSG_DONTWAIT)
			if err == unix.EAGAIN || err == unix.EINTR {
				break
			}
			if err == unix.ENETDOWN { // the interface went away or down
				break
			}
			if err != nil {
				c.err = err
				return
			}
			c.add(buf[:size], oob[:oobSize], from)
		}
	}
}

func (c *Capture) add(data, oob []byte, from unix.Sockaddr) {
	p := gopacket.NewPacket(data, layers.LayerTypeEthernet, gopacket.Default) // copies data
	if c.filter != nil && !c.filter(p) {
		return
	}
	f := Frame{Packet: p}
	if ll, ok := from.(*unix.SockaddrLinklayer); ok {
		f.Outgoing = ll.Pkttype == unix.PACKET_OUTGOING
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err == nil {
		for _, m := range messages {
			if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA && len(m.Data) >= 4 {
				status := *(*uint32)(unsafe.Pointer(&m.Data[0]))
				f.PartialChecksum = status&unix.TP_STATUS_CSUMNOTREADY != 0
			}
		}
	}
	c.mu.Lock()
	c.frames = append(c.frames, f)
	c.mu.Unlock()
}

// Frames returns what has been collected so far, in order.
func (c *Capture) Frames() []Frame {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Frame(nil), c.frames...)
}

// Wait returns the frames as soon as there are count of them, and fails the test when
// that takes longer than timeout.
func (c *Capture) Wait(t testing.TB, count int, timeout time.Duration) []Frame {
	t.Helper()
	if !poll(timeout, func() bool { return len(c.Frames()) >= count }) {
		for _, f := range c.Frames() {
			t.Log(f.Packet)
		}
		t.Fatalf("%d frames captured within %v, want %d", len(c.Frames()), timeout, count)
	}
	return c.Frames()
}

// Stop ends the capture; the frames stay readable.
func (c *Capture) Stop() {
	c.once.Do(func() {
		close(c.stop)
		<-c.done
		unix.Close(c.fd)
	})
}

// SendFrame sends an Ethernet frame out of an interface of the namespace, as it is.
func (n *NS) SendFrame(t testing.TB, ifname string, frame []byte) {
	t.Helper()
	n.SendFrames(t, ifname, [][]byte{frame})
}

// SendFrames sends Ethernet frames out of an interface of the namespace, in order.
func (n *NS) SendFrames(t testing.TB, ifname string, frames [][]byte) {
	t.Helper()
	fd, err := n.packetSocket(t, ifname, 0)
	if err != nil {
		t.Fatalf("send on %s: %v", ifname, err)
	}
	defer unix.Close(fd)
	for i, frame := range frames {
		if _, err := unix.Write(fd, frame); err != nil {
			t.Fatal(fmt.Errorf("send frame %d on %s: %w", i, ifname, err))
		}
	}
}
