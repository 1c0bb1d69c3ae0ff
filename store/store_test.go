// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.etcd.io/bbolt"

	"github.com/bpfnet/bpfnet/policy"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { s.Close() })
	return s
}

func reopen(t *testing.T, s *Store) *Store {
	t.Helper()
	require.NoError(t, s.Close())
	return open(t, s.dir)
}

var sample = policy.State{
	Networks: []policy.Network{{
		ID: "n1", Name: "fe", Source: policy.SourceDocker, Bridge: "br-fe",
		Subnets:     []netip.Prefix{netip.MustParsePrefix("172.18.0.0/16"), netip.MustParsePrefix("fd00:1::/64")},
		Gateways:    []netip.Addr{netip.MustParseAddr("172.18.0.1")},
		NoICC:       true,
		HostBinding: netip.MustParseAddr("192.0.2.1"),
		MTU:         1400,
	}, {ID: "n2", Name: "no binding"}},
	Endpoints: []policy.Endpoint{{
		ID: "e1", NetworkID: "n1", SandboxID: "c1", Name: "web", Source: policy.SourceDocker,
		Addrs:   []netip.Addr{netip.MustParseAddr("172.18.0.2"), netip.MustParseAddr("fd00:1::2")},
		MAC:     policy.MAC{2, 0x42, 0xac, 18, 0, 2},
		Allowed: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")},
	}},
	Ports: []policy.Port{{
		Proto: policy.UDP, Host: netip.MustParseAddrPort("[::]:53"), EndpointID: "e1", Target: 5353,
	}},
}

func TestKeepsWhatItIsGiven(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "a", "b"))

	for _, read := range []func() (int, error){
		func() (int, error) { v, err := s.Allowed(); return len(v), err },
		func() (int, error) { v, err := s.Sysctls(); return len(v), err },
		func() (int, error) {
			v, err := s.Slots()
			return len(v.Networks) + len(v.Endpoints) + len(v.Ports), err
		},
		func() (int, error) {
			v, ok, err := s.State(policy.SourceDocker)
			assert.False(t, ok)
			return len(v.Networks), err
		},
	} {
		n, err := read()
		require.NoError(t, err)
		assert.Zero(t, n, "a new store is empty")
	}

	changes := []Change{{Path: "net/ipv4/ip_forward", Old: "0", New: "1"}, {Path: "x", Old: "a", New: "a", Side: true}}
	slots := Slots{
		Networks:  map[string]uint16{"n1": 1},
		Endpoints: map[string]uint16{"e1": 4095},
		Ports:     map[string]uint16{"tcp 0.0.0.0:80": 16383},
	}
	require.NoError(t, s.SetSysctls(changes))
	require.NoError(t, s.SetForwardingOurs(true))
	require.NoError(t, s.SetSlots(slots))
	require.NoError(t, s.SetState(policy.SourceDocker, sample))

	s = reopen(t, s)
	gotChanges, err := s.Sysctls()
	require.NoError(t, err)
	assert.Equal(t, changes, gotChanges)
	ours, err := s.ForwardingOurs()
	require.NoError(t, err)
	assert.True(t, ours)
	gotSlots, err := s.Slots()
	require.NoError(t, err)
	assert.Equal(t, slots, gotSlots)
	state, ok, err := s.State(policy.SourceDocker)
	require.NoError(t, err)
	assert.True(t, ok)
	assert.Equal(t, sample, state)
	_, ok, err = s.State(policy.SourceStore)
	require.NoError(t, err)
	assert.False(t, ok, "another source has its own")
}

func TestAllowIsIdempotentAndHasNoDirection(t *testing.T) {
	s := open(t, t.TempDir())
	step := func(f func(a, b string) (bool, error), a, b string, news bool) {
		t.Helper()
		changed, err := f(a, b)
		require.NoError(t, err)
		assert.Equal(t, news, changed)
	}
	step(s.Disallow, "fe", "be", false)
	step(s.Allow, "fe", "be", true)
	step(s.Allow, "be", "fe", false)
	step(s.Allow, "be", "db", true)
	step(s.Allow, "a", "z", true)
	s = reopen(t, s)
	got, err := s.Allowed()
	require.NoError(t, err)
	assert.Equal(t, []Pair{{"a", "z"}, {"be", "db"}, {"be", "fe"}}, got)
	step(s.Disallow, "fe", "be", true)
	step(s.Disallow, "fe", "be", false)
	got, err = s.Allowed()
	require.NoError(t, err)
	assert.Equal(t, []Pair{{"a", "z"}, {"be", "db"}}, got)
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	_, err := Open(dir)
	require.ErrorIs(t, err, ErrLocked)
	assert.ErrorContains(t, err, dir)
	assert.ErrorContains(t, err, "--state")
	s = reopen(t, s)
	require.NoError(t, s.Remove())
	assert.NoFileExists(t, filepath.Join(dir, FileName))
	open(t, dir)
}

func TestFileHeldByAForeignToolIsRefused(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, open(t, dir).Close())
	db, err := bbolt.Open(filepath.Join(dir, FileName), 0o600, nil)
	require.NoError(t, err)
	defer db.Close()
	_, err = Open(dir)
	require.ErrorIs(t, err, ErrLocked)
}

func TestNewerSchemaIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	require.NoError(t, s.update(func(b *bbolt.Bucket) error { return put(b, keySchema, schema+1) }))
	require.NoError(t, s.Close())
	refusedAndKept(t, dir, ErrNewer)
}

func TestUndecodableValueIsDamage(t *testing.T) {
	s := open(t, t.TempDir())
	require.NoError(t, s.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucket).Put([]byte(keyAllowed), seal([]byte("{")))
	}))
	_, err := s.Allowed()
	require.ErrorIs(t, err, ErrDamaged)
	_, err = s.Allow("a", "b")
	require.ErrorIs(t, err, ErrDamaged)
}

// refusedAndKept opens the store twice and expects the same error, the same file and no lock left.
func refusedAndKept(t *testing.T, dir string, want error) {
	t.Helper()
	path := filepath.Join(dir, FileName)
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	for range 2 {
		_, err = Open(dir)
		require.ErrorIs(t, err, want)
		assert.ErrorContains(t, err, "to start over")
		assert.ErrorContains(t, err, path)
		assert.NotContains(t, err.Error(), "\n")
	}
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.True(t, bytes.Equal(before, after), "the file was changed")
	require.NoError(t, os.Rename(path, path+".damaged"))
	open(t, dir).Close()
}

// full returns the bytes of a store with branch, leaf, overflow and free pages.
func full(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	s := open(t, dir)
	for i := range 40 {
		big := sample
		big.Networks = []policy.Network{{ID: strings.Repeat("x", 300*i)}}
		require.NoError(t, s.SetState(policy.Source(strconv.Itoa(i)), big))
	}
	_, err := s.Allow("a", "b")
	require.NoError(t, err)
	require.NoError(t, s.Close())
	raw, err := os.ReadFile(filepath.Join(dir, FileName))
	require.NoError(t, err)
	return raw
}

func write(t *testing.T, raw []byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, FileName), raw, 0o600))
	return dir
}

func TestDamagedFileIsRefusedAndKept(t *testing.T) {
	raw := full(t)
	garbage := make([]byte, len(raw))
	for i := range garbage {
		garbage[i] = byte(i * 7)
	}
	for name, content := range map[string][]byte{
		"empty":        {},
		"text":         []byte("not a database\n"),
		"garbage":      garbage,
		"half a page":  raw[:2048],
		"metas only":   raw[:2*os.Getpagesize()],
		"half":         raw[:len(raw)/2],
		"bit of metas": append(append([]byte(nil), garbage[:2*os.Getpagesize()]...), raw[2*os.Getpagesize():]...),
	} {
		t.Run(name, func(t *testing.T) {
			refusedAndKept(t, write(t, content), ErrDamaged)
		})
	}
}

// Every way to cut the file or to spoil one page ends in a refusal or in the right contents (the page
// was a free one, or the older of the two metas), never in a crash.
func TestEveryTruncationAndPage(t *testing.T) {
	raw := full(t)
	page := os.Getpagesize()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	refused := 0
	check := func(content []byte) {
		t.Helper()
		dir := write(t, content)
		s, err := Open(dir)
		if err != nil {
			require.ErrorIs(t, err, ErrDamaged)
			refused++
			return
		}
		defer s.Close()
		for i := range 39 {
			_, ok, err := s.State(policy.Source(strconv.Itoa(i)))
			require.NoError(t, err)
			require.True(t, ok)
		}
		_, err = s.Allow("c", "d")
		require.NoError(t, err)
	}
	for cut := 0; cut < len(raw); cut += page / 2 {
		check(raw[:cut])
	}
	assert.Positive(t, refused)
	refused = 0
	for at := 0; at < len(raw); at += page {
		for _, fill := range []func() byte{
			func() byte { return 0 },
			func() byte { return 0xff },
			func() byte { return byte(random.Uint32()) },
		} {
			spoiled := bytes.Clone(raw)
			for i := range page {
				spoiled[at+i] = fill()
			}
			check(spoiled)
		}
	}
	assert.Positive(t, refused)
}

// usable opens a store with these bytes, reads and writes. It reports false if that is refused as damage.
func usable(t *testing.T, raw []byte) bool {
	t.Helper()
	dir := memory(t)
	defer os.RemoveAll(dir)
	require.NoError(t, os.WriteFile(filepath.Join(dir, FileName), raw, 0o600))
	s, err := Open(dir)
	if err == nil {
		defer s.Close()
		_, err = s.Own()
	}
	if err == nil {
		err = s.Write(Batch{Networks: several(network, 1000, 50)})
	}
	if err == nil {
		err = s.SetState(policy.SourceDocker, bigState(30000))
	}
	if err != nil {
		require.ErrorIs(t, err, ErrDamaged)
	}
	return err == nil
}

// Every number at the beginning of a page, which may be one of another page, is replaced by others: also
// by that of the page itself, which makes a tree without an end.
func TestEveryNumberOfAPage(t *testing.T) {
	raw := full(t)
	page := os.Getpagesize()
	random := seeded(t)
	refused := 0
	for at := 0; at < len(raw); at += page {
		for word := at; word < at+96; word += 8 {
			for _, number := range []int{at / page, 0, 2, 3, len(raw)/page - 1, len(raw) / page, 1 << 50, -1} {
				if !fullCount() && random.IntN(10) > 0 {
					continue
				}
				spoiled := bytes.Clone(raw)
				binary.NativeEndian.PutUint64(spoiled[word:], uint64(number))
				if !usable(t, spoiled) {
					refused++
				}
			}
		}
	}
	assert.Positive(t, refused)
}
