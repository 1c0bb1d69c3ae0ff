// SPDX-License-Identifier: Apache-2.0

package store

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.etcd.io/bbolt"

	"github.com/bpfnet/bpfnet/policy"
)

// schema1 returns a file as the version before wrote it.
func schema1(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "old")
	db, err := bbolt.Open(path, 0o600, nil)
	require.NoError(t, err)
	require.NoError(t, db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte("bpfnet"))
		require.NoError(t, err)
		state, err := json.Marshal(sample)
		require.NoError(t, err)
		for key, text := range map[string]string{
			"schema":       `1`,
			"allowed":      `[{"a":"a","b":"z"},{"a":"be","b":"db"},{"a":"be","b":"fe"}]`,
			"sysctls":      `[{"path":"net/ipv4/ip_forward","old":"0","new":"1"}]`,
			"forwarding":   `true`,
			"slots":        `{"networks":{"n1":1},"endpoints":{"e1":4095},"ports":{"tcp 0.0.0.0:80":16383}}`,
			"state/docker": string(state),
		} {
			require.NoError(t, b.Put([]byte(key), seal([]byte(text))))
		}
		return nil
	}))
	require.NoError(t, db.Close())
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	return raw
}

func TestSchema1IsMigrated(t *testing.T) {
	dir := write(t, schema1(t))
	s := open(t, dir)
	for range 2 { // Not again when it is opened again.
		pairs, err := s.Allowed()
		require.NoError(t, err)
		assert.Equal(t, []Pair{{"docker/a", "docker/z"}, {"docker/be", "docker/db"}, {"docker/be", "docker/fe"}}, pairs)
		changes, err := s.Sysctls()
		require.NoError(t, err)
		assert.Equal(t, []Change{{Path: "net/ipv4/ip_forward", Old: "0", New: "1"}}, changes)
		ours, err := s.ForwardingOurs()
		require.NoError(t, err)
		assert.True(t, ours)
		slots, err := s.Slots()
		require.NoError(t, err)
		assert.Equal(t, Slots{
			Networks: map[string]uint16{"n1": 1}, Endpoints: map[string]uint16{"e1": 4095},
			Ports: map[string]uint16{"tcp 0.0.0.0:80": 16383},
		}, slots)
		state, ok, err := s.State(policy.SourceDocker)
		require.NoError(t, err)
		assert.True(t, ok)
		assert.Equal(t, sample, state)
		own, err := s.Own()
		require.NoError(t, err)
		assert.Equal(t, Own{}, own)
		s = reopen(t, s)
	}
	changed, err := s.Disallow("docker/z", "docker/a")
	require.NoError(t, err)
	assert.True(t, changed)
	require.NoError(t, s.Write(Batch{Networks: several(network, 0, 1)}))
}

// Reading a file through to see whether it is whole does not migrate it.
func TestVerifyDoesNotMigrate(t *testing.T) {
	raw := schema1(t)
	path := filepath.Join(write(t, raw), FileName)
	require.NoError(t, verify(path))
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, raw, after)
}
