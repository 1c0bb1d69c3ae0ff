// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"testing"

	"github.com/cilium/ebpf/asm"
	"github.com/stretchr/testify/require"
)

func TestReturns(t *testing.T) {
	for _, tc := range []struct {
		name  string
		insns asm.Instructions
		want  Returns
	}{
		{"nothing at all", nil, Returns{Others: true}},
		{"a constant", asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}, Returns{Values: []int32{2}}},
		{"minus one in half a register", asm.Instructions{asm.Mov.Imm32(asm.R0, -1), asm.Return()}, Returns{Values: []int32{-1}}},
		{"two ways", asm.Instructions{
			asm.Mov.Imm(asm.R0, 2), asm.JEq.Imm(asm.R1, 0, "end"), asm.Mov.Imm(asm.R0, -1), asm.Return().WithSymbol("end"),
		}, Returns{Values: []int32{-1, 2}}},
		{"by way of another register", asm.Instructions{
			asm.Mov.Imm(asm.R6, 7), asm.FnKtimeGetNs.Call(), asm.Mov.Reg(asm.R0, asm.R6), asm.Return(),
		}, Returns{Values: []int32{7}}},
		{"a wide constant before a jump", asm.Instructions{
			asm.LoadImm(asm.R0, -1, asm.DWord), asm.Ja.Label("end"), asm.Mov.Imm(asm.R0, 5), asm.Return().WithSymbol("end"),
		}, Returns{Values: []int32{-1}}},
		{"what a call says", asm.Instructions{asm.FnKtimeGetNs.Call(), asm.Return()}, Returns{Others: true}},
		{"another program's word", asm.Instructions{asm.FnTailCall.Call(), asm.Mov.Imm(asm.R0, -1), asm.Return()}, Returns{Values: []int32{-1}, Others: true}},
		{"computed", asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Add.Imm(asm.R0, 1), asm.Return()}, Returns{Others: true}},
		{"a loop that counts", asm.Instructions{
			asm.Mov.Imm(asm.R0, 0), asm.Mov.Imm(asm.R2, 3),
			asm.Sub.Imm(asm.R2, 1).WithSymbol("again"), asm.JNE.Imm(asm.R2, 0, "again"), asm.Return(),
		}, Returns{Values: []int32{0}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.want, returnsOf(resolved(tc.insns)))
		})
	}
	require.True(t, Returns{Values: []int32{0, 2}}.Always(2, 0, 7))
	require.False(t, Returns{Values: []int32{0}, Others: true}.Always(0))
	require.True(t, Returns{Values: []int32{0, 2}}.Never(-1))
	require.False(t, Returns{Others: true}.Never(-1), "nobody knows")
}

// resolved gives jumps to labels their distance, as the kernel shows them.
func resolved(insns asm.Instructions) asm.Instructions {
	at := make(map[string]int64)
	for it := insns.Iterate(); it.Next(); {
		if s := it.Ins.Symbol(); s != "" {
			at[s] = int64(it.Offset)
		}
	}
	for it := insns.Iterate(); it.Next(); {
		if ref := it.Ins.Reference(); ref != "" {
			it.Ins.Offset = int16(at[ref] - int64(it.Offset) - 1)
		}
	}
	return insns
}
