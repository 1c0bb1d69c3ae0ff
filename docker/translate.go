// SPDX-License-Identifier: Apache-2.0

package docker

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/bpfnet/bpfnet/policy"
)

// Options of networks beside those of policy.ParseOptions.
const (
	optDefaultBridge = "com.docker.network.bridge.default_bridge"
	optIPvlanMode    = "ipvlan_mode"
)

// labelAllowed is the container label with more source addresses that it may send from:
// addresses or prefixes, separated by commas.
const labelAllowed = "bpfnet.allowed_addresses"

// binding is one published port, as asked for or as allocated.
type binding struct {
	proto    policy.Proto
	target   uint16     // the container's port
	hostIP   netip.Addr // zero: none given
	hostPort uint16
}

// run is what is known of one run of a container, from start to die.
type run struct {
	bindings []binding // as allocated, completely expanded by the Engine
	// endpoints are those of the run: IDs are new in each run, so a run whose endpoints are all
	// gone is over. The value is the gateway priority.
	endpoints map[string]int
}

// exposed is a port that a container says it listens on.
type exposed struct {
	proto policy.Proto
	port  uint16
}

// wish is what a container asked for when it was made.
type wish struct {
	known bool // it could be read
	name  string
	fixed []binding // those of its bindings that leave no choice
	asked []asked   // all of them, but for -P
	// anywhere are those that were asked for on all of the host's addresses, host port 0 where it was
	// left open.
	anywhere map[binding]bool
	allowed  []netip.Prefix
	links    []string // names or IDs of containers that it is linked to
	exposed  []exposed
}

// asked is a published port in the words of -p: a range of host ports, first 0 for any.
type asked struct {
	proto       policy.Proto
	target      uint16
	hostIP      netip.Addr // zero: none given
	first, last uint16
}

// onlyIPv4 reports whether an allocated binding to 0.0.0.0 was asked for in those words; without an
// address it would stand for IPv6 too.
func (w wish) onlyIPv4(b binding) bool {
	only := false
	for _, a := range w.asked {
		if a.proto != b.proto || a.target != b.target || b.hostPort < a.first || b.hostPort > a.last {
			continue
		}
		if !a.hostIP.IsValid() {
			return false
		}
		only = only || a.hostIP == netip.IPv4Unspecified()
	}
	return only
}

// printable is a name as it may be written to a terminal and a log. The Engine takes any for a network, escape sequences too;
// what is not printed stands as Go would write it in quotes.
func printable(name string) string {
	if !strings.ContainsFunc(name, func(r rune) bool { return !strconv.IsPrint(r) || r == utf8.RuneError }) {
		return name
	}
	q := strconv.Quote(name)
	return q[1 : len(q)-1]
}

// translateNetwork returns a bridge network with its endpoints and what is wrong with its options, and
// false for a network of any other driver, or one of which no subnet is known.
//
// An endpoint's SandboxID is the Engine's key: the container's ID, the builder's name for an
// image build, and "ep-" with the endpoint's ID as long as it has not joined a namespace, which
// is seen for some milliseconds when a network is read that early.
func translateNetwork(n network.Inspect, def DefaultBridgeSettings) (policy.Network, []policy.Endpoint, []policy.Problem, bool) {
	if n.Driver != "bridge" || n.ConfigOnly {
		return policy.Network{}, nil, nil, false
	}
	net := policy.Network{ID: n.ID, Name: printable(n.Name), Source: policy.SourceDocker, Bridge: bridgeName(n), Internal: n.Internal}
	labels := n.Options
	isDefault := labels[optDefaultBridge] == "true"
	if isDefault { // what the Engine says of masquerading there is not what was asked for
		labels = maps.Clone(labels)
		labels[policy.OptMasquerade] = strconv.FormatBool(!def.NoMasquerade)
	}
	options, problems := policy.ParseOptions(labels, n.Internal)
	if isDefault {
		options.NoICC = options.NoICC || def.NoICC
		if def.HostBinding.IsValid() {
			options.HostBinding = def.HostBinding
		}
	}
	net.SetOptions(options)
	for i := range problems {
		problems[i].Network = net.QualifiedName()
	}

	var has4, has6 bool
	for _, c := range n.IPAM.Config {
		if !c.Subnet.IsValid() {
			continue
		}
		subnet := netip.PrefixFrom(c.Subnet.Addr().Unmap(), c.Subnet.Bits()).Masked()
		switch {
		case !subnet.IsValid():
			continue
		case subnet.Addr().Is4() && !has4:
			has4 = true
		case subnet.Addr().Is6() && !has6 && n.EnableIPv6:
			has6 = true
		default: // the driver uses one subnet a family, and none of a family that is off
			continue
		}
		gw := c.Gateway.Unmap()
		if !gw.IsValid() {
			gw = subnet.Addr()
			if !subnet.IsSingleIP() {
				gw = gw.Next() // the address manager's first choice
			}
		}
		net.Subnets = append(net.Subnets, subnet)
		net.Gateways = append(net.Gateways, gw)
	}
	if len(net.Subnets) == 0 {
		return policy.Network{}, nil, nil, false
	}

	eps := make([]policy.Endpoint, 0, len(n.Containers))
	for _, key := range slices.Sorted(maps.Keys(n.Containers)) {
		r := n.Containers[key]
		ep := policy.Endpoint{
			ID:        cmp.Or(r.EndpointID, key),
			NetworkID: n.ID,
			SandboxID: key,
			Name:      printable(r.Name),
			Source:    policy.SourceDocker,
		}
		for _, p := range []netip.Prefix{r.IPv4Address, r.IPv6Address} {
			if p.IsValid() && !p.Addr().IsUnspecified() {
				ep.Addrs = append(ep.Addrs, p.Addr().Unmap())
			}
		}
		if len(r.MacAddress) == len(ep.MAC) {
			copy(ep.MAC[:], r.MacAddress)
		}
		eps = append(eps, ep)
	}
	return net, eps, problems, true
}

func bridgeName(n network.Inspect) string {
	if name := n.Options[policy.OptBridge]; name != "" {
		return name
	}
	return "br-" + n.ID[:min(12, len(n.ID))]
}

// actualBindings reads the ports of a container inspect.
func actualBindings(ports network.PortMap) []binding {
	var out []binding
	for p, list := range ports {
		proto, err := policy.ParseProto(string(p.Proto()))
		if err != nil {
			continue
		}
		for _, b := range list {
			if hp, err := strconv.ParseUint(b.HostPort, 10, 16); err == nil && hp != 0 {
				out = append(out, binding{proto, p.Num(), b.HostIP.Unmap(), uint16(hp)})
			}
		}
	}
	return out
}

// summaryBindings reads the ports of an entry of the list of containers.
func summaryBindings(ports []container.PortSummary) []binding {
	var out []binding
	for _, p := range ports {
		proto, err := policy.ParseProto(strings.ToLower(p.Type))
		if err != nil || p.PublicPort == 0 {
			continue
		}
		out = append(out, binding{proto, p.PrivatePort, p.IP.Unmap(), p.PublicPort})
	}
	return out
}

// runEndpoints reads the endpoints of a container and their gateway priorities.
func runEndpoints(networks map[string]*network.EndpointSettings) map[string]int {
	out := make(map[string]int, len(networks))
	for _, n := range networks {
		if n != nil && n.EndpointID != "" {
			out[n.EndpointID] = n.GwPriority
		}
	}
	return out
}

// parseAllowed reads the label bpfnet.allowed_addresses; what is no address is left out, as it
// then allows nothing.
func parseAllowed(label string) []netip.Prefix {
	var out []netip.Prefix
	for part := range strings.SplitSeq(label, ",") {
		part = strings.TrimSpace(part)
		if p, err := netip.ParsePrefix(part); err == nil {
			out = append(out, p.Masked())
		} else if a, err := netip.ParseAddr(part); err == nil && a.Zone() == "" {
			a = a.Unmap()
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

// buildState joins networks, wishes and runs (both by container ID) into one state. The result
// is sorted, so that equal input gives equal output.
func buildState(networks []network.Inspect, wishes map[string]wish, runs map[string]run, def DefaultBridgeSettings) policy.State {
	var st policy.State
	binding4 := make(map[string]netip.Addr)         // endpoint → default host address of its network
	gateways := make(map[string][]policy.Candidate) // sandbox →
	narrowed := make(map[string]bool)               // endpoints of the default network, if it has an address of ours
	for _, n := range networks {
		net, eps, problems, ok := translateNetwork(n, def)
		if ok {
			st.Networks = append(st.Networks, net)
			st.Problems = append(st.Problems, problems...)
			if n.Options[optDefaultBridge] == "true" {
				st.Openings = openings(eps, wishes)
				for _, e := range eps {
					narrowed[e.ID] = def.HostBinding.IsValid()
				}
			}
			for i := range eps {
				eps[i].Allowed = wishes[eps[i].SandboxID].allowed
				binding4[eps[i].ID] = net.HostBinding
			}
			st.Endpoints = append(st.Endpoints, eps...)
		}
		if !givesGateway(n) {
			continue
		}
		for key, r := range n.Containers {
			gateways[key] = append(gateways[key], policy.Candidate{
				Endpoint: cmp.Or(r.EndpointID, key),
				Network:  n.Name,
				Bridge:   ok,
				Internal: n.Internal,
				Priority: runs[key].endpoints[r.EndpointID],
				V4:       r.IPv4Address.IsValid(),
				V6:       r.IPv6Address.IsValid(),
			})
		}
	}

	// What is allocated is certain, so it comes first: a container that asks for a taken port
	// has an endpoint until its start fails, and must not get the port meanwhile.
	sandboxes := slices.Sorted(maps.Keys(gateways))
	var wanted []string
	for _, id := range sandboxes {
		r, ok := runs[id]
		if !ok || !r.current(gateways[id]) {
			wanted = append(wanted, id)
			continue
		}
		v4, v6 := policy.GatewayEndpoints(gateways[id])
		for _, b := range r.bindings {
			host := b.hostIP
			if !host.IsValid() {
				host = netip.IPv4Unspecified()
			}
			ports := appendPort(nil, b, netip.AddrPortFrom(host, b.hostPort), v4, v6)
			for _, p := range ports {
				asked := binding{proto: b.proto, target: b.target, hostIP: host, hostPort: b.hostPort}
				open := asked
				open.hostPort = 0
				if narrowed[p.EndpointID] && !wishes[id].anywhere[asked] && !wishes[id].anywhere[open] {
					ports = p.Narrow(def.HostBinding)
				}
			}
			st.Ports = append(st.Ports, ports...)
		}
	}
	for _, id := range wanted {
		v4, v6 := policy.GatewayEndpoints(gateways[id])
		for _, b := range wishes[id].fixed {
			for _, host := range policy.ExpandHost(b.hostIP, b.hostPort, binding4[cmp.Or(v4, v6)], v6 != "") {
				if _, taken := policy.Taken(st.Ports, b.proto, host); !taken {
					st.Ports = appendPort(st.Ports, b, host, v4, v6)
				}
			}
		}
	}

	for _, id := range sandboxes {
		r, ok := runs[id]
		v4, v6 := policy.GatewayEndpoints(gateways[id])
		if !ok || !r.current(gateways[id]) || v4 == "" || v6 != "" {
			continue
		}
		for _, p := range relayPorts(r.bindings, wishes[id], narrowed[v4]) {
			if _, taken := policy.Taken(st.Ports, p.Proto, p.Host); !taken {
				p.EndpointID = v4
				st.Ports = append(st.Ports, p)
			}
		}
	}

	slices.SortFunc(st.Networks, func(a, b policy.Network) int { return cmp.Compare(a.ID, b.ID) })
	slices.SortFunc(st.Endpoints, func(a, b policy.Endpoint) int {
		return cmp.Or(cmp.Compare(a.ID, b.ID), cmp.Compare(a.NetworkID, b.NetworkID))
	})
	slices.SortFunc(st.Ports, func(a, b policy.Port) int {
		return cmp.Or(
			cmp.Compare(a.Proto, b.Proto),
			a.Host.Compare(b.Host),
			cmp.Compare(a.EndpointID, b.EndpointID),
			cmp.Compare(a.Target, b.Target),
		)
	})
	st.Ports = slices.Compact(st.Ports)
	slices.SortFunc(st.Problems, policy.CompareProblems)
	return st
}

// openings are those of the links between containers of the default network: the ports that the linked
// one exposes. Other networks have no links of that kind.
func openings(eps []policy.Endpoint, wishes map[string]wish) []policy.Opening {
	var out []policy.Opening
	for _, from := range eps {
		for _, name := range wishes[from.SandboxID].links {
			for _, to := range eps {
				w := wishes[to.SandboxID]
				if from.ID == to.ID || !(w.name == name || to.Name == name || strings.HasPrefix(to.SandboxID, name)) {
					continue
				}
				for _, e := range w.exposed {
					out = append(out, policy.Opening{From: from.ID, To: to.ID, Proto: e.proto, Port: e.port})
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b policy.Opening) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port))
	})
	return slices.Compact(out)
}

// relayPorts are the IPv6 host ports of a container with IPv4 only that its userland proxy would hold
// and that an Engine without one leaves out. Where there is any, the proxy is on.
// narrowed says that no host address means another than all.
func relayPorts(bindings []binding, w wish, narrowed bool) []policy.Port {
	if !w.known || slices.ContainsFunc(bindings, func(b binding) bool { return b.hostIP.Is6() }) {
		return nil
	}
	var out []policy.Port
	add := func(b binding, host netip.Addr) {
		if b.proto != policy.SCTP {
			out = append(out, policy.Port{Proto: b.proto, Host: netip.AddrPortFrom(host, b.hostPort), Target: b.target, Relay: true})
		}
	}
	for _, b := range bindings {
		if (!b.hostIP.IsValid() || b.hostIP == netip.IPv4Unspecified()) && !narrowed && !w.onlyIPv4(b) {
			add(b, netip.IPv6Unspecified())
		}
	}
	for _, b := range w.fixed {
		if b.hostIP.Is6() && !b.hostIP.IsLinkLocalUnicast() {
			add(b, b.hostIP)
		}
	}
	return out
}

// givesGateway reports whether endpoints of the network get a default route from it.
func givesGateway(n network.Inspect) bool {
	switch n.Driver {
	case "bridge", "macvlan":
		return true
	case "ipvlan":
		return n.Options[optIPvlanMode] == "" || n.Options[optIPvlanMode] == "l2"
	}
	return false
}

// current reports whether the run is the one that the endpoints belong to.
func (r run) current(list []policy.Candidate) bool {
	return slices.ContainsFunc(list, func(c policy.Candidate) bool {
		_, ok := r.endpoints[c.Endpoint]
		return ok
	})
}

// appendPort gives the port to the gateway endpoint of the host address's family. IPv6
// addresses of the host can lead to a container that has only IPv4, not the reverse.
func appendPort(ports []policy.Port, b binding, host netip.AddrPort, v4, v6 string) []policy.Port {
	ep := v4
	if host.Addr().Is6() {
		ep = cmp.Or(v6, v4)
	}
	if ep == "" {
		return ports
	}
	return append(ports, policy.Port{Proto: b.proto, Host: host, EndpointID: ep, Target: b.target})
}
