// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	stdmaps "maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/maps"
)

// Verified says what a Verify found.
type Verified struct {
	// Lost are programs that somebody has taken off their device or cgroup. They are forgotten, so that
	// Attach puts them back.
	Lost []Attachment
	// Ahead are others' programs that run before one of ours and do not let every packet on.
	Ahead []Ahead
	// Repinned counts pins that were gone and are there again.
	Repinned int
}

// Ahead is a program of others before one of ours.
type Ahead struct {
	Attachment        // ours
	Name       string // of the other
	ID         uint32
}

// Verify compares what this instance has put in place with what the kernel has, and its pins with those that
// should be there. Pins are made again; an error says why they cannot be, and the data path goes on without
// them as long as this process lives. Nobody else waits for longer than the look at one of them.
func (l *Loader) Verify() (Verified, error) {
	l.mu.Lock()
	links, filters := slices.Collect(stdmaps.Keys(l.links)), stdmaps.Clone(l.filters)
	l.mu.Unlock()
	var v Verified
	var errs []error
	for _, name := range links {
		errs = append(errs, l.verifyLink(name, &v))
		runtime.Gosched() // there are thousands, and on one CPU a round may be waiting
	}
	for name, a := range filters {
		errs = append(errs, l.verifyFilter(name, a, &v))
	}
	n, err := l.repin()
	v.Repinned = n
	return v, errors.Join(append(errs, err)...)
}

func (l *Loader) verifyLink(name string, v *Verified) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	k, ok := l.links[name]
	if !ok {
		return nil // taken off meanwhile
	}
	a := parsePin(name)
	info, err := k.Info()
	if err != nil {
		return fmt.Errorf("ask for link %s: %w", name, err)
	}
	if !isOn(info) {
		v.Lost = append(v.Lost, a)
		k.Close()
		delete(l.links, name)
		return removePin(filepath.Join(linksDir(l.opts.BPFFS), name))
	}
	if a.Hook == "cgroup" || a.Hook == "xdp" {
		return nil
	}
	ahead, err := aheadOf(a, info.Netkit() != nil)
	v.Ahead = append(v.Ahead, ahead...)
	return err
}

func (l *Loader) verifyFilter(name string, a Attachment, v *Verified) error {
	there, err := l.opts.Classifier.HasFilter(a.Ifindex, isEgress(a.Program))
	if err != nil || there {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.filters[name]; !ok {
		return nil // taken off meanwhile
	}
	// Or even put on again.
	if there, err := l.opts.Classifier.HasFilter(a.Ifindex, isEgress(a.Program)); err != nil || there {
		return err
	}
	v.Lost = append(v.Lost, a)
	delete(l.filters, name)
	return removePin(filepath.Join(linksDir(l.opts.BPFFS), name))
}

// What a tcx program returns that keeps a packet from those behind it (linux/bpf.h).
const (
	tcxPass     = 0
	tcxDrop     = 2
	tcxRedirect = 7
)

// aheadOf lists who may keep packets from one of our programs on a device, where it is a program of a netkit pair or
// one by tcx. The values that say so are the same.
func aheadOf(a Attachment, netkit bool) ([]Ahead, error) {
	egress := isEgress(a.Program)
	attach := ebpf.AttachTCXIngress
	switch {
	case netkit:
		attach = ebpf.AttachNetkitPeer
	case egress:
		attach = ebpf.AttachTCXEgress
	}
	// Nearly always it is alone, and nothing else need be read.
	res, err := link.QueryPrograms(link.QueryOptions{Target: a.Ifindex, Attach: attach})
	if err != nil || len(res.Programs) < 2 {
		return nil, nil //nolint:nilerr // the device is gone
	}
	chain, err := TCXChain(a.Ifindex, egress)
	if err != nil {
		return nil, fmt.Errorf("list programs of device %d: %w", a.Ifindex, err)
	}
	var out []Ahead
	for _, p := range chain {
		if p.Ours != "" {
			break
		}
		if !p.Returns.Never(tcxPass, tcxDrop, tcxRedirect) {
			out = append(out, Ahead{Attachment: a, Name: p.Name, ID: p.ID})
		}
	}
	return out, nil
}

// isAttached reports whether a link's device or cgroup is there and it is on it.
func isAttached(k link.Link) (bool, error) {
	info, err := k.Info()
	if err != nil {
		return false, err
	}
	return isOn(info), nil
}

func isOn(info *link.Info) bool {
	if tcx := info.TCX(); tcx != nil {
		return tcx.Ifindex != 0
	}
	if netkit := info.Netkit(); netkit != nil {
		return netkit.Ifindex != 0
	}
	if xdp := info.XDP(); xdp != nil {
		return xdp.Ifindex != 0
	}
	if cgroup := info.Cgroup(); cgroup != nil {
		return cgroup.CgroupId != 0
	}
	return true
}

func removePin(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin: %w", err)
	}
	return nil
}

// repin makes the pins that are gone, and their directories: bpffs was unmounted or mounted anew, or
// somebody has removed them.
func (l *Loader) repin() (n int, err error) {
	l.mu.Lock()
	if err := l.relock(); err != nil {
		l.mu.Unlock()
		return 0, err
	}
	tables := make(map[string]*ebpf.Map)
	if l.shield != nil {
		addPinned(tables, l.shield.c.Maps, l.shield.pinned)
	}
	addPinned(tables, l.tc.Maps, l.pinned)
	links, filters := slices.Collect(stdmaps.Keys(l.links)), slices.Collect(stdmaps.Keys(l.filters))
	l.mu.Unlock()
	again := func(path string, pin func(string) error) error {
		made, err := pinAgain(path, pin)
		if made {
			n++
		}
		return err
	}
	for name, m := range tables {
		if err := again(filepath.Join(maps.Dir(l.opts.BPFFS), name), func(path string) error { return pinCopy(m, path) }); err != nil {
			return n, err
		}
	}
	for _, name := range links {
		l.mu.Lock()
		k, ok := l.links[name]
		if ok {
			err = again(filepath.Join(linksDir(l.opts.BPFFS), name), func(path string) error { return pinLinkAgain(k, path) })
		}
		l.mu.Unlock()
		if err != nil {
			return n, err
		}
		runtime.Gosched()
	}
	for _, name := range filters {
		l.mu.Lock()
		if _, ok := l.filters[name]; ok {
			err = again(filepath.Join(linksDir(l.opts.BPFFS), name), func(path string) error { return os.MkdirAll(path, 0o700) })
		}
		l.mu.Unlock()
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func pinLinkAgain(k link.Link, path string) error {
	info, err := k.Info()
	if err != nil {
		return err
	}
	again, err := link.NewFromID(info.ID)
	if err != nil {
		return err
	}
	defer again.Close()
	return again.Pin(path)
}

// addPinned adds the maps that are to be pinned.
func addPinned(to, from map[string]*ebpf.Map, pinned map[string]bool) {
	for name, m := range from {
		if pinned[name] {
			to[name] = m
		}
	}
}

func pinAgain(path string, pin func(string) error) (bool, error) {
	if _, err := os.Lstat(path); err == nil {
		return false, nil
	}
	if err := pin(path); err != nil {
		return false, fmt.Errorf("pin %s again: %w", path, err)
	}
	return true, nil
}

// relock makes the pin directory again where it is gone, and takes it.
func (l *Loader) relock() error {
	var have, want unix.Stat_t
	if err := unix.Fstat(int(l.lock.Fd()), &have); err != nil {
		return fmt.Errorf("pin directory: %w", err)
	}
	err := unix.Stat(l.opts.BPFFS, &want)
	if err == nil && have.Ino == want.Ino && have.Dev == want.Dev && isBPFFS(l.opts.BPFFS) {
		return nil
	}
	if err := ensureBPFFS(l.opts.BPFFS); err != nil {
		return err
	}
	if err := makeDirs(l.opts.BPFFS); err != nil {
		return err
	}
	lock, err := lockDir(l.opts.BPFFS)
	if err != nil {
		return err
	}
	l.lock.Close()
	l.lock = lock
	return nil
}

func makeDirs(bpffs string) error {
	for _, dir := range []string{maps.Dir(bpffs), linksDir(bpffs), programsDir(bpffs)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make pin directory: %w", err)
		}
	}
	return nil
}

// pinnedMaps are the names of the maps that spec has pinned.
func pinnedMaps(spec *ebpf.CollectionSpec) map[string]bool {
	out := make(map[string]bool)
	for name, m := range spec.Maps {
		out[name] = m.Pinning == ebpf.PinByName
	}
	return out
}
