// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

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
// them as long as this process lives.
func (l *Loader) Verify() (Verified, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var v Verified
	var errs []error
	for name, k := range l.links {
		if attached, err := isAttached(k); err != nil {
			errs = append(errs, fmt.Errorf("ask for link %s: %w", name, err))
		} else if !attached {
			v.Lost = append(v.Lost, parsePin(name))
			k.Close()
			delete(l.links, name)
			errs = append(errs, removePin(filepath.Join(linksDir(l.opts.BPFFS), name)))
		} else if a := parsePin(name); a.Hook != "cgroup" && a.Hook != "xdp" {
			ahead, err := aheadOf(a)
			errs = append(errs, err)
			v.Ahead = append(v.Ahead, ahead...)
		}
	}
	for name, a := range l.filters {
		there, err := l.opts.Classifier.HasFilter(a.Ifindex, isEgress(a.Program))
		if err != nil {
			errs = append(errs, err)
		} else if !there {
			v.Lost = append(v.Lost, a)
			delete(l.filters, name)
			errs = append(errs, removePin(filepath.Join(linksDir(l.opts.BPFFS), name)))
		}
	}
	n, err := l.repin()
	v.Repinned = n
	return v, errors.Join(append(errs, err)...)
}

// What a tcx program returns that keeps a packet from those behind it (linux/bpf.h).
const (
	tcxPass     = 0
	tcxDrop     = 2
	tcxRedirect = 7
)

// aheadOf lists who may keep packets from one of our programs on a device.
func aheadOf(a Attachment) ([]Ahead, error) {
	egress := isEgress(a.Program)
	attach := ebpf.AttachTCXIngress
	if egress {
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
	if tcx := info.TCX(); tcx != nil {
		return tcx.Ifindex != 0, nil
	}
	if netkit := info.Netkit(); netkit != nil {
		return netkit.Ifindex != 0, nil
	}
	if xdp := info.XDP(); xdp != nil {
		return xdp.Ifindex != 0, nil
	}
	if cgroup := info.Cgroup(); cgroup != nil {
		return cgroup.CgroupId != 0, nil
	}
	return true, nil
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
	if err := l.relock(); err != nil {
		return 0, err
	}
	tables := make(map[string]*ebpf.Map)
	if l.shield != nil {
		addPinned(tables, l.shield.c.Maps, l.shield.pinned)
	}
	addPinned(tables, l.tc.Maps, l.pinned)
	for name, m := range tables {
		if made, err := pinAgain(filepath.Join(maps.Dir(l.opts.BPFFS), name), func(path string) error {
			c, err := m.Clone() // one that knows of no pin
			if err != nil {
				return err
			}
			defer c.Close()
			return c.Pin(path)
		}); err != nil {
			return n, err
		} else if made {
			n++
		}
	}
	for name, k := range l.links {
		if made, err := pinAgain(filepath.Join(linksDir(l.opts.BPFFS), name), func(path string) error {
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
		}); err != nil {
			return n, err
		} else if made {
			n++
		}
	}
	for name := range l.filters {
		path := filepath.Join(linksDir(l.opts.BPFFS), name)
		if made, err := pinAgain(path, func(path string) error { return os.MkdirAll(path, 0o700) }); err != nil {
			return n, err
		} else if made {
			n++
		}
	}
	return n, nil
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
