// SPDX-License-Identifier: Apache-2.0

// Package policy is the pure core of bpfnet: the model of networks, endpoints and
// published ports, and their compilation into the tables that the data path reads.
// It makes no system calls and knows no clock, no logger and no source of state.
package policy

import (
	"fmt"
	"net/netip"
)

// MAC is an Ethernet address.
type MAC [6]byte

// String returns the address in the usual colon form.
func (m MAC) String() string {
	const digits = "0123456789abcdef"
	var out [17]byte
	for i, b := range m {
		if i > 0 {
			out[3*i-1] = ':'
		}
		out[3*i], out[3*i+1] = digits[b>>4], digits[b&15]
	}
	return string(out[:])
}

// IsZero reports whether no address is set.
func (m MAC) IsZero() bool { return m == MAC{} }

// Proto is an IP protocol number.
type Proto uint8

// The protocols that can be published.
const (
	TCP  Proto = 6
	UDP  Proto = 17
	SCTP Proto = 132
)

// String returns the lower-case name Docker uses.
func (p Proto) String() string {
	switch p {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	case SCTP:
		return "sctp"
	}
	return fmt.Sprintf("proto-%d", uint8(p))
}

// ParseProto is the inverse of Proto.String for the publishable protocols.
func ParseProto(s string) (Proto, error) {
	switch s {
	case "tcp", "":
		return TCP, nil
	case "udp":
		return UDP, nil
	case "sctp":
		return SCTP, nil
	}
	return 0, fmt.Errorf("unknown protocol %q: use tcp, udp or sctp", s)
}

// Source names where a network or an endpoint came from.
type Source string

// The sources of state.
const (
	SourceDocker Source = "docker"
	SourceStore  Source = "bpfnet"
)

// Network is a bridge with its subnets and options.
type Network struct {
	ID     string // as the source names it
	Name   string
	Source Source
	Bridge string // device name on the host

	Subnets  []netip.Prefix
	Gateways []netip.Addr // addresses of the bridge, at most one a family

	// NoICC forbids traffic between the containers of this network (enable_icc=false).
	NoICC bool
	// NoMasquerade keeps container addresses on the way out (enable_ip_masquerade=false).
	NoMasquerade bool
	// Internal networks reach nothing but themselves and the host.
	Internal bool
	// Mode4 and Mode6 say how containers are reached from beyond the network.
	Mode4, Mode6 GatewayMode
	// Source4 and Source6 are addresses to masquerade with. Optional: the route's.
	Source4, Source6 netip.Addr
	// Trusted are devices by which containers' own addresses may be dialled, at published ports.
	Trusted []string
	// HostBinding is the default host address of published ports. Optional: any address.
	HostBinding netip.Addr
	// MTU in bytes, 0 if the source did not say.
	MTU int
}

// SetOptions takes over the options.
func (n *Network) SetOptions(o Options) {
	n.NoICC, n.NoMasquerade, n.HostBinding, n.MTU = o.NoICC, o.NoMasquerade, o.HostBinding, o.MTU
	n.Mode4, n.Mode6, n.Source4, n.Source6, n.Trusted = o.Mode4, o.Mode6, o.Source4, o.Source6, o.Trusted
	if o.Mode4 == ModeIsolated || o.Mode6 == ModeIsolated {
		n.Internal = true
	}
}

// Mode is the gateway mode of a family.
func (n Network) Mode(is4 bool) GatewayMode {
	if is4 {
		return n.Mode4
	}
	return n.Mode6
}

// QualifiedName is the network's name among those of all sources: docker/frontend.
func (n Network) QualifiedName() string { return Qualify(n.Source, n.Name) }

// Qualify puts a source before a name. No source allows a slash in a name.
func Qualify(s Source, name string) string { return string(s) + "/" + name }

// Endpoint is one interface of one sandbox in one network.
type Endpoint struct {
	ID        string // as the source names it
	NetworkID string
	// SandboxID is the same for all endpoints of one network namespace (a container's ID for Docker).
	SandboxID string
	Name      string // the container's name
	Source    Source
	Addrs     []netip.Addr // at most one a family; link-local addresses are derived
	MAC       MAC
	// Allowed are more sources that the sandbox may send from (label bpfnet.allowed_addresses). Optional.
	Allowed []netip.Prefix
}

// Port is one published port: a host address and port that leads to an endpoint's port.
type Port struct {
	Proto Proto
	// Host is the binding. An unspecified address (0.0.0.0 or ::) stands for every host address of its family.
	Host       netip.AddrPort
	EndpointID string
	// Target is the container's port.
	Target uint16
	// Refused: the source holds the host's port, but it is not to lead anywhere.
	Refused bool
	// Relay says that the source holds no socket for the host port: bpfnet's relay is to hold it, and to
	// serve it. Only for IPv6 addresses that lead to a container with IPv4 only.
	Relay bool
}

// Narrow is the port where no host address was asked for and binding is the network's default one: on
// that address, and refused on the others.
func (p Port) Narrow(binding netip.Addr) []Port {
	host := p.Host.Addr()
	if !binding.IsValid() || binding.IsUnspecified() || !host.IsUnspecified() {
		return []Port{p}
	}
	rest := p
	rest.Refused = true
	if host.Is4() != binding.Is4() {
		return []Port{rest}
	}
	p.Host = netip.AddrPortFrom(binding, p.Host.Port())
	return []Port{p, rest}
}

// String is the binding in Docker's words: 0.0.0.0:8080->80/tcp.
func (p Port) String() string {
	return fmt.Sprintf("%s->%d/%s", p.Host, p.Target, p.Proto)
}

// Opening lets one endpoint dial a port of another where their network keeps containers apart
// (docker run --link), over IPv4 only.
type Opening struct {
	From, To string // endpoint IDs
	Proto    Proto
	Port     uint16
}

// State is the full state of one source at one moment.
type State struct {
	Networks  []Network
	Endpoints []Endpoint
	Ports     []Port
	Openings  []Opening
	// Problems are what the source has found wrong in the settings.
	Problems []Problem
}

// Link is a bridge port of a served network as the kernel shows it.
type Link struct {
	Ifindex int    // of the host side
	Name    string // of the host side
	Bridge  string // name of the bridge it is a port of
	PeerMAC MAC    // of the container's side; zero while unknown
	PeerNS  int    // number of the container's namespace in the host's; -1: it is in the host's
}

// Bridge is a bridge device as the kernel shows it.
type Bridge struct {
	Ifindex int
	Name    string
	MAC     MAC
	MTU     int
	Up      bool
	Addrs   []netip.Prefix
}

// Uplink is a device of the host's namespace with an address, neither lo nor a served bridge.
type Uplink struct {
	Ifindex  int
	Name     string
	Ethernet bool // has an Ethernet header
	MAC      MAC
	Tagged   bool // carries VLANs that have devices of their own
	MTU      int
	Addrs    []netip.Prefix
}

// HostAddr is an address that the host itself answers to.
type HostAddr struct {
	Addr    netip.Addr
	Ifindex int
}

// Devices is what the kernel's host namespace holds at one moment.
type Devices struct {
	Bridges   []Bridge
	Links     []Link
	Uplinks   []Uplink
	HostAddrs []HostAddr // loopback's included
}
