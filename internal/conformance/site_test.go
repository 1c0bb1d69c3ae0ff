// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// mode is one of the three data paths that the topology is built with.
type mode struct {
	name   string
	docker lab.DockerOpts
	bpfnet bool
	// sctp: the engine publishes SCTP ports. It binds a socket for each itself where no program does it
	// in docker-proxy's place, and the kernel may have no SCTP.
	sctp bool
}

var modes = []mode{
	{name: "docker-proxy", docker: lab.DockerOpts{IPTables: true, IP6Tables: true}, sctp: true},
	{name: "no docker-proxy", docker: lab.DockerOpts{IPTables: true, IP6Tables: true}},
	{name: "bpfnet", bpfnet: true, sctp: true},
}

// sctplessProxy stands in docker-proxy's place: it does nothing for SCTP, for which docker-proxy needs a
// kernel that has it, so that the engine goes on and writes its rules.
const sctplessProxy = `#!/bin/sh
case "$*" in
*"-proto sctp"*) printf '0\n' >&3; exec 3>&-; exec sleep 1000000 ;;
esac
exec /usr/sbin/docker-proxy "$@"
`

// The machines beyond the uplinks that the lab does not have.
var (
	router4 = netip.MustParsePrefix("203.0.113.65/26") // of client2, towards far
	far4    = netip.MustParsePrefix("203.0.113.66/26")
	router6 = netip.MustParsePrefix("2001:db8:5::1/64")
	far6    = netip.MustParsePrefix("2001:db8:5::2/64")
)

const servicePort = 9000

// site is the topology under one mode.
//
//	neighbour ── up0 host up1 ── client2 (a router) ── remote
//	              tun0 ── a machine without Ethernet
type site struct {
	*lab.Lab
	d *lab.Docker
	b *lab.Bpfnet

	options []Option
	outside map[string]*lab.NS // remote, tun, neighbour
	other   *lab.NS
	gate    pair              // of other's network
	places  map[string]*place // by option

	witnesses map[string]*lab.Witness // by name: an option's, "host", or one of outside
	names     map[netip.Addr]string   // of addresses that belong to the host
}

// pair is an address of each family; one that is missing is the zero Addr.
type pair [2]netip.Addr

func (p pair) of(family string) netip.Addr {
	if family == "v4" {
		return p[0]
	}
	return p[1]
}

// place is what belongs to one option.
type place struct {
	Option
	server, same *lab.NS
	// networks are one, or two where the container is on two: that which publishes first.
	networks                 []network
	any, one, loopback, sctp uint16 // published ports
}

type network struct{ address, gateway pair } // of the server, of the bridge

func newSite(t *testing.T, m mode, world []Option) *site {
	t.Helper()
	began := time.Now()
	s := &site{Lab: lab.New(t, lab.Opts{}), options: world, places: map[string]*place{}, witnesses: map[string]*lab.Witness{}}
	s.machines(t)
	proxy := filepath.Join(s.Dir, "docker-proxy")
	switch {
	case m.bpfnet:
		t.Setenv("BPFNET_SOCKET", filepath.Join(s.Dir, "bpfnet.sock"))
		m.docker.ProxyPath = proxy
	case m.sctp:
		require.NoError(t, os.WriteFile(proxy, []byte(sctplessProxy), 0o755))
		m.docker.ProxyPath = proxy
	}
	m.docker.ExtraArgs = []string{"--ipv6", "--fixed-cidr-v6", "fd00:0:0:ff::/64"}
	if !m.bpfnet { // with iptables off, dockerd refuses some of these
		m.docker.ExtraArgs = append(m.docker.ExtraArgs, world[0].Engine...)
	}
	s.d = s.StartDocker(t, m.docker)
	s.makeNetworks(t)
	if m.bpfnet {
		s.b = s.StartBpfnet(t, s.d, world[0].Daemon...)
		require.NoError(t, os.Symlink(s.b.Binary(), proxy))
	}
	s.run(t, m)
	s.witness(t)
	t.Logf("%s, %d options: the site stands after %.1f s", m.name, len(world), time.Since(began).Seconds())
	return s
}

// machines adds what the lab's topology lacks.
func (s *site) machines(t *testing.T) {
	t.Helper()
	far := s.NewNS(t, "far")
	lab.Join(t, lab.End{NS: s.Client2, If: "far0", Addrs: []netip.Prefix{router4, router6}},
		lab.End{NS: far, If: lab.ClientIf, Addrs: []netip.Prefix{far4, far6}})
	s.Client2.Sysctl(t, "net.ipv4.ip_forward", "1")
	s.Client2.Sysctl(t, "net.ipv6.conf.all.forwarding", "1")
	far.AddRoute(t, netip.MustParsePrefix("0.0.0.0/0"), router4.Addr())
	far.AddRoute(t, netip.MustParsePrefix("::/0"), router6.Addr())
	s.outside = map[string]*lab.NS{Remote: far, Tun: s.Tun(t, 0), Neighbour: s.Client}

	// The neighbour can send to 127.0.0.2 over the wire, as no honest machine does.
	s.Client.Sysctl(t, "net.ipv4.conf.all.route_localnet", "1")
	s.Client.MustRun(t, "ip", "addr", "del", "127.0.0.1/8", "dev", "lo")
	s.Client.AddRoute(t, netip.MustParsePrefix("127.0.0.0/8"), lab.Host4)
	s.names = map[netip.Addr]string{
		lab.Host4: "host up0", lab.Host6: "host up0", lab.HostB4: "host up1", lab.HostB6: "host up1",
		lab.Tun4: "host tun0", lab.Tun6: "host tun0",
	}
}

func (s *site) makeNetworks(t *testing.T) {
	t.Helper()
	number := 0
	for _, o := range append(slices.Clone(s.options), Option{Name: Other}) {
		for _, name := range o.Networks() {
			if name == "bridge" {
				continue
			}
			number++
			args := []string{"network", "create", "--subnet", fmt.Sprintf("172.30.%d.0/24", number)}
			if !o.V4Only {
				args = append(args, "--ipv6", "--subnet", fmt.Sprintf("fd00:0:0:%x::/64", number))
			}
			s.d.MustRun(t, append(append(args, o.Create...), name)...)
		}
	}
}

// run starts the containers, and waits until their ports are published.
func (s *site) run(t *testing.T, m mode) {
	t.Helper()
	var starts, linked [][]string // those with a link need the other end
	start := func(name, network string, args ...string) {
		if network != "bridge" { // the client takes --link only where that is not said
			args = append(args, "--network", network)
		}
		starts = append(starts, slices.Concat([]string{"run", "-d", "--name", name}, args, []string{lab.Image, "sleep", "1000000"}))
	}
	for i, o := range s.options {
		base := uint16(8000 + 10*i)
		p := &place{Option: o, any: base, one: base + 1, loopback: base + 2, sctp: base + 3}
		s.places[o.Name] = p
		var publish []string
		for _, proto := range []string{"tcp", "udp"} {
			for _, host := range []string{
				fmt.Sprint(p.any), fmt.Sprintf("%v:%d", lab.Host4, p.one), fmt.Sprintf("[%v]:%d", lab.Host6, p.one),
				fmt.Sprintf("127.0.0.2:%d", p.loopback), fmt.Sprintf("[::1]:%d", p.loopback),
			} {
				publish = append(publish, "-p", host+":80/"+proto)
			}
		}
		switch {
		case m.sctp && o.V4Only: // IPv6 to IPv4 takes the real docker-proxy, which takes a kernel with SCTP
			publish = append(publish, "-p", fmt.Sprintf("0.0.0.0:%d:%d/sctp", p.sctp, p.sctp))
		case m.sctp:
			publish = append(publish, "-p", fmt.Sprintf("%d:%d/sctp", p.sctp, p.sctp))
		}
		start("server-"+o.Name, o.Networks()[0], publish...)
		if o.Linked {
			starts, linked = linked, starts
			start("same-"+o.Name, o.Networks()[0], "--link", "server-"+o.Name)
			starts, linked = linked, starts
			continue
		}
		start("same-"+o.Name, o.Networks()[len(o.Networks())-1])
	}
	start("other", "net-other")
	s.together(t, starts)
	s.together(t, linked)
	endpoints := len(starts) + len(linked)
	for _, o := range s.options {
		for _, more := range o.Networks()[1:] {
			s.d.MustRun(t, "network", "connect", more, "server-"+o.Name)
			endpoints++
		}
	}

	s.other, s.gate = s.d.NS(t, "other"), s.gateway(t, "net-other")
	for _, o := range s.options {
		p := s.places[o.Name]
		p.server, p.same = s.d.NS(t, "server-"+o.Name), s.d.NS(t, "same-"+o.Name)
		for _, name := range o.Networks() {
			n := network{gateway: s.gateway(t, name)}
			n.address[0], n.address[1] = s.d.Addrs(t, "server-"+o.Name, name)
			p.networks = append(p.networks, n)
		}
	}
	if s.b == nil {
		return
	}
	lab.Eventually(t, 30*time.Second, "all endpoints are ready", func() bool {
		snap, err := api.ReadSnapshot(s.b.State)
		return err == nil && len(snap.Endpoints) == endpoints &&
			!slices.ContainsFunc(snap.Endpoints, func(e api.Endpoint) bool { return !e.Ready })
	})
}

// together runs commands of docker, a few at a time.
func (s *site) together(t *testing.T, commands [][]string) {
	t.Helper()
	var all sync.WaitGroup
	errs := make([]error, len(commands))
	slots := make(chan struct{}, 3)
	for i, args := range commands {
		all.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			_, errs[i] = s.d.Run(args...)
		})
	}
	all.Wait()
	for _, err := range errs {
		require.NoError(t, err)
	}
}

func (s *site) gateway(t *testing.T, name string) pair {
	t.Helper()
	var gateway pair
	for field := range strings.FieldsSeq(s.d.Inspect(t, name, "{{range .IPAM.Config}}{{.Subnet}} {{end}}")) {
		subnet, err := netip.ParsePrefix(field)
		require.NoError(t, err)
		if a := subnet.Masked().Addr().Next(); a.Is4() {
			gateway[0] = a
		} else {
			gateway[1] = a
		}
	}
	return gateway
}

// witness starts the servers: in the containers, on the host, and outside.
func (s *site) witness(t *testing.T) {
	t.Helper()
	for _, p := range s.places {
		s.witnesses[p.Name] = p.server.Witness(t, "--tcp", "80,81", "--udp", "80,81", "--sctp", fmt.Sprintf("81,%d", p.sctp))
	}
	port := fmt.Sprint(servicePort)
	for name, ns := range s.outside {
		s.witnesses["to-"+name] = ns.Witness(t, "--tcp", port, "--udp", port, "--sctp", port)
	}
	s.witnesses[Host] = s.Host.Witness(t, "--tcp", port, "--udp", port, "--sctp", port)
}

// target is where a cell's probe goes to, and the name of the witness that should see it.
func (s *site) target(c Cell) (to netip.AddrPort, witness string) {
	p := s.places[c.Option]
	network := p.networks[0]
	if c.From == Same {
		network = p.networks[len(p.networks)-1]
	}
	host, second := pair{lab.Host4, lab.Host6}, pair{lab.HostB4, lab.HostB6}
	any, inside := p.any, uint16(80)
	if c.Proto == "sctp" {
		any, inside = p.sctp, p.sctp
	}
	var a pair
	var port uint16
	switch c.To {
	case Container:
		a, port = network.address, inside
	case Unpublished:
		a, port = network.address, 81
	case Any:
		a, port = host, any
	case AnySecond:
		a, port = second, any
	case AnyLoopback:
		a, port = pair{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}, any
	case Gateway:
		a, port = network.gateway, any
	case OwnGateway:
		a, port = s.gate, any
	case One:
		a, port = host, p.one
	case OneSecond:
		a, port = second, p.one
	case Loopback:
		a, port = pair{netip.MustParseAddr("127.0.0.2"), netip.IPv6Loopback()}, p.loopback
	case LoopbackOut:
		a, port = host, p.loopback
	case HostService:
		return netip.AddrPortFrom(host.of(c.Family), servicePort), Host
	case HostGateway:
		return netip.AddrPortFrom(network.gateway.of(c.Family), servicePort), Host
	case ToRemote:
		return netip.AddrPortFrom(pair{far4.Addr(), far6.Addr()}.of(c.Family), servicePort), c.To
	case ToTun:
		return netip.AddrPortFrom(pair{lab.Remote4, lab.Remote6}.of(c.Family), servicePort), c.To
	case ToNeighbour:
		return netip.AddrPortFrom(pair{lab.Client4, lab.Client6}.of(c.Family), servicePort), c.To
	}
	return netip.AddrPortFrom(a.of(c.Family), port), c.Option
}
