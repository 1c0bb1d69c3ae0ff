// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/maps"
)

// DefaultBPFFS is where bpffs is mounted by custom.
const DefaultBPFFS = "/sys/fs/bpf"

func isBPFFS(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && uint32(st.Type) == unix.BPF_FS_MAGIC
}

// ensureBPFFS makes the directory below a bpffs mount; it mounts the customary one if that is what is
// missing.
func ensureBPFFS(dir string) error {
	parent := dir
	for parent != "/" {
		if _, err := os.Stat(parent); err == nil {
			break
		}
		parent = filepath.Dir(parent)
	}
	if !isBPFFS(parent) {
		if rel, err := filepath.Rel(DefaultBPFFS, dir); err != nil || rel == ".." || len(rel) > 2 && rel[:3] == "../" {
			return fmt.Errorf("pin directory %s: not below a bpffs mount; mount one there (mount -t bpf bpf %s) or choose another with --bpffs", dir, parent)
		}
		if err := unix.Mount("bpf", DefaultBPFFS, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("mount bpffs at %s: %w; mount it by hand or choose another place with --bpffs", DefaultBPFFS, err)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	return nil
}

// ErrLocked says that another process holds the pins.
var ErrLocked = errors.New("in use by another bpfnet")

// lockDir takes the pin directory until the file is closed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open pin directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("pin directory %s: %w; stop that one, or give this one pins of its own with --bpffs", dir, ErrLocked)
		}
		return nil, fmt.Errorf("lock pin directory %s: %w", dir, err)
	}
	return f, nil
}

// needed are the kernel's features without which the programs do not load, the newest first.
var needed = []struct {
	name, since string
	probe       func() error
}{
	{"BPF timers", "5.15", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnTimerInit) }},
	{"BPF programs of type syscall", "5.14", func() error { return features.HaveProgramType(ebpf.Syscall) }},
	{"bpf_for_each_map_elem", "5.13", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnForEachMapElem) }},
	{"bpf_ktime_get_coarse_ns", "5.11", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnKtimeGetCoarseNs) }},
	{"bpf_redirect_peer", "5.10", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnRedirectPeer) }},
	{"cgroup socket programs", "4.17", func() error { return features.HaveProgramType(ebpf.CGroupSockAddr) }},
}

// explainLoad says which feature the kernel lacks and since when there is one that has it. It probes
// after the failure: what is there needs no asking.
func explainLoad(err error) error {
	for _, n := range needed {
		if errors.Is(n.probe(), ebpf.ErrNotSupported) {
			return fmt.Errorf("load programs: the kernel has no %s: needs Linux %s or later (bpfnet is tested from 6.1 on): %w", n.name, n.since, err)
		}
	}
	if _, statErr := os.Stat("/sys/kernel/btf/vmlinux"); statErr != nil {
		return fmt.Errorf("load programs: the kernel has no BTF: needs one built with CONFIG_DEBUG_INFO_BTF: %w", err)
	}
	return fmt.Errorf("load programs: %w (bpfnet is tested on Linux 6.1 and later)", err)
}

// chooseAttach reports whether to use tcx.
func chooseAttach(want string, classifier Classifier) (bool, error) {
	switch want {
	case "clsact", "tcx", "":
	default:
		return false, fmt.Errorf("attach %q: unknown; use tcx or clsact", want)
	}
	if want != "clsact" {
		err := probeTCX()
		if err == nil {
			return true, nil
		}
		if want == "tcx" {
			return false, fmt.Errorf("attach by tcx: %w (since Linux 6.6); use --attach clsact", err)
		}
	}
	if classifier == nil {
		return false, errors.New("attach by clsact: no classifier given")
	}
	return false, nil
}

// probeTCX attaches an empty program to the loopback device for a moment: it lets every packet on.
func probeTCX() error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bpfnet_probe", Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		return fmt.Errorf("load a TC program: %w", err)
	}
	defer prog.Close()
	k, err := link.AttachTCX(link.TCXOptions{Interface: 1, Program: prog, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		return err
	}
	return k.Close()
}

// Cleanup removes every link, filter and pin of the instance. It goes on after an error, and is
// idempotent. The order keeps the guard up longest: links go before the maps they read.
func Cleanup(p Paths, c Classifier) error {
	var errs []error
	list, err := pinned(p.BPFFS)
	errs = append(errs, err)
	// What drops packets of the host's stack goes before what keeps them from it: where others' rules
	// stand ready, flows go on.
	order := []string{FromBridge, ToUplink, ToUplinkL3, ToContainer, FromContainer}
	slices.SortStableFunc(list, func(a, b Attachment) int {
		at := func(x Attachment) int {
			if i := slices.Index(order, x.Program); i >= 0 {
				return i
			}
			return len(order)
		}
		return at(a) - at(b)
	})
	for _, a := range list {
		path := filepath.Join(linksDir(p.BPFFS), pinName(a.Program, a.Ifindex))
		k, err := link.LoadPinnedLink(path, nil)
		if err == nil {
			if err := k.Unpin(); err != nil {
				errs = append(errs, fmt.Errorf("unpin %s: %w", path, err))
			}
			k.Close()
			continue
		}
		if c != nil && a.Hook != "cgroup" && a.Hook != "xdp" {
			errs = append(errs, c.DetachFilter(a.Ifindex, isEgress(a.Program)))
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove %s: %w", path, err))
		}
	}
	for _, dir := range []string{linksDir(p.BPFFS), programsDir(p.BPFFS), swapDir(p.BPFFS), nextDir(p.BPFFS), formerDir(p.BPFFS), maps.Dir(p.BPFFS)} {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		errs = append(errs, err)
		for _, e := range entries {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				errs = append(errs, fmt.Errorf("remove pin: %w", err))
			}
		}
		if err := os.Remove(dir); err != nil {
			errs = append(errs, fmt.Errorf("remove pin directory: %w", err))
		}
	}
	if err := os.Remove(p.BPFFS); err != nil && !errors.Is(err, fs.ErrNotExist) && p.BPFFS != DefaultBPFFS {
		errs = append(errs, fmt.Errorf("remove pin directory: %w", err))
	}
	return errors.Join(errs...)
}
