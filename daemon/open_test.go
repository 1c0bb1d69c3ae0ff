// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// What was opened before an error is closed again, and the error comes out.
func TestOpenRefuses(t *testing.T) {
	err := Run(t.Context(), Config{Docker: "off", Timeouts: map[string]time.Duration{"tea": time.Hour}})
	require.ErrorContains(t, err, `timeout "tea": unknown`)
}
