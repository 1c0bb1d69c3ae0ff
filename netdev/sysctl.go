// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// sysctlRoot shows the sysctls of the network namespace of the thread that opens a file in it.
const sysctlRoot = "/proc/sys"

// Setting is a sysctl and the value it should have.
type Setting struct {
	Path  string `json:"path"` // below /proc/sys, with slashes: net/ipv4/ip_forward
	Value string `json:"value"`
}

// Change is a sysctl that was changed: what it was and what it is now. Its JSON form is what is
// kept to restore it.
type Change struct {
	Path string `json:"path"` // below /proc/sys
	Old  string `json:"old"`
	New  string `json:"new"`
	// Side is true if the kernel changes it when another one is written. Old and New are the
	// same if it only would on the way back.
	Side bool `json:"side,omitempty"`
}

// The forwarding switches, which flip the settings of every device when they are written.
const (
	pathForward4 = "net/ipv4/ip_forward"
	pathForward6 = "net/ipv6/conf/all/forwarding"
)

// sideGlobs are the sysctls that the kernel changes when forwarding is switched.
var sideGlobs = []string{
	"net/ipv4/conf/*/forwarding",
	"net/ipv4/conf/all/accept_redirects",
	"net/ipv6/conf/*/forwarding",
}

// ReadSysctl returns the value of the sysctl at path (below /proc/sys) in the calling thread's
// network namespace, without the newline. It fails with fs.ErrNotExist if the kernel has none.
func ReadSysctl(path string) (string, error) {
	b, err := os.ReadFile(filepath.Join(sysctlRoot, path))
	if err != nil {
		return "", fmt.Errorf("read sysctl %s: %w", path, bare(err))
	}
	return strings.TrimSpace(string(b)), nil
}

// WriteSysctl is the inverse of ReadSysctl.
func WriteSysctl(path, value string) error {
	f, err := os.OpenFile(filepath.Join(sysctlRoot, path), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("write sysctl %s: %w", path, bare(err))
	}
	defer f.Close()
	// With the newline an empty value is written too.
	if _, err := f.WriteString(value + "\n"); err != nil {
		return fmt.Errorf("write sysctl %s = %q: %w", path, value, bare(err))
	}
	return nil
}

// bare takes the path off an error that names it again.
func bare(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// PlanForwarding returns what is to be set so that the host forwards for containers, in the
// order in which it is to be set. What already has the right value is left out, as is what the
// kernel lacks (no IPv6, no br_netfilter). It reads through read and changes nothing.
//
// Router advertisements: a device with accept_ra=1 would stop listening to them once it
// forwards, and would lose its default route, so uplinks with 1 get 2 before forwarding is
// switched on. A host that forwarded before on its own has made its choice and keeps it.
//
// earlier are the changes of earlier calls (see Merge): they say that the switch was ours.
func PlanForwarding(read func(path string) (string, error), uplinks []string, earlier []Change) ([]Setting, error) {
	var plan []Setting
	want := func(path, value string) error {
		have, err := read(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if have != value {
			plan = append(plan, Setting{path, value})
		}
		return nil
	}

	forward6, err := read(pathForward6)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	ours := forward6 == "0" || slices.ContainsFunc(earlier, func(c Change) bool { return c.Path == pathForward6 && !c.Side })
	if err == nil && ours {
		for _, name := range uplinks {
			path := "net/ipv6/conf/" + name + "/accept_ra"
			have, err := read(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if have == "1" {
				plan = append(plan, Setting{path, "2"})
			}
		}
	}
	for _, s := range []Setting{
		{pathForward4, "1"},
		{pathForward6, "1"},
		{"net/bridge/bridge-nf-call-iptables", "0"},
		{"net/bridge/bridge-nf-call-ip6tables", "0"},
		{"net/bridge/bridge-nf-call-arptables", "0"},
		// A container's answers to the host's own sockets come in by lo, from an address of the host
		// and to one: 127.0.0.1 among them, and no cached route tells that they are the host's.
		{"net/ipv4/conf/lo/route_localnet", "1"},
		{"net/ipv4/conf/lo/accept_local", "1"},
	} {
		if err := want(s.Path, s.Value); err != nil {
			return nil, err
		}
	}
	return plan, nil
}

// Apply writes the settings in order and returns what changed: each setting whose value was
// another, and each sysctl that the kernel flips along with one (Side). On an error the
// changes made so far are returned with it, for Restore.
func Apply(plan []Setting) ([]Change, error) {
	side, err := readSide()
	if err != nil {
		return nil, err
	}
	var changes []Change
	wrote := make(map[string]bool)
	for _, s := range plan {
		var old string
		if old, err = ReadSysctl(s.Path); err != nil {
			break
		}
		// What the kernel has flipped since counts from its value before.
		if before, ok := side[s.Path]; ok {
			old = before
		}
		if err = WriteSysctl(s.Path, s.Value); err != nil {
			break
		}
		wrote[s.Path] = true
		if old != s.Value {
			changes = append(changes, Change{Path: s.Path, Old: old, New: s.Value})
		}
	}
	after, serr := readSide()
	if serr != nil {
		return changes, errors.Join(err, serr)
	}
	for _, path := range sortedKeys(side) {
		now, ok := after[path]
		if !ok || wrote[path] {
			continue
		}
		if old := side[path]; now != old || (switched(changes, path) && old != flippedOff(path)) {
			changes = append(changes, Change{Path: path, Old: old, New: now, Side: true})
		}
	}
	return changes, err
}

// switched reports whether the changes include the switch of path's family.
func switched(changes []Change, path string) bool {
	sw := pathForward4
	if strings.HasPrefix(path, "net/ipv6/") {
		sw = pathForward6
	}
	return slices.ContainsFunc(changes, func(c Change) bool { return c.Path == sw })
}

// flippedOff is what the kernel sets path to when forwarding is switched off.
func flippedOff(path string) string {
	if strings.HasSuffix(path, "/accept_redirects") {
		return "1"
	}
	return "0"
}

// Restore puts back what Apply changed, where the value is still the one that Apply left:
// what someone else has changed since is left alone, also by the kernel's flipping. Sysctls of
// devices that are gone are skipped. It goes on after an error and returns all of them.
func Restore(changes []Change) error {
	type target struct{ path, value string }
	var writes, fixes []target
	var errs []error
	for i := len(changes) - 1; i >= 0; i-- {
		c := changes[i]
		now, err := ReadSysctl(c.Path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		switch {
		case now != c.New:
			fixes = append(fixes, target{c.Path, now})
		case c.Side:
			fixes = append(fixes, target{c.Path, c.Old})
		default:
			writes = append(writes, target{c.Path, c.Old})
			fixes = append(fixes, target{c.Path, c.Old})
		}
	}
	for _, w := range writes {
		if err := WriteSysctl(w.path, w.value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	// Only now, as the switches above flip what is below them. A switch that already has its
	// value is not written again: that would flip once more.
	for _, f := range fixes {
		now, err := ReadSysctl(f.path)
		if err != nil || now == f.value {
			continue
		}
		if err := WriteSysctl(f.path, f.value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Merge joins the changes of a later Apply to those of earlier ones: a path keeps its first old
// value and gets its last new one. A setting that is back at its old value is dropped.
func Merge(earlier, later []Change) []Change {
	out := slices.Clone(earlier)
	for _, c := range later {
		i := slices.IndexFunc(out, func(e Change) bool { return e.Path == c.Path })
		if i < 0 {
			out = append(out, c)
			continue
		}
		out[i].New = c.New
		out[i].Side = out[i].Side && c.Side
	}
	return slices.DeleteFunc(out, func(c Change) bool { return c.Old == c.New && !c.Side })
}

// readSide reads all sysctls that a switch of forwarding could flip.
func readSide() (map[string]string, error) {
	values := make(map[string]string)
	for _, glob := range sideGlobs {
		paths, err := filepath.Glob(filepath.Join(sysctlRoot, glob))
		if err != nil {
			return nil, fmt.Errorf("list sysctls %s: %w", glob, err)
		}
		for _, p := range paths {
			path := strings.TrimPrefix(p, sysctlRoot+"/")
			value, err := ReadSysctl(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue // the device went away
			}
			if err != nil {
				return nil, err
			}
			values[path] = value
		}
	}
	return values, nil
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// PortRange is a range of ports, both ends included.
type PortRange struct {
	First, Last uint16
}

// Len is the number of ports in the range.
func (r PortRange) Len() int { return int(r.Last) - int(r.First) + 1 }

const (
	pathLocalPorts    = "net/ipv4/ip_local_port_range"
	pathReservedPorts = "net/ipv4/ip_local_reserved_ports"
)

// LocalPortRange returns the ports from which the host's own sockets are given theirs.
func LocalPortRange() (PortRange, error) {
	s, err := ReadSysctl(pathLocalPorts)
	if err != nil {
		return PortRange{}, err
	}
	f := strings.Fields(s)
	if len(f) != 2 {
		return PortRange{}, fmt.Errorf("read sysctl %s: %q is not two ports", pathLocalPorts, s)
	}
	r, err := parseRange(f[0], f[1])
	if err != nil {
		return PortRange{}, fmt.Errorf("read sysctl %s: %w", pathLocalPorts, err)
	}
	return r, nil
}

// ReservedPorts returns the ports that the kernel gives to no socket by itself, in order.
func ReservedPorts() ([]PortRange, error) {
	s, err := ReadSysctl(pathReservedPorts)
	if err != nil {
		return nil, err
	}
	ranges, err := parseRanges(s)
	if err != nil {
		return nil, fmt.Errorf("read sysctl %s: %w", pathReservedPorts, err)
	}
	return ranges, nil
}

// SetReservedPorts replaces the whole list. The change is empty (no path) if nothing had to be
// done; Restore takes it.
func SetReservedPorts(ranges []PortRange) (Change, error) {
	old, err := ReadSysctl(pathReservedPorts)
	if err != nil {
		return Change{}, err
	}
	value := formatRanges(ranges)
	if err := WriteSysctl(pathReservedPorts, value); err != nil {
		return Change{}, err
	}
	// The kernel joins neighbouring ranges, so the value to compare with later is its own.
	now, err := ReadSysctl(pathReservedPorts)
	if err != nil {
		return Change{Path: pathReservedPorts, Old: old, New: value}, err
	}
	if now == old {
		return Change{}, nil
	}
	return Change{Path: pathReservedPorts, Old: old, New: now}, nil
}

func formatRanges(ranges []PortRange) string {
	parts := make([]string, 0, len(ranges))
	for _, r := range ranges {
		if r.First == r.Last {
			parts = append(parts, strconv.Itoa(int(r.First)))
			continue
		}
		parts = append(parts, fmt.Sprintf("%d-%d", r.First, r.Last))
	}
	return strings.Join(parts, ",")
}

func parseRanges(s string) ([]PortRange, error) {
	var ranges []PortRange
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		first, last, found := strings.Cut(part, "-")
		if !found {
			last = first
		}
		r, err := parseRange(first, last)
		if err != nil {
			return nil, err
		}
		ranges = append(ranges, r)
	}
	return ranges, nil
}

func parseRange(first, last string) (PortRange, error) {
	a, err := strconv.ParseUint(first, 10, 16)
	if err != nil {
		return PortRange{}, fmt.Errorf("parse port: %w", err)
	}
	b, err := strconv.ParseUint(last, 10, 16)
	if err != nil {
		return PortRange{}, fmt.Errorf("parse port: %w", err)
	}
	if b < a {
		return PortRange{}, fmt.Errorf("parse port range: %d-%d ends before it starts", a, b)
	}
	return PortRange{uint16(a), uint16(b)}, nil
}
