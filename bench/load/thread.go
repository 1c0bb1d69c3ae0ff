// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bytes"
	"fmt"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxThreads is how many threads may wait in the kernel at once: each keeps a P of the runtime.
const maxThreads = 64

// quiet keeps the runtime from doing anything while a window lasts. It is called once.
func quiet() {
	debug.SetGCPercent(-1)
	runtime.GOMAXPROCS(maxThreads)
}

// pin makes the caller's thread a measuring one, for good: on one CPU (negative: any), without signals for
// preemption and with timers that fire when they are due.
func pin(cpu int) error {
	runtime.LockOSThread()
	if cpu >= 0 {
		var set unix.CPUSet
		set.Set(cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("pin to CPU %d: %w", cpu, err)
		}
	}
	var urgent unix.Sigset_t
	urgent.Val[0] = 1 << (unix.SIGURG - 1)
	if err := unix.PthreadSigmask(unix.SIG_BLOCK, &urgent, nil); err != nil {
		return fmt.Errorf("block signals: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set timer slack: %w", err)
	}
	return nil
}

// The calls below go past the scheduler and repeat what a signal interrupted. The size of their
// result is -1 where err is set.

//go:nosplit
func read(fd int, p *byte, n uintptr) (int, unix.Errno) {
	for {
		r, _, err := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(p)), n)
		if err != unix.EINTR {
			return int(r), err
		}
	}
}

//go:nosplit
func write(fd int, p *byte, n uintptr) (int, unix.Errno) {
	for {
		r, _, err := unix.RawSyscall(unix.SYS_WRITE, uintptr(fd), uintptr(unsafe.Pointer(p)), n)
		if err != unix.EINTR {
			return int(r), err
		}
	}
}

//go:nosplit
func closeFD(fd int) { unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0) }

// sleepUntil sleeps to a time of the monotonic clock.
//
//go:nosplit
func sleepUntil(t int64) {
	ts := unix.Timespec{Sec: t / 1e9, Nsec: t % 1e9}
	for {
		_, _, err := unix.RawSyscall6(unix.SYS_CLOCK_NANOSLEEP, unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME,
			uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
		if err != unix.EINTR {
			return
		}
	}
}

// started is what now counts from: one moment, read by both clocks. Of some tries, the one with the least between the two
// readings; the wall clock's is the earlier, so that now never lags behind what sleepUntil waited for.
var started, startedAt = func() (best time.Time, at int64) {
	gap := time.Duration(math.MaxInt64)
	for range 20 {
		var ts unix.Timespec
		before := time.Now()
		unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
		if took := time.Since(before); took < gap {
			best, at, gap = before, ts.Nano(), took
		}
	}
	return best, at
}()

// now is the monotonic clock in nanoseconds, read without entering the kernel.
func now() int64 { return startedAt + int64(time.Since(started)) }

// idle is the time that all CPUs together have not worked, stolen time included, since boot.
func idle() (time.Duration, error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	f := bytes.Fields(line)
	if len(f) < 9 || string(f[0]) != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q: want times of cpu", line)
	}
	var ticks uint64
	for _, i := range []int{4, 5, 8} { // idle, iowait, steal
		n, err := strconv.ParseUint(string(f[i]), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100), nil
}
