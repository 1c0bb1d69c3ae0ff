// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// Ready reports whether what comes from a container's interface, by the index of the host's end, is let
// further than its bridge.
func (m *Maps) Ready(ifindex int) (bool, error) {
	var slot uint32
	err := m.m["links"].Lookup(uint32(ifindex), &slot)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read links: %w", err)
	}
	return true, nil
}
