// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/promise"
)

// fill takes all room of a file system, and returns what gives it back.
func fill(t *testing.T, dir string) func() {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	require.NoError(t, err)
	_, err = io.Copy(f, zeroes{})
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.NoError(t, f.Close())
	return func() { require.NoError(t, os.Remove(f.Name())) }
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// Needs root. Whatever is wrong with what the daemon finds: one clear line, and the connection that was there
// goes on; nothing is half done.
func TestBadInput(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	state := filepath.Join(l.Dir, "state")
	require.NoError(t, os.Mkdir(state, 0o755))
	require.NoError(t, syscall.Mount("tmpfs", state, "tmpfs", 0, "size=2m"))
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(state, syscall.MNT_DETACH)) })
	b := l.StartBpfnet(t, nil, "--docker", "off", "--attach", "tcx")
	b.Serve(t, "--name", "web", "-p", "8080:80", "--", "--tcp", "80")
	to := netip.AddrPortFrom(lab.Host4, 8080).String()
	stream := l.Client.Stream(t, "--interval", "5ms", "--duration", "10m", to)
	db := filepath.Join(state, "state.db")

	// start has the daemon refuse to start, and returns why; what runs, runs on.
	start := func(t *testing.T) string {
		t.Helper()
		before := pins(t, l)
		line := refused(t, lastErr(b.CLI("daemon", "--docker", "off", "--attach", "tcx")))
		assert.Equal(t, before, pins(t, l))
		l.Client.MustGet(t, to)
		return line
	}
	cases := []struct {
		name string
		run  func(t *testing.T)
	}{
		{"full disk while it runs", func(t *testing.T) {
			free := fill(t, state)
			before := b.Belongings(t)
			line := refused(t, lastErr(b.CLI("network", "create", "blue")))
			t.Log(line)
			assert.Contains(t, line, "no space left on device")
			assert.Equal(t, before, b.Belongings(t), "nothing half done")
			l.Client.MustGet(t, to)
			free()
			b.MustCLI(t, "network", "create", "blue")
			b.MustCLI(t, "network", "rm", "blue")
		}},
		{"full disk at the start", func(t *testing.T) {
			b.Stop(t)
			free := fill(t, state)
			line := start(t)
			t.Log(line)
			assert.Contains(t, line, "no space left on device")
			free()
			b.Start(t)
		}},
		{"read-only disk", func(t *testing.T) {
			b.Stop(t)
			// A view of its own: the sandbox's log is open for writing.
			require.NoError(t, syscall.Mount(state, state, "", syscall.MS_BIND, ""))
			require.NoError(t, syscall.Mount("", state, "", syscall.MS_REMOUNT|syscall.MS_BIND|syscall.MS_RDONLY, ""))
			line := start(t)
			t.Log(line)
			assert.Contains(t, line, "read-only file system")
			require.NoError(t, syscall.Unmount(state, syscall.MNT_DETACH))
			b.Start(t)
		}},
		{"truncated store", func(t *testing.T) {
			b.Stop(t)
			whole, err := os.ReadFile(db)
			require.NoError(t, err)
			require.NoError(t, os.Truncate(db, int64(len(whole)/2)))
			line := start(t)
			t.Log(line)
			assert.Contains(t, line, "damaged")
			half, err := os.ReadFile(db)
			require.NoError(t, err)
			assert.Equal(t, whole[:len(whole)/2], half, "left as it was found")
			require.NoError(t, os.WriteFile(db, whole, 0o600))
			b.Start(t)
		}},
		{"a table of a newer version", func(t *testing.T) {
			b.Stop(t)
			pin := filepath.Join(l.BPFFS, "maps", "ports")
			have, err := ebpf.LoadPinnedMap(pin, nil)
			require.NoError(t, err)
			spec := ebpf.MapSpec{
				Type: have.Type(), KeySize: have.KeySize(), ValueSize: have.ValueSize() + 8, MaxEntries: have.MaxEntries(), Flags: have.Flags(),
			}
			have.Close()
			newer, err := ebpf.NewMap(&spec)
			require.NoError(t, err)
			require.NoError(t, os.Remove(pin))
			require.NoError(t, newer.Pin(pin))
			newer.Close()
			b.Start(t)
			assert.Contains(t, b.Log(), "another version")
		}},
		{"a foreign program first, that returns early", func(t *testing.T) {
			var k link.Link
			require.NoError(t, l.Host.Do(func() (err error) {
				p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
					Name: "others", Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
					Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()}, // TCX_PASS: nobody behind it is asked
				})
				if err != nil {
					return err
				}
				defer p.Close()
				k, err = link.AttachTCX(link.TCXOptions{
					Interface: l.Host.Ifindex(t, lab.HostIf2), Program: p, Attach: ebpf.AttachTCXIngress, Anchor: link.Head(),
				})
				return err
			}))
			lab.Eventually(t, 20*time.Second, "the log says who is first", func() bool {
				return strings.Contains(b.Log(), "a program of others runs before bpfnet's")
			})
			require.NoError(t, k.Close())
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			c.run(t)
			l.Client.MustGet(t, to)
			b.MustGet(t, "web", to)
		})
	}
	sum := stream.Finish(t)
	require.Zero(t, sum.Lost+sum.Corrupt+sum.Resets, "%+v", sum)
	b.MustCLI(t, "rm", "-f", "web")
	promise.Kept(t, promise.BadInput,
		"A state directory on a full or read-only disk, a truncated store, tables of a newer version and foreign programs in front are told of in one clear line, and connections go on.",
		"%d cases; a stream through all of them lost nothing", len(cases))
}
