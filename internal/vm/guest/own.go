// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
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

func (s *scene) own() error {
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
		{"daemon", o.start},
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
		{"isolation", o.isolated},
		{"connect and disconnect", o.connect},
		{"allow", o.allow},
		{"run --rm", o.codes},
		{"run in another's network", o.joined},
		{"SIGTERM is passed on", o.signal},
		{"publish and unpublish", o.publish},
		{"published ports are held", o.held},
		{"restart", o.restart},
		{"doctor", func() error { _, err := bpfnet("doctor"); return err }},
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
func (o *own) start() error {
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
	o.daemon = exec.Command("/bpfnet", "daemon", "--docker", "off")
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
	for _, x := range []struct {
		space         **space
		name, network string
		args          []string
	}{
		{&o.web, "web", "one", []string{"-p", port, "-p", port + "/udp"}},
		{&o.db, "db", "one", nil},
		{&o.far, "far", "two", nil},
	} {
		args := append([]string{"run", "-d", "--name", x.name, "--network", x.network}, x.args...)
		if _, err := bpfnet(append(args, "/init", "serve", strconv.Itoa(target))...); err != nil {
			return err
		}
		pids, err := sandboxPIDs()
		if err != nil {
			return err
		}
		ns, err := netns.GetFromPid(pids[x.name])
		if err != nil {
			return err
		}
		h, err := netlink.NewHandleAt(ns)
		if err != nil {
			return err
		}
		*x.space = &space{ns: ns, h: h}
		// The server listens a moment later.
		if err := eventually(func() error {
			return (*x.space).exchange("tcp", at(families[0].loopback, target), small, families[0].loopback)
		}); err != nil {
			return fmt.Errorf("%s: %w", x.name, err)
		}
	}
	return nil
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
	if err := o.start(); err != nil {
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
