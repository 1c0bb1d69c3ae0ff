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
	docker *lab.Docker
	bpfnet *lab.Bpfnet
	step   string
	last   error // of the last command
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

	d.start()
	d.neighboursAndIsolation()
	d.defaultNetwork()
	d.publishedPorts()
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

// dock runs the Docker client on the host.
func (d *demo) dock(args ...string) string {
	d.t.Helper()
	out, err := d.docker.Run(args...)
	return d.finish("host", append([]string{"docker"}, args...), out, err, false)
}

// exec runs a command in a container. Whether it succeeds is for the caller to judge by its output.
func (d *demo) exec(container string, command ...string) string {
	d.t.Helper()
	args := append([]string{"exec", container}, command...)
	out, err := d.docker.Run(args...)
	return d.finish("host", append([]string{"docker"}, args...), out, err, true)
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
func (d *demo) ping(container string, to fmt.Stringer, want string) {
	d.t.Helper()
	d.answers(d.exec(container, "ping", "-c", "2", "-W", "2", to.String()), to, want)
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
func (d *demo) silent(container string, to fmt.Stringer, reason string) {
	d.t.Helper()
	before := d.drops(reason)
	out := d.exec(container, "ping", "-c", "2", "-W", "1", to.String())
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

func (d *demo) start() {
	d.title("A host with Docker and bpfnet")
	fmt.Fprintln(d.out, `   Namespaces stand for three machines; the host's FORWARD policy is DROP:
     client 192.0.2.2 -- 192.0.2.1 host 198.51.100.1 -- 198.51.100.2 client2 (and 203.0.113.1, "the internet")
   The image "lab" is a busybox with a test server that answers with what it sees.`)
	d.lab = lab.New(d.t, lab.Opts{})
	d.check()
	d.show("host", []string{"dockerd --iptables=false --ip6tables=false --userland-proxy=false &"}, "")
	d.docker = d.lab.StartDocker(d.t, lab.DockerOpts{})
	d.check()
	d.show("host", []string{"bpfnet daemon &"}, "")
	d.bpfnet = d.lab.StartBpfnet(d.t, d.docker)
	for line := range strings.Lines(d.bpfnet.Log()) {
		if !strings.HasPrefix(line, "time=") { // the log: what it said to the user is enough
			d.quote(line)
		}
	}
	d.check()
	d.lab.Client2.Serve(d.t, "--tcp", "9000")
}

func (d *demo) address(container, network string) netip.Addr {
	d.t.Helper()
	v4, _ := d.docker.Addrs(d.t, container, network)
	return v4
}

func (d *demo) neighboursAndIsolation() {
	d.title("Neighbours, and isolation between networks")
	d.dock("network", "create", "-d", "bridge", "--subnet", "172.19.0.0/16", "--gateway", "172.19.0.1", "mynetwork")
	d.dock("run", "-d", "--name", "box1", "--network", "mynetwork", lab.Image, "sleep", "1000")
	d.dock("run", "-d", "--name", "box2", "--network", "mynetwork", lab.Image, "sleep", "1000")
	d.dock("run", "-d", "--name", "other", lab.Image, "sleep", "1000")
	box1, box2, other := d.address("box1", "mynetwork"), d.address("box2", "mynetwork"), d.address("other", "bridge")

	d.title("From mynetwork: the host's address, the gateway, a neighbour")
	d.ping("box1", lab.Host4, "64")
	d.ping("box1", netip.MustParseAddr("172.19.0.1"), "64")
	d.ping("box1", box2, "64")

	d.title("Another network: not before it is allowed")
	d.silent("box1", other, "isolated")
	d.silent("other", box1, "isolated")
	d.bpf("network", "allow", "mynetwork", "bridge")
	d.ping("box1", other, "63")
	d.ping("other", box1, "63")
	d.say("63: one hop, routed by the programs")

	d.title("And isolated again")
	d.bpf("network", "disallow", "mynetwork", "bridge")
	d.silent("box1", other, "isolated")
}

func (d *demo) defaultNetwork() {
	gateway := netip.MustParseAddr("172.17.0.1")
	d.title("The default network: from the host into a container")
	d.dock("run", "-d", "--name", "server", lab.Image, "labtool", "serve", "--http", "8000", "--tcp", "9000")
	d.docker.WaitLog(d.t, "server", "ready")
	server := d.address("server", "bridge")
	d.answers(d.run(d.lab.Host, "host", "ping", "-n", "-c", "2", "-W", "2", server.String()), server, "64")
	d.sees(d.run(d.lab.Host, "host", "curl", "-sS", "-m", "5", fmt.Sprintf("http://%s:8000/", server)), gateway)

	d.title("From a container: its gateway, a neighbour, the world")
	d.ping("other", gateway, "64")
	d.ping("other", server, "64")
	d.sees(d.exec("other", "nc", "-w", "5", server.String(), "9000"), d.address("other", "bridge"))
	d.ping("other", lab.Internet4, "63")
	d.sees(d.exec("other", "nc", "-w", "5", lab.Internet4.String(), "9000"), lab.HostB4)
	d.say("that is the host's own address: masqueraded")

	d.title("traceroute from a container")
	hops := d.exec("other", "traceroute", "-n", "-q", "1", "-w", "2", "-m", "4", lab.Internet4.String())
	for i, want := range []netip.Addr{gateway, lab.Internet4} {
		if hop := regexp.MustCompile(fmt.Sprintf(`(?m)^\s*%d\s+(\S+)`, i+1)).FindStringSubmatch(hops); hop == nil || hop[1] != want.String() {
			d.fail("hop %d is %q, want %s", i+1, hop, want)
		}
	}
	d.say("the first hop is the gateway, then the destination")
}

func (d *demo) publishedPorts() {
	gateway := netip.MustParseAddr("172.17.0.1")
	d.title("Published ports")
	d.dock("run", "-d", "--name", "web", "-p", "18000:8000", "-p", "18001:8000", lab.Image, "labtool", "serve", "--http", "8000")
	d.dock("run", "-d", "--name", "web2", "-p", "8000", lab.Image, "labtool", "serve", "--http", "8000")
	d.docker.WaitLog(d.t, "web", "ready")
	d.docker.WaitLog(d.t, "web2", "ready")
	list := d.dock("port", "web")
	for _, port := range []string{"18000", "18001"} {
		if !strings.Contains(list, "8000/tcp -> 0.0.0.0:"+port) {
			d.fail("port %s is not listed", port)
		}
	}
	list = d.dock("port", "web2", "8000")
	chosen := regexp.MustCompile(`0\.0\.0\.0:(\d+)`).FindStringSubmatch(list)
	if chosen == nil {
		d.fail("docker port web2 8000 names no port of the host")
	}

	d.title("Reached from the host on 127.0.0.1")
	for _, port := range []string{"18000", "18001", chosen[1]} {
		d.sees(d.run(d.lab.Host, "host", "curl", "-sS", "-m", "5", "http://127.0.0.1:"+port+"/"), gateway)
	}

	d.title("Reached from another machine: the client's address is kept")
	d.sees(d.run(d.lab.Client, "client", "curl", "-sS", "-m", "5", fmt.Sprintf("http://%s:18000/", lab.Host4)), lab.Client4)
}
