// SPDX-License-Identifier: Apache-2.0

package store

import (
	"net/netip"
	"slices"

	"go.etcd.io/bbolt"

	"github.com/bpfnet/bpfnet/policy"
)

const keyByHand = "byhand"

// ByHand is an endpoint that no engine knows of: somebody made the device a port of a network's bridge.
type ByHand struct {
	Device string       `json:"device"` // the host's side
	Addrs  []netip.Addr `json:"addrs"`  // at most one a family
	MAC    policy.MAC   `json:"mac"`    // zero: that of the device's peer
}

// ByHand returns the endpoints that were allowed by hand, in the order of their devices.
func (s *Store) ByHand() ([]ByHand, error) {
	var list []ByHand
	err := s.view(func(b *bbolt.Bucket) error {
		_, err := get(b, keyByHand, &list)
		return err
	})
	return list, err
}

// AllowByHand remembers an endpoint, in place of another of the same device. It reports whether that is
// news.
func (s *Store) AllowByHand(e ByHand) (bool, error) {
	return s.changeByHand(e.Device, &e)
}

// DisallowByHand forgets what AllowByHand remembered. It reports whether there was anything to forget.
func (s *Store) DisallowByHand(device string) (bool, error) {
	return s.changeByHand(device, nil)
}

func (s *Store) changeByHand(device string, e *ByHand) (changed bool, err error) {
	err = s.update(func(b *bbolt.Bucket) error {
		var list []ByHand
		if _, err := get(b, keyByHand, &list); err != nil {
			return err
		}
		next := slices.DeleteFunc(slices.Clone(list), func(x ByHand) bool { return x.Device == device })
		if e != nil {
			next = append(next, *e)
			slices.SortFunc(next, func(x, y ByHand) int {
				if x.Device < y.Device {
					return -1
				}
				return 1
			})
		}
		if slices.EqualFunc(list, next, func(x, y ByHand) bool {
			return x.Device == y.Device && x.MAC == y.MAC && slices.Equal(x.Addrs, y.Addrs)
		}) {
			return nil
		}
		changed = true
		return put(b, keyByHand, next)
	})
	return changed && err == nil, err
}
