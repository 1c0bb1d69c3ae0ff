// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// HostsFile is what a sandbox's hosts file says besides what every one does.
type HostsFile struct {
	// Hostname is the sandbox's own, which leads to Addrs only. Empty: none.
	Hostname string
	Addrs    []netip.Addr
	// Neighbours are others with their names. Several may have a name in common.
	Neighbours []HostsEntry
}

// HostsEntry is an address with its names, the first of which is the one that it leads back to.
type HostsEntry struct {
	Addr  netip.Addr
	Names []string
}

// hostsBegin is what every file begins with, as Docker's does.
const hostsBegin = "127.0.0.1\tlocalhost\n" +
	"::1\tlocalhost ip6-localhost ip6-loopback\n" +
	"fe00::\tip6-localnet\n" +
	"ff00::\tip6-mcastprefix\n" +
	"ff02::1\tip6-allnodes\n" +
	"ff02::2\tip6-allrouters\n"

// maxHostsLine is a line's length in bytes, its end included, that musl's resolver reads in one.
const maxHostsLine = 511

// Hosts renders a hosts file: hosts(5). The same content gives the same text, in whatever order it
// comes. Addresses that are invalid and names that would not be a name in that file are left out, and
// so are neighbours' names that are the sandbox's own or localhost: it would mean both.
func Hosts(h HostsFile) []byte {
	out := bytes.NewBufferString(hostsBegin)
	own := make(map[string]bool)
	for name := range strings.FieldsSeq("localhost ip6-localhost ip6-loopback ip6-localnet ip6-mcastprefix ip6-allnodes ip6-allrouters") {
		own[name] = true
	}
	if hostName(h.Hostname) && !own[strings.ToLower(h.Hostname)] {
		own[strings.ToLower(h.Hostname)] = true
		for _, a := range sortedAddrs(h.Addrs) {
			writeHost(out, a, []string{h.Hostname})
		}
	}
	entries := make([]HostsEntry, 0, len(h.Neighbours))
	for _, e := range h.Neighbours {
		entries = append(entries, HostsEntry{e.Addr.Unmap().WithZone(""), e.Names})
	}
	slices.SortFunc(entries, func(a, b HostsEntry) int {
		return cmp.Or(a.Addr.Compare(b.Addr), slices.Compare(a.Names, b.Names))
	})
	for i := 0; i < len(entries); {
		addr := entries[i].Addr
		var names []string
		seen := make(map[string]bool)
		for ; i < len(entries) && entries[i].Addr == addr; i++ {
			for _, name := range entries[i].Names {
				if key := strings.ToLower(name); hostName(name) && !own[key] && !seen[key] {
					seen[key] = true
					names = append(names, name)
				}
			}
		}
		if addr.IsValid() {
			writeHost(out, addr, names)
		}
	}
	return out.Bytes()
}

// writeHost writes one address's names, in as many lines as they need.
func writeHost(out *bytes.Buffer, a netip.Addr, names []string) {
	line := 0
	for _, name := range names {
		if line > 0 && line+1+len(name)+1 > maxHostsLine {
			out.WriteByte('\n')
			line = 0
		}
		if line == 0 {
			out.WriteString(a.String())
			out.WriteByte('\t')
			line = len(a.String()) + 1
		} else {
			out.WriteByte(' ')
			line++
		}
		out.WriteString(name)
		line += len(name)
	}
	if line > 0 {
		out.WriteByte('\n')
	}
}

func sortedAddrs(addrs []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range addrs {
		if a.IsValid() {
			out = append(out, a.Unmap().WithZone(""))
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// hostName reports whether a string can stand for a host: letters, digits, "-", "_" and ".", at most
// 255 (RFC 1123 2.1; Docker's names have the underscore, too).
func hostName(s string) bool {
	if s == "" || len(s) > 255 {
		return false
	}
	for _, c := range []byte(s) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return true
}
