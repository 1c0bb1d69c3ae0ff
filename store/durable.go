// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"go.etcd.io/bbolt"
)

// settle makes the last commit durable. So far it may be in the kernel's cache only: the process that
// made it was killed before it synced, or its sync failed, and then another sync would succeed without
// doing anything (fsync(2)). So that its last write, of one meta page, is repeated: what came before was
// synced before.
//
// bbolt does not know such a commit from a durable one, and would go on to overwrite what only the
// commit before uses. Should the power fail then, neither of them would be whole on the disk.
func settle(db *bbolt.DB) error {
	f, err := os.OpenFile(db.Path(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	page := make([]byte, db.Info().PageSize)
	var at int64
	err = db.View(func(tx *bbolt.Tx) error {
		at = int64(tx.ID()%2) * int64(len(page)) // commits take turns with the two
		_, err := f.ReadAt(page, at)
		return err
	})
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(page, at); err != nil {
		return err
	}
	return f.Sync()
}

// syncDir makes the names in a directory durable.
func syncDir(dir *os.File) error {
	err := dir.Sync()
	if errors.Is(err, syscall.EINVAL) { // This file system does not sync directories: fsync(2).
		return nil
	}
	return err
}

// syncParents makes the name of dir, and of each directory above, durable.
func syncParents(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	for dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		f, err := os.Open(dir)
		if errors.Is(err, fs.ErrPermission) { // Made by somebody else, then.
			continue
		} else if err != nil {
			return err
		}
		if err := errors.Join(syncDir(f), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// fileError says which file cannot be written.
func fileError(path string, err error) error {
	if full := diskFull(path, err); full != nil {
		return full
	}
	return fmt.Errorf("state file %s: %w", path, err)
}

// diskFull returns the error to show if err is that the disk is full, or nil.
func diskFull(path string, err error) error {
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
		// bbolt keeps the number of some errors, and of others the text only.
		if errors.Is(err, errno) || err != nil && strings.Contains(err.Error(), errno.Error()) {
			return fmt.Errorf("state file %s: the disk is full (%w): "+
				"free space there and try again", path, errno)
		}
	}
	return nil
}
