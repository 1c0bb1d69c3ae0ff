// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/bench/load"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// The published ports, the same inside and outside: the generator's, TCP and UDP, and one for each
// iperf3 server, of which each family has its own.
const (
	loadPort   = 8000
	streamPort = 8001 // of IPv4; IPv6 has the next
)

// The prefix of the default bridge's IPv6 addresses. IPv4 is the Engine's own choice.
const bridge6 = "fd00:b::/64"

// loopbackAddr is the loopback address of a family.
func loopbackAddr(family int) netip.Addr {
	if family == 6 {
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// site is a lab in one mode, with a server and a client in containers of the default bridge: networks of
// the user have an embedded name server, whose rules turn connection tracking on inside every
// container, in every mode alike.
type site struct {
	mode   string
	lab    *lab.Lab
	docker *lab.Docker
	bpfnet *lab.Bpfnet

	// The containers. In mode loopback they are one and the same, in mode host there is none.
	client, server *lab.NS
	addrs          map[int]netip.Addr // of the server, by family
	clientAddrs    map[int]netip.Addr // of the client

	servers map[string]bool // that run, by namespace and family
	delay   time.Duration   // before each answer of a server: to be a slow path
}

// newSite builds the lab of a mode.
func newSite(t testing.TB, mode string) *site {
	t.Helper()
	s := &site{mode: mode, addrs: map[int]netip.Addr{}, clientAddrs: map[int]netip.Addr{}, servers: map[string]bool{}}
	// Engines load br_netfilter, and bridged packets then pass iptables rules where there are any.
	s.lab = lab.New(t, lab.Opts{Plain: true, BridgeNetfilter: true})
	for _, n := range []*lab.NS{s.lab.Client, s.lab.Host, s.lab.Client2} {
		ready(t, n)
	}
	engine := lab.DockerOpts{ExtraArgs: []string{"--ipv6", "--fixed-cidr-v6", bridge6}}
	switch mode {
	case Host:
		return s
	case Loopback:
		s.client = s.lab.NewNS(t, "container")
		ready(t, s.client)
		s.server = s.client
		return s
	case DockerIPTables:
		engine.IPTables, engine.IP6Tables = true, true
	case DockerProxy, ProxyPinned:
		engine.IPTables, engine.IP6Tables, engine.Proxy = true, true, true
	}
	s.docker = s.lab.StartDocker(t, engine)
	if mode == Bpfnet {
		s.bpfnet = s.lab.StartBpfnet(t, s.docker)
	}
	ports := fmt.Sprintf("%d-%d:%d-%d", loadPort, streamPort+1, loadPort, streamPort+1)
	s.docker.MustRun(t, "run", "-d", "--name", "server", "-p", ports, "-p", ports+"/udp", lab.Image, "sleep", "1000000")
	s.docker.MustRun(t, "run", "-d", "--name", "client", lab.Image, "sleep", "1000000")
	s.server, s.client = s.docker.NS(t, "server"), s.docker.NS(t, "client")
	for _, n := range []*lab.NS{s.server, s.client, s.lab.Host} {
		ready(t, n)
	}
	s.addrs[4], s.addrs[6] = s.docker.Addrs(t, "server", "bridge")
	s.clientAddrs[4], s.clientAddrs[6] = s.docker.Addrs(t, "client", "bridge")
	switch mode {
	case NFTables:
		s.loadNFT(t)
	case DockerProxy:
		s.placeProxies(t, allowed...)
	case ProxyPinned:
		s.placeProxies(t, WorkCPU())
	}
	return s
}

// ready makes a namespace one that generators can work in, and in which two windows meet the same:
// neighbours that stay known, where it would else be chance whether a window meets one that is being
// asked again, at 7 % of rr; and a congestion control without timers, which would be all that a stream
// measures.
func ready(t testing.TB, n *lab.NS) {
	t.Helper()
	for _, sysctl := range load.Sysctls {
		n.Sysctl(t, sysctl[0], sysctl[1])
	}
	n.Sysctl(t, "net.ipv4.tcp_congestion_control", "reno")
	for _, family := range []string{"ipv4", "ipv6"} {
		var devices []os.DirEntry
		err := n.Do(func() (err error) {
			devices, err = os.ReadDir("/proc/sys/net/" + family + "/neigh")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range devices {
			n.Sysctl(t, "net."+family+".neigh."+d.Name()+".base_reachable_time_ms", "3600000")
		}
	}
}

// path is one way of traffic: a client, a server, and what the client dials.
type path struct {
	*site
	scenario string
	family   int
	from, at *lab.NS
	to       netip.Addr
}

func (p path) target(port uint16) string { return netip.AddrPortFrom(p.to, port).String() }

// path is how a scenario's traffic goes at this site. The limits, host and loopback, have the same ends
// as far as there is nobody in between.
func (s *site) path(scenario string, family int) path {
	of := func(v4, v6 netip.Addr) netip.Addr {
		if family == 6 {
			return v6
		}
		return v4
	}
	p := path{site: s, scenario: scenario, family: family, from: s.client, at: s.server}
	limit := s.mode == Host || s.mode == Loopback
	switch scenario {
	case "container-container":
		p.to = s.addrs[family]
	case "published":
		p.from, p.to = s.lab.Client, of(lab.Host4, lab.Host6)
	case "egress":
		p.at, p.to = s.lab.Client2, of(lab.Internet4, lab.Internet6)
	case "host-published":
		p.from, p.to = s.lab.Host, loopbackAddr(family)
	case "hairpin":
		p.to = of(lab.Host4, lab.Host6)
	}
	switch {
	case s.mode == Loopback:
		p.to = loopbackAddr(family)
	case limit && scenario == "egress":
		p.from = s.lab.Host
	case limit:
		p.at = s.lab.Host
	}
	return p
}

// serve starts the servers of a path, once in a namespace.
func (p path) serve(t testing.TB) {
	t.Helper()
	anyone := netip.IPv4Unspecified()
	if p.family == 6 {
		anyone = netip.IPv6Unspecified()
	}
	if p.scenario == "egress" { // an answer over UDP is to come from the address that was asked
		anyone = p.to
	}
	name := fmt.Sprintf("%s %d", p.at.Path, p.family)
	if p.servers[name] {
		return
	}
	p.servers[name] = true
	pinned := []string{"-c", strconv.Itoa(WorkCPU())}
	generator := load.ServerArgs(netip.AddrPortFrom(anyone, loadPort).String(), WorkCPU())
	if p.delay > 0 {
		generator = append(generator, "--delay", p.delay.String())
	}
	p.at.Start(t, "taskset", slices.Concat(pinned, []string{p.lab.Tool}, generator)...).WaitOutput(t, "ready")
	stream := load.StreamServerArgs(netip.AddrPortFrom(anyone, p.streamPort()))
	p.at.Start(t, "taskset", slices.Concat(pinned, []string{"iperf3"}, stream)...).WaitOutput(t, "Server listening")
}

func (p path) streamPort() uint16 {
	if p.family == 6 {
		return streamPort + 1
	}
	return streamPort
}

// reach is one short exchange along the path, over TCP.
func (p path) reach(ctx context.Context) error {
	_, err := p.window(ctx, load.Client{Kind: load.RR, Warmup: time.Microsecond, Window: time.Microsecond})
	return err
}

// window runs a client of the generator along the path.
func (p path) window(ctx context.Context, c load.Client) (load.Result, error) {
	c.To, c.CPU = p.target(loadPort), WorkCPU()
	if c.Kind == load.Stream {
		c.To = p.target(p.streamPort())
	}
	out, err := p.from.Run(ctx, "taskset", append([]string{"-c", strconv.Itoa(WorkCPU()), p.lab.Tool}, c.Args()...)...)
	if err != nil {
		return load.Result{}, err
	}
	return load.Parse([]byte(out))
}
