// SPDX-License-Identifier: Apache-2.0

package loader_test

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
)

// Needs root. Where the kernel lets no program be looked at, a capture says that and leaves nothing behind; what it captures
// where it does, the guests of internal/vm see.
func TestCapture(t *testing.T) {
	traces := func() bool {
		p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.Tracing, AttachType: ebpf.AttachTraceFEntry, AttachTo: "ip_rcv", License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
		})
		if err == nil {
			p.Close()
		}
		return err == nil
	}()
	looking := func() (n int) {
		it := new(link.Iterator)
		defer it.Close()
		for it.Next() {
			if info, err := it.Link.Info(); err == nil && info.Type == link.TracingType {
				n++
			}
		}
		require.NoError(t, it.Err())
		return n
	}
	before := looking()
	lb := lab.New(t, lab.Opts{})
	paths := loader.Paths{BPFFS: lb.BPFFS}
	_, err := loader.NewCapture(lb.BPFFS, loader.CaptureFilter{Bytes: 64})
	require.ErrorIs(t, err, maps.ErrNotLoaded)
	require.NoError(t, lb.Host.Do(func() error {
		l := load(t, loader.Options{Paths: paths})
		_, err := loader.NewCapture(lb.BPFFS, loader.CaptureFilter{Bytes: 64, Reason: "isolatd"})
		assert.ErrorContains(t, err, `reason "isolatd": no such reason`)
		c, err := loader.NewCapture(lb.BPFFS, loader.CaptureFilter{Bytes: 64})
		if traces {
			require.NoError(t, err)
			assert.Equal(t, before+8*3, looking(), "entry and exit of each program, and drop() in it")
			require.NoError(t, c.Close())
		} else {
			require.ErrorContains(t, err, "the kernel does not let programs be looked at: want one with CONFIG_BPF_EVENTS, and CAP_PERFMON or root")
		}
		l.Close()
		return loader.Cleanup(paths, netdev.Clsact{})
	}))
	lab.Eventually(t, 10*time.Second, "nothing looks at programs", func() bool { return looking() == before })
}
