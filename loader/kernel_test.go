// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"
)

// Needs root. What this kernel has must not be reported missing, and what is missing is named with
// the version that has it.
func TestExplainLoad(t *testing.T) {
	cause := errors.New("refused")
	require.EqualError(t, explainLoad(cause), "load programs: refused (bpfnet is tested on Linux 6.1 and later)")

	old := needed[2].probe
	needed[2].probe = func() error { return ebpf.ErrNotSupported }
	t.Cleanup(func() { needed[2].probe = old })
	err := explainLoad(cause)
	require.ErrorIs(t, err, cause)
	require.ErrorContains(t, err, "the kernel has no bpf_for_each_map_elem: needs Linux 5.13 or later")
}
