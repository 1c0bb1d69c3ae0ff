// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// need is a privilege and what it is needed for. Any one of its capabilities will do.
type need struct {
	name string
	bits []uint
}

// daemonNeeds: CAP_SYS_ADMIN held CAP_BPF and CAP_PERFMON before Linux 5.8, and still implies them.
var daemonNeeds = []need{
	{"CAP_NET_ADMIN", []uint{unix.CAP_NET_ADMIN}},
	{"CAP_BPF", []uint{unix.CAP_BPF, unix.CAP_SYS_ADMIN}},
	{"CAP_PERFMON", []uint{unix.CAP_PERFMON, unix.CAP_SYS_ADMIN}},
}

// runnerNeeds is for namespaces, mounts and cgroups, and for a namespace's interfaces.
var runnerNeeds = []need{
	{"CAP_SYS_ADMIN", []uint{unix.CAP_SYS_ADMIN}},
	{"CAP_NET_ADMIN", []uint{unix.CAP_NET_ADMIN}},
}

// checkPrivilege fails with the names of the capabilities that the daemon misses.
func (a *App) checkPrivilege() error { return a.checkCapabilities(daemonNeeds) }

func (a *App) checkCapabilities(needs []need) error {
	raw, err := os.ReadFile(a.ProcStatus)
	if err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	effective, err := effectiveCapabilities(string(raw))
	if err != nil {
		return fmt.Errorf("read capabilities: %s: %w", a.ProcStatus, err)
	}
	var missing []string
	for _, n := range needs {
		have := false
		for _, bit := range n.bits {
			have = have || effective&(1<<bit) != 0
		}
		if !have {
			missing = append(missing, n.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("not permitted: missing %s; run this as root", strings.Join(missing, ", "))
	}
	return nil
}

func effectiveCapabilities(status string) (uint64, error) {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		}
	}
	return 0, errors.New("no line CapEff")
}

// errNoCgroup says that no cgroup2 hierarchy is mounted.
var errNoCgroup = errors.New("cgroup2 is not mounted")

// findCgroup returns the directory of --cgroup, or where cgroup2 is mounted.
func (a *App) findCgroup() (string, error) {
	if dir := a.paths.Cgroup; dir != "" {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			return "", a.located(fmt.Errorf("--cgroup %s: %w", dir, err))
		}
		if fs.Type != unix.CGROUP2_SUPER_MAGIC {
			return "", a.located(fmt.Errorf("--cgroup %s: not a directory of cgroup2; name one below its mount", dir))
		}
		return filepath.Clean(dir), nil
	}
	raw, err := os.ReadFile(a.ProcMounts)
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	if dir := cgroupMount(string(raw)); dir != "" {
		return dir, nil
	}
	return "", fmt.Errorf("%w: %s has none; mount it (mount -t cgroup2 none /sys/fs/cgroup), or name a directory with --cgroup", errNoCgroup, a.ProcMounts)
}

// cgroupMount returns the first cgroup2 mount point of /proc/mounts, or nothing.
func cgroupMount(mounts string) string {
	for line := range strings.Lines(mounts) {
		if f := strings.Fields(line); len(f) > 2 && f[2] == "cgroup2" {
			return unescapeMount(f[1])
		}
	}
	return ""
}

// unescapeMount undoes the octal escapes of /proc/mounts: \040 is a space.
func unescapeMount(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
