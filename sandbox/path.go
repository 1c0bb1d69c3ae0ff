// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotFound says that there is no such program. Shells exit with 127 then.
	ErrNotFound = errors.New("command not found")
	// ErrNotExecutable says that there is one that cannot be executed. Shells exit with 126 then.
	ErrNotExecutable = errors.New("not executable")
)

// defaultPath is where programs are looked for without PATH, as in Docker.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// LookPath finds a program as execvp(3) does for a process with that environment and working
// directory. It fails with [ErrNotFound] or [ErrNotExecutable].
func LookPath(file string, env []string, dir string) (string, error) {
	if file == "" {
		return "", fmt.Errorf("%q: %w", file, ErrNotFound)
	}
	if strings.Contains(file, "/") {
		path := inDir(dir, file)
		if err := executable(path); err != nil {
			return "", fmt.Errorf("%q: %w", file, err)
		}
		return path, nil
	}
	found := ErrNotFound
	for _, d := range filepath.SplitList(searchPath(env)) {
		path := inDir(dir, filepath.Join(d, file))
		err := executable(path)
		if err == nil {
			return path, nil
		}
		// A directory of that name is not what was meant.
		if st, statErr := os.Stat(path); statErr == nil && !st.IsDir() {
			found = err
		}
	}
	return "", fmt.Errorf("%q: %w", file, found)
}

func inDir(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

func searchPath(env []string) string {
	for _, kv := range slices.Backward(env) {
		if path, ok := strings.CutPrefix(kv, "PATH="); ok {
			return path
		}
	}
	return defaultPath
}

func executable(path string) error {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return ErrNotFound
	case err != nil:
		return fmt.Errorf("%w: %w", ErrNotExecutable, errno(err))
	case st.IsDir():
		return fmt.Errorf("%w: is a directory", ErrNotExecutable)
	}
	if err := unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS); err != nil {
		return fmt.Errorf("%w: %w", ErrNotExecutable, err)
	}
	return nil
}

// errno is what the kernel said, without the names that others put before it.
func errno(err error) error {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}

// execError tells what became of an execve.
func execError(path string, err error) error {
	e := errno(err)
	switch e {
	case unix.ENOENT, unix.ENOTDIR:
		// The program exists, most of the time: its interpreter does not.
		return fmt.Errorf("execute %q: %w: %w", path, ErrNotFound, e)
	case unix.EACCES, unix.ENOEXEC, unix.EISDIR, unix.ETXTBSY, unix.ELIBBAD:
		return fmt.Errorf("execute %q: %w: %w", path, ErrNotExecutable, e)
	}
	return fmt.Errorf("execute %q: %w", path, e)
}
