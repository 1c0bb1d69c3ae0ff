// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"math/bits"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	bpfmaps "github.com/bpfnet/bpfnet/maps"
)

const (
	stateDir  = "/var/lib/bpfnet"
	daemonLog = "/tmp/daemon.log"

	ownPort = 8081 // web's, from its start
	later   = 8082 // web's, for a while
	foreign = 8083 // of a program of the host
)

// own is what follows when the scene's networks have gone: bpfnet's daemon without Docker, its networks
// and sandboxes. The host, its uplink and the world stay.
//
//	world ── up0 host bridge "one" ── web, db
//	              bridge "two" ── far
type own struct {
	*scene
	web, db, far *space
	daemon       *exec.Cmd
}

// The links of the sandboxes should be of the kind, and the kernel lack these features.
func (s *scene) own(link string, lacks []string) error {
	o := &own{scene: s}
	for _, device := range []string{"br-one", "br-two", "veth-a", "veth-b", "veth-other"} {
		l, err := s.host.h.LinkByName(device)
		if err == nil {
			err = s.host.h.LinkDel(l)
		}
		if err != nil {
			return fmt.Errorf("delete %s: %w", device, err)
		}
	}
	started := time.Now()
	defer func() {
		log, _ := os.ReadFile(daemonLog)
		fmt.Printf("own %v; the daemon's log:\n%s", time.Since(started).Round(time.Second/10), log)
	}()
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"daemon", func() error { return o.start() }},
		{"network create", o.networks},
		{"run -d", o.sandboxes},
	} {
		err := step.do()
		check("own "+step.name, err)
		if err != nil {
			return fmt.Errorf("no use to go on without: own %s", step.name)
		}
	}
	o.traffic()
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"links are " + link, func() error { return linkedBy(link, o.web, o.db, o.far) }},
		{"fast path", o.straight},
		{"forged frames", o.forged},
		{"isolation", o.isolated},
		{"connect and disconnect", o.connect},
		{"allow", o.allow},
		{"run --rm", o.codes},
		{"run in another's network", o.joined},
		{"SIGTERM is passed on", o.signal},
		{"publish and unpublish", o.publish},
		{"published ports are held", o.held},
		{"the clock is set", o.clock},
		{"captures", o.captures},
		{"restart", o.restart},
		{"a veth beside", o.beside},
		{"doctor names what is missing", func() error { return doctor(lacks) }},
		{"rm", o.remove},
		{"cleanup", o.cleanup},
	} {
		check("own "+step.name, step.do())
	}
	return nil
}

// bpfnet runs a command of bpfnet. Its error tells what that wrote.
func bpfnet(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, "/bpfnet", args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("bpfnet %s: %w: %s%s", strings.Join(args, " "), err, errs.String(), out.String())
	}
	return strings.TrimSpace(out.String()), nil
}

// start starts the daemon and waits until it is ready: sd_notify(3).
func (o *own) start(args ...string) error {
	const path = "/tmp/notify"
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer ready.Close()
	log, err := os.OpenFile(daemonLog, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	o.daemon = exec.Command("/bpfnet", slices.Concat([]string{"daemon", "--docker", "off"}, args)...)
	o.daemon.Env = append(os.Environ(), "NOTIFY_SOCKET="+path)
	o.daemon.Stdout, o.daemon.Stderr = log, log
	if err := o.daemon.Start(); err != nil {
		return err
	}
	if err := ready.SetReadDeadline(time.Now().Add(3 * patience)); err != nil {
		return err
	}
	for buf := make([]byte, 4096); ; {
		n, err := ready.Read(buf)
		if err != nil {
			return fmt.Errorf("the daemon is not ready: %w", err)
		}
		if slices.Contains(strings.Split(string(buf[:n]), "\n"), "READY=1") {
			break
		}
	}
	if o.maps != nil {
		o.maps.Close()
	}
	o.maps, err = bpfmaps.Open(pins)
	return err
}

func (o *own) networks() error {
	_, err := bpfnet("network", "create", "--subnet", "10.1.0.0/24", "--subnet", "fd01::/64", "one")
	_, err2 := bpfnet("network", "create", "--subnet", "10.2.0.0/24", "--subnet", "fd02::/64", "two")
	return errors.Join(err, err2)
}

// sandboxes have the addresses of the scene's containers.
func (o *own) sandboxes() error {
	port := fmt.Sprintf("%d:%d", ownPort, target)
	var err, err2, err3 error
	o.web, err = server("web", "one", "-p", port, "-p", port+"/udp")
	o.db, err2 = server("db", "one")
	o.far, err3 = server("far", "two")
	return errors.Join(err, err2, err3)
}

// server runs a sandbox that serves.
func server(name, network string, args ...string) (*space, error) {
	args = slices.Concat([]string{"run", "-d", "--name", name, "--network", network}, args, []string{"/init", "serve", strconv.Itoa(target)})
	if _, err := bpfnet(args...); err != nil {
		return nil, err
	}
	pids, err := sandboxPIDs()
	if err != nil {
		return nil, err
	}
	ns, err := netns.GetFromPid(pids[name])
	if err != nil {
		return nil, err
	}
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return nil, err
	}
	s := &space{ns: ns, h: h}
	// The server listens a moment later.
	if err := eventually(func() error {
		return s.exchange("tcp", at(families[0].loopback, target), small, families[0].loopback)
	}); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// sandboxPIDs are the processes of the sandboxes that run, by name.
func sandboxPIDs() (map[string]int, error) {
	all, err := api.ReadSnapshot(stateDir)
	if err != nil {
		return nil, err
	}
	pids := make(map[string]int)
	for _, s := range all.Sandboxes {
		if s.Status == api.StatusRunning {
			pids[s.Name] = s.PID
		}
	}
	return pids, nil
}

// traffic is all that must work with nothing said.
func (o *own) traffic() {
	for _, proto := range protocols {
		_, err := bpfnet("exec", "db", "/init", "ask", proto, fmt.Sprintf("web:%d", target))
		check("own "+proto+" by name", err)
	}
	for _, f := range families {
		_, err := bpfnet("exec", "db", "ping", "-"+f.name[3:], "-c", "1", "-W", "10", "web")
		check("own "+f.name+" ping by name", err)
		for _, proto := range protocols {
			name := "own " + f.name + " " + proto + " "
			check(name+"world to published port", o.world.exchange(proto, at(f.host, ownPort), large, f.world))
			check(name+"host to loopback's published port", o.host.published(proto, at(f.loopback, ownPort), large))
			check(name+"neighbour to published port", o.db.published(proto, at(f.host, ownPort), large))
			check(name+"sandbox to world, masqueraded", o.far.exchange(proto, at(f.world, target), large, f.host))
			check(name+"refusal from a sandbox", o.db.refused(proto, at(f.a, closed)))
		}
	}
}

// linkedBy looks at the sandboxes' ends of their links.
func linkedBy(kind string, spaces ...*space) error {
	for _, s := range spaces {
		l, err := s.h.LinkByName("eth0")
		if err != nil {
			return err
		}
		if l.Type() != kind {
			return fmt.Errorf("eth0 is a %s", l.Type())
		}
	}
	return nil
}

// straight sends a lot between neighbours: no bridge and no other program may see it.
func (o *own) straight() error {
	return o.byFates([]way{
		{hook: "container", fate: "container", least: 100, most: math.MaxUint64},
		{hook: "container", fate: "bridge", most: 10}, // ARP is
		{hook: "to_container", fate: "bridge", most: 10},
		{hook: "to_container", fate: "stack", most: 10},
	}, func(f family) error { return o.db.exchange("tcp", at(f.a, target), bulk, f.b) })
}

// forged has db send frames that hide a datagram under an address that is not its own. Their first one
// says that it is untagged, with a tag; the other tells the kernel another protocol than it carries,
// which a netkit believes.
func (o *own) forged() error {
	const port = 9999
	f := families[0]
	l, err := o.db.h.LinkByName("eth0")
	if err != nil {
		return err
	}
	var server net.PacketConn
	if err := o.host.do(func() (err error) {
		server, err = net.ListenPacket("udp", at(f.gatewayOne, port).String())
		return err
	}); err != nil {
		return err
	}
	defer server.Close()
	packet := datagram(netip.MustParseAddr("10.1.0.77"), f.gatewayOne, port)
	ethernet := func(kind ...byte) []byte {
		return slices.Concat([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, l.Attrs().HardwareAddr, kind, packet)
	}
	err = o.db.do(func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, x := range []struct {
			frame    []byte
			protocol uint16
		}{
			{ethernet(0x81, 0x00, 0, 0, 0x08, 0x00), unix.ETH_P_8021Q},
			{ethernet(0x88, 0xb5), unix.ETH_P_IP}, // IEEE 802's for experiments
		} {
			to := &unix.SockaddrLinklayer{Protocol: bits.ReverseBytes16(x.protocol), Ifindex: l.Attrs().Index}
			// A netkit tells the sender at once that it drops.
			if err := unix.Sendto(fd, x.frame, 0, to); err != nil && !errors.Is(err, unix.ENOBUFS) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := o.db.send(at(f.gatewayOne, port)); err != nil {
		return err
	}
	if err := server.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, from, err := server.ReadFrom(make([]byte, 100))
	if err == nil && !strings.HasPrefix(from.String(), f.b.String()+":") {
		err = fmt.Errorf("the host got a datagram from %s", from)
	}
	return err
}

// datagram is an IPv4 packet with an empty one.
func datagram(from, to netip.Addr, port uint16) []byte {
	p := slices.Concat([]byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, from.AsSlice(), to.AsSlice())
	var sum uint32
	for i := 0; i < len(p); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum+sum>>16))
	for _, field := range []uint16{port, port, 8, 0} {
		p = binary.BigEndian.AppendUint16(p, field)
	}
	return p
}

func (o *own) isolated() error {
	for _, f := range families {
		if err := o.dropped(o.far, at(f.a, target), "isolated"); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return nil
}

// connect gives db an interface in network two, by which far reaches it, and takes it back.
func (o *own) connect() error {
	if _, err := bpfnet("network", "connect", "--alias", "store", "two", "db"); err != nil {
		return err
	}
	var errs []error
	for _, a := range []string{"10.2.0.3", "fd02::3"} {
		errs = append(errs, o.far.published("tcp", at(ip(a), target), large))
	}
	_, err := bpfnet("exec", "far", "/init", "ask", "udp", fmt.Sprintf("store:%d", target))
	_, err2 := bpfnet("network", "disconnect", "two", "db")
	errs = append(errs, err, err2)
	if _, err := o.db.h.LinkByName("eth1"); !errors.As(err, &netlink.LinkNotFoundError{}) {
		errs = append(errs, fmt.Errorf("the interface after disconnect: %v", err))
	}
	return errors.Join(errs...)
}

func (o *own) allow() error {
	if _, err := bpfnet("network", "allow", "one", "two"); err != nil {
		return err
	}
	for _, f := range families {
		for _, proto := range protocols {
			if err := o.far.exchange(proto, at(f.a, target), large, f.other); err != nil {
				return fmt.Errorf("%s %s: %w", f.name, proto, err)
			}
		}
	}
	return nil
}

func (o *own) codes() error {
	for script, want := range map[string]int{"true": 0, "exit 3": 3, "no-such-command": 127} {
		args := []string{"run", "--rm", "sh", "-c", script}
		if want == 127 {
			args = []string{"run", "--rm", script}
		}
		_, err := bpfnet(args...)
		code := 0
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		if code != want {
			return fmt.Errorf("%s: status %d, not %d: %v", script, code, want, err)
		}
	}
	return nil
}

func (o *own) joined() error {
	_, err := bpfnet("run", "--rm", "--network", "container:web", "/init", "ask", "tcp", fmt.Sprintf("localhost:%d", target))
	return err
}

func (o *own) signal() error {
	cmd := exec.Command("/bpfnet", "run", "--rm", "sh", "-c", "trap 'exit 7' TERM; echo set; while :; do sleep 0.1; done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	timer := time.AfterFunc(3*patience, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_, err = out.Read(make([]byte, 1))
	err = errors.Join(err, cmd.Process.Signal(unix.SIGTERM))
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 7 {
		err = errors.Join(err, fmt.Errorf("ended with %v, not exit status 7", cmd.ProcessState))
	}
	return err
}

// listen binds sockets on the host, as any program would.
func (o *own) listen(port uint16) error {
	var errs []error
	_ = o.host.do(func() error {
		for _, f := range families {
			l, err := net.Listen("tcp"+f.name[3:], at(f.anything, port).String())
			if err == nil {
				l.Close()
			}
			p, err2 := net.ListenPacket("udp"+f.name[3:], at(f.anything, port).String())
			if err2 == nil {
				p.Close()
			}
			errs = append(errs, err, err2)
		}
		return nil
	})
	return errors.Join(errs...)
}

// publish opens a port of web for a while, and the host gets it back.
func (o *own) publish() error {
	port := fmt.Sprintf("%d:%d", later, target)
	if _, err := bpfnet("publish", "web", port, port+"/udp"); err != nil {
		return err
	}
	for _, f := range families {
		for _, proto := range protocols {
			if err := o.world.exchange(proto, at(f.host, later), large, f.world); err != nil {
				return fmt.Errorf("%s %s: %w", f.name, proto, err)
			}
		}
	}
	if _, err := bpfnet("unpublish", "web", port, port+"/udp"); err != nil {
		return err
	}
	return errors.Join(o.world.refused("tcp", at(families[0].host, later)), o.listen(later))
}

// held has published ports and programs of the host get in each other's way.
func (o *own) held() error {
	for _, f := range families {
		_, err := net.Listen("tcp", at(f.anything, ownPort).String())
		_, err2 := net.ListenPacket("udp", at(f.anything, ownPort).String())
		if !errors.Is(err, unix.EADDRINUSE) || !errors.Is(err2, unix.EADDRINUSE) {
			return fmt.Errorf("%s: the host got a published port: %v, %v", f.name, err, err2)
		}
	}
	l, err := net.Listen("tcp", at(families[0].anything, foreign).String())
	if err != nil {
		return err
	}
	defer l.Close()
	_, err = bpfnet("publish", "web", fmt.Sprintf("%d:%d", foreign, target))
	if err == nil || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) {
		return fmt.Errorf("publish of a port that process %d has: %v", os.Getpid(), err)
	}
	return nil
}

// restart kills the daemon in the middle of a conversation, which goes on, as do the sandboxes. One ends
// while nobody is there to see it.
func (o *own) restart() error {
	f := families[0]
	if _, err := bpfnet("run", "-d", "--name", "brief", "--network", "one", "sleep", "1000"); err != nil {
		return err
	}
	before, err := sandboxPIDs()
	if err != nil {
		return err
	}
	c, err := o.world.ask("tcp", at(f.host, ownPort), large)
	if err != nil {
		return err
	}
	defer c.Close()
	err = o.daemon.Process.Kill()
	_ = o.daemon.Wait()
	err = errors.Join(err, unix.Kill(before["brief"], unix.SIGKILL))
	delete(before, "brief")
	if err = errors.Join(err, c.echo(large), o.world.exchange("udp", at(f.host, ownPort), large, f.world)); err != nil {
		return fmt.Errorf("without the daemon: %w", err)
	}
	if err := o.start("--link-type", "veth"); err != nil {
		return err
	}
	if err := errors.Join(c.echo(large), o.world.exchange("tcp", at(f.host, ownPort), large, f.world)); err != nil {
		return fmt.Errorf("with the next daemon: %w", err)
	}
	after, err := sandboxPIDs()
	if err == nil && !maps.Equal(before, after) {
		err = fmt.Errorf("sandboxes were %v, are %v", before, after)
	}
	_, err2 := bpfnet("rm", "brief")
	return errors.Join(err, err2, o.allow(), o.held())
}

// beside has a sandbox that the daemon with --link-type veth has made talk with earlier ones.
func (o *own) beside() error {
	s, err := server("beside", "one")
	if err != nil {
		return err
	}
	errs := []error{linkedBy("veth", s)}
	for _, proto := range protocols {
		_, err := bpfnet("exec", "db", "/init", "ask", proto, fmt.Sprintf("beside:%d", target))
		_, err2 := bpfnet("exec", "beside", "/init", "ask", proto, fmt.Sprintf("db:%d", target))
		errs = append(errs, err, err2)
	}
	_, err = bpfnet("rm", "-f", "beside")
	return errors.Join(append(errs, err)...)
}

// doctor must find nothing broken, and name just these features as missing, with what is done instead.
func doctor(lacks []string) error {
	out, err := bpfnet("doctor")
	if err != nil {
		return err
	}
	var have []string
	for _, m := range missing.FindAllStringSubmatch(out, -1) {
		have = append(have, m[1])
	}
	if !slices.Equal(have, lacks) {
		return fmt.Errorf("doctor misses %q, and not %q: %s", have, lacks, out)
	}
	return nil
}

var missing = regexp.MustCompile(`(?m) no (\S.*) \(since Linux [0-9.]+\): \S`)

func (o *own) remove() error {
	_, err := bpfnet("rm", "-f", "web", "db", "far")
	_, err2 := bpfnet("network", "rm", "one", "two")
	return errors.Join(err, err2, o.listen(ownPort))
}

// cleanup must leave nothing.
func (o *own) cleanup() error {
	o.maps.Close()
	if err := o.daemon.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	if err := o.daemon.Wait(); err != nil {
		return fmt.Errorf("the daemon: %w", err)
	}
	if _, err := bpfnet("cleanup"); err != nil {
		return err
	}
	if err := nothingLoaded(); err != nil {
		return err
	}
	links, err := o.host.h.LinkList()
	if err != nil {
		return err
	}
	var left []string
	for _, l := range links {
		if name := l.Attrs().Name; name != "lo" && name != "up0" {
			left = append(left, name)
		}
	}
	for _, pattern := range []string{stateDir + "/*", cgroupRoot + "/bpfnet", "/run/bpfnet/*", "/proc/[0-9]*/exe"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, path := range paths {
			// Of processes, those with our program; others have ended, or are of the kernel.
			if exe, err := os.Readlink(path); filepath.Base(path) != "exe" || err == nil && exe == "/bpfnet" {
				left = append(left, path)
			}
		}
	}
	if len(left) > 0 {
		return fmt.Errorf("left: %s", strings.Join(left, ", "))
	}
	return nil
}

// role is what the guest does in a sandbox.
func role(args []string) error {
	here, err := netns.Get()
	if err != nil {
		return err
	}
	s := &space{ns: here}
	switch {
	case len(args) == 2 && args[0] == "serve":
		port, err := strconv.ParseUint(args[1], 10, 16)
		if err != nil {
			return err
		}
		if err := s.serve(uint16(port)); err != nil {
			return err
		}
		return unix.Pause()
	case len(args) == 3 && args[0] == "ask":
		name, port, err := net.SplitHostPort(args[2])
		if err != nil {
			return err
		}
		addrs, err := net.LookupHost(name)
		if err != nil {
			return err
		}
		if len(addrs) != len(families) {
			return fmt.Errorf("%s is at %v", name, addrs)
		}
		for _, a := range addrs {
			to, err := netip.ParseAddrPort(net.JoinHostPort(a, port))
			if err != nil {
				return err
			}
			if err := s.published(args[1], to, large); err != nil {
				return err
			}
		}
		return nil
	}
	return syscall.EINVAL
}
