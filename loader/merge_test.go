// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"github.com/stretchr/testify/require"
)

// Needs root. A table that is full takes what it has room for: an upgrade does not fail for the rest.
func TestMergeIntoFullTable(t *testing.T) {
	require.NoError(t, rlimit.RemoveMemlock())
	table := func(value, room uint32, first, n int) *ebpf.Map {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: value, MaxEntries: room})
		require.NoError(t, err)
		t.Cleanup(func() { m.Close() })
		for i := range n {
			key := binary.LittleEndian.AppendUint32(nil, uint32(first+i))
			require.NoError(t, m.Put(key, make([]byte, value)))
		}
		return m
	}
	from := table(64, 100, 0, 100)
	m := &moving{name: "flows4", layout: layout{flow: true}, from: []*ebpf.Map{from}, to: table(72, 100, 1000, 30)}
	require.NoError(t, m.fill(from))
	require.NoError(t, m.merge())
	require.Equal(t, 30, m.lost, "for whom there is no room")
	require.NoError(t, m.merge())
	require.Equal(t, 30, m.lost, "counted once")
}
