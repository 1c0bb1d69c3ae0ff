// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Command is what runs in a sandbox, and what is special about its surroundings.
type Command struct {
	Path string   // of the program, see LookPath
	Args []string // the first is the program's name for itself
	Env  []string // KEY=VALUE; of several with the same key the last counts
	Dir  string   // absolute; must exist

	Stdin, Stdout, Stderr *os.File // nil: /dev/null

	// Files are bind-mounted over others, in a mount namespace of the sandbox's own: target → source.
	// A target may be a symbolic link that leads nowhere, but it must exist. One that the host
	// replaces is mounted over again until the thread is closed.
	Files map[string]string
	// Sysfs asks for a /sys that shows the thread's network namespace. What is mounted below the
	// host's (cgroups, bpffs…) stays where it was.
	Sysfs bool
	// Hostname is set in a UTS namespace of the sandbox's own. Empty: the host's.
	Hostname string
	// Cgroup is a directory of the cgroup2 hierarchy, made if it is missing; the process starts in it.
	// Empty: the caller's.
	Cgroup string
}

// Process is a command that was started.
type Process struct {
	proc      *os.Process
	startTime uint64
}

// Start makes the command's surroundings and starts it, in the thread's network namespace. It
// fails with [ErrNotFound] or [ErrNotExecutable] when the program cannot be executed. A thread starts
// one command; after an error, too, it is of no more use.
func (t *Thread) Start(c Command) (*Process, error) {
	var p *Process
	err := t.do(func() (err error) {
		p, err = start(c)
		return err
	})
	if err != nil {
		return nil, err
	}
	if len(c.Files) > 0 {
		if t.kept, err = keepFiles(t, c.Files); err != nil {
			_ = p.proc.Kill()
			_, _ = p.proc.Wait()
			return nil, err
		}
	}
	return p, nil
}

func start(c Command) (p *Process, err error) {
	if err := checkDir(c.Dir); err != nil {
		return nil, err
	}
	if err := surround(c); err != nil {
		return nil, err
	}
	sys := &syscall.SysProcAttr{}
	if c.Cgroup != "" {
		made, err := makeCgroup(c.Cgroup)
		if err != nil {
			return nil, err
		}
		if made {
			defer func() {
				if p == nil {
					_ = RemoveCgroup(c.Cgroup)
				}
			}()
		}
		dir, err := os.Open(c.Cgroup)
		if err != nil {
			return nil, fmt.Errorf("open cgroup: %w", err)
		}
		defer dir.Close()
		sys.UseCgroupFD, sys.CgroupFD = true, int(dir.Fd())
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	files := []*os.File{c.Stdin, c.Stdout, c.Stderr}
	for i := range files {
		if files[i] == nil {
			files[i] = null
		}
	}
	// The child is forked from this thread, and so in its namespaces.
	proc, err := os.StartProcess(c.Path, c.Args, &os.ProcAttr{Dir: c.Dir, Env: environ(c.Env), Files: files, Sys: sys})
	if err != nil {
		return nil, execError(c.Path, err)
	}
	// It cannot have been reaped: that is for Wait.
	id, err := Identify(proc.Pid)
	if err != nil {
		_ = proc.Kill()
		_, _ = proc.Wait()
		return nil, err
	}
	return &Process{proc: proc, startTime: id.StartTime}, nil
}

// checkDir says clearly what execve's caller could only report as the program's fault.
func checkDir(dir string) error {
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("working directory %q: does not exist", dir)
	case err != nil:
		return fmt.Errorf("working directory %q: %w", dir, err)
	case !st.IsDir():
		return fmt.Errorf("working directory %q: is not a directory", dir)
	}
	return nil
}

// surround gives the calling thread the namespaces that the command asks for, and fills them.
func surround(c Command) error {
	if c.Hostname != "" {
		if err := unix.Unshare(unix.CLONE_NEWUTS); err != nil {
			return fmt.Errorf("make UTS namespace: %w", err)
		}
		if err := unix.Sethostname([]byte(c.Hostname)); err != nil {
			return fmt.Errorf("set hostname %q: %w", c.Hostname, err)
		}
	}
	if len(c.Files) == 0 && !c.Sysfs {
		return nil
	}
	if err := newMountNS(); err != nil {
		return err
	}
	if c.Sysfs {
		if err := mountSysfs(); err != nil {
			return err
		}
	}
	return mountFiles(c.Files)
}

// environ keeps the last of several variables with the same name, in the place of the first: C's
// getenv would take the first.
func environ(env []string) []string {
	out := make([]string, 0, len(env))
	at := make(map[string]int, len(env))
	for _, kv := range env {
		key, _, _ := strings.Cut(kv, "=")
		if i, ok := at[key]; ok {
			out[i] = kv
			continue
		}
		at[key] = len(out)
		out = append(out, kv)
	}
	return out
}

// PID is the process's number.
func (p *Process) PID() int { return p.proc.Pid }

// StartTime is when it began, in clock ticks since the machine's start: see [ID].
func (p *Process) StartTime() uint64 { return p.startTime }

// Signal sends a signal. Signalling a process that has ended is no error.
func (p *Process) Signal(sig os.Signal) error {
	if err := p.proc.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("send %v to process %d: %w", sig, p.PID(), err)
	}
	return nil
}

// Wait waits for the process's end, once. The code is as a shell has it: the process's own, or 128
// and the number of the signal that ended it.
func (p *Process) Wait() (code int, err error) {
	state, err := p.proc.Wait()
	if err != nil {
		return 0, fmt.Errorf("wait for process %d: %w", p.PID(), err)
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return state.ExitCode(), nil
}
