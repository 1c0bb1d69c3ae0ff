// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"container/heap"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// The errors of leases; errors.Is finds them in what Allocate and Take return.
var (
	ErrFull     = errors.New("no address is free")
	ErrTaken    = errors.New("is taken")
	ErrOutside  = errors.New("outside of subnet")
	ErrReserved = errors.New("reserved")
)

// Leases says which addresses of a subnet are in use. It is not for use by several goroutines
// at once.
type Leases struct {
	subnet Subnet
	base   u128 // the prefix's first address
	// from and to are the ends of the range, counted from base.
	from, to u128
	rest     time.Duration

	// used has the addresses that Allocate does not look at, counted from base: leases, those
	// that rest, and the reserved ones.
	used    tree
	resting map[netip.Addr]*release
	queue   queue
}

// release is an address that rests.
type release struct {
	addr  netip.Addr
	at    time.Time
	index int // in the queue
}

// NewLeases returns those of a subnet that Normalize has passed, all addresses free. Rest is how
// long an address that was given back is not given again: what it is remembered by elsewhere
// (neighbour tables, resolvers) shall not lead to somebody new.
func NewLeases(s Subnet, rest time.Duration) *Leases {
	l := &Leases{subnet: s, rest: rest, resting: make(map[netip.Addr]*release)}
	if !s.Prefix.IsValid() {
		l.from = u128{lo: 1} // and to is 0: an empty range
		return l
	}
	l.base = first(s.Prefix)
	l.used = newTree(hostBits(s.Prefix))
	r := s.Prefix
	if s.Range.IsValid() {
		r = s.Range
	}
	l.from, l.to = first(r).sub(l.base), last(r).sub(l.base)
	end := last(s.Prefix).addr(s.Prefix.Addr().BitLen())
	for _, a := range []netip.Addr{s.Prefix.Masked().Addr(), end, s.Gateway} {
		if s.Prefix.Contains(a) && s.reserved(a) != "" {
			l.used.add(l.offset(a))
		}
	}
	return l
}

// Allocate leases the lowest address of the range that is free. Addresses that rest are passed
// over; when there is nothing else, the one that was released longest ago is given. The error is
// ErrFull. It takes time in the logarithm of the subnet's size, whatever is in use, and ends the
// rests that are over, each of them once.
func (l *Leases) Allocate(now time.Time) (netip.Addr, error) {
	for len(l.queue) > 0 && !now.Before(l.queue[0].at.Add(l.rest)) {
		a := l.wake()
		l.used.remove(l.offset(a))
	}
	if x, ok := l.used.missing(l.from); ok && !x.less(l.from) && !l.to.less(x) {
		l.used.add(x)
		return l.base.add(x).addr(l.subnet.Prefix.Addr().BitLen()), nil
	}
	if len(l.queue) > 0 {
		return l.wake(), nil
	}
	return netip.Addr{}, fmt.Errorf("subnet %s: %w; remove a sandbox from the network, or make a larger network", l.subnet.Prefix, ErrFull)
}

// Take leases an address of choice, in the range or not, free or at rest. The error is
// ErrTaken, ErrOutside of the subnet, or ErrReserved for the gateway, the network and the
// broadcast address.
func (l *Leases) Take(a netip.Addr) error {
	a = a.Unmap()
	if !l.subnet.Prefix.Contains(a) {
		return fmt.Errorf("address %s: %w %s; choose an address in it", a, ErrOutside, l.subnet.Prefix)
	}
	if why := l.subnet.reserved(a); why != "" {
		return fmt.Errorf("address %s: %w as the %s of subnet %s; choose another", a, ErrReserved, why, l.subnet.Prefix)
	}
	if r, ok := l.resting[a]; ok {
		heap.Remove(&l.queue, r.index)
		delete(l.resting, a)
		return nil
	}
	if !l.used.add(l.offset(a)) {
		return fmt.Errorf("address %s: %w; choose another, or none to get one that is free", a, ErrTaken)
	}
	return nil
}

// Release gives an address back, to rest from now on. One that is not leased is no error.
func (l *Leases) Release(a netip.Addr, now time.Time) {
	a = a.Unmap()
	if l.leased(a) && l.used.remove(l.offset(a)) {
		l.Rest(a, now)
	}
}

// Rest has an address that is free rest as if it had been released at that time; an earlier time
// changes nothing for one that rests already. What is leased stays so.
func (l *Leases) Rest(a netip.Addr, released time.Time) {
	a = a.Unmap()
	if r, ok := l.resting[a]; ok {
		if released.After(r.at) {
			r.at = released
			heap.Fix(&l.queue, r.index)
		}
		return
	}
	if !l.subnet.Prefix.Contains(a) || l.subnet.reserved(a) != "" {
		return
	}
	x := l.offset(a)
	if x.less(l.from) || l.to.less(x) {
		return // nobody gets it but by choice
	}
	if l.used.add(x) {
		r := &release{addr: a, at: released}
		l.resting[a] = r
		heap.Push(&l.queue, r)
	}
}

// leased reports whether an address is in use, and neither reserved nor at rest.
func (l *Leases) leased(a netip.Addr) bool {
	_, rests := l.resting[a]
	return !rests && l.subnet.Prefix.Contains(a) && l.subnet.reserved(a) == "" && l.used.has(l.offset(a))
}

func (l *Leases) offset(a netip.Addr) u128 { return number(a).sub(l.base) }

// wake ends the rest of the address that was released longest ago. It stays in used.
func (l *Leases) wake() netip.Addr {
	r := heap.Pop(&l.queue).(*release)
	delete(l.resting, r.addr)
	return r.addr
}

// queue has what was released longest ago first, of several at once the lowest address.
type queue []*release

func (q queue) Len() int { return len(q) }

func (q queue) Less(i, j int) bool {
	if c := q[i].at.Compare(q[j].at); c != 0 {
		return c < 0
	}
	return q[i].addr.Less(q[j].addr)
}

func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *queue) Push(x any) {
	r := x.(*release)
	r.index = len(*q)
	*q = append(*q, r)
}

func (q *queue) Pop() any {
	old := *q
	r := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return r
}
