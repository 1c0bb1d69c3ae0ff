// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// maxOld is how much longer than its new content, in bytes, a file may be to be looked at.
const maxOld = 1 << 20

// Rewrite gives a file new content in place, and makes it if it is missing: one that is mounted
// elsewhere must stay the same file. One that has the content is not touched. Those who see the file
// there can write to it, so that it may have any size.
func Rewrite(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return rewriteError(err)
	}
	defer f.Close()
	limit := len(content) + maxOld
	old, err := io.ReadAll(io.LimitReader(f, int64(limit)))
	if err != nil {
		return rewriteError(err)
	}
	if bytes.Equal(old, content) {
		return nil
	}
	// One write, so that a reader sees the old or the new; where the old was longer he may see empty
	// lines behind the new, never a part of the old. What we have not written is not worth that.
	text := content
	if pad := len(old) - len(content); pad > 0 && len(old) < limit {
		text = append(bytes.Clone(content), bytes.Repeat([]byte("\n"), pad)...)
	}
	if _, err := f.WriteAt(text, 0); err != nil {
		return rewriteError(err)
	}
	if err := f.Truncate(int64(len(content))); err != nil {
		return rewriteError(err)
	}
	return nil
}

func rewriteError(err error) error {
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("rewrite file: %w: free space there and try again", err)
	}
	return fmt.Errorf("rewrite file: %w", err)
}

// exitFile is the name of the file with the exit code, in the sandbox's directory.
const exitFile = "exit"

// WriteExit leaves a sandbox's exit code in its directory.
func WriteExit(dir string, code int) error {
	path := filepath.Join(dir, exitFile)
	if err := os.WriteFile(path+".new", []byte(strconv.Itoa(code)+"\n"), 0o644); err != nil {
		return fmt.Errorf("write exit code: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write exit code: %w", err)
	}
	return nil
}

// ReadExit reads what WriteExit has left. It is not ok when there is nothing: the runner was killed.
func ReadExit(dir string) (code int, ok bool, err error) {
	b, err := os.ReadFile(filepath.Join(dir, exitFile))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("read exit code: %w", err)
	}
	text := strings.TrimSpace(string(b))
	if text == "" { // the machine lost power before it was on the disk
		return 0, false, nil
	}
	if code, err = strconv.Atoi(text); err != nil {
		return 0, false, fmt.Errorf("read exit code of %s: %w", dir, err)
	}
	return code, true, nil
}
