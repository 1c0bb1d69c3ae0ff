// SPDX-License-Identifier: Apache-2.0

package reserve

import (
	"bytes"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// endClosed ends the connections that keep a TCP port from being bound, if all of its rivals are
// connections that no process has any more and that have no data to send: TIME_WAIT, and FIN_WAIT2
// where the peer is slow to close. They stand in the way even of SO_REUSEADDR if they began without
// that option, as those of simple servers do, and those of clients that had the port by chance.
// TIME_WAIT keeps old packets from a new connection between the same four; here the data path gets
// the packets, and gives them to another host.
//
// The kernel itself makes room, so its own judgement of who collides stays in force. Kernels
// without CONFIG_INET_DIAG_DESTROY do not: then the connections are left, for a minute at most.
func endClosed(list []socket) bool {
	for _, s := range list {
		if s.inode != 0 || s.state != timeWait && s.state != finWait2 {
			return false
		}
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	for _, s := range list {
		if err := destroy(fd, s); err != nil && !errors.Is(err, unix.ENOENT) {
			return false
		}
	}
	return true
}

// diagRequest is the kernel's struct inet_diag_req_v2 after its struct nlmsghdr: sock_diag(7).
type diagRequest struct {
	Header   unix.NlMsghdr
	Family   uint8
	Protocol uint8
	_        [2]uint8
	States   uint32
	Sport    [2]byte // in the network's order, as are the addresses
	Dport    [2]byte
	Src      [16]byte
	Dst      [16]byte
	Ifindex  uint32
	Cookie   [2]uint32
}

// destroy ends one TCP connection. The error is ENOENT if it is gone.
func destroy(fd int, s socket) error {
	req := diagRequest{
		Header:   unix.NlMsghdr{Type: unix.SOCK_DESTROY, Flags: unix.NLM_F_REQUEST | unix.NLM_F_ACK},
		Family:   uint8(s.family),
		Protocol: unix.IPPROTO_TCP,
		States:   ^uint32(0),
		Cookie:   [2]uint32{^uint32(0), ^uint32(0)}, // INET_DIAG_NOCOOKIE: any
	}
	binary.BigEndian.PutUint16(req.Sport[:], s.local.Port())
	binary.BigEndian.PutUint16(req.Dport[:], s.remote.Port())
	copy(req.Src[:], s.local.Addr().AsSlice())
	copy(req.Dst[:], s.remote.Addr().AsSlice())
	req.Header.Len = uint32(binary.Size(req))

	var msg bytes.Buffer
	if err := binary.Write(&msg, binary.NativeEndian, req); err != nil {
		return err
	}
	if err := unix.Sendto(fd, msg.Bytes(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 1024)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	if n < unix.SizeofNlMsghdr+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return unix.EPROTO
	}
	if code := int32(binary.NativeEndian.Uint32(answer[unix.SizeofNlMsghdr:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}
