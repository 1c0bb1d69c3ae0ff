// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root, and strace, which makes the disk slow. While a change of the deny list waits for the disk, rounds go on, and
// so do those who only read it.
func TestSlowDisk(t *testing.T) {
	// Debuggers may be forbidden altogether.
	if out, err := exec.Command("strace", "-f", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		if os.Getenv("BPFNET_REQUIRE_ROOT") != "" {
			t.Fatalf("needs strace: %v %s", err, out)
		}
		t.Skipf("needs strace: %v %s", err, out)
	}
	l := lab.New(t, lab.Opts{})
	b := l.StartBpfnet(t, nil, "--docker", "off")
	trace := filepath.Join(l.Dir, "trace")
	slow := l.Host.Start(t, "strace", "-f", "-p", strconv.Itoa(b.PID()), "-o", trace, "-e", "trace=fsync,fdatasync",
		"-e", "inject=fsync,fdatasync:delay_enter=20000000") // µs
	lab.Eventually(t, 20*time.Second, "all threads are traced", func() bool {
		threads, err := filepath.Glob("/proc/" + strconv.Itoa(b.PID()) + "/task/*/status")
		require.NoError(t, err)
		for _, path := range threads {
			status, err := os.ReadFile(path)
			if err == nil && strings.Contains(string(status), "\nTracerPid:\t0\n") {
				return false
			}
		}
		return len(threads) > 0
	})
	denied := make(chan error, 1)
	go func() { denied <- lastErr(b.CLI("deny", "add", "203.0.113.0/24")) }()
	lab.Eventually(t, 20*time.Second, "the change waits for the disk", func() bool {
		calls, err := os.ReadFile(trace)
		return err == nil && strings.Contains(string(calls), "sync(")
	})
	require.NotContains(t, b.MustCLI(t, "deny", "ls"), "203.0.113.0/24")
	l.Host.MustRun(t, "ip", "address", "add", "192.0.2.177/32", "dev", lab.HostIf)
	lab.Eventually(t, 10*time.Second, "a round finds the new address", func() bool {
		return strings.Contains(b.Log(), "uplinks have changed")
	})
	select {
	case err := <-denied:
		t.Fatal("it did not wait for the disk", err)
	default:
	}
	require.NoError(t, slow.Signal(syscall.SIGINT)) // it lets go of the daemon
	require.NoError(t, <-denied)
	require.Contains(t, b.MustCLI(t, "deny", "ls"), "203.0.113.0/24")
}
