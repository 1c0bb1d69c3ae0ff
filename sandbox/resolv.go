// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strings"
)

// Resolv renders a sandbox's resolv.conf (resolv.conf(5)) from the host's: its search list and
// options, and as name servers dns if there are any, else those of the host's that a sandbox can
// reach. Those are not the loopback addresses, nor those of IPv6 that mean an interface of the host's,
// as link-local ones do.
func Resolv(host []byte, dns []netip.Addr) []byte {
	var keep, servers []string
	given := false
	for _, a := range dns {
		if a.IsValid() {
			given = true
			servers = append(servers, a.String())
		}
	}
	search := ""
	for line := range strings.Lines(string(host)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "search", "domain": // of all of these the last one counts
			search = strings.Join(f, " ")
		case "options":
			keep = append(keep, strings.Join(f, " "))
		case "nameserver":
			if a, err := netip.ParseAddr(f[1]); err == nil && !given && reachable(a) {
				servers = append(servers, a.String())
			}
		}
	}
	var out bytes.Buffer
	for _, s := range servers {
		fmt.Fprintf(&out, "nameserver %s\n", s)
	}
	if search != "" {
		fmt.Fprintln(&out, search)
	}
	for _, line := range keep {
		fmt.Fprintln(&out, line)
	}
	return out.Bytes()
}

// reachable reports whether a host's name server is one for its sandboxes.
func reachable(a netip.Addr) bool {
	a = a.Unmap()
	return !a.IsLoopback() && !a.IsUnspecified() && (a.Is4() || a.Zone() == "" && !a.IsLinkLocalUnicast())
}

const (
	resolvConf = "/etc/resolv.conf"
	// resolvedConf is where systemd-resolved lists the servers that it asks.
	resolvedConf = "/run/systemd/resolve/resolv.conf"
)

// resolvedStub is where systemd-resolved answers.
var resolvedStub = netip.AddrFrom4([4]byte{127, 0, 0, 53})

// HostResolv reads the host's resolv.conf; where that names nothing but systemd-resolved's own
// address, the file with the servers behind it. A host without any has an empty one.
func HostResolv() ([]byte, error) { return hostResolv(resolvConf, resolvedConf) }

func hostResolv(conf, resolved string) ([]byte, error) {
	b, err := readIfExists(conf)
	if err != nil || !onlyResolved(b) {
		return b, err
	}
	behind, err := readIfExists(resolved)
	if err != nil || behind == nil {
		return b, err
	}
	return behind, nil
}

func readIfExists(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read name servers: %w", err)
	}
	return b, nil
}

func onlyResolved(conf []byte) bool {
	found := false
	for line := range strings.Lines(string(conf)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err != nil || a != resolvedStub {
			return false
		}
		found = true
	}
	return found
}
