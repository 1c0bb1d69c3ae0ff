// SPDX-License-Identifier: Apache-2.0

// Package conformance compares bpfnet with the Engine's own data path, cell by cell: who reaches what,
// by which protocol, under which network options, and as whom the server sees it.
//
// The matrix, the comparison and the report are pure. The run, which needs root and an Engine, is this
// package's test: it builds one topology three times (Docker's iptables rules with docker-proxy, the
// same without docker-proxy, bpfnet) and sends the same probes in each.
package conformance

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// Cell is one question: does a packet get there, and as whose?
type Cell struct {
	From   string `json:"from"`
	To     string `json:"to"`
	Proto  string `json:"proto"`
	Family string `json:"family"`
	Option string `json:"option"`
}

func (c Cell) String() string {
	return strings.Join([]string{c.Option, c.From, c.To, c.Proto, c.Family}, "/")
}

// Where probes come from. "self" is the container itself that serves; "same" and "other" are
// containers of its own network and of another one.
const (
	Remote    = "remote"    // a machine beyond a router
	Tun       = "tun"       // a machine behind a link without Ethernet header
	Neighbour = "neighbour" // a machine on an uplink's own segment, whose routes lead to the host
	Host      = "host"
	Self      = "self"
	Same      = "same"
	Other     = "other"
)

// Where they go. All but the last five are ways to the container that serves.
const (
	Container   = "container"    // its address, a port that is published
	Unpublished = "unpublished"  // its address, a port that is not
	Any         = "any"          // published without an address, at the first uplink's address
	AnySecond   = "any-second"   // the same, at the second uplink's
	AnyLoopback = "any-loopback" // the same, at 127.0.0.1 and ::1
	Gateway     = "gateway"      // the same, at the address of the network's own gateway
	OwnGateway  = "own-gateway"  // the same, at that of the sender's
	One         = "one"          // published at the first uplink's address
	OneSecond   = "one-second"   // that port at the second uplink's
	Loopback    = "loopback"     // published at 127.0.0.2 and ::1
	LoopbackOut = "loopback-out" // that port at the first uplink's address
	HostService = "host"         // a program of the host, at the first uplink's address
	HostGateway = "host-gateway" // the same, at the gateway's address
	ToRemote    = "to-remote"    // programs on machines outside
	ToTun       = "to-tun"
	ToNeighbour = "to-neighbour"
)

// The values of a cell's fields, in the order of the report.
var (
	Froms    = []string{Remote, Tun, Neighbour, Host, Self, Same, Other}
	Tos      = []string{Container, Unpublished, Any, AnySecond, AnyLoopback, Gateway, OwnGateway, One, OneSecond, Loopback, LoopbackOut, HostService, HostGateway, ToRemote, ToTun, ToNeighbour}
	Protos   = []string{"tcp", "udp", "icmp", "sctp"}
	Families = []string{"v4", "v6"}
)

// Option is one setting of the network that the serving container is on.
type Option struct {
	Name string
	// Text says what it is, for the report.
	Text string
	// Create are the arguments of "docker network create" behind name and subnets. The Engine's own
	// network "bridge" is not created.
	Create []string
	// V4Only has the network made without IPv6.
	V4Only bool
	// Engine are arguments of the reference's dockerd, Daemon those of bpfnet that say the same. Options
	// that differ in these are asked at different times.
	Engine, Daemon []string
	// Linked has senders of the same network started with a link to the server, which only the Engine's
	// own network knows.
	Linked bool
}

// Networks are the names of the networks that an option's server is on. Senders are on the last.
func (o Option) Networks() []string {
	switch {
	case strings.HasPrefix(o.Name, "bridge"):
		return []string{"bridge"}
	case o.Name == "two":
		return []string{"two-a", "two-b"}
	}
	return []string{"net-" + o.Name} // "default" is taken
}

// Worlds are the options in groups that are asked at the same time.
func Worlds() [][]Option {
	var worlds [][]Option
	for _, o := range Options {
		i := slices.IndexFunc(worlds, func(w []Option) bool { return slices.Equal(w[0].Engine, o.Engine) })
		if i < 0 {
			i, worlds = len(worlds), append(worlds, nil)
		}
		worlds[i] = append(worlds[i], o)
	}
	return worlds
}

const label = "com.docker.network."

// Options are those of the matrix.
var Options = []Option{
	{Name: "default", Text: "no options"},
	{Name: "bridge", Text: "the Engine's own network \"bridge\""},
	{Name: "icc-off", Text: "enable_icc=false", Create: []string{"-o", label + "bridge.enable_icc=false"}},
	{Name: "internal", Text: "--internal", Create: []string{"--internal"}},
	{Name: "masquerade-off", Text: "enable_ip_masquerade=false", Create: []string{"-o", label + "bridge.enable_ip_masquerade=false"}},
	{Name: "binding", Text: "host_binding_ipv4=192.0.2.1", Create: []string{"-o", label + "bridge.host_binding_ipv4=192.0.2.1"}},
	{Name: "v4-only", Text: "a network without IPv6", V4Only: true},
	{Name: "routed", Text: "gateway_mode_ipv4 and gateway_mode_ipv6=routed", Create: []string{
		"-o", label + "bridge.gateway_mode_ipv4=routed", "-o", label + "bridge.gateway_mode_ipv6=routed"}},
	{Name: "routed-v6", Text: "gateway_mode_ipv6=routed, IPv4 as usual", Create: []string{
		"-o", label + "bridge.gateway_mode_ipv6=routed"}},
	{Name: "unprotected", Text: "gateway_mode_ipv4 and gateway_mode_ipv6=nat-unprotected", Create: []string{
		"-o", label + "bridge.gateway_mode_ipv4=nat-unprotected", "-o", label + "bridge.gateway_mode_ipv6=nat-unprotected"}},
	{Name: "isolated", Text: "--internal with gateway_mode_ipv4 and gateway_mode_ipv6=isolated", Create: []string{"--internal",
		"-o", label + "bridge.gateway_mode_ipv4=isolated", "-o", label + "bridge.gateway_mode_ipv6=isolated"}},
	{Name: "host-address", Text: "host_ipv4=192.0.2.1, the first uplink's, without IPv6, with which 20.10 takes that option for both families",
		Create: []string{"-o", label + "host_ipv4=192.0.2.1"}, V4Only: true},
	{Name: "trusted", Text: "trusted_host_interfaces=up0, the first uplink", Create: []string{
		"-o", label + "bridge.trusted_host_interfaces=up0"}},
	{Name: "bridge-closed", Text: "the Engine's own network with --icc=false, --ip-masq=false and --ip=192.0.2.1; senders of the same network are linked",
		Engine: []string{"--icc=false", "--ip-masq=false", "--ip=192.0.2.1"},
		Daemon: []string{"--default-bridge-no-icc", "--default-bridge-no-masquerade", "--default-bridge-ip=192.0.2.1"}, Linked: true},
	{Name: "two", Text: "the container is on two networks; senders on the second"},
}

// reasons say, once each, why combinations are no cells. The first that holds counts.
var reasons = []struct {
	text  string
	holds func(c Cell) bool
}{
	{"ICMP knows no ports: it goes to the container, to the host, and outside", func(c Cell) bool {
		return c.Proto == "icmp" && !slices.Contains([]string{Container, HostService, HostGateway, ToRemote, ToTun, ToNeighbour}, c.To)
	}},
	{"SCTP is published without an address only, under one number inside and outside", func(c Cell) bool {
		return c.Proto == "sctp" && slices.Contains([]string{AnyLoopback, One, OneSecond, Loopback, LoopbackOut}, c.To)
	}},
	{"what a container sends to its own address never leaves it", func(c Cell) bool {
		return c.From == Self && (c.To == Container || c.To == Unpublished)
	}},
	{"only a container sends outside, and its neighbours send as it does", func(c Cell) bool {
		return strings.HasPrefix(c.To, "to-") && c.From != Self
	}},
	{"a loopback address is the sender's own; a neighbour can craft a packet to 127.0.0.2 (to ::1, no socket does)", func(c Cell) bool {
		return c.To == AnyLoopback && c.From != Host ||
			c.To == Loopback && c.From != Host && !(c.From == Neighbour && c.Family == "v4")
	}},
	{"only another network has another gateway", func(c Cell) bool { return c.To == OwnGateway && c.From != Other }},
	{"services of the host do not depend on who else the sender's network holds, nor on a network that is not on the way", func(c Cell) bool {
		isService := c.To == HostService || c.To == HostGateway
		return isService && (c.From == Host || c.From == Same || c.From != Self && c.Option != "default" ||
			c.To == HostGateway && c.From != Self)
	}},
	{"a network without IPv6 has no IPv6 addresses: what is left is IPv6 to published ports, from others", func(c Cell) bool {
		o, _ := OptionNamed(c.Option)
		return o.V4Only && c.Family == "v6" && (c.From == Self || c.From == Same || c.Proto == "sctp" ||
			c.To == Container || c.To == Unpublished || c.To == Gateway || c.To == LoopbackOut)
	}},
	{"the port of a single address is closed at others whatever the network's options are", func(c Cell) bool {
		return (c.To == OneSecond || c.To == LoopbackOut) && c.Option != "default"
	}},
	{"a link without Ethernet header is another way in, not another rule: no options but the default's", func(c Cell) bool {
		return c.From == Tun && c.Option != "default" && c.Option != "bridge"
	}},
}

// Cells lists the whole matrix, in the order of the report.
func Cells() []Cell {
	var cells []Cell
	each(func(c Cell) {
		if LeftOut(c) == "" {
			cells = append(cells, c)
		}
	})
	return cells
}

func each(f func(Cell)) {
	for _, o := range Options {
		for _, from := range Froms {
			for _, to := range Tos {
				for _, proto := range Protos {
					for _, family := range Families {
						f(Cell{from, to, proto, family, o.Name})
					}
				}
			}
		}
	}
}

// LeftOut is the reason why a combination is no cell; empty for a cell.
func LeftOut(c Cell) string {
	for _, r := range reasons {
		if r.holds(c) {
			return r.text
		}
	}
	return ""
}

// Sample takes a tenth of the cells at random, and so many more that every value of every field occurs.
// One seed gives one sample.
func Sample(cells []Cell, seed uint64) []Cell {
	r := rand.New(rand.NewPCG(seed, 0))
	order := r.Perm(len(cells))
	seen := map[string]bool{}
	values := func(c Cell) []string {
		return []string{"from " + c.From, "to " + c.To, "proto " + c.Proto, "family " + c.Family, "option " + c.Option}
	}
	var taken []int
	take := func(i int) {
		taken = append(taken, i)
		for _, v := range values(cells[i]) {
			seen[v] = true
		}
	}
	tenth := (len(cells) + 9) / 10
	for _, i := range order[:tenth] {
		take(i)
	}
	for _, i := range order[tenth:] {
		if slices.ContainsFunc(values(cells[i]), func(v string) bool { return !seen[v] }) {
			take(i)
		}
	}
	slices.Sort(taken)
	var sample []Cell
	for _, i := range taken {
		sample = append(sample, cells[i])
	}
	return sample
}

// OptionNamed finds an option of the matrix.
func OptionNamed(name string) (Option, error) {
	for _, o := range Options {
		if o.Name == name {
			return o, nil
		}
	}
	return Option{}, fmt.Errorf("option %q: not in the matrix", name)
}
