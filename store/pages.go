// SPDX-License-Identifier: Apache-2.0

package store

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// The layout of a bbolt file, version 2 (its internal/common, page.go and meta.go). Numbers are in the
// machine's byte order. A page begins with its number (8 bytes), kind (2), count of elements (2) and
// number of further pages that it spans (4). Elements are 16 bytes each and lie behind that.
const (
	pageHead = 16
	element  = 16

	kindBranch   = 0x01
	kindLeaf     = 0x02
	kindFreelist = 0x10

	leafBucket   = 0x01      // flag of an element whose value is a bucket
	noFreelist   = 1<<64 - 1 // the number of the freelist's page if there is none
	countFollows = 1<<16 - 1 // the freelist's first number is its count
)

var (
	order = binary.NativeEndian

	errOutside = errors.New("out of bounds")
	errNoKey   = errors.New("a key is empty")
)

// pages are the bytes of a file, of which each page has one use.
type pages struct {
	raw  []byte
	size uint64
	end  uint64 // the first page beyond
	used []bool
}

// checkPages reads the pages that belong to a meta page: each has one use, and all that points lies in
// bounds. That has to be known before bbolt walks them, also with its own check: a page that is its own
// child makes it walk until the memory is out, and a free page beyond the end makes it panic when it
// writes.
func checkPages(raw []byte, size, meta int) error {
	m := raw[meta*size+pageHead:]
	p := pages{raw: raw, size: uint64(size), end: order.Uint64(m[40:])}
	if p.end > uint64(len(raw)/size) {
		return fmt.Errorf("%d bytes of %d are there", len(raw), p.end*p.size)
	}
	p.used = make([]bool, p.end)
	for id := range min(2, p.end) { // the metas
		p.used[id] = true
	}
	if free := order.Uint64(m[32:]); free != noFreelist {
		if err := p.freelist(free); err != nil {
			return fmt.Errorf("freelist: %w", err)
		}
	}
	return p.tree(order.Uint64(m[16:]))
}

func (p *pages) use(id uint64) error {
	if id >= p.end {
		return fmt.Errorf("page %d: %w", id, errOutside)
	} else if p.used[id] {
		return fmt.Errorf("page %d: is used twice", id)
	}
	p.used[id] = true
	return nil
}

// page returns a page with those that it spans.
func (p *pages) page(id uint64) ([]byte, error) {
	if err := p.use(id); err != nil {
		return nil, err
	}
	b := p.raw[id*p.size:]
	if order.Uint64(b) != id {
		return nil, fmt.Errorf("page %d: calls itself %d", id, order.Uint64(b))
	}
	more := uint64(order.Uint32(b[12:]))
	for next := id + 1; next <= id+more; next++ {
		if err := p.use(next); err != nil {
			return nil, err
		}
	}
	return b[:(more+1)*p.size], nil
}

func kindOf(b []byte) uint16 { return order.Uint16(b[8:]) }

func countOf(b []byte) int { return int(order.Uint16(b[10:])) }

func (p *pages) freelist(id uint64) error {
	b, err := p.page(id)
	if err != nil {
		return err
	}
	count, list := uint64(countOf(b)), b[pageHead:]
	if count == countFollows {
		count, list = order.Uint64(list), list[8:]
	}
	if kindOf(b) != kindFreelist || count > uint64(len(list)/8) {
		return fmt.Errorf("page %d: is no freelist", id)
	}
	for ; count > 0; count-- {
		if err := p.use(order.Uint64(list)); err != nil {
			return err
		}
		list = list[8:]
	}
	return nil
}

// tree reads a page with all below it.
func (p *pages) tree(id uint64) error {
	b, err := p.page(id)
	if err != nil {
		return err
	}
	switch kindOf(b) {
	case kindBranch:
		err = p.branch(b)
	case kindLeaf:
		err = p.leaf(b)
	default:
		err = errors.New("is no part of a tree")
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

// branch: an element is the key's place, counted from the element, its length, and the child's number.
func (p *pages) branch(b []byte) error {
	if countOf(b) == 0 {
		return errors.New("is empty")
	}
	for i := range countOf(b) {
		e, err := elementOf(b, i)
		if err != nil {
			return err
		}
		if uint64(order.Uint32(e))+uint64(order.Uint32(e[4:])) > uint64(len(e)) {
			return errOutside
		} else if order.Uint32(e[4:]) == 0 {
			return errNoKey
		}
		if err := p.tree(order.Uint64(e[8:])); err != nil {
			return err
		}
	}
	return nil
}

// leaf: an element is flags, the key's place, counted from the element, its length, and that of the value
// behind it.
func (p *pages) leaf(b []byte) error {
	for i := range countOf(b) {
		e, err := elementOf(b, i)
		if err != nil {
			return err
		}
		value := uint64(order.Uint32(e[4:])) + uint64(order.Uint32(e[8:]))
		end := value + uint64(order.Uint32(e[12:]))
		if end > uint64(len(e)) {
			return errOutside
		} else if order.Uint32(e[8:]) == 0 {
			return errNoKey
		}
		if order.Uint32(e)&leafBucket == 0 {
			continue
		}
		if err := p.bucket(e[value:end]); err != nil {
			return err
		}
	}
	return nil
}

// bucket: the number of its root (8 bytes) and a counter (8). A small one has no root: its only page
// follows, which is shorter than others.
func (p *pages) bucket(value []byte) error {
	if len(value) < 16 {
		return errOutside
	}
	if root := order.Uint64(value); root != 0 {
		return p.tree(root)
	}
	inline := value[16:]
	if len(inline) < pageHead || kindOf(inline) != kindLeaf {
		return errors.New("is no part of a tree")
	}
	return p.leaf(inline)
}

// elementOf returns the page's bytes from an element on.
func elementOf(b []byte, i int) ([]byte, error) {
	at := pageHead + i*element
	if at+element > len(b) {
		return nil, errOutside
	}
	return b[at:], nil
}
