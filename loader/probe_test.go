// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/loader"
)

// Needs root. Trying leaves nothing behind, which TestMain holds, and says what this kernel has.
func TestFeatures(t *testing.T) {
	lb := lab.New(t, lab.Opts{})
	names := make(map[string]error)
	require.NoError(t, lb.Host.Do(func() error {
		for _, f := range loader.Features(lb.Cgroup) {
			names[f.Name] = f.Err
		}
		return nil
	}))
	for _, name := range []string{"bpf_redirect_peer", "BPF timers", "BPF programs of type syscall", "BTF", "attaching to a cgroup"} {
		require.Contains(t, names, name)
		require.NoError(t, names[name], name)
	}
	// What another way is there for is found or missed as a whole: not for the probe's own faults.
	for _, name := range []string{"tcx", "route lookup that tells the source address", "BPF_F_IPV6 in checksum updates"} {
		require.Contains(t, names, name)
		if err := names[name]; err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
			require.ErrorIs(t, err, unix.EINVAL, name)
		}
	}
	start := time.Now()
	require.NoError(t, loader.TryLoad())
	t.Logf("loaded and let go in %v", time.Since(start).Round(time.Millisecond))

	nearest, ok := loader.IsBPFFS(filepath.Join(lb.BPFFS, "not", "there"))
	require.Equal(t, lb.BPFFS, nearest)
	require.True(t, ok)
	_, ok = loader.IsBPFFS(lb.Dir)
	require.False(t, ok)
}

// attachTCX puts a program that returns one of the values on a device and pins it.
func attachTCX(ifindex int, name, pin string, values ...int32) error {
	insns := asm.Instructions{asm.Mov.Imm(asm.R0, values[0])}
	for _, v := range values[1:] {
		insns = append(insns, asm.JEq.Imm(asm.R1, 0, "end"), asm.Mov.Imm(asm.R0, v))
	}
	insns = append(insns, asm.Return().WithSymbol("end"))
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.SchedCLS, License: "GPL", Instructions: insns})
	if err != nil {
		return err
	}
	defer prog.Close()
	k, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		return err
	}
	defer k.Close()
	return k.Pin(pin)
}

// Needs root. The chain of a hook: who is first, what they can say, which are ours, and where their
// links are pinned.
func TestChain(t *testing.T) {
	lb := lab.New(t, lab.Opts{})
	ifindex := lb.Host.Ifindex(t, lab.HostIf)
	foreign := filepath.Join(lb.BPFFS, "foreign")
	var chain []loader.Program
	require.NoError(t, lb.Host.Do(func() error {
		if err := attachTCX(ifindex, "first", foreign, 2); err != nil {
			return err
		}
		l, err := loader.Load(loader.Options{Paths: loader.Paths{BPFFS: lb.BPFFS, Cgroup: lb.Cgroup}, Attach: "tcx", Flows: 1024})
		if err != nil {
			return err
		}
		defer l.Close()
		if err := errors.Join(l.Attach(loader.FromUplink, ifindex), l.AttachCgroup(), attachTCX(ifindex, "from_uplink", foreign+"2", -1)); err != nil {
			return err
		}
		chain, err = loader.TCXChain(ifindex, false)
		return err
	}))
	require.Len(t, chain, 3)
	require.Equal(t, "first", chain[0].Name)
	require.Equal(t, loader.Returns{Values: []int32{2}}, chain[0].Returns)
	require.Empty(t, chain[0].Ours)
	require.Equal(t, loader.FromUplink, chain[1].Ours)
	require.Empty(t, chain[2].Ours, "only a name makes no program ours")
	require.True(t, chain[2].Returns.Always(-1))

	pins, err := loader.Pins(lb.BPFFS)
	require.NoError(t, err)
	byLink := make(map[uint32]loader.Pin)
	for _, p := range pins {
		byLink[p.Link] = p
	}
	require.Equal(t, filepath.Join(lb.BPFFS, "links", fmt.Sprintf("from_uplink-%d", ifindex)), byLink[chain[1].Link].Path)
	require.Equal(t, foreign, loader.FindPins(lb.BPFFS)[chain[0].Link])

	socks, err := loader.CgroupPrograms(lb.Cgroup)
	require.NoError(t, err)
	require.Len(t, socks, 11)
}
