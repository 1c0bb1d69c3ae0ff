// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// pinListeners gives maps a directory, and the map of listeners its pin there.
func pinListeners(t *testing.T, m *Maps) {
	t.Helper()
	m.dir = lab.BPFFS(t)
	require.NoError(t, m.m["listeners"].Pin(filepath.Join(m.dir, "listeners")))
}

// Needs root.
func TestListeners(t *testing.T) {
	m := newMaps(t)
	pinListeners(t, m)
	places := func() (taken int) {
		var v bpf.DatapathListeners
		require.NoError(t, m.m["listeners"].Lookup(uint32(0), &v))
		for _, until := range v.Until {
			if until != 0 {
				taken++
			}
		}
		return taken
	}
	var all []*Listener
	for range maxListeners {
		l, err := m.Listen()
		require.NoError(t, err)
		all = append(all, l)
	}
	_, err := m.Listen()
	require.ErrorIs(t, err, ErrListeners)
	require.Equal(t, maxListeners, places())

	// A place of which nobody has spoken for long is free, and one that is spoken of is not.
	require.NoError(t, m.m["listeners"].Put(uint32(0), &bpf.DatapathListeners{Until: [4]uint64{1, 1, 1, 1}}))
	all[0].next = time.Now()
	_, err = all[0].Next(time.Now())
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	other, err := m.Listen()
	require.NoError(t, err)
	require.EqualValues(t, 1, other.place)

	// Who lost its place takes another, and leaves the new one's alone.
	all[1].next = time.Now()
	_, err = all[1].Next(time.Now())
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NotEqual(t, other.place, all[1].place)
	require.True(t, other.owns())
	require.False(t, all[all[1].place].owns(), "whose place it took")
	require.NoError(t, all[all[1].place].Close())
	require.True(t, all[1].owns())

	for i, l := range append(all, other) {
		if i != 2 { // which is closed
			require.NoError(t, l.Close())
		}
	}
	require.Zero(t, places(), "nobody is told any more")
	for i := range uint32(maxListeners) {
		require.Error(t, m.m["event_rings"].Lookup(i, new(uint32)), "a ring is kept")
	}
	_, err = other.Next(time.Now())
	require.ErrorIs(t, err, os.ErrClosed)
}

// Needs root.
func TestMissed(t *testing.T) {
	m := newMaps(t)
	pinListeners(t, m)
	bump := func(reason bpf.DatapathReason, suppressed, lost uint64) {
		var values []bpf.DatapathEventBucket
		require.NoError(t, m.m["event_buckets"].Lookup(uint32(reason), &values))
		values[len(values)-1].Suppressed += suppressed
		values[0].Lost += lost
		require.NoError(t, m.m["event_buckets"].Put(uint32(reason), values))
	}
	bump(bpf.DatapathReasonREASON_ISOLATED, 5, 0)
	l, err := m.Listen()
	require.NoError(t, err)
	defer l.Close()
	missed, err := l.Missed()
	require.NoError(t, err)
	require.Empty(t, missed.Suppressed, "of before")
	bump(bpf.DatapathReasonREASON_ISOLATED, 2, 0)
	bump(bpf.DatapathReasonREASON_TRANSIT, 0, 3)
	missed, err = l.Missed()
	require.NoError(t, err)
	require.Equal(t, Missed{Suppressed: map[string]uint64{"isolated": 2}, Lost: map[string]uint64{"transit": 3}}, missed)
}
