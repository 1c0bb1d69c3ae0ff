// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// mount is one line of /proc/mounts.
type mount struct{ dir, fstype string }

func mounts() ([]mount, error) {
	f, err := os.Open("/proc/mounts")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []mount
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 2 {
			all = append(all, mount{dir: fields[1], fstype: fields[2]})
		}
	}
	return all, lines.Err()
}

// cgroup2Root finds where the cgroup2 hierarchy is mounted.
func cgroup2Root() (string, error) {
	all, err := mounts()
	if err != nil {
		return "", err
	}
	for _, m := range all {
		if m.fstype == "cgroup2" {
			return m.dir, nil
		}
	}
	return "", errors.New("no cgroup2 mount in /proc/mounts")
}

// killCgroup ends every process below a cgroup2 directory and waits until they are
// gone. A directory that does not exist is no error.
func killCgroup(dir string) error {
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	empty := func() bool {
		events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
		return err != nil || strings.Contains(string(events), "populated 0")
	}
	if !poll(10*time.Second, empty) {
		return fmt.Errorf("processes left in cgroup %q after SIGKILL", dir)
	}
	return nil
}

// removeCgroups removes the cgroup of that name, and all below it, from every
// hierarchy: the engine makes its cgroup parent in those of version 1 too, and leaves
// it behind.
func removeCgroups(name string) error {
	all, err := mounts()
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range all {
		if m.fstype != "cgroup" && m.fstype != "cgroup2" {
			continue
		}
		dir := filepath.Join(m.dir, name)
		var last error
		// A cgroup stays busy for a moment after its last process has exited.
		if !poll(5*time.Second, func() bool { last = removeCgroup(dir); return last == nil }) {
			errs = append(errs, last)
		}
	}
	return errors.Join(errs...)
}

func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
