// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
)

const (
	maxListeners   = 4
	eventRingBytes = 256 << 10
	// listenFor is how long a listener's place stays taken after its last word.
	listenFor = 5 * time.Second
)

// ErrListeners says that all places for listeners are taken.
var ErrListeners = errors.New("four listen to drops already; end one of them")

// ErrGone says that the data path that was listened to is no more: its pins are away, or those of another stand there.
var ErrGone = errors.New("the data path has been taken away")

// Event is a dropped packet.
type Event struct {
	Time    time.Time
	Reason  string
	Hook    string
	Ifindex int    // of the device at whose hook it was
	Length  int    // bytes, of the whole packet
	Head    []byte // its first bytes: from the link layer, or the network layer where there is none
}

// Missed are drops that no listener was told of, by reason.
type Missed struct {
	Suppressed map[string]uint64 // over the rate of a reason
	Lost       map[string]uint64 // a listener did not keep up
}

// Listener is told of drops as they happen. Nothing is written for it once it is closed or its process is gone. It is for one
// goroutine; Close may be called by any.
type Listener struct {
	m     *Maps
	place uint32
	ring  *ebpf.Map
	id    ebpf.MapID // of ring
	r     *ringbuf.Reader
	next  time.Time // when to say again that it listens
	since Missed
}

// Listen begins to listen, by maps that Open has opened. It fails with ErrListeners where too many do.
func (m *Maps) Listen() (*Listener, error) {
	l := &Listener{m: m}
	var err error
	if l.since, err = m.missed(); err != nil {
		return nil, err
	}
	l.ring, err = ebpf.NewMap(&ebpf.MapSpec{Name: "event_ring", Type: ebpf.RingBuf, MaxEntries: eventRingBytes})
	if err != nil {
		return nil, fmt.Errorf("make a ring buffer: %w", err)
	}
	if l.r, err = ringbuf.NewReader(l.ring); err != nil {
		l.ring.Close()
		return nil, fmt.Errorf("read a ring buffer: %w", err)
	}
	info, err := l.ring.Info()
	if err == nil {
		var known bool
		if l.id, known = info.ID(); !known {
			err = errors.New("the kernel does not tell its ID")
		}
	}
	if err == nil {
		err = m.listeners(l.claim)
	}
	if err != nil {
		l.r.Close()
		l.ring.Close()
		return nil, fmt.Errorf("listen to drops: %w", err)
	}
	l.next = time.Now().Add(listenFor / 3)
	return l, nil
}

// claim takes a free place.
func (l *Listener) claim(until []uint64) error {
	now := monotonic()
	free := slices.IndexFunc(until, func(t uint64) bool { return t < uint64(now) })
	if free < 0 {
		return ErrListeners
	}
	l.place = uint32(free)
	if err := l.m.m["event_rings"].Put(l.place, l.ring); err != nil {
		return fmt.Errorf("write event_rings: %w", err)
	}
	until[free] = uint64(now + listenFor)
	return nil
}

// owns says whether its place is still its own: who is silent for long loses it to the next who comes.
func (l *Listener) owns() bool {
	var id ebpf.MapID
	return l.m.m["event_rings"].Lookup(l.place, &id) == nil && id == l.id
}

// listeners changes who listens, one process at a time.
func (m *Maps) listeners(change func(until []uint64) error) error {
	lock, err := m.lockListeners()
	if err != nil {
		return err
	}
	defer lock.Close()
	var v bpf.DatapathListeners
	if err := m.m["listeners"].Lookup(uint32(0), &v); err != nil {
		return fmt.Errorf("read listeners: %w", err)
	}
	if err := change(v.Until[:]); err != nil {
		return err
	}
	if err := m.m["listeners"].Put(uint32(0), &v); err != nil {
		return fmt.Errorf("write listeners: %w", err)
	}
	return nil
}

// lockListeners locks out other listeners for the moment that a change takes.
func (m *Maps) lockListeners() (*os.File, error) {
	f, err := os.Open(m.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("lock the listeners: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	if err != nil {
		err = fmt.Errorf("lock the listeners: %w", err)
	} else {
		err = m.stillPinned("listeners")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// stillPinned fails with ErrGone where the pin is away, or is that of a map that was made later.
func (m *Maps) stillPinned(name string) error {
	pinned, err := ebpf.LoadPinnedMap(filepath.Join(m.dir, name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return ErrGone
	}
	if err != nil {
		return fmt.Errorf("open map %s: %w", name, err)
	}
	defer pinned.Close()
	var ids [2]ebpf.MapID
	for i, x := range []*ebpf.Map{pinned, m.m[name]} {
		info, err := x.Info()
		if err != nil {
			return fmt.Errorf("ask for map %s: %w", name, err)
		}
		ids[i], _ = info.ID()
	}
	if ids[0] != ids[1] {
		return ErrGone
	}
	return nil
}

// Next waits until the deadline for the next drop. Its error is os.ErrDeadlineExceeded then, os.ErrClosed after Close, and
// ErrGone not later than two seconds after the data path has been taken away.
func (l *Listener) Next(deadline time.Time) (Event, error) {
	for {
		now := time.Now()
		if !now.Before(l.next) {
			if err := l.stay(); err != nil {
				return Event{}, err
			}
			l.next = now.Add(listenFor / 3)
		}
		end := deadline
		if l.next.Before(end) {
			end = l.next
		}
		l.r.SetDeadline(end)
		record, err := l.r.Read()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && time.Now().Before(deadline):
			continue
		case errors.Is(err, ringbuf.ErrClosed):
			return Event{}, os.ErrClosed
		case err != nil:
			return Event{}, err
		}
		return l.decode(record.RawSample)
	}
}

func (l *Listener) decode(raw []byte) (Event, error) {
	var e bpf.DatapathEvent
	if _, err := binary.Decode(raw, binary.NativeEndian, &e); err != nil {
		return Event{}, fmt.Errorf("read an event of %d bytes: %w", len(raw), err)
	}
	return Event{
		Time: WallTime(e.Time), Reason: nameOf(reasonNames(), int(e.Reason)), Hook: nameOf(hookNames(), int(e.Hook)),
		Ifindex: int(e.Ifindex), Length: int(e.Len), Head: e.Head[:min(int(e.Captured), len(e.Head))],
	}, nil
}

func nameOf(names []string, i int) string {
	if i < len(names) {
		return names[i]
	}
	return fmt.Sprintf("%d", i)
}

// stay says that it still listens.
func (l *Listener) stay() error {
	now := monotonic()
	return l.m.listeners(func(until []uint64) error {
		if !l.owns() {
			return l.claim(until)
		}
		until[l.place] = uint64(now + listenFor)
		return nil
	})
}

// Missed are the drops that it was not told of since it began.
func (l *Listener) Missed() (Missed, error) {
	now, err := l.m.missed()
	if err != nil {
		return Missed{}, err
	}
	for _, part := range []struct{ now, before map[string]uint64 }{
		{now.Suppressed, l.since.Suppressed}, {now.Lost, l.since.Lost},
	} {
		for reason, n := range part.before {
			part.now[reason] -= n
			if part.now[reason] == 0 {
				delete(part.now, reason)
			}
		}
	}
	return now, nil
}

func (m *Maps) missed() (Missed, error) {
	out := Missed{Suppressed: make(map[string]uint64), Lost: make(map[string]uint64)}
	names := reasonNames()
	for i, name := range names[:len(names)-1] { // REASON_COUNT
		var values []bpf.DatapathEventBucket
		if err := m.m["event_buckets"].Lookup(uint32(i), &values); err != nil {
			return Missed{}, fmt.Errorf("read event_buckets: %w", err)
		}
		for _, v := range values {
			if v.Suppressed != 0 {
				out.Suppressed[name] += v.Suppressed
			}
			if v.Lost != 0 {
				out.Lost[name] += v.Lost
			}
		}
	}
	return out, nil
}

// Close frees its place.
func (l *Listener) Close() error {
	err := l.m.listeners(func(until []uint64) error {
		if !l.owns() {
			return nil
		}
		until[l.place] = 0
		if err := l.m.m["event_rings"].Delete(l.place); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("write event_rings: %w", err)
		}
		return nil
	})
	if errors.Is(err, ErrGone) {
		err = nil // nobody is left to take a place
	}
	return errors.Join(err, l.r.Close(), l.ring.Close())
}
