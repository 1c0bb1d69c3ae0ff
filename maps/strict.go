// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/bpfnet/bpfnet/bpf"
)

// StrictSource is an address or a prefix that the namespace of a READY endpoint may use.
type StrictSource struct {
	Cookie uint64
	Prefix netip.Prefix
}

// StrictWriter fills the map of strict mode. It is its only writer and not safe for concurrent use.
type StrictWriter struct {
	m    *ebpf.Map
	have map[bpf.StrictStrictKey]uint8
}

// NewStrictWriter reads what the map holds.
func NewStrictWriter(m *ebpf.Map) (*StrictWriter, error) {
	w := &StrictWriter{m: m}
	return w, readHash(m, &w.have)
}

// Apply brings the map to what is wanted. It goes on after an error.
func (w *StrictWriter) Apply(want map[StrictSource]bool) error {
	keys := make(map[bpf.StrictStrictKey]uint8, len(want))
	for s := range want {
		keys[strictKey(s)] = 1
	}
	_, gone := remove(w.m, w.have, keys)
	_, added := put(w.m, w.have, keys)
	if err := errors.Join(gone, added); err != nil {
		return fmt.Errorf("strict mode: %w", err)
	}
	return nil
}

func strictKey(s StrictSource) bpf.StrictStrictKey {
	return bpf.StrictStrictKey{
		Prefixlen: 64 + mappedBits(s.Prefix), Cookie: [2]uint32{uint32(s.Cookie), uint32(s.Cookie >> 32)},
		Addr: bpf.StrictAddr(addr(s.Prefix.Masked().Addr())),
	}
}
