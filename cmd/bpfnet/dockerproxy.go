// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/relay"
)

// proxyName is the name under which the engine runs this binary in docker-proxy's place:
// dockerd --userland-proxy-path=/usr/libexec/bpfnet/docker-proxy, a link to bpfnet.
const proxyName = "docker-proxy"

// socketEnv names the daemon's socket where it is not the usual one: the engine passes its own
// environment on.
const socketEnv = "BPFNET_SOCKET"

// announceTimeout is less than the 16 s that the engine waits for its proxy.
const announceTimeout = 15 * time.Second

// portHook does what the engine wants of docker-proxy, without carrying a packet: it holds the host
// port with a socket that takes nothing, has the daemon publish it, and says so on the status pipe;
// then it waits for the end. Only from IPv6 to a container that has none, packets cannot be sent:
// there it relays, as docker-proxy does. The exit status is 0 where the port was held.
type portHook struct {
	Status    io.Writer // the engine's pipe: "0\n", or "1\n" and why
	Getenv    func(string) string
	Listening *os.File // where the engine has bound the port itself (28 and later); nil: it has not

	proto               string
	hostIP, containerIP string
	hostPort, port      uint
}

// runPortHook is main under the name docker-proxy.
func runPortHook(ctx context.Context, args []string) int {
	h := portHook{Status: os.NewFile(3, "status"), Getenv: os.Getenv}
	useFD, err := h.parse(args)
	if err != nil {
		return h.fail(err)
	}
	if useFD {
		h.Listening = os.NewFile(4, "port")
	}
	held, err := h.hold(ctx)
	if err != nil {
		return h.fail(err)
	}
	defer held.Close()
	fmt.Fprint(h.Status, "0\n")
	if c, ok := h.Status.(io.Closer); ok {
		c.Close()
	}
	<-ctx.Done()
	return statusOK
}

func (h *portHook) fail(err error) int {
	fmt.Fprintf(h.Status, "1\nbpfnet: %s\n", oneLine(err.Error()))
	return statusError
}

func (h *portHook) parse(args []string) (useFD bool, err error) {
	flags := flag.NewFlagSet(proxyName, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&h.proto, "proto", "tcp", "")
	flags.StringVar(&h.hostIP, "host-ip", "", "")
	flags.UintVar(&h.hostPort, "host-port", 0, "")
	flags.StringVar(&h.containerIP, "container-ip", "", "")
	flags.UintVar(&h.port, "container-port", 0, "")
	flags.BoolVar(&useFD, "use-listen-fd", false, "")
	if err := flags.Parse(args); err != nil {
		return false, err
	}
	_, err = h.binding()
	return useFD, err
}

func (h *portHook) binding() (api.PortBinding, error) {
	b := api.PortBinding{Proto: h.proto}
	for _, side := range []struct {
		flag, ip string
		port     uint
		to       *netip.AddrPort
	}{{"-host-ip", h.hostIP, h.hostPort, &b.Host}, {"-container-ip", h.containerIP, h.port, &b.Container}} {
		ip, err := netip.ParseAddr(side.ip)
		if err != nil || side.port == 0 || side.port > 65535 {
			return b, fmt.Errorf("%s %q port %d: want an address and a port", side.flag, side.ip, side.port)
		}
		*side.to = netip.AddrPortFrom(ip, uint16(side.port))
	}
	return b, nil
}

// relays says that the port leads from IPv6 to a container that has none.
func relays(b api.PortBinding) bool {
	host := b.Host.Addr()
	return host.Is6() && !host.Is4In6() && !b.Container.Addr().Is6() && b.Proto != "sctp"
}

// relayHere serves the port in this process until Close. The engine ends it with its container.
func relayHere(b api.PortBinding, held io.Closer) (io.Closer, error) {
	proto, err := policy.ParseProto(b.Proto)
	if err != nil {
		return nil, err
	}
	socket, ok := held.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("relay %s/%s: has no socket", b.Host, b.Proto)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, dupErr := -1, error(nil)
	err = raw.Control(func(s uintptr) { fd, dupErr = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) })
	if err := errors.Join(err, dupErr); err != nil {
		return nil, err
	}
	r := relay.New(relay.Limits{})
	port := relay.Port{Key: relay.Key{Proto: proto, Host: b.Host}, Target: b.Container}
	if err := r.Add(port, fd); err != nil {
		return nil, err
	}
	return closerFunc(func() error {
		r.Close()
		return held.Close()
	}), nil
}

type closerFunc func() error

func (f closerFunc) Close() error { return f() }

// hold binds the port, so that nobody else can, and has the daemon publish it.
func (h *portHook) hold(ctx context.Context) (io.Closer, error) {
	b, err := h.binding()
	if err != nil {
		return nil, err
	}
	var held io.Closer = h.Listening
	if h.Listening == nil {
		if held, err = reserve(b); err != nil {
			return nil, err
		}
	}
	if relays(b) {
		relayed, err := relayHere(b, held)
		if err != nil {
			held.Close()
			return nil, err
		}
		held = relayed
	}
	path := h.Getenv(socketEnv)
	if path == "" {
		path = defaultSocket
	}
	ctx, cancel := context.WithTimeout(ctx, announceTimeout)
	defer cancel()
	client, err := api.Dial(ctx, path)
	if err == nil {
		err = client.Announce(ctx, b)
	}
	if err != nil {
		held.Close()
		return nil, err
	}
	return held, nil
}

// reserve binds the host port with a socket that drops whatever reaches it: the data path answers,
// and while it does not yet, a client's next try must not find somebody who never accepts.
func reserve(b api.PortBinding) (io.Closer, error) {
	lc := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var serr error
		err := raw.Control(func(fd uintptr) { serr = dropAll(int(fd)) })
		return errors.Join(err, serr)
	}}
	family := "4"
	if b.Host.Addr().Is6() {
		family = "6"
	}
	switch b.Proto {
	case "tcp":
		return lc.Listen(context.Background(), "tcp"+family, b.Host.String())
	case "udp":
		return lc.ListenPacket(context.Background(), "udp"+family, b.Host.String())
	case "sctp":
		return reserveSCTP(b.Host)
	}
	return nil, fmt.Errorf("protocol %q: unknown; use tcp, udp or sctp", b.Proto)
}

func dropAll(fd int) error {
	raw, err := bpf.Assemble([]bpf.Instruction{bpf.RetConstant{Val: 0}})
	if err != nil {
		return err
	}
	filter := []unix.SockFilter{{Code: raw[0].Op, Jt: raw[0].Jt, Jf: raw[0].Jf, K: raw[0].K}}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &filter[0]})
}

func reserveSCTP(host netip.AddrPort) (io.Closer, error) {
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(host.Port())})
	if host.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(host.Port()), Addr: host.Addr().As16()}
	} else {
		sa.(*unix.SockaddrInet4).Addr = host.Addr().As4()
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return io.NopCloser(nil), nil // a kernel without SCTP: nobody else can bind the port either
	}
	if err != nil {
		return nil, fmt.Errorf("sctp socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "sctp")
	if err := unix.Bind(fd, sa); err != nil {
		f.Close()
		return nil, fmt.Errorf("bind %s/sctp: %w", host, err)
	}
	return f, nil
}

// isPortHook reports whether the engine has run this binary in docker-proxy's place.
func isPortHook(name string) bool { return filepath.Base(name) == proxyName }
