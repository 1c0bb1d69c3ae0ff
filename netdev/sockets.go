// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// ErrNoDestroy says that the kernel cannot end other programs' sockets (CONFIG_INET_DIAG_DESTROY, or
// the modules tcp_diag and udp_diag, are missing).
var ErrNoDestroy = errors.New("the kernel cannot end sockets (it lacks CONFIG_INET_DIAG_DESTROY, tcp_diag or udp_diag)")

// Socket is a TCP or UDP socket of the host that has a peer.
type Socket struct {
	Proto  policy.Proto
	Cookie uint64
	Local  netip.AddrPort
	Peer   netip.AddrPort // IPv4 for a mapped address
	id     []byte         // struct inet_diag_sockid
	family uint8
}

// Of linux/inet_diag.h and linux/sock_diag.h.
const (
	sockDestroy    = 21 // SOCK_DESTROY
	diagIDSize     = 48 // struct inet_diag_sockid
	diagMsgSize    = 72 // struct inet_diag_msg
	diagBytecode   = 1  // INET_DIAG_REQ_BYTECODE
	bytecodeJump   = 1  // INET_DIAG_BC_JMP
	bytecodeToHost = 8  // INET_DIAG_BC_D_COND
	// chunk is how many addresses one dump asks for: a jump has 16 bits.
	chunk = 256
)

// Kernel states of sockets that have a peer: neither LISTEN nor TIME_WAIT, which has no owner any more.
const (
	tcpStates = 1<<1 | 1<<2 | 1<<3 | 1<<4 | 1<<5 | 1<<8 | 1<<9 | 1<<11
	udpStates = 1 << 1 // connected
)

// diagRequest is struct inet_diag_req_v2.
type diagRequest struct {
	family, proto uint8
	states        uint32
	id            []byte
}

func (r diagRequest) Len() int { return 8 + diagIDSize }

func (r diagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0], b[1] = r.family, r.proto
	binary.NativeEndian.PutUint32(b[4:], r.states)
	copy(b[8:], r.id)
	return b
}

// peerFilter is a program for the kernel's socket dump that accepts sockets with one of the peers.
func peerFilter(peers []netip.Addr) []byte {
	// Per peer, struct inet_diag_bc_op: the condition, and a jump to the end where it holds.
	var b []byte
	size := 0
	for i, a := range peers {
		size += 4 + 8 + a.BitLen()/8
		if i < len(peers)-1 {
			size += 4
		}
	}
	op := func(code, yes uint8, no int) {
		b = append(b, code, yes)
		b = binary.NativeEndian.AppendUint16(b, uint16(no))
	}
	for i, a := range peers {
		cond := 4 + 8 + a.BitLen()/8
		op(bytecodeToHost, uint8(cond), cond+4) // where it does not hold: behind the jump, or past the end
		family := uint8(unix.AF_INET)
		if a.Is6() {
			family = unix.AF_INET6
		}
		b = append(b, family, uint8(a.BitLen()), 0, 0)
		b = binary.NativeEndian.AppendUint32(b, ^uint32(0)) // any port
		b = append(b, a.AsSlice()...)
		if i < len(peers)-1 {
			op(bytecodeJump, 4, size-len(b))
		}
	}
	return b
}

// SocketsTo lists the host's sockets that are connected to one of the addresses, or are about to be.
func SocketsTo(peers []netip.Addr) ([]Socket, error) {
	var out []Socket
	for part := range slices.Chunk(peers, chunk) {
		for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
			for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
				list, err := retry("list sockets", func() ([]Socket, error) { return dumpSockets(family, proto, part) })
				if err != nil {
					return out, err
				}
				out = append(out, list...)
			}
		}
	}
	return out, nil
}

func dumpSockets(family uint8, proto policy.Proto, peers []netip.Addr) ([]Socket, error) {
	states := uint32(tcpStates)
	if proto == policy.UDP {
		states = udpStates
	}
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	req.AddData(diagRequest{family: family, proto: uint8(proto), states: states})
	req.AddData(nl.NewRtAttr(diagBytecode, peerFilter(peers)))
	msgs, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, ErrNoDestroy
	}
	if err != nil {
		return nil, err
	}
	var out []Socket
	for _, m := range msgs {
		if s, ok := parseSocket(m, proto); ok {
			out = append(out, s)
		}
	}
	return out, nil
}

// parseSocket reads a struct inet_diag_msg.
func parseSocket(m []byte, proto policy.Proto) (Socket, bool) {
	if len(m) < diagMsgSize {
		return Socket{}, false
	}
	id := m[4 : 4+diagIDSize]
	s := Socket{Proto: proto, family: m[0], id: slices.Clone(id), Cookie: binary.NativeEndian.Uint64(id[40:])}
	addr := func(b []byte) netip.Addr {
		if s.family == unix.AF_INET {
			return netip.AddrFrom4([4]byte(b))
		}
		return netip.AddrFrom16([16]byte(b)).Unmap()
	}
	s.Local = netip.AddrPortFrom(addr(id[4:20]), binary.BigEndian.Uint16(id))
	s.Peer = netip.AddrPortFrom(addr(id[20:36]), binary.BigEndian.Uint16(id[2:]))
	return s, true
}

// Destroy ends the socket as if its connection had been aborted: its program gets ECONNABORTED. A socket
// that is gone is no error. ErrNoDestroy: this kernel cannot.
func (s Socket) Destroy() error {
	req := nl.NewNetlinkRequest(sockDestroy, unix.NLM_F_ACK)
	req.AddData(diagRequest{family: s.family, proto: uint8(s.Proto), states: ^uint32(0), id: s.id})
	_, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESTALE):
		return nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return ErrNoDestroy
	}
	return fmt.Errorf("end the %s socket %s to %s: %w", s.Proto, s.Local, s.Peer, err)
}

// CanDestroySockets asks the kernel, and ends none. ErrNoDestroy: it cannot.
func CanDestroySockets() error {
	for _, proto := range []policy.Proto{policy.TCP, policy.UDP} {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			// Of all sockets, none has this peer; the unspecified tuple is no socket's.
			if _, err := dumpSockets(family, proto, []netip.Addr{netip.IPv4Unspecified()}); err != nil {
				return err
			}
			s := Socket{Proto: proto, family: family, id: make([]byte, diagIDSize)}
			if err := s.Destroy(); err != nil {
				return err
			}
		}
	}
	return nil
}
