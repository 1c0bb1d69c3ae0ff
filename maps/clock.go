// SPDX-License-Identifier: Apache-2.0

package maps

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// monotonic is the data path's clock (bpf_ktime_get_ns): CLOCK_MONOTONIC as it is outside of all time namespaces.
// Nobody sets it, and it stands still while the host is suspended.
func monotonic() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // which the kernel always has
	return time.Duration(ts.Nano()) - clockOffset()
}

// WallTime is when the data path's clock showed ns, which was not long ago. It goes by the age: the wall clock may have
// been set since.
func WallTime(ns uint64) time.Time { return time.Now().Add(time.Duration(ns) - monotonic()) }

// clockOffset is by how much CLOCK_MONOTONIC is ahead in the time namespace of this process.
var clockOffset = sync.OnceValue(func() time.Duration {
	// The offsets are those of the children's namespace, which a process only enters when it is executed.
	own, err := os.Readlink("/proc/self/ns/time")
	if err != nil {
		return 0 // a kernel without such namespaces
	}
	if children, err := os.Readlink("/proc/self/ns/time_for_children"); err != nil || children != own {
		return 0
	}
	text, err := os.ReadFile("/proc/self/timens_offsets")
	if err != nil {
		return 0
	}
	return parseClockOffset(string(text))
})

// parseClockOffset reads /proc/PID/timens_offsets: time_namespaces(7).
func parseClockOffset(text string) time.Duration {
	for line := range strings.Lines(text) {
		var seconds, nanoseconds int64
		if n, _ := fmt.Sscanf(line, "monotonic %d %d", &seconds, &nanoseconds); n == 2 {
			return time.Duration(seconds)*time.Second + time.Duration(nanoseconds)
		}
	}
	return 0
}
