// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// cost is what a program is to a kernel, in instructions: its own with those of the functions that it
// calls, which are the same for every kernel, and those that the verifier has gone through.
type cost struct{ size, verified int }

// Needs root. A kernel's golden file has a line for every program: object, program, size, verified. The
// verifier has a limit of a million, and by how much a change comes nearer differs from kernel to kernel.
//
// With -update it writes the file of the kernel that it runs on, and the sizes in those of the others.
func TestInstructionsVerified(t *testing.T) {
	var name unix.Utsname
	require.NoError(t, unix.Uname(&name))
	var major, minor int
	_, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor)
	require.NoError(t, err)
	dir := filepath.Join("testdata", "kernels")
	golden := filepath.Join(dir, fmt.Sprintf("%d.%d.golden", major, minor))

	have := verify(t)
	if *update {
		files, err := filepath.Glob(filepath.Join(dir, "*.golden"))
		require.NoError(t, err)
		for _, file := range files {
			list := readCosts(t, file)
			for program, c := range list {
				if list[program] = (cost{have[program].size, c.verified}); have[program].size == 0 {
					delete(list, program)
				}
			}
			writeCosts(t, file, list)
		}
		writeCosts(t, golden, have)
	}
	if _, err := os.Stat(golden); errors.Is(err, fs.ErrNotExist) {
		t.Skipf("nothing is known of Linux %d.%d: go test ./bpf -run TestInstructionsVerified -update", major, minor)
	}
	const hint = "if that is meant: make kernels-golden"
	want := readCosts(t, golden)
	require.Equal(t, slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(have)), hint)
	for program, w := range want {
		assert.Equal(t, w.size, have[program].size, "size of %s; %s", program, hint)
		assert.InEpsilon(t, w.verified, have[program].verified, 0.1, "verified instructions of %s; %s", program, hint)
	}
}

// verify loads all programs.
func verify(t *testing.T) map[string]cost {
	t.Helper()
	out := make(map[string]cost)
	for _, object := range objects {
		spec, err := object.load()
		require.NoError(t, err)
		for name, m := range spec.Maps {
			m.Pinning = ebpf.PinNone
			if strings.HasPrefix(name, "flows") {
				m.MaxEntries = 64
			}
		}
		c, err := ebpf.NewCollection(spec)
		require.NoError(t, err)
		for name, program := range c.Programs {
			info, err := program.Info()
			require.NoError(t, err)
			verified, ok := info.VerifiedInstructions()
			require.True(t, ok)
			size := 0
			for _, ins := range spec.Programs[name].Instructions {
				size += int(ins.Size() / asm.InstructionSize)
			}
			out[object.name+" "+name] = cost{size, int(verified)}
		}
		c.Close()
	}
	return out
}

func readCosts(t *testing.T, file string) map[string]cost {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	out := make(map[string]cost)
	for line := range strings.Lines(string(text)) {
		var object, program string
		var c cost
		_, err := fmt.Sscan(line, &object, &program, &c.size, &c.verified)
		require.NoError(t, err, "%s: %q", file, line)
		out[object+" "+program] = c
	}
	return out
}

func writeCosts(t *testing.T, file string, list map[string]cost) {
	t.Helper()
	var text strings.Builder
	for _, program := range slices.Sorted(maps.Keys(list)) {
		fmt.Fprintf(&text, "%s %d %d\n", program, list[program].size, list[program].verified)
	}
	require.NoError(t, os.WriteFile(file, []byte(text.String()), 0o644))
}
