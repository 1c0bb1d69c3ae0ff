// SPDX-License-Identifier: Apache-2.0

package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"
)

// lockTimeout: the directory's lock comes first, so only a foreign tool can hold the file.
const lockTimeout = 500 * time.Millisecond

// damaged says what is wrong with the file and how to start over. It stays as it is.
func damaged(path, why string) error {
	return fmt.Errorf("state file %s: %w (%s); it is kept, and without it allowed networks and saved "+
		"settings are forgotten: to start over, mv %s %s.damaged", path, ErrDamaged, why, path, path)
}

// openFile opens an existing file after it has proved to be whole. bbolt maps the file and trusts its
// page numbers: a truncated file would kill the process with SIGBUS at some later time, so that it is
// read through first, with faults turned into errors.
func openFile(path string) (*bbolt.DB, error) {
	if err := verify(path); err != nil {
		return nil, err
	}
	var db *bbolt.DB
	err := guarded(path, func(opts *bbolt.Options) error {
		var err error
		db, err = bbolt.Open(path, 0o600, opts)
		return err
	})
	if err != nil {
		return nil, err
	}
	return db, nil
}

// verify reads every page without writing.
func verify(path string) error {
	return guarded(path, func(opts *bbolt.Options) error {
		// bbolt would make a new store in an empty file, even where it may not write.
		if info, err := os.Stat(path); err != nil {
			return err
		} else if info.Size() == 0 {
			return errors.New("it is empty")
		}
		opts.ReadOnly = true
		db, err := bbolt.Open(path, 0, opts)
		if err != nil {
			return err
		}
		err = db.View(func(tx *bbolt.Tx) error {
			raw, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			// Commits take turns with the two meta pages.
			if err := checkPages(raw, db.Info().PageSize, tx.ID()%2); err != nil {
				return err
			}
			if err := tx.ForEach(walk); err != nil {
				return err
			}
			// The freelist was not needed so far. Writing trusts it.
			if err := loadFreelist(path, opts); err != nil {
				return err
			}
			var first error
			for err := range tx.Check() {
				if first == nil {
					first = err
				}
			}
			return first
		})
		return errors.Join(err, db.Close())
	})
}

// walk checks all keys and values of a bucket and of those below it.
func walk(_ []byte, b *bbolt.Bucket) error {
	return b.ForEach(func(k, v []byte) error {
		if v == nil {
			return walk(k, b.Bucket(k))
		}
		if _, err := unseal(v); err != nil {
			return fmt.Errorf("%q: %w", k, err)
		}
		return nil
	})
}

func loadFreelist(path string, opts *bbolt.Options) error {
	own := *opts
	own.PreLoadFreelist = true
	db, err := bbolt.Open(path, 0, &own)
	if err != nil {
		return err
	}
	return db.Close()
}

// guarded calls f with panics and faults turned into errors. All that is no error of the operating
// system is taken for damage.
func guarded(path string, f func(*bbolt.Options) error) (err error) {
	var files []*os.File
	opts := &bbolt.Options{
		Timeout: lockTimeout,
		OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
			f, err := os.OpenFile(name, flag, mode)
			if err == nil {
				files = append(files, f)
			}
			return f, err
		},
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			// bbolt was left in the middle, with its locks.
			for _, f := range files {
				f.Close()
			}
			err = damaged(path, fmt.Sprint(r))
		}
	}()
	err = f(opts)
	var pathErr *fs.PathError
	var errno syscall.Errno
	switch {
	case err == nil:
		return nil
	case errors.Is(err, bbolterrors.ErrTimeout):
		return fmt.Errorf("state file %s: %w; end that one first", path, ErrLocked)
	case errors.As(err, &pathErr), errors.As(err, &errno):
		return fmt.Errorf("state file %s: %w", path, err)
	default:
		return damaged(path, err.Error())
	}
}
