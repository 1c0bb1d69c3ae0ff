// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
)

// What "bpfnet doctor" tries and looks at. All that is loaded or attached here is gone on return.

// Feature is something that the kernel has or lacks.
type Feature struct {
	Name, Since string
	Err         error  // why it is not there; nil: it is
	Without     string // what is done instead; empty: the programs do not load without it
}

// Features tries what the programs need of the kernel, the oldest first. cgroup is the directory where
// the sock programs are to go; empty: none.
func Features(cgroup string) []Feature {
	var out []Feature
	for _, n := range slices.Backward(needed) {
		out = append(out, Feature{Name: n.name, Since: n.since, Err: n.probe()})
	}
	var btf error
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		btf = errors.New("not built with CONFIG_DEBUG_INFO_BTF")
	}
	out = append(out, Feature{Name: "BTF", Since: "5.2", Err: btf})
	if cgroup != "" {
		out = append(out, Feature{Name: "attaching to a cgroup", Since: "5.7", Err: probeCgroup(cgroup)})
	}
	return append(out,
		Feature{Name: "tcx", Since: "6.6", Err: probeTCX(), Without: "programs are attached as clsact filters"},
		Feature{
			Name: "route lookup that tells the source address", Since: "6.7", Err: probeHelper(fibLookup),
			Without: "masquerading uses one address of the uplink, also where a route names another (src)",
		},
		Feature{
			Name: "BPF_F_IPV6 in checksum updates", Since: "6.16", Err: probeHelper(csumReplace6),
			Without: "translated IPv6 packets that a device sums up whole lose that sum, and are summed up again",
		})
}

// fibLookup and csumReplace6 call a helper with the flags in question, and nothing that it could work
// on: a kernel that does not know the flags says EINVAL, another one something else.
var (
	fibLookup = slices.Concat(zeroes(64), asm.Instructions{
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, -64), asm.Mov.Imm(asm.R3, 64),
		asm.StoreImm(asm.R2, 0, unix.AF_INET, asm.Byte), // family
		asm.StoreImm(asm.R2, 8, 1, asm.Word),            // ifindex: lo
		asm.Mov.Imm(asm.R4, fibLookupSkipNeigh|fibLookupSrc), asm.FnFibLookup.Call(),
	})
	csumReplace6 = asm.Instructions{
		asm.Mov.Imm(asm.R2, 1), // an odd offset
		asm.Mov.Imm(asm.R3, 0), asm.Mov.Imm(asm.R4, 0), asm.Mov.Imm(asm.R5, pseudoHeader|csumIPv6), asm.FnL4CsumReplace.Call(),
	}
)

// Flags of linux/bpf.h.
const (
	fibLookupSkipNeigh = 1 << 2
	fibLookupSrc       = 1 << 4
	pseudoHeader       = 1 << 4
	csumIPv6           = 1 << 7
)

// zeroes clears the top of the stack.
func zeroes(size int16) (out asm.Instructions) {
	out = append(out, asm.Mov.Imm(asm.R0, 0))
	for at := -size; at < 0; at += 8 {
		out = append(out, asm.StoreMem(asm.RFP, at, asm.R0, asm.DWord))
	}
	return out
}

// probeHelper runs the call that insns end with, and fails if the kernel says EINVAL.
func probeHelper(insns asm.Instructions) error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bpfnet_probe", Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: slices.Concat(insns, asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R0), asm.Mov.Imm(asm.R0, 0),
			asm.JNE.Imm(asm.R1, -int32(unix.EINVAL), "end"), asm.Mov.Imm(asm.R0, 1),
			asm.Return().WithSymbol("end"),
		}),
	})
	if err != nil {
		return fmt.Errorf("load a TC program: %w", err)
	}
	defer prog.Close()
	ret, err := prog.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err == nil && ret != 0 {
		err = unix.EINVAL
	}
	return err
}

// probeCgroup attaches a program that allows everything for a moment. It is refused where a program
// was attached that tolerates none beside it.
func probeCgroup(dir string) error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bpfnet_probe", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		return fmt.Errorf("load a cgroup program: %w", err)
	}
	defer prog.Close()
	k, err := link.AttachCgroup(link.CgroupOptions{Path: dir, Attach: ebpf.AttachCGroupInet4Connect, Program: prog})
	if err != nil {
		return err
	}
	return k.Close()
}

// TryLoad loads both objects, with tables of the smallest size and nothing pinned, and lets go of them.
// The error is the verifier's or the kernel's, explained.
func TryLoad() error {
	if err := rlimit.RemoveMemlock(); err != nil {
		return fmt.Errorf("raise the memlock limit: %w", err)
	}
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return fmt.Errorf("read the data path object: %w", err)
	}
	unpin(spec)
	tc, err := ebpf.NewCollection(spec)
	if err != nil {
		return explainLoad(err)
	}
	defer tc.Close()
	if spec, err = bpf.LoadSock(); err != nil {
		return fmt.Errorf("read the sock object: %w", err)
	}
	unpin(spec)
	shared := make(map[string]*ebpf.Map)
	for name := range spec.Maps {
		if m := tc.Maps[name]; m != nil {
			shared[name] = m
		}
	}
	sock, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return explainLoad(err)
	}
	sock.Close()
	return nil
}

func unpin(spec *ebpf.CollectionSpec) {
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
}

// MemcgAccounting reports whether memory of programs and maps counts against their process's cgroup, as
// since Linux 5.11, and not against its memlock limit. It tries a helper of that version.
func MemcgAccounting() bool {
	return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnKtimeGetCoarseNs) == nil
}

// IsBPFFS reports whether the directory, or the nearest above it that exists, is in a bpffs, and which
// that is.
func IsBPFFS(dir string) (nearest string, ok bool) {
	for nearest = dir; nearest != "/" && nearest != "."; nearest = filepath.Dir(nearest) {
		if _, err := os.Stat(nearest); err == nil {
			break
		}
	}
	return nearest, isBPFFS(nearest)
}

// Program is a loaded program at a hook.
type Program struct {
	ID      uint32
	Name    string // at most 15 bytes
	Link    uint32 // ID of the link that holds it there; 0: none does
	Returns Returns
	// Ours is the name of one of the programs of this project, of this instance or another. What such a
	// one returns is not looked at.
	Ours string
}

// ourMaps are those of which each program of this project uses at least one.
var ourMaps = []string{"config", "fates", "sock_peers", "reservations", "strict_sources", "strict_marks"}

var ourNames = []string{
	FromContainer, ToContainer, FromBridge, FromUplink, FromUplinkL3, FromHost, ToUplink, ToUplinkL3, ShieldProgram,
}

// ProgramByID describes a loaded program; fs.ErrNotExist if it is gone.
func ProgramByID(id uint32) (Program, error) {
	out := Program{ID: id, Returns: Returns{Others: true}}
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return out, fmt.Errorf("open program %d: %w", id, err)
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil {
		return out, fmt.Errorf("read program %d: %w", id, err)
	}
	out.Name = info.Name
	if ids, ok := info.MapIDs(); ok && (slices.Contains(ourNames, out.Name) || strings.HasPrefix(out.Name, "sock_") || IsStrict(out.Name)) {
		for _, id := range ids {
			if slices.Contains(ourMaps, mapName(id)) {
				out.Ours = out.Name
				return out, nil
			}
		}
	}
	if insns, err := info.Instructions(); err == nil {
		out.Returns = returnsOf(insns)
	}
	return out, nil
}

func mapName(id ebpf.MapID) string {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return ""
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// TCXChain lists the programs of a device's tcx hook in the order in which they run; before those of
// ingress, a netkit's that see what its far end sends. A kernel without tcx has none.
func TCXChain(ifindex int, egress bool) ([]Program, error) {
	if egress {
		return query(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXEgress})
	}
	var netkit []Program
	if isNetkit(ifindex) {
		var err error
		if netkit, err = query(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachNetkitPeer}); err != nil {
			return nil, err
		}
	}
	tcx, err := query(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress})
	return append(netkit, tcx...), err
}

func query(opts link.QueryOptions) ([]Program, error) {
	res, err := link.QueryPrograms(opts)
	switch {
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		return nil, nil
	case err != nil:
		return nil, err
	}
	var out []Program
	for _, a := range res.Programs {
		p, err := ProgramByID(uint32(a.ID))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if id, ok := a.LinkID(); ok {
			p.Link = uint32(id)
		}
		out = append(out, p)
	}
	return out, nil
}

// CgroupPrograms lists our programs at a cgroup, by name.
func CgroupPrograms(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	defer f.Close()
	var out []string
	for _, load := range []func() (*ebpf.CollectionSpec, error){bpf.LoadSock, bpf.LoadStrict} {
		spec, err := load()
		if err != nil {
			return nil, fmt.Errorf("read the cgroup programs: %w", err)
		}
		for name, p := range spec.Programs {
			list, err := query(link.QueryOptions{Target: int(f.Fd()), Attach: p.AttachType})
			if err != nil {
				return nil, fmt.Errorf("cgroup %s: %w", dir, err)
			}
			if slices.ContainsFunc(list, func(p Program) bool { return p.Ours != "" && strings.HasPrefix(name, p.Ours) }) {
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return out, nil
}

// Pin is a pinned link of an instance, or the directory that stands for a clsact filter.
type Pin struct {
	Attachment
	Path string
	Link uint32 // ID; 0: a filter
}

// Pins lists what is pinned for attachments below an instance's pin directory; nothing where there is
// none.
func Pins(bpffs string) ([]Pin, error) {
	list, err := pinned(bpffs)
	if err != nil {
		return nil, err
	}
	var out []Pin
	for _, a := range list {
		p := Pin{Attachment: a, Path: filepath.Join(linksDir(bpffs), pinName(a.Program, a.Ifindex))}
		p.Link, _ = linkID(p.Path)
		out = append(out, p)
	}
	return out, nil
}

func linkID(path string) (uint32, bool) {
	k, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return 0, false
	}
	defer k.Close()
	info, err := k.Info()
	if err != nil {
		return 0, false
	}
	return uint32(info.ID), true
}

// FindPins looks below a bpffs mount for the pins of links, by the links' IDs.
func FindPins(root string) map[uint32]string {
	out := make(map[uint32]string)
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if id, ok := linkID(path); ok {
				out[id] = path
			}
		}
		return nil
	})
	return out
}

// XDPLink is the ID of the link that holds an XDP program on a device, or 0.
func XDPLink(ifindex int) uint32 {
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		info, err := it.Link.Info()
		if err != nil {
			continue
		}
		if x := info.XDP(); x != nil && int(x.Ifindex) == ifindex {
			return uint32(info.ID)
		}
	}
	return 0
}
