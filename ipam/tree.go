// SPDX-License-Identifier: Apache-2.0

package ipam

import (
	"math/bits"
	"slices"
)

// digitBits is the part of a number that one level of the tree decides: 64 ways, one word.
const digitBits = 6

// tree is a set of numbers that answers "which is the lowest that is missing" in one walk from
// the root. It is a radix tree of 64-way nodes. What is completely in the set, or completely
// missing, has no node, so dense sets take next to no memory, and sparse ones a path for each
// neighbourhood of 64 numbers.
type tree struct {
	root   node
	height int // of the root; leaves have height 0
}

// node stands for 64 subtrees, or in a leaf for 64 numbers.
type node struct {
	full uint64  // those that are completely in the set
	some uint64  // those that are in kids: neither full nor empty
	kids []*node // in the order of their bits in some
}

// newTree returns an empty set of numbers of that many bits.
func newTree(width int) tree {
	return tree{height: max(width-1, 0) / digitBits}
}

// digit is the place of x in a node of that height.
func digit(x u128, height int) int {
	return int(x.shr(height*digitBits).lo & 63)
}

// add puts a number into the set, and reports whether it was missing.
func (t *tree) add(x u128) bool { return t.root.add(x, t.height) }

// remove takes a number out of the set, and reports whether it was there.
func (t *tree) remove(x u128) bool { return t.root.remove(x, t.height) }

// has reports whether a number is in the set.
func (t *tree) has(x u128) bool {
	n := &t.root
	for height := t.height; ; height-- {
		i := digit(x, height)
		if n.full>>i&1 == 1 {
			return true
		}
		if n.some>>i&1 == 0 {
			return false
		}
		n = n.kids[n.place(i)]
	}
}

// missing returns the lowest number from x on that is not in the set. It may have some more bits
// than the tree was made for: as many as the root is too wide.
func (t *tree) missing(x u128) (u128, bool) { return t.root.missing(x, t.height) }

// place is the index in kids of subtree i.
func (n *node) place(i int) int { return bits.OnesCount64(n.some & (1<<i - 1)) }

// keep gives subtree i a node.
func (n *node) keep(i int, kid *node) *node {
	n.kids = slices.Insert(n.kids, n.place(i), kid)
	n.some |= 1 << i
	return kid
}

// drop removes the node of subtree i.
func (n *node) drop(i int) {
	n.kids = slices.Delete(n.kids, n.place(i), n.place(i)+1)
	n.some &^= 1 << i
	if n.some == 0 {
		n.kids = nil
	}
}

func (n *node) add(x u128, height int) bool {
	i := digit(x, height)
	switch {
	case n.full>>i&1 == 1:
		return false
	case height == 0:
		n.full |= 1 << i
		return true
	}
	var kid *node
	if n.some>>i&1 == 1 {
		kid = n.kids[n.place(i)]
	} else {
		kid = n.keep(i, new(node))
	}
	if !kid.add(x, height-1) {
		return false
	}
	if kid.full == ^uint64(0) {
		n.drop(i)
		n.full |= 1 << i
	}
	return true
}

func (n *node) remove(x u128, height int) bool {
	i := digit(x, height)
	var kid *node
	switch {
	case height == 0:
		was := n.full>>i&1 == 1
		n.full &^= 1 << i
		return was
	case n.full>>i&1 == 1:
		n.full &^= 1 << i
		kid = n.keep(i, &node{full: ^uint64(0)})
	case n.some>>i&1 == 1:
		kid = n.kids[n.place(i)]
	default:
		return false
	}
	if !kid.remove(x, height-1) {
		return false
	}
	if kid.full|kid.some == 0 {
		n.drop(i)
	}
	return true
}

func (n *node) missing(x u128, height int) (u128, bool) {
	at := digit(x, height)
	for left := ^n.full &^ (1<<at - 1); left != 0; left &= left - 1 {
		i := bits.TrailingZeros64(left)
		if i != at { // from the start of that subtree
			shift := height * digitBits
			x = x.shr(shift + digitBits).shl(digitBits).add(u128{lo: uint64(i)}).shl(shift)
		}
		if height == 0 || n.some>>i&1 == 0 {
			return x, true
		}
		// Only the subtree that x itself is in can have nothing left: the part from x on is full.
		if y, ok := n.kids[n.place(i)].missing(x, height-1); ok {
			return y, true
		}
	}
	return u128{}, false
}
