// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"net/netip"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/policy"
)

// Everything that knows byte order or the layout of an address stands in this file. The objects are
// little-endian only (bpfel), and so are the hosts that load them.

// addr is the data path's form: IPv4 as ::ffff:a.b.c.d, network byte order in memory.
func addr(a netip.Addr) bpf.DatapathAddr {
	raw := a.As16()
	var out bpf.DatapathAddr
	for i := range out.W {
		out.W[i] = binary.LittleEndian.Uint32(raw[4*i:])
	}
	return out
}

func fromAddr(a bpf.DatapathAddr) netip.Addr {
	var raw [16]byte
	for i := range a.W {
		binary.LittleEndian.PutUint32(raw[4*i:], a.W[i])
	}
	return netip.AddrFrom16(raw).Unmap()
}

// addr6 is the zero address for an invalid one, as the data path has it.
func addr6(a netip.Addr) bpf.DatapathAddr {
	if !a.IsValid() {
		return bpf.DatapathAddr{}
	}
	return addr(a)
}

// addr4 is a __be32; 0 for an invalid address.
func addr4(a netip.Addr) uint32 {
	if !a.IsValid() {
		return 0
	}
	raw := a.As4()
	return binary.LittleEndian.Uint32(raw[:])
}

func fromAddr4(v uint32) netip.Addr {
	if v == 0 {
		return netip.Addr{}
	}
	var raw [4]byte
	binary.LittleEndian.PutUint32(raw[:], v)
	return netip.AddrFrom4(raw)
}

// port16 swaps between host order and a __be16; it is its own inverse.
func port16(p uint16) uint16 { return p>>8 | p<<8 }

// mappedBits is the length of a prefix in the data path's address form.
func mappedBits(p netip.Prefix) uint32 {
	if p.Addr().Is4() {
		return uint32(p.Bits()) + 96
	}
	return uint32(p.Bits())
}

func networkValue(r policy.NetworkRow) bpf.DatapathNetwork {
	v := bpf.DatapathNetwork{
		Ifindex: uint32(r.Ifindex), Mac: r.MAC, Mtu: uint16(min(r.MTU, 65535)),
		Gateway4: addr4(r.Gateway4), Gateway6: addr6(r.Gateway6),
		Mode4: bpf.DatapathGatewayMode(r.Mode4), Mode6: bpf.DatapathGatewayMode(r.Mode6),
		Source4: addr4(r.Source4), Source6: addr6(r.Source6),
	}
	if r.NoICC {
		v.Flags |= bpf.DatapathNetworkFlagsNETWORK_NO_ICC
	}
	if r.Masquerade {
		v.Flags |= bpf.DatapathNetworkFlagsNETWORK_MASQUERADE
	}
	if r.Internal {
		v.Flags |= bpf.DatapathNetworkFlagsNETWORK_INTERNAL
	}
	return v
}

func endpointValue(r policy.EndpointRow) bpf.DatapathEndpoint {
	return bpf.DatapathEndpoint{
		Ifindex: uint32(r.Ifindex), Sandbox: r.Sandbox, Net: r.Network,
		Flags: bpf.DatapathEndpointFlagsENDPOINT_READY, Mac: r.MAC,
		Addr4: addr4(r.Addr4), Addr6: addr6(r.Addr6),
	}
}

func portKey(k policy.PortKey) bpf.DatapathPortKey {
	return bpf.DatapathPortKey{Addr: addr(k.Host.Addr()), Port: port16(k.Host.Port()), Proto: uint8(k.Proto)}
}

func fromPortKey(k bpf.DatapathPortKey) policy.PortKey {
	return policy.PortKey{Proto: policy.Proto(k.Proto), Host: addrPort(k.Addr, k.Port)}
}

func addrPort(a bpf.DatapathAddr, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(fromAddr(a), port16(port))
}

func portValue(r policy.PortRow) bpf.DatapathPort {
	return bpf.DatapathPort{
		Addr: addr(r.Target.Addr()), Port: port16(r.Target.Port()), Endpoint: r.Endpoint, Slot: r.Slot,
	}
}

func openKey(k policy.OpenKey) bpf.DatapathOpenKey {
	return bpf.DatapathOpenKey{
		Saddr: addr6(k.From), Daddr: addr(k.To.Addr()), Port: port16(k.To.Port()), Proto: uint8(k.Proto),
	}
}

// subnetBit is the bit of port_class.subnets for an address, as maybe_in_subnet() computes it.
func subnetBit(a netip.Addr) uint16 {
	w := addr(a).W
	if a.Is4() {
		return uint16(w[3])
	}
	return uint16(w[0]>>16) ^ uint16(w[0])
}

// subnetBits are the bits of every address of the prefix; all is set where they are too many to
// list, and every bit counts.
func subnetBits(p netip.Prefix) (bits []uint16, all bool) {
	p = p.Masked()
	fixed := 16
	if p.Addr().Is6() {
		fixed = 32
	}
	if p.Bits() >= fixed {
		return []uint16{subnetBit(p.Addr())}, false
	}
	if p.Addr().Is6() {
		return nil, true
	}
	raw := p.Addr().As4()
	first := int(raw[0])<<8 | int(raw[1])
	for i := range 1 << (16 - p.Bits()) {
		v := first + i
		bits = append(bits, subnetBit(netip.AddrFrom4([4]byte{byte(v >> 8), byte(v)})))
	}
	return bits, false
}
