// SPDX-License-Identifier: Apache-2.0

// Package store keeps what the daemon must remember over its own end, in one file below the state
// directory: the networks, sandboxes and endpoints that bpfnet itself made, which networks may talk,
// what was changed of the host's settings, which slots the maps' entries have, and the last known state
// of each source.
//
// Every change is one transaction and is on the disk when its method returns: it survives the end of the
// process and of the power at any point, as a whole or not at all. On a full disk a change fails and
// alters nothing. Where the disk itself fails at the end of a change (EIO), the change may have been done.
//
// It knows the shapes that it keeps and nothing of what is done with them.
package store

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"go.etcd.io/bbolt"

	"github.com/bpfnet/bpfnet/policy"
)

// FileName is the store's file below the state directory.
const FileName = "state.db"

// schema is the version of the layout below. A store with a higher one is refused, one with a lower one
// is brought up to it.
//
//	1  the bucket bpfnet; its allowed pairs are names of Docker's networks
//	2  a source before each name of a pair ("docker/fe"); buckets for what is bpfnet's own
const schema = 2

// The bucket of single things and its keys. Each value is JSON behind its checksum.
var (
	bucket = []byte("bpfnet")

	keySchema     = "schema"
	keyAllowed    = "allowed"
	keySysctls    = "sysctls"
	keyForwarding = "forwarding"
	keySlots      = "slots"
	keyState      = "state/" // and the source's name
)

// The errors of Open that a caller can match. Their texts name the directory or the file and the way
// out.
var (
	ErrLocked  = errors.New("in use by another process")
	ErrDamaged = errors.New("damaged")
	ErrNewer   = errors.New("written by a newer bpfnet")
)

// Pair names two networks that may talk, in both directions. Its names are in order, each with its source
// in front: "docker/fe", "bpfnet/mynet".
type Pair struct {
	A string `json:"a"`
	B string `json:"b"`
}

// NewPair puts the names in order.
func NewPair(a, b string) Pair {
	if b < a {
		a, b = b, a
	}
	return Pair{a, b}
}

// Change is a setting of the host that was changed. It has the shape of netdev.Change.
type Change struct {
	Path string `json:"path"` // below /proc/sys
	Old  string `json:"old"`
	New  string `json:"new"`
	Side bool   `json:"side,omitempty"` // changed by the kernel along with another
}

// Slots are the places of named things in the maps.
type Slots = policy.Slots

// Store is the open file. It is safe for concurrent use.
type Store struct {
	dir  string
	db   *bbolt.DB
	lock *os.File // the directory

	mu    sync.Mutex // one writer at a time
	doubt bool       // a commit failed: see settle
}

// Open opens the store below dir and makes both where they are missing. The directory is locked until
// Close or the end of the process. A store of an older schema is migrated, in one transaction.
//
// It fails with ErrLocked, ErrDamaged or ErrNewer, and changes nothing then.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	s := &Store{dir: dir, lock: lock}
	if err := s.open(); err != nil {
		if s.db != nil {
			s.db.Close()
		}
		lock.Close()
		return nil, err
	}
	return s, nil
}

func (s *Store) open() error {
	if _, err := os.Lstat(s.path()); errors.Is(err, os.ErrNotExist) {
		if err := create(s.path()); err != nil {
			return fileError(s.path(), err)
		}
	}
	var err error
	if s.db, err = openFile(s.path()); err != nil {
		return err
	}
	have, err := s.schema()
	if err != nil {
		return err
	}
	// What is here may be in the kernel's cache only, left by a process that was killed: the file's name
	// (also a new one), and its last commit.
	if err := syncDir(s.lock); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	if err := settle(s.db); err != nil {
		return fileError(s.path(), err)
	}
	if have < schema {
		return s.migrate()
	}
	return nil
}

func lockDir(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, fmt.Errorf("second daemon on the same state: %s is %w; "+
			"stop that one, or give this one a directory of its own with --state", dir, ErrLocked)
	}
	return nil, fmt.Errorf("lock state directory %s: %w", dir, err)
}

// create makes an empty store. It appears under its name when it is complete, so that an end in the
// middle leaves no half a file that would look damaged. The caller has to sync the directory.
func create(path string) error {
	// The directories may be as new as the file.
	if err := syncParents(filepath.Dir(path)); err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	err := fill(tmp)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		os.Remove(tmp)
	}
	return err
}

func fill(path string) error {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket(bucket)
		if err != nil {
			return err
		}
		if err := makeOwn(tx); err != nil {
			return err
		}
		return put(b, keySchema, schema)
	})
	return errors.Join(err, db.Close())
}

func (s *Store) schema() (int, error) {
	var have int
	err := s.view(func(b *bbolt.Bucket) error {
		_, err := get(b, keySchema, &have)
		return err
	})
	path := s.path()
	switch {
	case err != nil:
		return 0, err
	case have > schema:
		return 0, fmt.Errorf("state file %s: %w (schema %d, this one knows %d); run that version, or "+
			"move the file away to start over: mv %s %s.newer", path, ErrNewer, have, schema, path, path)
	case have < 1:
		return 0, damaged(path, "it has no schema")
	}
	return have, nil
}

// migrate brings a store of schema 1 up to this one.
func (s *Store) migrate() error {
	return s.updateTx(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucket)
		var pairs []Pair
		if _, err := get(b, keyAllowed, &pairs); err != nil {
			return err
		}
		for i, p := range pairs { // They stay in order.
			pairs[i] = Pair{"docker/" + p.A, "docker/" + p.B}
		}
		if pairs != nil {
			if err := put(b, keyAllowed, pairs); err != nil {
				return err
			}
		}
		if err := makeOwn(tx); err != nil {
			return err
		}
		return put(b, keySchema, schema)
	})
}

// Close ends the lock. Everything stays on disk.
func (s *Store) Close() error {
	err := s.db.Close()
	return errors.Join(err, s.lock.Close())
}

// Remove closes the store and deletes its file.
func (s *Store) Remove() error {
	err := s.db.Close()
	// Under the lock, so that no daemon opens what is being deleted.
	if rerr := os.Remove(s.path()); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		err = errors.Join(err, rerr)
	}
	return errors.Join(err, syncDir(s.lock), s.lock.Close())
}

// Allowed returns the pairs of networks that may talk, in order.
func (s *Store) Allowed() ([]Pair, error) {
	var pairs []Pair
	err := s.view(func(b *bbolt.Bucket) error {
		_, err := get(b, keyAllowed, &pairs)
		return err
	})
	return pairs, err
}

// Allow remembers that two networks may talk. It reports whether that is news.
func (s *Store) Allow(a, b string) (bool, error) {
	return s.changeAllowed(NewPair(a, b), true)
}

// Disallow forgets what Allow remembered. It reports whether there was anything to forget.
func (s *Store) Disallow(a, b string) (bool, error) {
	return s.changeAllowed(NewPair(a, b), false)
}

func (s *Store) changeAllowed(p Pair, allow bool) (changed bool, err error) {
	err = s.update(func(b *bbolt.Bucket) error {
		var pairs []Pair
		if _, err := get(b, keyAllowed, &pairs); err != nil {
			return err
		}
		i, found := slices.BinarySearchFunc(pairs, p, func(x, y Pair) int {
			return cmp.Or(cmp.Compare(x.A, y.A), cmp.Compare(x.B, y.B))
		})
		if found == allow {
			return nil
		}
		if allow {
			pairs = slices.Insert(pairs, i, p)
		} else {
			pairs = slices.Delete(pairs, i, i+1)
		}
		changed = true
		return put(b, keyAllowed, pairs)
	})
	return changed && err == nil, err
}

// Sysctls returns the host's settings that were changed and not yet restored.
func (s *Store) Sysctls() ([]Change, error) {
	var changes []Change
	err := s.view(func(b *bbolt.Bucket) error {
		_, err := get(b, keySysctls, &changes)
		return err
	})
	return changes, err
}

// SetSysctls replaces what Sysctls returns.
func (s *Store) SetSysctls(changes []Change) error {
	return s.update(func(b *bbolt.Bucket) error { return put(b, keySysctls, changes) })
}

// ForwardingOurs reports whether it was bpfnet that switched forwarding on.
func (s *Store) ForwardingOurs() (bool, error) {
	var ours bool
	err := s.view(func(b *bbolt.Bucket) error {
		_, err := get(b, keyForwarding, &ours)
		return err
	})
	return ours, err
}

// SetForwardingOurs replaces what ForwardingOurs returns.
func (s *Store) SetForwardingOurs(ours bool) error {
	return s.update(func(b *bbolt.Bucket) error { return put(b, keyForwarding, ours) })
}

// Slots returns the last kept slots.
func (s *Store) Slots() (Slots, error) {
	var slots Slots
	err := s.view(func(b *bbolt.Bucket) error {
		_, err := get(b, keySlots, &slots)
		return err
	})
	return slots, err
}

// SetSlots replaces all slots.
func (s *Store) SetSlots(slots Slots) error {
	return s.update(func(b *bbolt.Bucket) error { return put(b, keySlots, slots) })
}

// State returns the last known state of a source; ok is false if none was kept.
func (s *Store) State(source policy.Source) (state policy.State, ok bool, err error) {
	err = s.view(func(b *bbolt.Bucket) error {
		var err error
		ok, err = get(b, keyState+string(source), &state)
		return err
	})
	return state, ok, err
}

// SetState replaces the last known state of a source.
func (s *Store) SetState(source policy.Source, state policy.State) error {
	return s.update(func(b *bbolt.Bucket) error { return put(b, keyState+string(source), state) })
}

func (s *Store) view(f func(*bbolt.Bucket) error) error {
	return s.viewTx(func(tx *bbolt.Tx) error { return inBucket(tx, s.path(), f) })
}

func (s *Store) update(f func(*bbolt.Bucket) error) error {
	return s.updateTx(func(tx *bbolt.Tx) error { return inBucket(tx, s.path(), f) })
}

func (s *Store) viewTx(f func(*bbolt.Tx) error) error {
	if err := s.db.View(f); err != nil {
		return fmt.Errorf("read state: %w", err)
	}
	return nil
}

func (s *Store) updateTx(f func(*bbolt.Tx) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.doubt {
		if err := settle(s.db); err != nil {
			return fmt.Errorf("write state: %w", fileError(s.path(), err))
		}
		s.doubt = false
	}
	var committing bool
	err := s.db.Update(func(tx *bbolt.Tx) error {
		err := f(tx)
		committing = err == nil
		return err
	})
	if err != nil {
		s.doubt = committing
		if full := diskFull(s.path(), err); full != nil {
			err = full
		}
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

func (s *Store) path() string { return filepath.Join(s.dir, FileName) }

func inBucket(tx *bbolt.Tx, path string, f func(*bbolt.Bucket) error) error {
	b := tx.Bucket(bucket)
	if b == nil {
		return damaged(path, "it holds nothing of bpfnet")
	}
	return f(b)
}

// get decodes the value of key into v, which is left alone if there is none.
func get(b *bbolt.Bucket, key string, v any) (bool, error) {
	sealed := b.Get([]byte(key))
	if sealed == nil {
		return false, nil
	}
	if err := decode(sealed, v); err != nil {
		return false, damaged(b.Tx().DB().Path(), fmt.Sprintf("%s: %v", key, err))
	}
	return true, nil
}

func decode(sealed []byte, v any) error {
	raw, err := unseal(sealed)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, v)
}

func put(b *bbolt.Bucket, key string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return b.Put([]byte(key), seal(raw))
}

// bbolt has a checksum on its two meta pages only, so that each value carries its own in front.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func seal(raw []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, crc32.Checksum(raw, castagnoli)), raw...)
}

func unseal(sealed []byte) ([]byte, error) {
	if len(sealed) < 4 {
		return nil, errors.New("too short")
	}
	raw := sealed[4:]
	if binary.BigEndian.Uint32(sealed) != crc32.Checksum(raw, castagnoli) {
		return nil, errors.New("wrong checksum")
	}
	return raw, nil
}
