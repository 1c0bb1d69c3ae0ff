// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/internal/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// demo is one run. Every command is printed as a user would type it, with what it answered.
type demo struct {
	t       *testing.T
	out     io.Writer
	signals chan os.Signal

	lab    *lab.Lab
	bpfnet *lab.Bpfnet
	step   string
	last   error // of the last command
}

// engine is one of the two that the demonstration shows side by side, on one host: Docker, and bpfnet
// itself. What is said to them differs in the first word, and in the image that only Docker has.
type engine struct {
	name  string
	run   func(args ...string) (string, error)
	addrs func(t testing.TB, sandbox, network string) (v4, v6 netip.Addr)
	log   func(t testing.TB, sandbox, text string)
	image []string // between the options and the command of "run"

	network, subnet, gateway string // of the network that the demonstration makes
	standard                 string // the default network
	standardGateway          netip.Addr
	ports                    [2]string // of the host
}

// Needs root and a Docker Engine.
//
//	client 192.0.2.2 ── 192.0.2.1 host 198.51.100.1 ── 198.51.100.2 client2, 203.0.113.1 ("the internet")
func TestDemo(t *testing.T) {
	lab.NeedRoot(t)
	d := &demo{t: t, out: os.Stdout, signals: make(chan os.Signal, 1)}
	if os.Getenv(envOutput) == "3" {
		d.out = os.NewFile(3, "output")
	}
	signal.Notify(d.signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(d.signals) })
	began := time.Now()

	docker, own := d.start()
	d.neighboursAndIsolation(docker, own)
	d.defaultNetwork(docker, own)
	d.publishedPorts(docker, own)
	d.together(docker, own)
	d.title("What bpfnet has counted")
	d.bpf("stats")
	fmt.Fprintf(d.out, "\nAll steps as they should be, in %.0f s.\n", time.Since(began).Seconds())
}

func (d *demo) title(text string) {
	d.t.Helper()
	d.check()
	d.step = text
	fmt.Fprintf(d.out, "\n== %s\n", text)
}

// say remarks on what was seen.
func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, "   -> "+format+"\n", args...) }

func (d *demo) fail(format string, args ...any) {
	d.t.Helper()
	text := fmt.Sprintf(format, args...)
	if d.last != nil {
		text += "; " + d.last.Error()
	}
	fmt.Fprintf(d.out, "\nFAILED in step %q: %s\n", d.step, text)
	d.t.Fatalf("step %q: %s", d.step, text)
}

// check ends an interrupted run.
func (d *demo) check() {
	d.t.Helper()
	select {
	case sig := <-d.signals:
		fmt.Fprintf(d.out, "\n%v: taking the lab down\n", sig)
		d.t.FailNow()
	default:
	}
}

// show prints a command and its answer.
func (d *demo) show(where string, command []string, out string) {
	fmt.Fprintf(d.out, "%s# %s\n", where, strings.Join(command, " "))
	d.quote(out)
}

func (d *demo) quote(out string) {
	for l := range strings.Lines(strings.TrimSpace(out)) {
		fmt.Fprintln(d.out, strings.TrimRight("   "+l, " \n"))
	}
}

func (d *demo) finish(where string, command []string, out string, err error, wantErr bool) string {
	d.t.Helper()
	d.show(where, command, out)
	d.check()
	d.last = err
	if err != nil && !wantErr {
		d.fail("a command failed")
	}
	return out
}

// on runs a command of an engine on the host.
func (d *demo) on(e engine, args ...string) string {
	d.t.Helper()
	out, err := e.run(args...)
	return d.finish("host", append([]string{e.name}, args...), out, err, false)
}

// box has an engine run a command in the background, in a container or sandbox of that name.
func (d *demo) box(e engine, name string, options []string, command ...string) {
	d.t.Helper()
	d.on(e, slices.Concat([]string{"run", "-d", "--name", name}, options, e.image, command)...)
}

// exec runs a command in a container. Whether it succeeds is for the caller to judge by its output.
func (d *demo) exec(e engine, container string, command ...string) string {
	d.t.Helper()
	args := append([]string{"exec", container}, command...)
	out, err := e.run(args...)
	return d.finish("host", append([]string{e.name}, args...), out, err, true)
}

func (d *demo) run(ns *lab.NS, where string, command ...string) string {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := ns.Run(ctx, command[0], command[1:]...)
	return d.finish(where, command, out, err, true)
}

func (d *demo) bpf(args ...string) string {
	d.t.Helper()
	out, err := d.bpfnet.CLI(args...)
	return d.finish("host", append([]string{"bpfnet"}, args...), out, err, false)
}

var ttl = regexp.MustCompile(`ttl=(\d+)`)

// ping pings from a container twice and wants both answers with that TTL.
func (d *demo) ping(e engine, container string, to fmt.Stringer, want string) {
	d.t.Helper()
	d.answers(d.exec(e, container, "ping", "-c", "2", "-W", "2", to.String()), to, want)
}

func (d *demo) answers(out string, to fmt.Stringer, want string) {
	d.t.Helper()
	all := ttl.FindAllStringSubmatch(out, -1)
	if len(all) != 2 {
		d.fail("%d answers from %s, want 2", len(all), to)
	}
	for _, m := range all {
		if m[1] != want {
			d.fail("ttl=%s from %s, want %s", m[1], to, want)
		}
	}
	d.say("answers with ttl=%s", want)
}

// silent pings in vain, and sees why in the drop counters.
func (d *demo) silent(e engine, container string, to fmt.Stringer, reason string) {
	d.t.Helper()
	before := d.drops(reason)
	out := d.exec(e, container, "ping", "-c", "2", "-W", "1", to.String())
	if ttl.MatchString(out) {
		d.fail("%s answers, and should not", to)
	}
	if n := d.drops(reason) - before; n < 2 {
		d.fail("%d packets counted as dropped under the reason %q, want 2", n, reason)
	}
	d.say("no answer; bpfnet counts the drops under %q", reason)
}

func (d *demo) drops(reason string) uint64 {
	d.t.Helper()
	var s struct {
		Drops []struct {
			Reason  string
			Packets uint64
		}
	}
	d.bpfnet.StatsJSON(d.t, &s)
	var n uint64
	for _, r := range s.Drops {
		if r.Reason == reason {
			n += r.Packets
		}
	}
	return n
}

// remote is the client's address that the test server names in its answer.
var remote = regexp.MustCompile(`"remote":\s*"([^"]+)"`)

// sees wants the server's answer to name the address as its client's.
func (d *demo) sees(out string, want netip.Addr) {
	d.t.Helper()
	m := remote.FindStringSubmatch(out)
	if m == nil {
		d.fail("no answer")
	}
	have, err := netip.ParseAddrPort(m[1])
	if err != nil || have.Addr().Unmap() != want {
		d.fail("the server sees %s, want %s", m[1], want)
	}
	d.say("answers; the server sees the client as %s", want)
}

func (d *demo) start() (docker, own engine) {
	d.title("A host with Docker and bpfnet")
	fmt.Fprintln(d.out, `   Namespaces stand for three machines; the host's FORWARD policy is DROP:
     client 192.0.2.2 -- 192.0.2.1 host 198.51.100.1 -- 198.51.100.2 client2 (and 203.0.113.1, "the internet")
   Everything is done twice, side by side: with Docker, and with bpfnet alone, which needs no Docker.
   The image "lab" is a busybox with a test server that answers with what it sees.`)
	d.lab = lab.New(d.t, lab.Opts{})
	d.check()
	d.show("host", []string{"dockerd --iptables=false --ip6tables=false --userland-proxy=false &"}, "")
	engineUnderTest := d.lab.StartDocker(d.t, lab.DockerOpts{})
	d.check()
	d.show("host", []string{"bpfnet daemon --default-subnet 172.30.0.0/16 &"}, "")
	d.bpfnet = d.lab.StartBpfnet(d.t, engineUnderTest, "--default-subnet", "172.30.0.0/16")
	for line := range strings.Lines(d.bpfnet.Log()) {
		if !strings.HasPrefix(line, "time=") { // the log: what it said to the user is enough
			d.quote(line)
		}
	}
	d.check()
	d.lab.Client2.Serve(d.t, "--tcp", "9000")
	docker = engine{
		name: "docker", run: engineUnderTest.Run, addrs: engineUnderTest.Addrs, log: engineUnderTest.WaitLog,
		image:   []string{lab.Image},
		network: "mynetwork", subnet: "172.19.0.0/16", gateway: "172.19.0.1",
		standard: "bridge", standardGateway: netip.MustParseAddr("172.17.0.1"), ports: [2]string{"18000", "18001"},
	}
	own = engine{
		name: "bpfnet", run: d.bpfnet.CLI, addrs: d.bpfnet.Addrs, log: d.bpfnet.WaitLog,
		network: "ownnetwork", subnet: "172.29.0.0/16", gateway: "172.29.0.1",
		standard: "bpfnet", standardGateway: netip.MustParseAddr("172.30.0.1"), ports: [2]string{"19000", "19001"},
	}
	return docker, own
}

func (d *demo) address(e engine, container, network string) netip.Addr {
	d.t.Helper()
	v4, _ := e.addrs(d.t, container, network)
	return v4
}

func (d *demo) neighboursAndIsolation(engines ...engine) {
	d.title("A network, two neighbours in it, and one elsewhere")
	for _, e := range engines {
		d.on(e, "network", "create", "-d", "bridge", "--subnet", e.subnet, "--gateway", e.gateway, e.network)
		d.box(e, e.name+"-box1", []string{"--network", e.network}, "sleep", "1000")
		d.box(e, e.name+"-box2", []string{"--network", e.network}, "sleep", "1000")
		d.box(e, e.name+"-other", nil, "sleep", "1000")
	}

	d.title("From the network: the host's address, the gateway, a neighbour")
	for _, e := range engines {
		d.ping(e, e.name+"-box1", lab.Host4, "64")
		d.ping(e, e.name+"-box1", netip.MustParseAddr(e.gateway), "64")
		d.ping(e, e.name+"-box1", d.address(e, e.name+"-box2", e.network), "64")
	}

	d.title("Another network: not before it is allowed")
	for _, e := range engines {
		box1, other := d.address(e, e.name+"-box1", e.network), d.address(e, e.name+"-other", e.standard)
		d.silent(e, e.name+"-box1", other, "isolated")
		d.silent(e, e.name+"-other", box1, "isolated")
		d.bpf("network", "allow", e.network, e.standard)
		d.ping(e, e.name+"-box1", other, "63")
		d.ping(e, e.name+"-other", box1, "63")
		d.say("63: one hop, routed by the programs")
	}

	d.title("And isolated again")
	for _, e := range engines {
		d.bpf("network", "disallow", e.network, e.standard)
		d.silent(e, e.name+"-box1", d.address(e, e.name+"-other", e.standard), "isolated")
	}
}

func (d *demo) defaultNetwork(engines ...engine) {
	d.title("The default network: from the host into a container")
	for _, e := range engines {
		name := e.name + "-server"
		d.box(e, name, nil, "labtool", "serve", "--http", "8000", "--tcp", "9000")
		e.log(d.t, name, "ready")
		server := d.address(e, name, e.standard)
		d.answers(d.run(d.lab.Host, "host", "ping", "-n", "-c", "2", "-W", "2", server.String()), server, "64")
		d.sees(d.run(d.lab.Host, "host", "curl", "-sS", "-m", "5", fmt.Sprintf("http://%s:8000/", server)), e.standardGateway)
	}

	d.title("From a container: its gateway, a neighbour, the world")
	for _, e := range engines {
		other, server := e.name+"-other", d.address(e, e.name+"-server", e.standard)
		d.ping(e, other, e.standardGateway, "64")
		d.ping(e, other, server, "64")
		d.sees(d.exec(e, other, "nc", "-w", "5", server.String(), "9000"), d.address(e, other, e.standard))
		d.ping(e, other, lab.Internet4, "63")
		d.sees(d.exec(e, other, "nc", "-w", "5", lab.Internet4.String(), "9000"), lab.HostB4)
		d.say("that is the host's own address: masqueraded")
	}

	d.title("traceroute from a container")
	for _, e := range engines {
		hops := d.exec(e, e.name+"-other", "traceroute", "-n", "-q", "1", "-w", "2", "-m", "4", lab.Internet4.String())
		for i, want := range []netip.Addr{e.standardGateway, lab.Internet4} {
			hop := regexp.MustCompile(fmt.Sprintf(`(?m)^\s*%d\s+(\S+)`, i+1)).FindStringSubmatch(hops)
			if hop == nil || hop[1] != want.String() {
				d.fail("hop %d is %q, want %s", i+1, hop, want)
			}
		}
		d.say("the first hop is the gateway, then the destination")
	}
}

func (d *demo) publishedPorts(engines ...engine) {
	chosen := make(map[string]string)
	d.title("Published ports")
	for _, e := range engines {
		web, web2 := e.name+"-web", e.name+"-web2"
		d.box(e, web, []string{"-p", e.ports[0] + ":8000", "-p", e.ports[1] + ":8000"}, "labtool", "serve", "--http", "8000")
		d.box(e, web2, []string{"-p", "8000"}, "labtool", "serve", "--http", "8000")
		e.log(d.t, web, "ready")
		e.log(d.t, web2, "ready")
		list := d.on(e, "port", web)
		for _, port := range e.ports {
			if !strings.Contains(list, "8000/tcp -> 0.0.0.0:"+port) {
				d.fail("port %s is not listed", port)
			}
		}
		list = d.on(e, "port", web2, "8000")
		m := regexp.MustCompile(`0\.0\.0\.0:(\d+)`).FindStringSubmatch(list)
		if m == nil {
			d.fail("%s port %s 8000 names no port of the host", e.name, web2)
		}
		chosen[e.name] = m[1]
	}

	d.title("Reached from the host on 127.0.0.1")
	for _, e := range engines {
		for _, port := range []string{e.ports[0], e.ports[1], chosen[e.name]} {
			d.sees(d.run(d.lab.Host, "host", "curl", "-sS", "-m", "5", "http://127.0.0.1:"+port+"/"), e.standardGateway)
		}
	}

	d.title("Reached from another machine: the client's address is kept")
	for _, e := range engines {
		d.sees(d.run(d.lab.Client, "client", "curl", "-sS", "-m", "5", fmt.Sprintf("http://%s:%s/", lab.Host4, e.ports[0])), lab.Client4)
	}
}

func (d *demo) together(docker, own engine) {
	d.title("Both on one host: isolated from each other, until they are allowed")
	theirs, ours := d.address(docker, "docker-other", docker.standard), d.address(own, "bpfnet-other", own.standard)
	d.silent(docker, "docker-other", ours, "isolated")
	d.silent(own, "bpfnet-other", theirs, "isolated")
	d.bpf("network", "allow", docker.standard, own.standard)
	d.ping(docker, "docker-other", ours, "63")
	d.ping(own, "bpfnet-other", theirs, "63")
	d.bpf("network", "ls")
	d.bpf("ps")
}
