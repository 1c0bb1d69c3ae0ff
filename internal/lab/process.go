// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Process is a program that runs beside the test. It is killed, and waited for, when
// the test ends. Its output goes to files, so that no pipe keeps the test waiting.
type Process struct {
	cmd    *exec.Cmd
	stdout string
	stderr string
	done   chan struct{} // closed when the process has been waited for
	err    error         // valid once done is closed
}

// Start starts a program in the namespace, as [NS.Command] does, and leaves it running.
func (n *NS) Start(t testing.TB, name string, args ...string) *Process {
	t.Helper()
	// The cleanup below ends it, not a context: killing is Process's business.
	p, err := n.lab.start(n.command(name, args...), filepath.Base(name))
	if err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("%s: stdout: %s\nstderr: %s", strings.Join(p.cmd.Args, " "), tail(p.stdout), tail(p.stderr))
		}
	})
	return p
}

// start starts cmd with its output in files of the lab's directory named after label.
func (l *Lab) start(cmd *exec.Cmd, label string) (*Process, error) {
	base := filepath.Join(l.Dir, fmt.Sprintf("%s.%d", label, l.serial.Add(1)))
	p := &Process{cmd: cmd, stdout: base + ".out", stderr: base + ".err", done: make(chan struct{})}
	stdout, err := os.Create(p.stdout)
	if err != nil {
		return nil, err
	}
	defer stdout.Close()
	stderr, err := os.Create(p.stderr)
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// PID is the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Stdout is what it has written to its standard output so far.
func (p *Process) Stdout() string { return read(p.stdout) }

// Written is how many bytes it has written to its standard output so far: a cheaper question
// than what they are.
func (p *Process) Written() int64 {
	info, err := os.Stat(p.stdout)
	if err != nil {
		return 0
	}
	return info.Size()
}

// Stderr is what it has written to its standard error so far.
func (p *Process) Stderr() string { return read(p.stderr) }

// Exited reports whether the process has ended.
func (p *Process) Exited() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Signal sends a signal. Signalling a process that has ended is no error.
func (p *Process) Signal(sig os.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	return nil
}

// Kill ends the process with SIGKILL and waits for it.
func (p *Process) Kill() {
	_ = p.Signal(syscall.SIGKILL)
	<-p.done
}

// Wait waits until the process ends by itself and returns its error, which is an
// *[exec.ExitError] when it failed, or os.ErrDeadlineExceeded.
func (p *Process) Wait(timeout time.Duration) error {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.err
	case <-timer.C:
		return fmt.Errorf("process %d after %v: %w", p.PID(), timeout, os.ErrDeadlineExceeded)
	}
}

// Stop sends SIGTERM, waits until the process has ended, and returns what it has
// written to its standard output. It fails the test if that takes over ten seconds.
func (p *Process) Stop(t testing.TB) string {
	t.Helper()
	_ = p.Signal(syscall.SIGTERM)
	if err := p.Wait(10 * time.Second); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("stop %s: %v", p.cmd.Path, err)
	}
	return p.Stdout()
}

// WaitOutput waits until the process has written text to its standard output. It fails
// the test when the process ends before, or after ten seconds.
func (p *Process) WaitOutput(t testing.TB, text string) {
	t.Helper()
	Eventually(t, 10*time.Second, fmt.Sprintf("%q in the output of %s", text, p.cmd.Path), func() bool {
		exited := p.Exited() // before the look, so that no last words are missed
		if strings.Contains(p.Stdout(), text) {
			return true
		}
		if exited {
			t.Fatalf("%s ended before it said %q: %v\n%s%s", p.cmd.Path, text, p.err, tail(p.stdout), tail(p.stderr))
		}
		return false
	})
}

func read(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(b)
}

// tail returns the last lines of a log: enough to see why something failed.
func tail(path string) string {
	const lines = 80
	all := strings.Split(strings.TrimRight(read(path), "\n"), "\n")
	if len(all) > lines {
		all = all[len(all)-lines:]
	}
	return strings.Join(all, "\n")
}

// ResidentKiB is the memory that a process has in use (proc_pid_status(5), VmRSS).
func ResidentKiB(t testing.TB, pid int) int {
	t.Helper()
	for line := range strings.Lines(read(fmt.Sprintf("/proc/%d/status", pid))) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			var n int
			if _, err := fmt.Sscan(value, &n); err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("process %d has no VmRSS", pid)
	return 0
}
