// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// inside is the path of a file as a process sees it.
func inside(pid int, path string) string { return fmt.Sprintf("/proc/%d/root%s", pid, path) }

func TestMountedFiles(t *testing.T) {
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	writeFile(t, target, "host's\n")
	require.NoError(t, Rewrite(source, []byte("sandbox's\n")))
	c := shell("exec sleep infinity")
	c.Files = map[string]string{target: source}
	p := begin(t, c)
	assert.Equal(t, "sandbox's\n", readFile(t, inside(p.PID(), target)))
	for _, text := range []string{"another one, which is longer\n", "short\n", ""} {
		require.NoError(t, Rewrite(source, []byte(text)))
		assert.Equal(t, text, readFile(t, inside(p.PID(), target)))
	}
	assert.Equal(t, "host's\n", readFile(t, target))
	assert.NotContains(t, readFile(t, "/proc/self/mountinfo"), target)
}

// As /etc/resolv.conf: a link to a file that is missing, or that its owner replaces.
func TestMountOverLink(t *testing.T) {
	for _, dangling := range []bool{false, true} {
		dir := t.TempDir()
		source, link, end := filepath.Join(dir, "source"), filepath.Join(dir, "link"), filepath.Join(dir, "end")
		writeFile(t, source, "sandbox's\n")
		require.NoError(t, os.Symlink("end", link))
		if !dangling {
			writeFile(t, end, "host's\n")
		}
		c := shell("cat " + link)
		c.Files = map[string]string{link: source}
		out, code := run(t, c)
		assert.Zero(t, code)
		assert.Equal(t, "sandbox's\n", out)
		to, err := os.Readlink(link)
		require.NoError(t, err)
		assert.Equal(t, "end", to)
		assert.NotEqual(t, dangling, exists(end))
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// The host's file is replaced, as editors do it: the kernel drops the mount.
func TestReplacedFileIsMountedAgain(t *testing.T) {
	dir := t.TempDir()
	source := filepath.Join(dir, "source")
	writeFile(t, source, "sandbox's\n")
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	writeFile(t, target, "host's\n")
	require.NoError(t, os.Symlink("nowhere", link))
	c := shell("exec sleep infinity")
	c.Files = map[string]string{target: source, link: source}
	th := newThread(t)
	p, err := th.Start(c)
	require.NoError(t, err)
	t.Cleanup(func() { end(p) })

	replaced := filepath.Join(dir, "new")
	for i := range 30 {
		for _, path := range []string{target, link} {
			writeFile(t, replaced, "new\n")
			require.NoError(t, os.Rename(replaced, path))
			assert.Equal(t, "new\n", readFile(t, path))
			lab.Eventually(t, 10*time.Second, fmt.Sprintf("%s mounted again, time %d", path, i), func() bool {
				b, err := os.ReadFile(inside(p.PID(), path))
				return err == nil && string(b) == "sandbox's\n"
			})
		}
	}
	// Removed, and made some time later.
	require.NoError(t, os.Remove(target))
	lab.Eventually(t, 10*time.Second, "target awaited", func() bool {
		th.kept.mu.Lock()
		defer th.kept.mu.Unlock()
		return th.kept.made != nil
	})
	assert.NoFileExists(t, inside(p.PID(), target))
	writeFile(t, target, "anew\n")
	lab.Eventually(t, 10*time.Second, "removed and made, mounted again", func() bool {
		b, err := os.ReadFile(inside(p.PID(), target))
		return err == nil && string(b) == "sandbox's\n"
	})
	assert.Equal(t, "anew\n", readFile(t, target))
	// None of it piled up: two files, two mounts.
	mounts := strings.Count(readFile(t, fmt.Sprintf("/proc/%d/mounts", p.PID())), dir)
	assert.Equal(t, 2, mounts)

	// Closing does not wait for what is missing.
	require.NoError(t, os.Remove(link))
	lab.Eventually(t, 10*time.Second, "link awaited", func() bool {
		th.kept.mu.Lock()
		defer th.kept.mu.Unlock()
		return th.kept.made != nil
	})
}

func TestSysfs(t *testing.T) {
	lab.BPFFS(t) // so that there is one mounted
	c := shell("ls /sys/class/net; echo --; cut -d' ' -f5 /proc/self/mountinfo | grep ^/sys/; echo --; stat -f -c %t /sys/fs/bpf")
	c.Sysfs = true
	out, _ := run(t, c)
	parts := strings.Split(out, "--\n")
	require.Len(t, parts, 3)
	assert.Equal(t, "lo\n", parts[0])
	host, err := exec.Command("sh", "-c", "cut -d' ' -f5 /proc/self/mountinfo | grep ^/sys/").Output()
	require.NoError(t, err)
	want, got := strings.Fields(string(host)), strings.Fields(parts[1])
	slices.Sort(want)
	slices.Sort(got)
	assert.Equal(t, want, got)
	assert.Contains(t, want, "/sys/fs/bpf")
	assert.Equal(t, fmt.Sprintf("%x\n", unix.BPF_FS_MAGIC), parts[2])
}

// hostLike makes a mount namespace like that of a machine with systemd, where mounts propagate
// everywhere, and returns a thread and a process in it.
func hostLike(t *testing.T) (*Thread, int) {
	t.Helper()
	th := newThread(t)
	var cmd *exec.Cmd
	require.NoError(t, th.do(func() error {
		if err := newMountNS(); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
			return err
		}
		if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
			return err
		}
		cmd = exec.Command("sleep", "infinity")
		return cmd.Start()
	}))
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return th, cmd.Process.Pid
}

func TestMountsStayInside(t *testing.T) {
	th, host := hostLike(t)
	dir := t.TempDir()
	source, target, usb := filepath.Join(dir, "source"), filepath.Join(dir, "target"), filepath.Join(dir, "a disk")
	writeFile(t, source, "sandbox's\n")
	writeFile(t, target, "host's\n")
	require.NoError(t, os.Mkdir(usb, 0o755))
	table := func() string { return readFile(t, fmt.Sprintf("/proc/%d/mountinfo", host)) }
	before := table()

	out, w := pipe(t)
	c := shell("mount -t tmpfs tmpfs /mnt && mount -t tmpfs tmpfs /sys/fs && echo mounted; exec sleep infinity")
	c.Files, c.Sysfs, c.Stdout = map[string]string{target: source}, true, w
	p, err := th.Start(c)
	w.Close()
	require.NoError(t, err)
	t.Cleanup(func() { end(p) })
	require.Equal(t, "mounted", out.next())
	assert.Equal(t, before, table(), "neither ours nor the command's own")
	assert.Equal(t, "sandbox's\n", readFile(t, inside(p.PID(), target)))

	// A disk that is mounted on the host afterwards is there, and gone when it is unmounted.
	on := func(name string, args ...string) {
		t.Helper()
		out, err := exec.Command("nsenter", append([]string{fmt.Sprintf("--mount=/proc/%d/ns/mnt", host), "--", name}, args...)...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	on("mount", "-t", "tmpfs", "disk", usb)
	on("touch", usb+"/file")
	assert.FileExists(t, inside(p.PID(), usb+"/file"))
	on("umount", usb)
	assert.NoFileExists(t, inside(p.PID(), usb+"/file"))
	assert.Equal(t, before, table())
}

// A host whose /sys is read-only, as in a container, keeps it so.
func TestSysfsStaysReadOnly(t *testing.T) {
	th, _ := hostLike(t)
	require.NoError(t, th.do(func() error { return unix.Mount("", "/sys", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "") }))
	out, w := pipe(t)
	c := shell("grep ' /sys sysfs ' /proc/self/mounts | tail -n 1 | cut -d' ' -f4 | cut -d, -f1")
	c.Sysfs, c.Stdout = true, w
	p, err := th.Start(c)
	w.Close()
	require.NoError(t, err)
	_, err = p.Wait()
	require.NoError(t, err)
	assert.Equal(t, "ro", out.next())
}

// Mount points may have any name.
func TestMountsBelow(t *testing.T) {
	th, _ := hostLike(t)
	dir := t.TempDir()
	odd := filepath.Join(dir, "a b\\c\td\ne")
	require.NoError(t, os.MkdirAll(odd, 0o755))
	require.NoError(t, os.Mkdir(filepath.Join(dir, "plain"), 0o755))
	var found []string
	require.NoError(t, th.do(func() (err error) {
		for _, at := range []string{dir, odd, filepath.Join(dir, "plain")} {
			if err := unix.Mount("tmpfs", at, "tmpfs", 0, ""); err != nil {
				return err
			}
			if at == dir {
				if err := os.MkdirAll(odd, 0o755); err != nil {
					return err
				}
				if err := os.MkdirAll(filepath.Join(odd, "deep"), 0o755); err != nil {
					return err
				}
				if err := os.Mkdir(filepath.Join(dir, "plain"), 0o755); err != nil {
					return err
				}
			}
		}
		if err := os.Mkdir(filepath.Join(odd, "deep"), 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", filepath.Join(odd, "deep"), "tmpfs", 0, ""); err != nil {
			return err
		}
		found, err = mountsIn(dir)
		return err
	}))
	slices.Sort(found)
	assert.Equal(t, []string{odd, filepath.Join(dir, "plain")}, found, "what is deeper goes with them")
}
