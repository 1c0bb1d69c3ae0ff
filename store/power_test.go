// SPDX-License-Identifier: Apache-2.0

package store

import (
	"fmt"
	"hash/maphash"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A process that ends leaves all its writes in the kernel's cache; a power loss takes those that were not
// yet on the disk. The tests here record the system calls of real writers and make the images that a disk
// may hold when the power fails after each of the calls:
//   - what was written to a file before a sync of it that succeeded is there;
//   - of what was written since, or before a sync that failed, any part may be there, in sectors of 512
//     bytes, in any order; likewise a change of the file's size;
//   - the same is true for names, with a sync of their directory; after one that failed, though, the next
//     one makes them durable: they are in the file system's journal, not in pages that it gives up.

const sector = 512

// A call is a system call of a writer, or its word that a step was done.
type call struct {
	kind  string // "write", "resize", "sync", "create", "mkdir", "rename", "unlink" or "acked"
	file  int    // of write, resize, create, rename and sync; of sync of a directory none
	dir   string // of sync of a directory and of changes of names
	name  string // path
	from  string // of rename
	at    int64
	data  []byte
	size  int64 // of resize
	ok    bool  // of sync
	acked int
}

func (c call) String() string {
	return fmt.Sprintf("%s file %d %s%s at %d size %d ok %t acked %d",
		c.kind, c.file, c.dir, filepath.Base(c.name), c.at, max(c.size, int64(len(c.data))), c.ok, c.acked)
}

const noFile = -1

// A recorder turns logs of strace into calls. A file keeps its number under a new name.
type recorder struct {
	root  string         // the directory of interest, with all below
	names map[string]int // path to file; noFile for a directory
	next  int
	calls []call
	hit   int // the number of calls when strace did what it was told to; 0: never
}

// add reads the log of one process.
func (r *recorder) add(t *testing.T, log []byte) {
	t.Helper()
	fds := make(map[int]string)      // path; of files below the root
	began := make(map[string]string) // by thread
	for line := range strings.Lines(string(log)) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasSuffix(line, "(INJECTED)") {
			r.hit = max(len(r.calls), 1)
		}
		thread, rest, _ := strings.Cut(line, " ")
		rest = strings.TrimLeft(rest, " ")
		if begin, ok := strings.CutSuffix(rest, " <unfinished ...>"); ok {
			began[thread] = begin
			continue
		}
		if _, end, ok := strings.Cut(rest, " resumed>"); ok {
			rest = began[thread] + end
		}
		name, rest, called := strings.Cut(rest, "(")
		end := strings.LastIndex(rest, " = ")
		if !called || end < 0 {
			continue // It was killed before that.
		}
		result, _, _ := strings.Cut(rest[end+3:], " ")
		if ret, err := strconv.Atoi(result); err == nil {
			r.one(t, fds, name, strings.Split(strings.TrimRight(rest[:end], " )"), ", "), ret)
		}
	}
}

func (r *recorder) below(path string) bool {
	return strings.HasPrefix(path, r.root+"/") || path == r.root
}

func unhex(t *testing.T, quoted string) string {
	t.Helper()
	require.NotContains(t, quoted, "...", "cut off by strace")
	raw, err := strconv.Unquote(quoted)
	require.NoError(t, err)
	return raw
}

// one takes one system call with its return value.
func (r *recorder) one(t *testing.T, fds map[int]string, name string, args []string, ret int) {
	t.Helper()
	fd, _ := strconv.Atoi(args[0])
	path, known := fds[fd]
	number := func(i int) int64 {
		n, err := strconv.ParseInt(args[i], 0, 64)
		require.NoError(t, err)
		return n
	}
	add := func(c call) { r.calls = append(r.calls, c) }
	switch name {
	case "openat":
		opened := unhex(t, args[1])
		if ret < 0 || !r.below(opened) {
			return
		}
		fds[ret] = opened
		if strings.Contains(args[2], "O_TRUNC") {
			t.Fatalf("%s is truncated", opened)
		}
		if _, there := r.names[opened]; !there && strings.Contains(args[2], "O_CREAT") {
			r.names[opened] = r.next
			add(call{kind: "create", file: r.next, dir: filepath.Dir(opened), name: opened})
			r.next++
		}
	case "mkdirat":
		if made := unhex(t, args[1]); ret == 0 && r.below(made) {
			r.names[made] = noFile
			add(call{kind: "mkdir", file: noFile, dir: filepath.Dir(made), name: made})
		}
	case "close":
		delete(fds, fd)
	case "write":
		if fd == 1 && ret > 0 {
			step, err := strconv.Atoi(strings.TrimSpace(unhex(t, args[1])))
			require.NoError(t, err)
			add(call{kind: "acked", acked: step})
		} else if known {
			t.Fatalf("write(2) to %s: not understood", path)
		}
	case "pwrite64":
		if data := unhex(t, args[1]); known && ret > 0 {
			add(call{kind: "write", file: r.names[path], at: number(3), data: []byte(data)[:ret]})
		}
	case "ftruncate":
		if known && ret == 0 {
			add(call{kind: "resize", file: r.names[path], size: number(1)})
		}
	case "fsync", "fdatasync":
		if !known {
			return
		}
		file, there := r.names[path]
		if c := (call{kind: "sync", file: file, ok: ret == 0}); there && file != noFile {
			add(c)
		} else {
			c.file, c.dir = noFile, path
			add(c)
		}
	case "renameat":
		if from, to := unhex(t, args[1]), unhex(t, args[3]); ret == 0 && r.below(to) {
			file := r.names[from]
			delete(r.names, from)
			r.names[to] = file
			for fd, p := range fds {
				if p == from {
					fds[fd] = to
				}
			}
			add(call{kind: "rename", file: file, dir: filepath.Dir(to), name: to, from: from})
		}
	case "unlinkat":
		if gone := unhex(t, args[1]); ret == 0 && r.below(gone) {
			delete(r.names, gone)
			add(call{kind: "unlink", file: noFile, dir: filepath.Dir(gone), name: gone})
		}
	default:
		for _, arg := range args {
			if known || strings.HasPrefix(arg, `"`) && r.below(unhex(t, arg)) {
				t.Fatalf("%s: not understood", name)
			}
		}
	}
}

// durable says of each of the calls whether a sync made it so.
func durable(calls []call) []bool {
	out := make([]bool, len(calls))
	for i, c := range calls {
		if c.kind == "sync" || c.kind == "acked" {
			out[i] = true
			continue
		}
		for _, s := range calls[i+1:] {
			var same bool
			switch c.kind {
			case "write", "resize":
				same = s.file == c.file
			case "create", "mkdir", "rename", "unlink":
				same = s.file == noFile && s.dir == c.dir
			}
			if s.kind == "sync" && same {
				out[i] = s.ok
				if s.ok || s.file != noFile {
					break
				}
			}
		}
	}
	return out
}

// An image is what a disk holds.
type image struct {
	names map[string]int
	files map[int][]byte
}

// keep says how much of a call that need not be on the disk is there: nothing, all, or a part.
type keep func(i int) (any, all bool)

// after makes the image of a disk after the calls, of which some are sure to be there. The parts of the
// others are chosen at random. keep counts from first on.
func (i image) after(calls []call, sure []bool, first int, keep keep, random *rand.Rand) image {
	out := image{maps.Clone(i.names), make(map[int][]byte)}
	for n, raw := range i.files {
		out.files[n] = slices.Clone(raw)
	}
	for i, c := range calls {
		some, all := true, true
		if !sure[i] {
			some, all = keep(first + i)
		}
		if !some {
			continue
		}
		switch c.kind {
		case "create", "mkdir":
			out.names[c.name] = c.file
		case "rename":
			delete(out.names, c.from)
			out.names[c.name] = c.file
		case "unlink":
			delete(out.names, c.name)
		case "resize":
			raw := out.files[c.file]
			out.files[c.file] = append(raw, make([]byte, max(0, c.size-int64(len(raw))))...)[:c.size]
		case "write":
			out.files[c.file] = tear(out.files[c.file], c, all, random)
		}
	}
	return out
}

// tear writes all or some sectors. Without the whole, the file need not have grown.
func tear(raw []byte, c call, all bool, random *rand.Rand) []byte {
	if end := c.at + int64(len(c.data)); int64(len(raw)) < end && (all || random.IntN(2) == 0) {
		raw = append(raw, make([]byte, end-int64(len(raw)))...)
	}
	for at := 0; at < len(c.data); at += sector {
		if to := c.at + int64(at); to < int64(len(raw)) && (all || random.IntN(2) == 0) {
			copy(raw[to:], c.data[at:min(at+sector, len(c.data))])
		}
	}
	return raw
}

// file returns what is in the file at path, if the names from the root on lead there.
func (i image) file(root, path string) (raw []byte, there bool) {
	file, there := i.names[path]
	for dir := filepath.Dir(path); dir != root && there; dir = filepath.Dir(dir) {
		_, there = i.names[dir]
	}
	return i.files[file], there
}

// memory makes a directory in memory, where a sync costs nothing, if there is such a place.
func memory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "bpfnet-store-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A replay checks images of what writers did one after another on the same disk.
type replay struct {
	start  start
	random *rand.Rand
	dir    string // for images
	images int
	hash   maphash.Seed
	seen   map[string]bool
}

// writers runs one writer after another, each with its options to strace, and returns their calls, the
// image before them and the state directory.
func (p *replay) writers(t *testing.T, options ...[]string) (r *recorder, before image, state string) {
	t.Helper()
	root := t.TempDir()
	state = p.start.dir(t, root)
	before = image{map[string]int{}, map[int][]byte{}}
	if p.start.file != nil {
		before.names[filepath.Dir(state)], before.names[state] = noFile, noFile
		before.names[filepath.Join(state, FileName)] = 0
		before.files[0] = p.start.file
	}
	r = &recorder{root: root, names: maps.Clone(before.names), next: 1}
	step := 0
	for i, o := range options {
		w := runWriter(t, state, step, o...)
		step = max(step, w.acked)
		r.add(t, w.log)
		if !w.finished {
			r.hit = max(len(r.calls), 1)
		}
		if i == len(options)-1 {
			require.True(t, w.finished)
			require.Equal(t, len(steps), w.acked)
		}
	}
	return r, before, state
}

// check makes images for each point from the hit on, and opens them. Of each point there are the
// image without anything that need not be there, that with all of it, each call's part alone and each
// missing alone, and others by chance: of all these, one in stride.
func (p *replay) check(t *testing.T, r *recorder, before image, state string, chances, stride int) {
	t.Helper()
	acked := -1
	for n, c := range r.calls {
		if c.kind == "acked" {
			acked = c.acked
		}
		if n < r.hit-1 {
			continue
		}
		calls := r.calls[:n+1]
		sure := durable(calls)
		var pending []int
		for i := range calls {
			if !sure[i] {
				pending = append(pending, i)
			}
		}
		// What comes before the first one is the same in all images.
		first := len(calls)
		if len(pending) > 0 {
			first = pending[0]
		}
		base := before.after(calls[:first], sure[:first], 0, nil, nil)
		choices := []keep{
			func(int) (bool, bool) { return false, false },
		}
		if len(pending) > 0 {
			choices = append(choices, func(int) (bool, bool) { return true, true })
		}
		// What failed stays in doubt for good: only the last ones are worth their own images.
		for _, only := range pending[max(0, len(pending)-20):] {
			choices = append(choices,
				func(i int) (bool, bool) { return i == only, true },
				func(i int) (bool, bool) { return i == only, false },
				func(i int) (bool, bool) { return i != only, true })
		}
		for range min(len(pending), 1) * chances {
			choices = append(choices, func(int) (bool, bool) {
				part := p.random.IntN(3)
				return part > 0, part > 1
			})
		}
		for i, k := range choices {
			if p.random.IntN(stride) > 0 {
				continue
			}
			p.image(t, base.after(calls[first:], sure[first:], first, k, p.random), r.root, state, acked,
				fmt.Sprintf("after call %d (%s), image %d", n, c, i))
		}
	}
}

func (p *replay) image(t *testing.T, i image, root, state string, acked int, what string) {
	t.Helper()
	raw, there := i.file(root, filepath.Join(state, FileName))
	require.True(t, there || acked < 0, "%s: the file is gone", what)
	if key := fmt.Sprintf("%d %t %x", acked, there, maphash.Bytes(p.hash, raw)); p.seen[key] {
		return
	} else {
		p.seen[key] = true
	}
	p.images++
	dir := filepath.Join(p.dir, strconv.Itoa(p.images))
	require.NoError(t, os.Mkdir(dir, 0o755))
	if there {
		require.NoError(t, os.WriteFile(filepath.Join(dir, FileName), raw, 0o600))
	}
	p.start.check(t, dir, acked, what)
	require.NoError(t, os.RemoveAll(dir))
}

func eachStart(t *testing.T, f func(t *testing.T, p *replay)) {
	needStrace(t)
	random := seeded(t)
	for _, b := range starts(t) {
		t.Run("file "+b.name, func(t *testing.T) {
			p := &replay{start: b, random: random, dir: memory(t), hash: maphash.MakeSeed(), seen: make(map[string]bool)}
			f(t, p)
			t.Logf("%d images", p.images)
			assert.Positive(t, p.images)
		})
	}
}

func TestPowerLoss(t *testing.T) {
	eachStart(t, func(t *testing.T, p *replay) {
		r, before, state := p.writers(t, nil)
		stride := 10
		if fullCount() {
			stride = 1
		}
		p.check(t, r, before, state, 100, stride)
	})
}

// each calls f for numbers from 1 on until it returns false; for a tenth of them without BPFNET_FULL.
func (p *replay) each(f func(n int) bool) {
	n, step := 1, 1
	if !fullCount() {
		n, step = 1+p.random.IntN(5), 10
	}
	for f(n) {
		n += step
	}
}

// The process is killed with writes in the kernel's cache, another one goes on, then the power fails.
func TestPowerLossAfterAKill(t *testing.T) {
	eachStart(t, func(t *testing.T, p *replay) {
		for _, name := range []string{"fdatasync", "fsync"} {
			p.each(func(n int) bool {
				kill := []string{"-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", name, n)}
				r, before, state := p.writers(t, kill, nil)
				p.check(t, r, before, state, 10, 20)
				return r.hit > 0
			})
		}
	})
}

// A sync fails, or the disk is full; the same process goes on, then the power fails.
func TestPowerLossAfterAnError(t *testing.T) {
	eachStart(t, func(t *testing.T, p *replay) {
		for name, errno := range map[string]string{
			"fdatasync": "EIO", "fsync": "EIO", "pwrite64": "ENOSPC", "ftruncate": "ENOSPC", "renameat": "ENOSPC",
		} {
			p.each(func(n int) bool {
				fail := []string{"-e", fmt.Sprintf("inject=%s:error=%s:when=%d", name, errno, n)}
				r, before, state := p.writers(t, fail)
				p.check(t, r, before, state, 5, 40)
				return r.hit > 0
			})
		}
	})
}

// A disk that forgets what it said was durable may leave a file that nothing can be made of. It is
// refused, or can be used; the process does not end, and neither does its memory.
func TestPowerLossOfADiskThatLies(t *testing.T) {
	images := 100
	if fullCount() {
		images = 1000
	}
	eachStart(t, func(t *testing.T, p *replay) {
		r, before, state := p.writers(t, nil)
		refused := 0
		for range images {
			n := p.random.IntN(len(r.calls)) + 1
			lost := p.random.IntN(20) + 2
			i := before.after(r.calls[:n], make([]bool, n), 0, func(int) (bool, bool) {
				part := p.random.IntN(lost)
				return part > 0, part > 1
			}, p.random)
			raw, there := i.file(r.root, filepath.Join(state, FileName))
			if there && !usable(t, raw) {
				refused++
			}
			p.images++
		}
		t.Logf("refused %d", refused)
		assert.Positive(t, refused)
		assert.Less(t, refused, images)
	})
}
