// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes network namespaces and a cgroup, and loads and attaches BPF programs.
//
// One namespace stands for the host and one for a container:
//
//	host: lo, h0 10.77.0.1 fd77::1, 192.0.2.1 2001:db8::1 ──veth── c0 10.77.0.2 fd77::2 :container
//
// Whoever takes a connection says who it is and its port, so every case asserts where a socket
// went: "container:80", or "host:8080" where the programs leave it alone. The dialling is done by
// children of the test binary, in a cgroup that has the programs. The test itself is outside of it.
package bpf_test

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
)

const (
	sockChildEnv = "BPFNET_SOCK_CHILD"
	engineComm   = "dockerd"

	tcp   = unix.IPPROTO_TCP
	udp   = unix.IPPROTO_UDP
	mptcp = unix.IPPROTO_MPTCP

	readyEndpoint, unreadyEndpoint = 1, 2

	portAny, portLoopback, portHostAddr, portUnready, portV4Only = 8080, 8081, 8082, 8083, 8084
	portUnpublished, portTCPOnly, portBoth, portNoSlot           = 8085, 8086, 8087, 8088
)

func init() {
	switch os.Getenv(sockChildEnv) {
	case "":
		return
	case "dial":
		runDialer()
	case "hold":
		runHolder()
	}
	os.Exit(0)
}

// dialScript is what one child does with one socket: "bind A", "connect A", "sendto A", "send",
// "receive", "pktinfo IP A" (a sendto from that source), "device NAME", "v6only". The answer is then
// received.
type dialScript struct {
	Family int
	Proto  int
	Steps  []string
}

// dialResult has the addresses as the child's system calls gave them.
type dialResult struct {
	Answer string // who took it; UDP: as the last datagram said
	Peer   string // getpeername, if connected
	From   string // recvfrom, UDP
	Err    string
}

func runDialer() {
	var script dialScript
	if err := json.NewDecoder(os.Stdin).Decode(&script); err != nil {
		panic(err)
	}
	result, err := dial(script)
	if err != nil {
		result.Err = err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		panic(err)
	}
}

func dial(script dialScript) (result dialResult, err error) {
	kind := unix.SOCK_STREAM
	if script.Proto == udp {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(script.Family, kind, script.Proto)
	if err != nil {
		return result, err
	}
	defer unix.Close(fd)
	limit := unix.Timeval{Sec: 5}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return result, err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
		return result, err
	}
	for _, step := range script.Steps {
		if err := dialStep(fd, script.Family, strings.Fields(step)); err != nil {
			return result, fmt.Errorf("%s: %w", step, err)
		}
	}
	if peer, err := unix.Getpeername(fd); err == nil {
		result.Peer = sockaddrString(peer)
	}
	buf := make([]byte, 64)
	n, from, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return result, fmt.Errorf("receive: %w", err)
	}
	result.Answer = string(buf[:n])
	if script.Proto == udp {
		result.From = sockaddrString(from)
	}
	return result, nil
}

func dialStep(fd, family int, step []string) error {
	last := step[len(step)-1]
	switch step[0] {
	case "bind":
		return unix.Bind(fd, sockaddr(family, last))
	case "connect":
		return unix.Connect(fd, sockaddr(family, last))
	case "sendto":
		return unix.Sendto(fd, []byte("?"), 0, sockaddr(family, last))
	case "send":
		return unix.Send(fd, []byte("?"), 0)
	case "receive":
		_, _, err := unix.Recvfrom(fd, make([]byte, 64), 0)
		return err
	case "pktinfo":
		source := netip.MustParseAddr(step[1]).As4()
		oob := unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: source})
		return unix.Sendmsg(fd, []byte("?"), oob, sockaddr(family, last), 0)
	case "device":
		return unix.BindToDevice(fd, last)
	case "v6only":
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1)
	}
	return fmt.Errorf("unknown step")
}

func sockaddr(family int, address string) unix.Sockaddr {
	a := netip.MustParseAddrPort(address)
	if family == unix.AF_INET {
		return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
	}
	var zone uint32
	if device, err := net.InterfaceByName(a.Addr().Zone()); err == nil {
		zone = uint32(device.Index)
	}
	return &unix.SockaddrInet6{Addr: a.Addr().As16(), Port: int(a.Port()), ZoneId: zone}
}

func sockaddrString(address unix.Sockaddr) string {
	switch a := address.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port)).String()
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr), uint16(a.Port)).String()
	}
	return ""
}

// runHolder binds and closes sockets as it is told, a line each: "tcp A" or "udp A", "close N".
func runHolder() {
	var held []int
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if words[0] == "close" {
			n, err := strconv.Atoi(words[1])
			if err == nil {
				err = unix.Close(held[n])
			}
			fmt.Println(err)
			continue
		}
		fd, err := hold(words[0], words[1])
		held = append(held, fd)
		fmt.Println(err)
	}
}

func hold(network, address string) (int, error) {
	family, kind := unix.AF_INET6, unix.SOCK_DGRAM
	if netip.MustParseAddrPort(address).Addr().Is4() {
		family = unix.AF_INET
	}
	if network == "tcp" {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(family, kind, 0)
	if err != nil {
		return -1, err
	}
	if family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1); err != nil {
			return -1, err
		}
	}
	if err := unix.Bind(fd, sockaddr(family, address)); err != nil {
		return fd, err
	}
	if network == "tcp" {
		return fd, unix.Listen(fd, 1)
	}
	return fd, nil
}

// sockLab owns the namespaces, the cgroup, the maps and the attached programs.
type sockLab struct {
	host, container netns.NsHandle
	cgroup          *os.File
	spec            *ebpf.CollectionSpec
	maps            map[string]*ebpf.Map
}

func newSockLab(t *testing.T) *sockLab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for network namespaces, cgroups and BPF")
	}
	lab := &sockLab{host: newNamespace(t), container: newNamespace(t), cgroup: newCgroup(t)}
	lab.connect(t)
	lab.load(t)
	lab.fill(t)
	return lab
}

func newNamespace(t *testing.T) netns.NsHandle {
	t.Helper()
	var ns netns.NsHandle
	require.NoError(t, onOwnThread(func() (err error) {
		ns, err = netns.New()
		return err
	}))
	t.Cleanup(func() { assert.NoError(t, ns.Close()) })
	return ns
}

// onOwnThread runs f on a thread that ends with it, in whatever namespace f left it.
func onOwnThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

func inNamespace(ns netns.NsHandle, f func() error) error {
	return onOwnThread(func() error {
		if err := netns.Set(ns); err != nil {
			return err
		}
		return f()
	})
}

func newCgroup(t *testing.T) *os.File {
	t.Helper()
	mounts, err := os.ReadFile("/proc/mounts")
	require.NoError(t, err)
	for line := range strings.Lines(string(mounts)) {
		mount := strings.Fields(line)
		if mount[2] != "cgroup2" {
			continue
		}
		dir, err := os.MkdirTemp(mount[1], "bpfnet_sock_test_")
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, os.Remove(dir)) })
		cgroup, err := os.Open(dir)
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, cgroup.Close()) })
		return cgroup
	}
	t.Fatal("no cgroup2 hierarchy is mounted")
	return nil
}

func (lab *sockLab) connect(t *testing.T) {
	t.Helper()
	host, err := netlink.NewHandleAt(lab.host)
	require.NoError(t, err)
	defer host.Close()
	container, err := netlink.NewHandleAt(lab.container)
	require.NoError(t, err)
	defer container.Close()
	require.NoError(t, host.LinkAdd(&netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: "h0"},
		PeerName:      "c0",
		PeerNamespace: netlink.NsFd(lab.container),
	}))
	configure(t, host, "lo")
	configure(t, host, "h0", "10.77.0.1/24", "fd77::1/64", "fe80::77/64")
	configure(t, host, "h0", "192.0.2.1/32", "2001:db8::1/128")
	configure(t, container, "lo")
	configure(t, container, "c0", "10.77.0.2/24", "fd77::2/64")
	for _, gateway := range []string{"10.77.0.1", "fd77::1"} {
		require.NoError(t, container.RouteAdd(&netlink.Route{Gw: net.ParseIP(gateway)}))
	}
}

func configure(t *testing.T, h *netlink.Handle, name string, prefixes ...string) {
	t.Helper()
	device, err := h.LinkByName(name)
	require.NoError(t, err)
	require.NoError(t, h.LinkSetUp(device))
	for _, prefix := range prefixes {
		address, err := netlink.ParseAddr(prefix)
		require.NoError(t, err)
		if address.IP.To4() == nil {
			address.Flags = unix.IFA_F_NODAD
		}
		require.NoError(t, h.AddrAdd(device, address))
	}
}

func (lab *sockLab) load(t *testing.T) {
	t.Helper()
	var err error
	lab.spec, err = bpf.LoadSock()
	require.NoError(t, err)
	for _, m := range lab.spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	collection, err := ebpf.NewCollection(lab.spec)
	require.NoError(t, err)
	t.Cleanup(collection.Close)
	lab.maps = collection.Maps
	for name, program := range collection.Programs {
		attached, err := link.AttachCgroup(link.CgroupOptions{
			Path:    lab.cgroup.Name(),
			Attach:  lab.spec.Programs[name].AttachType,
			Program: program,
		})
		require.NoError(t, err, name)
		t.Cleanup(func() { assert.NoError(t, attached.Close()) })
	}
}

// fields are the members of a map's key or value, by their names in C; the rest is zero.
type fields map[string]any

// record lays out a struct as its BTF says. Numbers are in host order, []byte as given.
func record(t *testing.T, typ btf.Type, values fields) []byte {
	t.Helper()
	size, err := btf.Sizeof(typ)
	require.NoError(t, err)
	out := make([]byte, size)
	for name, value := range values {
		n, err := binary.Encode(out[member(t, typ, name):], binary.NativeEndian, value)
		require.NoError(t, err, name)
		require.Positive(t, n)
	}
	return out
}

// member returns the offset of a struct's member in bytes.
func member(t *testing.T, typ btf.Type, name string) int {
	t.Helper()
	for _, m := range btf.UnderlyingType(typ).(*btf.Struct).Members {
		if m.Name == name {
			return int(m.Offset.Bytes())
		}
	}
	t.Fatalf("%v has no member %q", typ, name)
	return 0
}

func (lab *sockLab) put(t *testing.T, name string, key any, value fields) {
	t.Helper()
	if f, ok := key.(fields); ok {
		key = record(t, lab.spec.Maps[name].Key, f)
	}
	require.NoError(t, lab.maps[name].Put(key, record(t, lab.spec.Maps[name].Value, value)), name)
}

func mapped(address string) []byte {
	a := netip.MustParseAddr(address).As16()
	return a[:]
}

func bigEndian(port int) []byte {
	return binary.BigEndian.AppendUint16(nil, uint16(port))
}

// fill publishes the ports, marks the endpoints and starts the servers.
func (lab *sockLab) fill(t *testing.T) {
	t.Helper()
	lab.put(t, "config", uint32(0), fields{"netns_cookie": netnsCookie(t, lab.host)})
	lab.put(t, "endpoint_slots", uint32(readyEndpoint), fields{"ifindex": uint32(1), "flags": uint8(1)})
	lab.put(t, "endpoint_slots", uint32(unreadyEndpoint), fields{"ifindex": uint32(1)})
	for _, address := range []string{"10.77.0.1", "fd77::1", "fe80::77", "192.0.2.1", "2001:db8::1"} {
		lab.put(t, "host_addrs", mapped(address), nil)
	}
	published := []struct {
		address  string
		port     int
		target   string
		endpoint int
		protos   []uint8
	}{
		{"0.0.0.0", portAny, "10.77.0.2:80", readyEndpoint, []uint8{tcp, udp}},
		{"::", portAny, "[fd77::2]:80", readyEndpoint, []uint8{tcp, udp}},
		{"127.0.0.1", portLoopback, "10.77.0.2:80", readyEndpoint, []uint8{tcp, udp}},
		{"192.0.2.1", portHostAddr, "10.77.0.2:80", readyEndpoint, []uint8{tcp, udp}},
		{"2001:db8::1", portHostAddr, "[fd77::2]:80", readyEndpoint, []uint8{tcp, udp}},
		{"0.0.0.0", portUnready, "10.77.0.2:80", unreadyEndpoint, []uint8{tcp, udp}},
		{"::", portUnready, "[fd77::2]:80", unreadyEndpoint, []uint8{tcp, udp}},
		{"::", portV4Only, "10.77.0.2:80", readyEndpoint, []uint8{tcp, udp}},
		{"0.0.0.0", portTCPOnly, "10.77.0.2:80", readyEndpoint, []uint8{tcp}},
		{"0.0.0.0", portBoth, "10.77.0.2:80", readyEndpoint, []uint8{tcp, udp}},
		{"127.0.0.1", portBoth, "10.77.0.2:81", readyEndpoint, []uint8{tcp, udp}},
		{"0.0.0.0", portNoSlot, "10.77.0.2:80", 0, []uint8{tcp, udp}},
	}
	classType := lab.spec.Maps["port_class"].Value
	class := record(t, classType, nil)
	for _, p := range published {
		target := netip.MustParseAddrPort(p.target)
		for _, proto := range p.protos {
			lab.put(t, "ports",
				fields{"addr": mapped(p.address), "port": bigEndian(p.port), "proto": proto},
				fields{
					"addr":     mapped(target.Addr().String()),
					"port":     bigEndian(int(target.Port())),
					"endpoint": uint16(p.endpoint),
				})
			class[member(t, classType, "ports")+p.port] |= portBit(proto)
		}
	}
	require.NoError(t, lab.maps["port_class"].Put(uint32(0), class))
	for port := portAny; port <= portNoSlot; port++ {
		serve(t, lab.host, "host", port)
	}
	for _, port := range []int{80, 81} {
		serve(t, lab.container, "container", port)
	}
	serve(t, lab.container, "inside", portAny)
}

// portBit is enum port_bits.
func portBit(proto uint8) uint8 {
	if proto == tcp {
		return 1
	}
	return 2
}

func netnsCookie(t *testing.T, ns netns.NsHandle) uint64 {
	t.Helper()
	var cookie uint64
	require.NoError(t, inNamespace(ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return err
	}))
	return cookie
}

// serve answers on a port of every address, TCP and UDP, with who it is. It ends with the test.
func serve(t *testing.T, ns netns.NsHandle, who string, port int) {
	t.Helper()
	answer := fmt.Appendf(nil, "%s:%d", who, port)
	address := fmt.Sprintf(":%d", port)
	var listener net.Listener
	var packets net.PacketConn
	require.NoError(t, inNamespace(ns, func() (err error) {
		if listener, err = net.Listen("tcp", address); err != nil {
			return err
		}
		packets, err = net.ListenPacket("udp", address)
		return err
	}))
	done := make(chan struct{}, 2)
	t.Cleanup(func() {
		listener.Close()
		packets.Close()
		<-done
		<-done
	})
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write(answer)
			conn.Close()
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		buf := make([]byte, 64)
		for {
			_, from, err := packets.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = packets.WriteTo(answer, from)
		}
	}()
}

// child prepares the test binary under a name, as a process of the cgroup.
func (lab *sockLab) child(t *testing.T, name, role string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(name)
	cmd.Env = append(os.Environ(), sockChildEnv+"="+role, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(lab.cgroup.Fd())}
	return cmd
}

func (lab *sockLab) dial(t *testing.T, ns netns.NsHandle, script dialScript) dialResult {
	t.Helper()
	input, err := json.Marshal(script)
	require.NoError(t, err)
	cmd := lab.child(t, "/proc/self/exe", "dial")
	cmd.Stdin = strings.NewReader(string(input))
	var output strings.Builder
	cmd.Stdout = &output
	require.NoError(t, inNamespace(ns, cmd.Start))
	require.NoError(t, cmd.Wait())
	var result dialResult
	require.NoError(t, json.Unmarshal([]byte(output.String()), &result), output.String())
	return result
}

func TestSockDial(t *testing.T) {
	lab := newSockLab(t)
	const v4, v6 = unix.AF_INET, unix.AF_INET6
	const reached = "container:80"
	tests := []struct {
		name   string
		ns     netns.NsHandle
		script dialScript
		want   dialResult
	}{
		{name: "tcp 127.0.0.1",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.1:8080"}},
			want:   dialResult{Answer: reached, Peer: "127.0.0.1:8080"}},
		{name: "tcp 127.0.0.2",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.2:8080"}},
			want:   dialResult{Answer: reached, Peer: "127.0.0.2:8080"}},
		{name: "tcp 0.0.0.0 means loopback",
			script: dialScript{v4, tcp, []string{"connect 0.0.0.0:8080"}},
			want:   dialResult{Answer: reached, Peer: "127.0.0.1:8080"}},
		{name: "tcp host address",
			script: dialScript{v4, tcp, []string{"connect 192.0.2.1:8080"}},
			want:   dialResult{Answer: reached, Peer: "192.0.2.1:8080"}},
		{name: "tcp the bridge's address",
			script: dialScript{v4, tcp, []string{"connect 10.77.0.1:8080"}},
			want:   dialResult{Answer: reached, Peer: "10.77.0.1:8080"}},
		{name: "tcp the container's own address stays what it is",
			script: dialScript{v4, tcp, []string{"connect 10.77.0.2:80"}},
			want:   dialResult{Answer: reached, Peer: "10.77.0.2:80"}},
		{name: "tcp a published number at an address that is not the host's",
			script: dialScript{v4, tcp, []string{"connect 10.77.0.2:8080"}},
			want:   dialResult{Answer: "inside:8080", Peer: "10.77.0.2:8080"}},
		{name: "tcp ::1",
			script: dialScript{v6, tcp, []string{"connect [::1]:8080"}},
			want:   dialResult{Answer: reached, Peer: "[::1]:8080"}},
		{name: "tcp :: means loopback",
			script: dialScript{v6, tcp, []string{"connect [::]:8080"}},
			want:   dialResult{Answer: reached, Peer: "[::1]:8080"}},
		{name: "tcp host v6 address",
			script: dialScript{v6, tcp, []string{"connect [2001:db8::1]:8080"}},
			want:   dialResult{Answer: reached, Peer: "[2001:db8::1]:8080"}},
		{name: "tcp host link-local address",
			script: dialScript{v6, tcp, []string{"connect [fe80::77%h0]:8080"}},
			want:   dialResult{Answer: reached, Peer: "[fe80::77]:8080"}},
		{name: "tcp mapped 127.0.0.1, as Java does",
			script: dialScript{v6, tcp, []string{"connect [::ffff:127.0.0.1]:8080"}},
			want:   dialResult{Answer: reached, Peer: "[::ffff:127.0.0.1]:8080"}},
		{name: "tcp mapped host address",
			script: dialScript{v6, tcp, []string{"connect [::ffff:192.0.2.1]:8080"}},
			want:   dialResult{Answer: reached, Peer: "[::ffff:192.0.2.1]:8080"}},
		{name: "tcp ::1 to a container with IPv4 only",
			script: dialScript{v6, tcp, []string{"connect [::1]:8084"}},
			want:   dialResult{Answer: reached, Peer: "[::1]:8084"}},
		{name: "tcp host v6 address to a container with IPv4 only",
			script: dialScript{v6, tcp, []string{"connect [2001:db8::1]:8084"}},
			want:   dialResult{Answer: reached, Peer: "[2001:db8::1]:8084"}},
		{name: "tcp v6only socket to a container with IPv4 only",
			script: dialScript{v6, tcp, []string{"v6only", "connect [::1]:8084"}},
			want:   dialResult{Err: "connect [::1]:8084: network is unreachable"}},

		{name: "tcp bound to loopback is left",
			script: dialScript{v4, tcp, []string{"bind 127.0.0.1:0", "connect 127.0.0.1:8080"}},
			want:   dialResult{Answer: "host:8080", Peer: "127.0.0.1:8080"}},
		{name: "tcp bound to ::1 is left",
			script: dialScript{v6, tcp, []string{"bind [::1]:0", "connect [::1]:8080"}},
			want:   dialResult{Answer: "host:8080", Peer: "[::1]:8080"}},
		{name: "tcp bound to mapped loopback is left",
			script: dialScript{v6, tcp,
				[]string{"bind [::ffff:127.0.0.3]:0", "connect [::ffff:127.0.0.1]:8080"}},
			want: dialResult{Answer: "host:8080", Peer: "[::ffff:127.0.0.1]:8080"}},
		{name: "tcp bound to a device is left",
			script: dialScript{v4, tcp, []string{"device lo", "connect 127.0.0.1:8080"}},
			want:   dialResult{Answer: "host:8080", Peer: "127.0.0.1:8080"}},
		{name: "tcp bound to a host address",
			script: dialScript{v4, tcp, []string{"bind 192.0.2.1:0", "connect 192.0.2.1:8080"}},
			want:   dialResult{Answer: reached, Peer: "192.0.2.1:8080"}},
		{name: "tcp bound to a host address, 0.0.0.0 means that and not loopback",
			script: dialScript{v4, tcp, []string{"bind 192.0.2.1:0", "connect 0.0.0.0:8081"}},
			want:   dialResult{Answer: "host:8081", Peer: "192.0.2.1:8081"}},
		{name: "tcp bound to a host address, to 127.0.0.1",
			script: dialScript{v4, tcp, []string{"bind 192.0.2.1:0", "connect 127.0.0.1:8080"}},
			want:   dialResult{Answer: reached, Peer: "127.0.0.1:8080"}},
		{name: "tcp bound to a host v6 address",
			script: dialScript{v6, tcp, []string{"bind [2001:db8::1]:0", "connect [::1]:8080"}},
			want:   dialResult{Answer: reached, Peer: "[::1]:8080"}},
		{name: "tcp bound to a host v6 address, to a container with IPv4 only, is left",
			script: dialScript{v6, tcp, []string{"bind [2001:db8::1]:0", "connect [::1]:8084"}},
			want:   dialResult{Answer: "host:8084", Peer: "[::1]:8084"}},
		{name: "tcp bound to a mapped host address",
			script: dialScript{v6, tcp,
				[]string{"bind [::ffff:192.0.2.1]:0", "connect [::ffff:127.0.0.1]:8080"}},
			want: dialResult{Answer: reached, Peer: "[::ffff:127.0.0.1]:8080"}},

		{name: "tcp from a container's namespace is left", ns: lab.container,
			script: dialScript{v4, tcp, []string{"connect 127.0.0.1:8080"}},
			want:   dialResult{Answer: "inside:8080", Peer: "127.0.0.1:8080"}},
		{name: "udp from a container's namespace is left", ns: lab.container,
			script: dialScript{v6, udp, []string{"sendto [::1]:8080"}},
			want:   dialResult{Answer: "inside:8080", From: "[::1]:8080"}},
		{name: "tcp unpublished",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.1:8085"}},
			want:   dialResult{Answer: "host:8085", Peer: "127.0.0.1:8085"}},
		{name: "tcp published for tcp only",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.1:8086"}},
			want:   dialResult{Answer: reached, Peer: "127.0.0.1:8086"}},
		{name: "udp published for tcp only",
			script: dialScript{v4, udp, []string{"sendto 127.0.0.1:8086"}},
			want:   dialResult{Answer: "host:8086", From: "127.0.0.1:8086"}},
		{name: "tcp published for v4 only, ::1",
			script: dialScript{v6, tcp, []string{"connect [::1]:8086"}},
			want:   dialResult{Answer: "host:8086", Peer: "[::1]:8086"}},
		{name: "tcp published on 127.0.0.1 only",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.1:8081"}},
			want:   dialResult{Answer: reached, Peer: "127.0.0.1:8081"}},
		{name: "tcp published on 127.0.0.1 only, 127.0.0.2",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.2:8081"}},
			want:   dialResult{Answer: "host:8081", Peer: "127.0.0.2:8081"}},
		{name: "tcp published on 127.0.0.1 only, host address",
			script: dialScript{v4, tcp, []string{"connect 192.0.2.1:8081"}},
			want:   dialResult{Answer: "host:8081", Peer: "192.0.2.1:8081"}},
		{name: "tcp published on a host address only",
			script: dialScript{v4, tcp, []string{"connect 192.0.2.1:8082"}},
			want:   dialResult{Answer: reached, Peer: "192.0.2.1:8082"}},
		{name: "tcp published on a host address only, 127.0.0.1",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.1:8082"}},
			want:   dialResult{Answer: "host:8082", Peer: "127.0.0.1:8082"}},
		{name: "tcp published on a host v6 address only",
			script: dialScript{v6, tcp, []string{"connect [2001:db8::1]:8082"}},
			want:   dialResult{Answer: reached, Peer: "[2001:db8::1]:8082"}},
		{name: "tcp published on a host v6 address only, ::1",
			script: dialScript{v6, tcp, []string{"connect [::1]:8082"}},
			want:   dialResult{Answer: "host:8082", Peer: "[::1]:8082"}},
		{name: "tcp exact address before any",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.1:8087"}},
			want:   dialResult{Answer: "container:81", Peer: "127.0.0.1:8087"}},
		{name: "tcp any beside an exact address",
			script: dialScript{v4, tcp, []string{"connect 192.0.2.1:8087"}},
			want:   dialResult{Answer: reached, Peer: "192.0.2.1:8087"}},
		{name: "tcp endpoint not ready",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.1:8083"}},
			want:   dialResult{Answer: "host:8083", Peer: "127.0.0.1:8083"}},
		{name: "tcp port of no endpoint",
			script: dialScript{v4, tcp, []string{"connect 127.0.0.1:8088"}},
			want:   dialResult{Answer: "host:8088", Peer: "127.0.0.1:8088"}},

		{name: "udp connected",
			script: dialScript{v4, udp, []string{"connect 127.0.0.1:8080", "send"}},
			want: dialResult{Answer: reached, Peer: "127.0.0.1:8080",
				From: "127.0.0.1:8080"}},
		{name: "udp connected to a host address",
			script: dialScript{v4, udp, []string{"connect 192.0.2.1:8080", "send"}},
			want: dialResult{Answer: reached, Peer: "192.0.2.1:8080",
				From: "192.0.2.1:8080"}},
		{name: "udp connected to ::1",
			script: dialScript{v6, udp, []string{"connect [::1]:8080", "send"}},
			want:   dialResult{Answer: reached, Peer: "[::1]:8080", From: "[::1]:8080"}},
		{name: "udp connected to mapped loopback",
			script: dialScript{v6, udp, []string{"connect [::ffff:127.0.0.1]:8080", "send"}},
			want: dialResult{Answer: reached, Peer: "[::ffff:127.0.0.1]:8080",
				From: "[::ffff:127.0.0.1]:8080"}},
		{name: "udp connected to ::1, a container with IPv4 only",
			script: dialScript{v6, udp, []string{"connect [::1]:8084", "send"}},
			want:   dialResult{Answer: reached, Peer: "[::1]:8084", From: "[::1]:8084"}},
		{name: "udp connected to an unpublished port, then elsewhere: bound to loopback by it",
			script: dialScript{v4, udp,
				[]string{"connect 127.0.0.1:8085", "connect 127.0.0.1:8080", "send"}},
			want: dialResult{Answer: "host:8080", Peer: "127.0.0.1:8080",
				From: "127.0.0.1:8080"}},
		{name: "udp unconnected",
			script: dialScript{v4, udp, []string{"sendto 127.0.0.1:8080"}},
			want:   dialResult{Answer: reached, From: "127.0.0.1:8080"}},
		{name: "udp unconnected, 127.0.0.2",
			script: dialScript{v4, udp, []string{"sendto 127.0.0.2:8080"}},
			want:   dialResult{Answer: reached, From: "127.0.0.2:8080"}},
		{name: "udp unconnected, host address",
			script: dialScript{v4, udp, []string{"sendto 192.0.2.1:8080"}},
			want:   dialResult{Answer: reached, From: "192.0.2.1:8080"}},
		{name: "udp unconnected, ::1",
			script: dialScript{v6, udp, []string{"sendto [::1]:8080"}},
			want:   dialResult{Answer: reached, From: "[::1]:8080"}},
		{name: "udp unconnected, host v6 address",
			script: dialScript{v6, udp, []string{"sendto [2001:db8::1]:8080"}},
			want:   dialResult{Answer: reached, From: "[2001:db8::1]:8080"}},
		{name: "udp unconnected, host link-local address is left",
			script: dialScript{v6, udp, []string{"sendto [fe80::77%h0]:8080"}},
			want:   dialResult{Answer: "host:8080", From: "[fe80::77]:8080"}},
		{name: "udp unconnected, mapped loopback",
			script: dialScript{v6, udp, []string{"sendto [::ffff:127.0.0.1]:8080"}},
			want:   dialResult{Answer: reached, From: "[::ffff:127.0.0.1]:8080"}},
		{name: "udp unconnected, mapped loopback, bound to mapped loopback is left",
			script: dialScript{v6, udp,
				[]string{"bind [::ffff:127.0.0.1]:0", "sendto [::ffff:127.0.0.1]:8080"}},
			want: dialResult{Answer: "host:8080", From: "[::ffff:127.0.0.1]:8080"}},
		{name: "udp unconnected, ::1 to a container with IPv4 only is left",
			script: dialScript{v6, udp, []string{"sendto [::1]:8084"}},
			want:   dialResult{Answer: "host:8084", From: "[::1]:8084"}},
		{name: "udp unconnected, bound to loopback is left",
			script: dialScript{v4, udp, []string{"bind 127.0.0.1:0", "sendto 127.0.0.1:8080"}},
			want:   dialResult{Answer: "host:8080", From: "127.0.0.1:8080"}},
		{name: "udp unconnected, bound to ::1 is left",
			script: dialScript{v6, udp, []string{"bind [::1]:0", "sendto [::1]:8080"}},
			want:   dialResult{Answer: "host:8080", From: "[::1]:8080"}},
		{name: "udp unconnected, bound to a host address",
			script: dialScript{v4, udp, []string{"bind 192.0.2.1:0", "sendto 192.0.2.1:8080"}},
			want:   dialResult{Answer: reached, From: "192.0.2.1:8080"}},
		{name: "udp unconnected, message with a loopback source is left",
			script: dialScript{v4, udp, []string{"pktinfo 127.0.0.1 127.0.0.1:8080"}},
			want:   dialResult{Answer: "host:8080", From: "127.0.0.1:8080"}},
		{name: "udp unconnected, message with a host source",
			script: dialScript{v4, udp, []string{"pktinfo 192.0.2.1 127.0.0.1:8080"}},
			want:   dialResult{Answer: reached, From: "127.0.0.1:8080"}},
		{name: "udp unconnected, two ports, then the first again",
			script: dialScript{v4, udp, []string{
				"sendto 127.0.0.1:8080", "receive",
				"sendto 127.0.0.1:8087", "receive",
				"sendto 127.0.0.1:8080"}},
			want: dialResult{Answer: reached, From: "127.0.0.1:8080"}},
		{name: "udp unconnected, another name of the same container",
			script: dialScript{v4, udp,
				[]string{"sendto 127.0.0.1:8080", "receive", "sendto 192.0.2.1:8082"}},
			want: dialResult{Answer: reached, From: "192.0.2.1:8082"}},
		{name: "udp connected, then sendto another port",
			script: dialScript{v4, udp,
				[]string{"connect 192.0.2.1:8080", "sendto 127.0.0.1:8080"}},
			want: dialResult{Answer: reached, Peer: "127.0.0.1:8080", From: "127.0.0.1:8080"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			ns := lab.host
			if test.ns != 0 {
				ns = test.ns
			}
			assert.Equal(t, test.want, lab.dial(t, ns, test.script))
		})
	}
}

// The programs of a host act on its namespace only, whatever cgroup its processes share.
func TestSockOtherHost(t *testing.T) {
	lab := newSockLab(t)
	script := dialScript{unix.AF_INET, tcp, []string{"connect 127.0.0.1:8080"}}
	require.Equal(t, "container:80", lab.dial(t, lab.host, script).Answer)
	lab.put(t, "config", uint32(0), fields{"netns_cookie": netnsCookie(t, lab.container)})
	assert.Equal(t, "host:8080", lab.dial(t, lab.host, script).Answer)
}

// A socket that is bound to a masquerade port may not connect onto a tuple that a container's flow
// holds: answers would be the container's.
func TestSockHeldTuple(t *testing.T) {
	lab := newSockLab(t)
	const bound = 20000
	class := make([]byte, lab.maps["port_class"].ValueSize())
	require.NoError(t, lab.maps["port_class"].Lookup(uint32(0), &class))
	class[member(t, lab.spec.Maps["port_class"].Value, "ports")+bound] |= byte(bpf.DatapathPortBitsPORT_SNAT)
	class[member(t, lab.spec.Maps["port_class"].Value, "ports")+bound+1] |= byte(bpf.DatapathPortBitsPORT_SNAT)
	class[member(t, lab.spec.Maps["port_class"].Value, "ports")+80] |= byte(bpf.DatapathPortBitsPORT_TCP) // the host publishes that number too
	require.NoError(t, lab.maps["port_class"].Put(uint32(0), class))
	hold := func(remote, local string, port int, proto, out uint8) {
		r, l := netip.MustParseAddr(remote), netip.MustParseAddr(local)
		key := fields{"sport": bigEndian(80), "dport": bigEndian(port), "proto": proto, "hook": uint8(bpf.DatapathHookHOOK_UPLINK)}
		flow := record(t, lab.spec.Maps["flows4"].Value, nil)
		table := "flows4"
		if r.Is6() {
			table, flow = "flows6", record(t, lab.spec.Maps["flows6"].Value, nil)
			key["saddr"], key["daddr"] = r.AsSlice(), l.AsSlice()
		} else {
			key["saddr"], key["daddr"] = r.AsSlice(), l.AsSlice()
		}
		entry := btf.UnderlyingType(lab.spec.Maps[table].Value).(*btf.Struct).Members[0]
		flow[int(entry.Offset.Bytes())+member(t, entry.Type, "flags")] = out
		require.NoError(t, lab.maps[table].Put(record(t, lab.spec.Maps[table].Key, key), flow))
	}
	const container, stack = uint8(bpf.DatapathHookHOOK_CONTAINER), 0
	hold("10.77.0.2", "10.77.0.1", bound, tcp, container)
	hold("10.77.0.2", "10.77.0.1", bound, udp, container)
	hold("fd77::2", "fd77::1", bound, tcp, container)
	hold("10.77.0.2", "10.77.0.1", bound+1, udp, stack) // what the host itself claimed

	const v4, v6, taken = unix.AF_INET, unix.AF_INET6, "cannot assign requested address"
	for _, c := range []struct {
		name   string
		ns     netns.NsHandle
		script dialScript
		taken  bool
	}{
		{"no address", lab.host, dialScript{v4, tcp, []string{"bind 0.0.0.0:20000", "connect 10.77.0.2:80"}}, true},
		{"that address", lab.host, dialScript{v4, tcp, []string{"bind 10.77.0.1:20000", "connect 10.77.0.2:80"}}, true},
		{"UDP", lab.host, dialScript{v4, udp, []string{"bind 0.0.0.0:20000", "connect 10.77.0.2:80", "send"}}, true},
		{"UDP, not connected", lab.host, dialScript{v4, udp, []string{"bind 0.0.0.0:20000", "sendto 10.77.0.2:80"}}, true},
		{"UDP, not connected, mapped", lab.host, dialScript{v6, udp, []string{"bind [::]:20000", "sendto [::ffff:10.77.0.2]:80"}}, true},
		{"mapped", lab.host, dialScript{v6, tcp, []string{"bind [::]:20000", "connect [::ffff:10.77.0.2]:80"}}, true},
		{"IPv6", lab.host, dialScript{v6, tcp, []string{"bind [::]:20000", "connect [fd77::2]:80"}}, true},
		{"IPv6, that address", lab.host, dialScript{v6, tcp, []string{"bind [fd77::1]:20000", "connect [fd77::2]:80"}}, true},
		{"IPv6 UDP is held by nobody", lab.host, dialScript{v6, udp, []string{"bind [::]:20000", "connect [fd77::2]:80", "send"}}, false},
		{"another remote port", lab.host, dialScript{v4, tcp, []string{"bind 0.0.0.0:20000", "connect 10.77.0.2:81"}}, false},
		{"another port", lab.host, dialScript{v4, tcp, []string{"bind 0.0.0.0:20001", "connect 10.77.0.2:80"}}, false},
		{"another address", lab.host, dialScript{v4, tcp, []string{"bind 192.0.2.1:20000", "connect 10.77.0.2:80"}}, false},
		{"held by the host", lab.host, dialScript{v4, udp, []string{"bind 0.0.0.0:20001", "connect 10.77.0.2:80", "send"}}, false},
		{"not bound", lab.host, dialScript{v4, tcp, []string{"connect 10.77.0.2:80"}}, false},
		{"another namespace", lab.container, dialScript{v4, tcp, []string{"bind 0.0.0.0:20000", "connect 10.77.0.2:80"}}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := lab.dial(t, c.ns, c.script)
			if c.taken {
				assert.Contains(t, r.Err, taken)
				return
			}
			assert.NotContains(t, r.Err, taken)
			assert.Contains(t, r.Answer, "container:", "%+v", r)
		})
	}
}

// A socket that is bound to a device counts at its masquerade port for as long as it is open.
func TestSockDevice(t *testing.T) {
	lab := newSockLab(t)
	const bound, others = 20000, 10
	class := make([]byte, lab.maps["port_class"].ValueSize())
	require.NoError(t, lab.maps["port_class"].Lookup(uint32(0), &class))
	for port := bound; port < bound+others; port++ {
		class[member(t, lab.spec.Maps["port_class"].Value, "ports")+port] |= byte(bpf.DatapathPortBitsPORT_SNAT)
	}
	require.NoError(t, lab.maps["port_class"].Put(uint32(0), class))
	counted := func() (sum uint32) {
		for port := uint32(bound); port < bound+others; port++ {
			var n uint32
			require.NoError(t, lab.maps["device_sockets"].Lookup(port, &n))
			sum += n
		}
		return sum
	}
	var server net.PacketConn
	var listener net.Listener
	require.NoError(t, inNamespace(lab.host, func() (err error) {
		if server, err = net.ListenPacket("udp", ":9999"); err != nil {
			return err
		}
		listener, err = net.Listen("tcp", ":9999")
		return err
	}))
	t.Cleanup(func() {
		server.Close()
		listener.Close()
	})
	const v4, v6 = unix.AF_INET, unix.AF_INET6
	// A port of its own for each that leaves it to TIME_WAIT.
	for _, c := range []struct {
		name   string
		script dialScript
		want   uint32
	}{
		{"connect", dialScript{v4, udp, []string{"device lo", "bind 0.0.0.0:20000", "connect 127.0.0.1:9999", "send"}}, 1},
		{"connect, IPv6", dialScript{v6, udp, []string{"device lo", "bind [::]:20000", "connect [::1]:9999", "send"}}, 1},
		{"send", dialScript{v4, udp, []string{"device lo", "bind 0.0.0.0:20000", "sendto 127.0.0.1:9999"}}, 1},
		{"send, IPv6", dialScript{v6, udp, []string{"device lo", "bind [::]:20000", "sendto [::1]:9999"}}, 1},
		{"TCP", dialScript{v4, tcp, []string{"device lo", "bind 0.0.0.0:20002", "connect 127.0.0.1:9999"}}, 1},
		{"MPTCP", dialScript{v4, mptcp, []string{"device lo", "bind 0.0.0.0:20003", "connect 127.0.0.1:9999"}}, 1},
		{"MPTCP, IPv6", dialScript{v6, mptcp, []string{"device lo", "bind [::]:20004", "connect [::1]:9999"}}, 1},
		{"no device", dialScript{v4, udp, []string{"bind 0.0.0.0:20000", "connect 127.0.0.1:9999", "send"}}, 0},
		{"another port", dialScript{v4, udp, []string{"device lo", "bind 0.0.0.0:20010", "connect 127.0.0.1:9999", "send"}}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			soon := time.Now().Add(20 * time.Second)
			require.NoError(t, errors.Join(server.SetReadDeadline(soon), listener.(*net.TCPListener).SetDeadline(soon)))
			result := make(chan dialResult, 1)
			go func() { result <- lab.dial(t, lab.host, c.script) }()
			var open uint32
			if c.script.Proto == udp {
				_, from, err := server.ReadFrom(make([]byte, 64))
				require.NoError(t, err)
				open = counted()
				_, err = server.WriteTo([]byte("answer"), from)
				require.NoError(t, err)
			} else {
				conn, err := listener.Accept()
				require.NoError(t, err)
				open = counted()
				_, err = conn.Write([]byte("answer"))
				require.NoError(t, err)
				defer conn.Close()
			}
			require.Equal(t, "answer", (<-result).Answer)
			require.Equal(t, c.want, open)
			require.Zero(t, counted(), "closed")
		})
	}
}

// A closed socket is forgotten, so that the table holds the living only.
func TestSockPeersGoWithSocket(t *testing.T) {
	lab := newSockLab(t)
	for _, script := range []dialScript{
		{unix.AF_INET, tcp, []string{"connect 127.0.0.1:8080"}},
		{unix.AF_INET6, tcp, []string{"connect [::1]:8080"}},
		{unix.AF_INET6, udp, []string{"sendto [::ffff:127.0.0.1]:8080"}},
	} {
		require.Equal(t, "container:80", lab.dial(t, lab.host, script).Answer)
		assert.Zero(t, count(t, lab.maps["sock_peers"]), script)
	}
}

func count(t *testing.T, m *ebpf.Map) (n int) {
	t.Helper()
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		n++
	}
	require.NoError(t, entries.Err())
	return n
}

// holder is a child that binds what it is told.
type holder struct {
	input  io.Writer
	output *bufio.Reader
}

func (lab *sockLab) startHolder(t *testing.T, ns netns.NsHandle, comm string) *holder {
	t.Helper()
	cmd := lab.child(t, copySelf(t, comm), "hold")
	input, err := cmd.StdinPipe()
	require.NoError(t, err)
	output, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, inNamespace(ns, cmd.Start))
	t.Cleanup(func() {
		assert.NoError(t, input.Close())
		assert.NoError(t, cmd.Wait())
	})
	return &holder{input: input, output: bufio.NewReader(output)}
}

func copySelf(t *testing.T, name string) string {
	t.Helper()
	binary, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(path, binary, 0o700))
	return path
}

func (h *holder) do(t *testing.T, order string) {
	t.Helper()
	_, err := fmt.Fprintln(h.input, order)
	require.NoError(t, err)
	reply, err := h.output.ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "<nil>\n", reply, order)
}

// engineBits returns the port's byte of port_class.engine.
func (lab *sockLab) engineBits(t *testing.T, port int) uint8 {
	t.Helper()
	class := make([]byte, lab.maps["port_class"].ValueSize())
	require.NoError(t, lab.maps["port_class"].Lookup(uint32(0), &class))
	return class[member(t, lab.spec.Maps["port_class"].Value, "engine")+port]
}

// reservation returns how many sockets hold a port, and when the last was bound that takes IPv4, IPv6.
func (lab *sockLab) reservation(t *testing.T, port int, proto uint8) (sockets uint32, bound [2]uint64) {
	t.Helper()
	m := lab.spec.Maps["reservations"]
	value := make([]byte, m.ValueSize)
	key := record(t, m.Key, fields{"port": bigEndian(port), "proto": proto})
	if err := lab.maps["reservations"].Lookup(key, &value); err != nil {
		require.ErrorIs(t, err, ebpf.ErrKeyNotExist)
		return 0, bound
	}
	since := value[member(t, m.Value, "bound"):]
	return binary.NativeEndian.Uint32(value[member(t, m.Value, "sockets"):]),
		[2]uint64{binary.NativeEndian.Uint64(since), binary.NativeEndian.Uint64(since[8:])}
}

func TestSockReservation(t *testing.T) {
	lab := newSockLab(t)
	for _, comm := range []string{engineComm, "docker-proxy"} {
		t.Run(comm, func(t *testing.T) {
			engine := lab.startHolder(t, lab.host, comm)
			engine.do(t, "tcp 0.0.0.0:9000")
			sockets, first := lab.reservation(t, 9000, tcp)
			assert.EqualValues(t, 1, sockets)
			assert.Less(t, first[1], first[0], "it takes no IPv6")
			assert.Equal(t, portBit(tcp), lab.engineBits(t, 9000))

			engine.do(t, "tcp [::]:9000")
			sockets, second := lab.reservation(t, 9000, tcp)
			assert.EqualValues(t, 2, sockets)
			assert.Greater(t, second[0], first[0], "it may take both")
			assert.Equal(t, second[0], second[1])

			engine.do(t, "udp 127.0.0.1:9000")
			assert.Equal(t, portBit(tcp)|portBit(udp), lab.engineBits(t, 9000))
			assert.Zero(t, lab.engineBits(t, 9001))

			engine.do(t, "close 0")
			assert.Equal(t, portBit(tcp)|portBit(udp), lab.engineBits(t, 9000))
			engine.do(t, "close 1")
			assert.Equal(t, portBit(udp), lab.engineBits(t, 9000))
			engine.do(t, "close 2")
			assert.Zero(t, lab.engineBits(t, 9000))
			for _, proto := range []uint8{tcp, udp} {
				sockets, _ := lab.reservation(t, 9000, proto)
				assert.Zero(t, sockets)
			}
		})
		assert.Zero(t, lab.engineBits(t, 9000), "the process is gone")
	}
}

// A reservation ends with its process, and a port is reserved again after it.
func TestSockReservationOfKilledEngine(t *testing.T) {
	lab := newSockLab(t)
	for range 2 {
		t.Run("", func(t *testing.T) {
			engine := lab.startHolder(t, lab.host, engineComm)
			for port := 9000; port < 9008; port++ {
				engine.do(t, fmt.Sprintf("tcp 0.0.0.0:%d", port))
				engine.do(t, fmt.Sprintf("tcp [::]:%d", port))
				assert.Equal(t, portBit(tcp), lab.engineBits(t, port))
			}
		})
		for port := 9000; port < 9008; port++ {
			assert.Zero(t, lab.engineBits(t, port))
			sockets, _ := lab.reservation(t, port, tcp)
			assert.Zero(t, sockets)
		}
	}
}

func TestSockNoReservation(t *testing.T) {
	lab := newSockLab(t)
	tests := []struct {
		name string
		ns   netns.NsHandle
		comm string
	}{
		{"another process", lab.host, "nginx"},
		{"a longer name", lab.host, "dockerd-rootles"},
		{"another namespace", lab.container, engineComm},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			other := lab.startHolder(t, test.ns, test.comm)
			other.do(t, "tcp 0.0.0.0:9000")
			other.do(t, "udp [::]:9000")
			assert.Zero(t, lab.engineBits(t, 9000))
			sockets, _ := lab.reservation(t, 9000, tcp)
			assert.Zero(t, sockets)
		})
	}
}

// The engine's other sockets come and go beside a reservation, and nobody else's close ends it.
func TestSockReservationOutlivesOthers(t *testing.T) {
	lab := newSockLab(t)
	engine := lab.startHolder(t, lab.host, engineComm)
	other := lab.startHolder(t, lab.host, "nginx")
	engine.do(t, "tcp 192.0.2.1:9000")
	other.do(t, "tcp 10.77.0.1:9000")
	other.do(t, "close 0")
	assert.Equal(t, portBit(tcp), lab.engineBits(t, 9000))
	engine.do(t, "tcp 127.0.0.1:0")
	engine.do(t, "close 1")
	assert.Equal(t, portBit(tcp), lab.engineBits(t, 9000))
}
