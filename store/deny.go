// SPDX-License-Identifier: Apache-2.0

package store

import (
	"net/netip"
	"slices"

	"go.etcd.io/bbolt"
)

const keyDenied = "denied"

// Denied returns the shield's deny list, in order.
func (s *Store) Denied() ([]netip.Prefix, error) {
	var list []netip.Prefix
	err := s.view(func(b *bbolt.Bucket) error {
		_, err := get(b, keyDenied, &list)
		return err
	})
	return list, err
}

// SetDenied replaces the deny list.
func (s *Store) SetDenied(list []netip.Prefix) error {
	list = slices.SortedFunc(slices.Values(list), netip.Prefix.Compare)
	return s.update(func(b *bbolt.Bucket) error { return put(b, keyDenied, list) })
}
