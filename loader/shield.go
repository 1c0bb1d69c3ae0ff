// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/maps"
)

// ShieldProgram is the shield's program; its pins at devices are named for the mode besides.
const ShieldProgram = "shield"

// How the shield runs on a device.
const (
	ShieldNative  = "native"  // in the driver, before there is an skb
	ShieldGeneric = "generic" // behind it, on an skb: everywhere, and for little gain
)

var (
	// ErrNoNativeXDP says that a device's driver runs no XDP programs, or none with the device as it is.
	ErrNoNativeXDP = errors.New("its driver takes no XDP program")
	// ErrForeignXDP says that somebody else's XDP program is on the device.
	ErrForeignXDP = errors.New("another XDP program is on it")
)

// isShield reports whether a pin is the shield's, in whichever mode.
func isShield(program string) bool { return strings.HasPrefix(program, ShieldProgram) }

// Shield is the XDP program for uplinks. As everything else, what is pinned of it goes on without a daemon.
type Shield struct {
	l      *Loader
	c      *ebpf.Collection
	mode   string
	pinned map[string]bool // maps of c, by name
}

// LoadShield loads the shield for ShieldNative or ShieldGeneric.
func (l *Loader) LoadShield(mode string) (*Shield, error) {
	spec, err := bpf.LoadShield()
	if err != nil {
		return nil, fmt.Errorf("read the shield's object: %w", err)
	}
	l.shareSizes(spec)
	pinned := pinnedMaps(spec)
	if mode == ShieldGeneric {
		// For a program that takes frames in fragments the kernel gives generic XDP a new skb, and forgets the length of its
		// link layer's header (Linux 6.18, skb_pp_cow_data): from_uplink would be shown the frame from its IP header on. For
		// any other it makes the skb linear, and keeps it.
		spec.Programs[ShieldProgram].Flags &^= unix.BPF_F_XDP_HAS_FRAGS
	}
	c, err := l.load(spec, shelf{programsDir(l.opts.BPFFS), shieldObject(mode)})
	if err != nil {
		return nil, fmt.Errorf("shield: %w", err)
	}
	s := &Shield{l: l, c: c, mode: mode, pinned: pinned}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shield = s
	return s, nil
}

// shieldObject tells what is loaded for a mode from what is for the other.
func shieldObject(mode string) string {
	if mode == ShieldGeneric {
		return bpf.ShieldDigest() + "-" + mode
	}
	return bpf.ShieldDigest()
}

// Maps are the maps that the shield works on. They are closed with it.
func (s *Shield) Maps() *maps.Maps { return maps.Use(s.c.Maps) }

func (s *Shield) pinName(mode string, ifindex int) string {
	if mode == ShieldGeneric {
		return pinName(ShieldProgram+"_"+mode, ifindex)
	}
	return pinName(ShieldProgram, ifindex)
}

// Attach puts the shield on a device, replacing an older version of it without a gap; one in the other
// mode is taken off first. It is idempotent, and mends what somebody has detached. Until TakeOver has changed
// tables that are to be, it does nothing: the shield's flow tables are those that the others write. It fails
// with ErrForeignXDP or ErrNoNativeXDP.
func (s *Shield) Attach(ifindex int) error {
	flags, other := link.XDPDriverMode, ShieldGeneric
	if s.mode == ShieldGeneric {
		flags, other = link.XDPGenericMode, ShieldNative
	}
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	if len(s.l.moving) > 0 {
		return nil
	}
	name := s.pinName(s.mode, ifindex)
	if err := errors.Join(s.l.unpinLink(s.pinName(other, ifindex)), s.l.forgetDetached(name)); err != nil {
		return err
	}
	prog := s.c.Programs[ShieldProgram]
	err := s.l.attachLink(name, prog, func() (link.Link, error) {
		return link.AttachXDP(link.XDPOptions{Interface: ifindex, Program: prog, Flags: flags})
	})
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: %w", ErrForeignXDP, err)
	case s.mode == ShieldNative && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ERANGE)):
		return fmt.Errorf("%w: %w", ErrNoNativeXDP, err)
	}
	return err
}

// forgetDetached forgets a link that somebody has taken its device from.
func (l *Loader) forgetDetached(name string) error {
	k, ok := l.links[name]
	if !ok {
		return nil
	}
	if attached, err := isAttached(k); err == nil && attached {
		return nil
	}
	return l.unpinLink(name)
}

// swap replaces the program of a pinned link. A device that is gone, or that somebody has taken the shield
// off, is left to Attach. The caller holds l.mu.
func (s *Shield) swap(a Attachment) error {
	return s.l.attachLink(pinName(a.Program, a.Ifindex), s.c.Programs[ShieldProgram], func() (link.Link, error) { return nil, unix.ENODEV })
}

// unpinLink ends a link; a missing one is no error.
func (l *Loader) unpinLink(name string) error {
	k, ok := l.links[name]
	if !ok {
		k, _ = link.LoadPinnedLink(filepath.Join(linksDir(l.opts.BPFFS), name), nil)
	}
	if k != nil {
		// The kernel lets go of what nobody has any more a moment later: until then the device would be taken.
		_ = k.Detach()
		k.Close()
		delete(l.links, name)
	}
	if err := os.Remove(filepath.Join(linksDir(l.opts.BPFFS), name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("detach %s: %w", name, err)
	}
	return nil
}

// Detach takes the shield off all devices that keep does not name.
func (s *Shield) Detach(keep map[int]bool) error {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	return s.l.detachShield(keep)
}

func (l *Loader) detachShield(keep map[int]bool) error {
	list, err := pinned(l.opts.BPFFS)
	errs := []error{err}
	for _, a := range list {
		if isShield(a.Program) && !keep[a.Ifindex] {
			errs = append(errs, l.unpinLink(pinName(a.Program, a.Ifindex)))
		}
	}
	return errors.Join(errs...)
}

// Close closes file descriptors; what is pinned stays.
func (s *Shield) Close() {
	s.l.mu.Lock()
	defer s.l.mu.Unlock()
	s.l.shield = nil
	s.c.Close()
}

// RemoveShield takes away what an earlier daemon has left of a shield: links, programs and maps.
func (l *Loader) RemoveShield() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	errs := []error{l.detachShield(nil)}
	for _, pattern := range []string{
		filepath.Join(programsDir(l.opts.BPFFS), ShieldProgram+"-*"),
		filepath.Join(maps.Dir(l.opts.BPFFS), ShieldProgram+"_*"),
	} {
		found, err := filepath.Glob(pattern)
		errs = append(errs, err)
		for _, path := range found {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("remove the shield: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}
