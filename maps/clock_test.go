// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
)

// inTimeNamespace has TestClockInTimeNamespace say what its clocks are.
const inTimeNamespace = "BPFNET_TEST_CLOCKS"

// Needs root. The data path's clock is the same in every time namespace, as the programs' is.
func TestClockInTimeNamespace(t *testing.T) {
	if os.Getenv(inTimeNamespace) != "" {
		var ts unix.Timespec
		require.NoError(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts))
		fmt.Println("clocks", ts.Nano(), monotonic().Nanoseconds())
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat("/proc/self/ns/time"); err != nil {
		t.Skip("this kernel has no time namespaces")
	}
	const ahead = 100_000 * time.Second
	before := monotonic()
	cmd := exec.Command("unshare", "--time", "--fork", "--monotonic", fmt.Sprint(int(ahead.Seconds())),
		os.Args[0], "-test.run=^TestClockInTimeNamespace$", "-test.v")
	cmd.Env = append(os.Environ(), inTimeNamespace+"=1")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	after := monotonic()
	var shown, own time.Duration
	_, text, found := strings.Cut(string(out), "clocks ")
	require.True(t, found, "%s", out)
	_, err = fmt.Sscan(text, &shown, &own)
	require.NoError(t, err, "%s", out)
	require.Greater(t, shown, before+ahead-1, "it is in that namespace")
	require.GreaterOrEqual(t, own, before)
	require.LessOrEqual(t, own, after)
}

func TestParseClockOffset(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"monotonic           0         0\nboottime            0         0\n": 0,
		"monotonic      864000         0\nboottime     1728000         0\n":  10 * 24 * time.Hour,
		"monotonic          -2 500000000\nboottime           7         0\n":  -1500 * time.Millisecond,
		"boottime            7         0\nmonotonic           1         5\n": time.Second + 5,
		"":                 0,
		"monotonic soon\n": 0,
	} {
		require.Equal(t, want, parseClockOffset(text), "%q", text)
	}
}

// A drop's time is by the wall clock as it is when it is read, and not as it was when listening began.
func TestEventTime(t *testing.T) {
	const age = 3 * time.Second
	raw, err := binary.Append(nil, binary.NativeEndian, bpf.DatapathEvent{Time: uint64(monotonic() - age)})
	require.NoError(t, err)
	l := &Listener{}
	e, err := l.decode(raw)
	require.NoError(t, err)
	require.WithinDuration(t, time.Now().Add(-age), e.Time, time.Second)
}
