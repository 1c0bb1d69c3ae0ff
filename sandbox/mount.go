// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// newMountNS gives the calling thread a mount namespace that hears of the host's later mounts, and
// tells the host of none.
func newMountNS() error {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("separate mount namespace: %w", err)
	}
	return nil
}

// mountFiles mounts files over others: target → source.
func mountFiles(files map[string]string) error {
	for _, target := range slices.Sorted(maps.Keys(files)) {
		if err := mountFile(files[target], target); err != nil {
			return fmt.Errorf("mount %s over %s: %w", files[target], target, err)
		}
	}
	return nil
}

// mountFile mounts over the target itself if that is a symbolic link, which mount(2) does not do: the
// file that /etc/resolv.conf leads to may be missing, and is replaced by its owner whenever he likes,
// which takes away what was mounted over it.
func mountFile(source, target string) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("%s does not exist; make it, an empty one is enough", target)
	}
	return err
}

// mountSysfs mounts a /sys over the old one, for the thread's network namespace, and moves there
// what is mounted in the old one.
func mountSysfs() error {
	const sys = "/sys"
	below, err := mountsIn(sys)
	if err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	fds := make([]int, 0, len(below))
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for _, path := range below {
		fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fmt.Errorf("open mount %s: %w", path, err)
		}
		fds = append(fds, fd)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(sys, &st); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	flags |= uintptr(st.Flags) & unix.ST_RDONLY // the same bit as MS_RDONLY
	if err := unix.Mount("sysfs", sys, "sysfs", flags, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	for i, path := range below {
		err := unix.MoveMount(fds[i], "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
		// Below a directory of an interface, there is no such place in another network namespace.
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("move mount %s: %w", path, err)
		}
	}
	return nil
}

// mountsIn lists the mount points below a directory that belong to the same mount as the directory
// itself. What is mounted below them goes where they go.
func mountsIn(dir string) ([]string, error) {
	var stx unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, unix.STATX_MNT_ID, &stx); err != nil {
		return nil, err
	}
	b, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	parent := strconv.FormatUint(stx.Mnt_id, 10)
	var found []string
	for line := range strings.Lines(string(b)) {
		// 36 35 98:0 /mnt1 /mnt2 rw,noatime …: mount ID, parent, device, root, mount point
		f := strings.Fields(line)
		if len(f) > 4 && f[1] == parent && strings.HasPrefix(f[4], dir+"/") {
			found = append(found, unescape(f[4]))
		}
	}
	return found, nil
}

// unescape undoes the kernel's \ooo for blanks and backslashes in paths: proc_pid_mountinfo(5).
func unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
