// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
)

// listen gives a listener's place a ring, and says until when it is taken.
func (h *host) listen(t *testing.T, place uint32, bytes int, until uint64) *ringbuf.Reader {
	t.Helper()
	ring, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.RingBuf, MaxEntries: uint32(bytes)})
	require.NoError(t, err)
	t.Cleanup(func() { ring.Close() })
	r, err := ringbuf.NewReader(ring)
	require.NoError(t, err)
	t.Cleanup(func() { r.Close() })
	h.put("event_rings", place, ring)
	var all bpf.DatapathListeners
	require.NoError(t, h.coll.Maps["listeners"].Lookup(uint32(0), &all))
	all.Until[place] = until
	h.put("listeners", uint32(0), all)
	return r
}

// told reads all that is in a ring.
func told(t *testing.T, r *ringbuf.Reader) (out []bpf.DatapathEvent) {
	t.Helper()
	r.SetDeadline(time.Now())
	for {
		record, err := r.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return out
		}
		require.NoError(t, err)
		var e bpf.DatapathEvent
		_, err = binary.Decode(record.RawSample, binary.NativeEndian, &e)
		require.NoError(t, err)
		out = append(out, e)
	}
}

// untold sums the buckets of a reason over the processors.
func (h *host) untold(reason bpf.DatapathReason) (suppressed, lost uint64) {
	h.t.Helper()
	var values []bpf.DatapathEventBucket
	require.NoError(h.t, h.coll.Maps["event_buckets"].Lookup(uint32(reason), &values))
	for _, v := range values {
		suppressed += v.Suppressed
		lost += v.Lost
	}
	return suppressed, lost
}

// Needs root.
func TestDropEvents(t *testing.T) {
	const forever = 1 << 62
	h := newHost(t, 64)
	f := families[0]
	frame := packet.UDP(at(f.foreign, 53), at(f.addr(bob), 80), toNeighbour(alice, bob), packet.Payload(make([]byte, 300)))
	short := packet.UDP(at(f.addr(alice), 53), at(f.addr(carol), 80), toGateway(alice))
	drop := func() { h.drops("spoofed", spoofed, "container", func() result { return h.from(alice, frame) }) }

	past := h.listen(t, 1, 1<<16, 1)
	drop()
	require.Empty(t, told(t, past), "a listener that was killed")
	suppressed, lost := h.untold(spoofed)
	require.Zero(t, suppressed+lost)

	one, two := h.listen(t, 0, 1<<16, forever), h.listen(t, 3, 1<<16, forever)
	drop()
	h.drops("isolated", isolated, "container", func() result { return h.from(alice, short) })
	events := told(t, one)
	require.Len(t, events, 2)
	require.Equal(t, events, told(t, two), "each listener is told")
	require.Empty(t, told(t, past))
	e := events[0]
	require.EqualValues(t, spoofed, e.Reason)
	require.Equal(t, bpf.DatapathHookHOOK_CONTAINER, e.Hook)
	require.EqualValues(t, h.links[alice], e.Ifindex)
	require.EqualValues(t, len(frame), e.Len)
	require.Equal(t, frame[:len(e.Head)], e.Head[:e.Captured], "the beginning of a long one")
	require.Equal(t, short, events[1].Head[:events[1].Captured], "all of a short one")
	require.LessOrEqual(t, e.Time, events[1].Time)

	t.Run("a token for each", func(t *testing.T) {
		const n = 1000
		before, _ := h.untold(spoofed)
		for range n {
			h.from(alice, frame)
		}
		suppressed, lost := h.untold(spoofed)
		require.Zero(t, lost)
		require.EqualValues(t, n, len(told(t, one))+int(suppressed-before))
		require.Greater(t, suppressed-before, uint64(n/2))
		h.from(alice, short)
		require.Len(t, told(t, one), 1, "another reason has tokens of its own")
	})
	t.Run("a full ring", func(t *testing.T) {
		h.listen(t, 1, os.Getpagesize(), forever)
		for range 100 {
			h.uplink(packet.TCP(at(f.client, 4000), at(f.addr(alice), 80), fromOutside))
		}
		suppressed, lost := h.untold(directAccess)
		require.Positive(t, lost)
		require.EqualValues(t, 100, len(told(t, one))+int(suppressed), "the other listener misses nothing by it")
	})
}
