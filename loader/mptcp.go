// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// sockAt is where struct bpf_sock_addr has its socket.
const sockAt = 64

// knowsMPTCP reports whether programs at a cgroup can ask whose subflow a socket is. A kernel that refuses that
// was built without MPTCP, whatever helpers it names, and has no subflows.
var knowsMPTCP = sync.OnceValue(func() bool {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bpfnet_probe", Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R1, asm.R1, sockAt, asm.DWord),
			asm.FnSkcToMptcpSock.Call(),
			asm.Mov.Imm(asm.R0, 1),
			asm.Return(),
		},
	})
	if err != nil {
		return false
	}
	p.Close()
	return true
})

// withoutMPTCP has the programs take every socket for none of MPTCP's.
func withoutMPTCP(spec *ebpf.CollectionSpec) {
	for _, p := range spec.Programs {
		for i := range p.Instructions {
			ins := &p.Instructions[i]
			if ins.IsBuiltinCall() && asm.BuiltinFunc(ins.Constant) == asm.FnSkcToMptcpSock {
				none := asm.Mov.Imm(asm.R0, 0)
				none.Metadata = ins.Metadata
				*ins = none
			}
		}
	}
}
