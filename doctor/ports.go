// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/bpfnet/bpfnet/policy"
)

// covers reports whether a socket bound to have keeps others off want.
func covers(have, want netip.AddrPort) bool {
	if have.Port() != want.Port() {
		return false
	}
	a, b := have.Addr().Unmap(), want.Addr().Unmap()
	switch {
	case a == b, a.Is6() && a.IsUnspecified():
		return true // [::] takes IPv4 too, unless it is told not to
	case a.Is4() == b.Is4():
		return a.IsUnspecified() || b.IsUnspecified()
	}
	return false
}

// checkReservations: a published port is bound by the Engine, its proxy, or bpfnet, so that no program
// of the host takes it and waits for clients that the container gets.
func checkReservations(f *Facts) []Finding {
	if f.Snapshot == nil || len(f.Snapshot.Ports) == 0 {
		return []Finding{okf("no port is published")}
	}
	var out []Finding
	var free []string
	held := 0
	for _, p := range f.Snapshot.Ports {
		want, err := netip.ParseAddrPort(p.Host)
		proto, perr := policy.ParseProto(p.Proto)
		if err != nil || perr != nil || proto == policy.SCTP {
			continue
		}
		var holders []Socket
		for _, s := range f.Sockets {
			if s.Proto == proto && covers(s.Addr, want) {
				holders = append(holders, s)
			}
		}
		good := false
		for _, s := range holders {
			switch {
			case engineProcess(s.Process.Name):
				good = true
			case s.Process.PID == 0:
				good = true // in no process: the last moments of one
			default:
				out = append(out, brokenf(commandLine("kill", fmt.Sprint(s.Process.PID)),
					"%s (process %d) listens on %s/%s, which is published: its clients get container %s instead", s.Process.Name, s.Process.PID, s.Addr, p.Proto, p.Container))
				good = true
			}
		}
		if good {
			held++
		} else if f.suspect("port %s/%s", p.Host, p.Proto) {
			free = append(free, p.Host+"/"+p.Proto)
		}
	}
	if len(free) > 0 && f.SocketsErr != nil {
		out = append(out, unknownf("whether %s are held: %s", some(free), f.SocketsErr))
	} else if len(free) > 0 {
		fix := ""
		if !f.Daemon.Running {
			fix = f.startDaemon()
		}
		out = append(out, notef(fix, "published, but held by no socket: %s; a program of the host could bind it and would get no packet", some(free)))
	}
	return one(out, "all published ports (%d) are held by sockets of the Engine or bpfnet", held)
}

// ParseSockets reads /proc/net/tcp, udp and their likes for IPv6 (proc(5)): listening sockets of TCP, and all
// bound ones of UDP, each with its inode.
func ParseSockets(proto, text string) (list []Socket, inodes []string) {
	p, err := policy.ParseProto(proto)
	if err != nil {
		return nil, nil
	}
	for line := range strings.Lines(text) {
		w := strings.Fields(line)
		// TCP_LISTEN; of UDP, connected ones are clients.
		if len(w) < 10 || p == policy.TCP && w[3] != "0A" || p == policy.UDP && w[3] != "07" {
			continue
		}
		addr, err := parseSocketAddr(w[1])
		if err != nil {
			continue
		}
		list = append(list, Socket{Proto: p, Addr: addr})
		inodes = append(inodes, w[9])
	}
	return list, inodes
}

// parseSocketAddr reads 0100007F:1F90: words in the machine's own order, in hexadecimal.
func parseSocketAddr(s string) (netip.AddrPort, error) {
	host, port, ok := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	n, perr := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || perr != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("address %q: unknown form", s)
	}
	for i := 0; i < len(raw); i += 4 {
		binary.BigEndian.PutUint32(raw[i:], binary.NativeEndian.Uint32(raw[i:]))
	}
	a, ok := netip.AddrFromSlice(raw)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("address %q: unknown form", s)
	}
	return netip.AddrPortFrom(a, uint16(n)), nil
}

// HoldsPorts reports whether the process is one that binds published ports to keep others off.
func HoldsPorts(p Process) bool { return engineProcess(p.Name) }
