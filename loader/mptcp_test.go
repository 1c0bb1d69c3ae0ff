// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bpf"
)

// Needs root. A kernel without MPTCP takes the sock programs too: they ask it for nothing that it has not.
func TestSockProgramsWithoutMPTCP(t *testing.T) {
	calls := func(spec *ebpf.CollectionSpec) (n int) {
		for _, p := range spec.Programs {
			for _, ins := range p.Instructions {
				if ins.IsBuiltinCall() && asm.BuiltinFunc(ins.Constant) == asm.FnSkcToMptcpSock {
					n++
				}
			}
		}
		return n
	}
	spec, err := bpf.LoadSock()
	require.NoError(t, err)
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	require.NotZero(t, calls(spec))
	withoutMPTCP(spec)
	require.Zero(t, calls(spec))
	c, err := ebpf.NewCollection(spec)
	require.NoError(t, err)
	c.Close()
	require.True(t, knowsMPTCP(), "all kernels that the tests run on have it")
}
