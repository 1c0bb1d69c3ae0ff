// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"slices"

	"github.com/cilium/ebpf/asm"
)

// Returns are the values that a program can return, as far as its instructions tell.
type Returns struct {
	Values []int32 // in order
	// Others says that it may return more: what it computes, or what another program says.
	Others bool
}

// Always reports whether every value is one of these.
func (r Returns) Always(values ...int32) bool {
	return !r.Others && len(r.Values) > 0 && !slices.ContainsFunc(r.Values, func(v int32) bool { return !slices.Contains(values, v) })
}

// Never reports whether none of the values can be one of these.
func (r Returns) Never(values ...int32) bool {
	return !r.Others && len(r.Values) > 0 && !slices.ContainsFunc(r.Values, func(v int32) bool { return slices.Contains(values, v) })
}

// maxValues is how many constants are followed in a register. More are "others".
const maxValues = 8

// value is what a register can hold: some constants, or nobody knows.
type value struct {
	known  []int32 // in order; as the low half of the register, which is what a return value is
	unsure bool
}

var anything = value{unsure: true}

func constant(v int64) value { return value{known: []int32{int32(v)}} }

func (v value) join(o value) value {
	out := value{known: slices.Clone(v.known), unsure: v.unsure || o.unsure}
	for _, k := range o.known {
		if i, found := slices.BinarySearch(out.known, k); !found {
			out.known = slices.Insert(out.known, i, k)
		}
	}
	if len(out.known) > maxValues {
		return anything
	}
	return out
}

func (v value) equal(o value) bool { return v.unsure == o.unsure && slices.Equal(v.known, o.known) }

// registers are all that four bits can name: the kernel's rewriting uses one more than programs may.
type registers [16]value

// returnsOf follows the constants through a program's registers, along every path. It takes each
// branch for possible, so that it names too many values rather than too few.
func returnsOf(insns asm.Instructions) Returns {
	at := make(map[asm.RawInstructionOffset]int, len(insns))
	offset := make([]asm.RawInstructionOffset, len(insns))
	for it := insns.Iterate(); it.Next(); {
		at[it.Offset], offset[it.Index] = it.Index, it.Offset
	}
	states := make([]*registers, len(insns))
	var start registers
	for i := range start {
		start[i] = anything
	}
	var out value
	todo := []int{0}
	if len(insns) == 0 {
		return Returns{Others: true}
	}
	states[0] = &start
	flow := func(to int, r registers) {
		if to < 0 || to >= len(insns) {
			out.unsure = true
			return
		}
		if states[to] == nil {
			states[to] = &r
			todo = append(todo, to)
			return
		}
		changed := false
		for i := range r {
			if joined := states[to][i].join(r[i]); !joined.equal(states[to][i]) {
				states[to][i], changed = joined, true
			}
		}
		if changed {
			todo = append(todo, to)
		}
	}
	target := func(i int, rel int64) int {
		to, ok := at[asm.RawInstructionOffset(int64(offset[i])+1+rel)]
		if !ok {
			return -1
		}
		return to
	}
	for len(todo) > 0 {
		i := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		r, ins := *states[i], insns[i]
		op := ins.OpCode
		switch class := op.Class(); {
		case class.IsJump() && op.JumpOp() == asm.Exit:
			out = out.join(r[asm.R0])
		case class.IsJump() && op.JumpOp() == asm.Call:
			if ins.IsBuiltinCall() && asm.BuiltinFunc(ins.Constant) == asm.FnTailCall {
				out.unsure = true // the other program's word
			}
			for reg := asm.R0; reg <= asm.R5; reg++ {
				r[reg] = anything
			}
			flow(i+1, r)
		case class == asm.JumpClass && op.JumpOp() == asm.Ja:
			flow(target(i, int64(ins.Offset)), r)
		case class == asm.Jump32Class && op.JumpOp() == asm.Ja: // a long one
			flow(target(i, ins.Constant), r)
		case class.IsJump():
			flow(i+1, r)
			flow(target(i, int64(ins.Offset)), r)
		default:
			step(&r, ins)
			flow(i+1, r)
		}
	}
	return Returns{Values: out.known, Others: out.unsure}
}

// step is an instruction that neither jumps nor ends.
func step(r *registers, ins asm.Instruction) {
	op := ins.OpCode
	switch class := op.Class(); {
	case class.IsALU() && op.ALUOp() == asm.Mov && op.Source() == asm.ImmSource:
		r[ins.Dst] = constant(ins.Constant)
	case class.IsALU() && op.ALUOp() == asm.Mov && ins.Offset == 0:
		r[ins.Dst] = r[ins.Src]
	case class.IsALU() && op.ALUOp() == asm.Xor && op.Source() == asm.RegSource && ins.Dst == ins.Src:
		r[ins.Dst] = constant(0)
	case op.IsDWordLoad() && ins.Src == 0:
		r[ins.Dst] = constant(ins.Constant)
	case class.IsALU(), class.IsLoad():
		r[ins.Dst] = anything
	case class.IsStore():
		// An atomic operation may fetch into its source, or into R0.
		if op.Mode() == asm.AtomicMode {
			r[ins.Src], r[asm.R0] = anything, anything
		}
	}
	// Loads of packet bytes by the old instructions clobber what a call does.
	if class := op.Class(); class == asm.LdClass && !op.IsDWordLoad() {
		for reg := asm.R0; reg <= asm.R5; reg++ {
			r[reg] = anything
		}
	}
}
