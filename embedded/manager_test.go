// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What the store says of a time holds in the running process whatever happens to the wall clock, and is never yet to come.
func TestRestored(t *testing.T) {
	now := time.Now()
	ago := now.Add(-20 * time.Second).Round(0)
	got := restored(ago, now)
	require.True(t, got.Equal(ago), "%v", got)
	require.NotEqual(t, got.Round(0), got, "it is a time of the clock that nobody sets")
	require.Equal(t, now, restored(now.Add(48*time.Hour).Round(0), now), "by a clock that was set back since")
}
