// SPDX-License-Identifier: Apache-2.0

package bpf_test

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/bpf"
)

// Needs root. Kernels differ in what a cgroup_skb program may ask of a socket. What the programs do is
// tested with containers, in internal/scenarios.
func TestStrictLoads(t *testing.T) {
	spec, err := bpf.LoadStrict()
	require.NoError(t, err)
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	c, err := ebpf.NewCollection(spec)
	require.NoError(t, err)
	defer c.Close()
	require.Len(t, c.Programs, 3)
}
