// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"bytes"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestClockSet(t *testing.T) {
	var log bytes.Buffer
	d := &Daemon{log: slog.New(slog.NewTextHandler(&log, nil))}
	noon := time.Date(2026, time.November, 1, 12, 0, 0, 0, time.UTC)
	at := func(steady, ahead time.Duration) moment { return moment{noon.Add(steady + ahead), steady} }
	require.False(t, d.clockSet(at(0, 0)), "there is nothing to compare with")
	require.False(t, d.clockSet(at(5*time.Second, 0)))
	require.False(t, d.clockSet(at(10*time.Second, 3*time.Millisecond)), "slewed")
	require.Empty(t, log.String())
	require.True(t, d.clockSet(at(15*time.Second, 24*time.Hour)))
	require.Contains(t, log.String(), "by=23h59m59.997s")
	log.Reset()
	require.False(t, d.clockSet(at(20*time.Second, 24*time.Hour)), "said once")
	require.True(t, d.clockSet(at(25*time.Second, -24*time.Hour)))
	require.Contains(t, log.String(), "by=-48h0m0s")
}
