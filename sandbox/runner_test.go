// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// startRunner starts a process that runs a command as bpfnet run does, and returns the PID that it
// says.
func startRunner(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	errs, w := pipe(t)
	cmd.Stderr = w
	require.NoError(t, cmd.Start())
	w.Close()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var pid int
	_, err := fmt.Sscanf(errs.next(), "PID %d", &pid)
	require.NoError(t, err)
	return pid
}

func TestRunnerPassesSignals(t *testing.T) {
	out, w := pipe(t)
	c := shell("trap 'echo got TERM; exit 9' TERM; trap 'echo got USR2' USR2; sleep infinity >&- 2>&- & echo ready; while :; do wait; done")
	c.Cgroup = testCgroup(t)
	cmd := asRole(t, role{Run: &c})
	cmd.Stdout = w
	startRunner(t, cmd)
	w.Close()
	require.Equal(t, "ready", out.next())
	require.NoError(t, cmd.Process.Signal(unix.SIGUSR2))
	require.Equal(t, "got USR2", out.next())
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	require.Equal(t, "got TERM", out.next())
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Wait(), &exit)
	assert.Equal(t, 9, exit.ExitCode())
	assert.NoDirExists(t, c.Cgroup)
}

// The runner's death is not the sandbox's.
func TestRunnerKilled(t *testing.T) {
	dir := t.TempDir()
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	writeFile(t, source, "sandbox's\n")
	writeFile(t, target, "host's\n")
	c := shell("exec sleep infinity")
	c.Files, c.Cgroup = map[string]string{target: source}, testCgroup(t)
	cmd := asRole(t, role{Run: &c})
	pid := startRunner(t, cmd)
	id, err := Identify(pid)
	require.NoError(t, err)
	net := namespace(t, pid, "net")
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()

	assert.True(t, id.Alive())
	assert.Equal(t, net, namespace(t, pid, "net"))
	assert.Equal(t, "sandbox's\n", readFile(t, inside(pid, target)))
	watch, err := Open(id)
	require.NoError(t, err)
	defer watch.Close()
	require.NoError(t, KillCgroup(c.Cgroup))
	<-watch.Done()
	assert.False(t, id.Alive())
	require.NoError(t, RemoveCgroup(c.Cgroup))
}

// As with nohup: what the runner was started to ignore neither ends the command nor reaches it.
func TestRunnerIgnoresWhatItShould(t *testing.T) {
	c := shell("exec sleep infinity")
	c.Cgroup = testCgroup(t)
	cmd := asRole(t, role{Run: &c})
	cmd.Args = []string{"sh", "-c", `trap "" HUP; exec "$0"`, cmd.Path}
	cmd.Path = "/bin/sh"
	pid := startRunner(t, cmd)
	var ignored uint64
	for line := range strings.Lines(readFile(t, fmt.Sprintf("/proc/%d/status", pid))) {
		if text, ok := strings.CutPrefix(line, "SigIgn:"); ok {
			var err error
			ignored, err = strconv.ParseUint(strings.TrimSpace(text), 16, 64)
			require.NoError(t, err)
		}
	}
	assert.NotZero(t, ignored&(1<<(unix.SIGHUP-1)))
	require.NoError(t, cmd.Process.Signal(unix.SIGHUP))
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Wait(), &exit)
	assert.Equal(t, 128+15, exit.ExitCode())
}

// patience is for what passes through several programs, on a machine that does other things as well.
const patience = 30 * time.Second

// terminal is a pseudo-terminal with a session in it, and what that has written so far.
type terminal struct {
	t      *testing.T
	master *os.File
	mu     sync.Mutex
	text   strings.Builder
}

// inTerminal starts cmd as the leader of a session in a new terminal: pty(7).
func inTerminal(t *testing.T, cmd *exec.Cmd) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	conn, err := master.SyscallConn()
	require.NoError(t, err)
	var slave *os.File
	var inner error
	require.NoError(t, conn.Control(func(fd uintptr) {
		if inner = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); inner != nil {
			return
		}
		// TIOCGPTPEER takes the flags by value and returns the descriptor.
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
		if errno != 0 {
			inner = errno
			return
		}
		slave = os.NewFile(n, "terminal")
	}))
	require.NoError(t, inner)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	require.NoError(t, cmd.Start())
	slave.Close()
	term := &terminal{t: t, master: master}
	over := make(chan struct{})
	go func() {
		defer close(over)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			term.mu.Lock()
			term.text.Write(buf[:n])
			term.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		master.Close()
		<-over
		if t.Failed() {
			t.Logf("terminal:\n%s", term.text.String())
		}
	})
	return term
}

func (x *terminal) write(text string) {
	x.t.Helper()
	_, err := x.master.WriteString(text)
	require.NoError(x.t, err)
}

// waitFor waits until text has been written n times.
func (x *terminal) waitFor(text string, n int) {
	x.t.Helper()
	lab.Eventually(x.t, patience, fmt.Sprintf("%q in the terminal, time %d", text, n), func() bool { return x.count(text) >= n })
}

func (x *terminal) count(text string) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return strings.Count(x.text.String(), text)
}

// Ctrl-C goes to both, from the terminal, so the runner does not pass it on. That would not always
// show (a signal that is pending already is not counted again), so it gets one more that the command
// does not. SIGTERM, which no terminal sends, is passed on.
func TestTerminalInterrupt(t *testing.T) {
	c := shell(`
		n=0; trap 'n=$((n+1)); echo int-$n' INT
		trap 'echo total-$n; exit 3' TERM
		sleep infinity & echo ready
		while :; do wait; done`)
	c.Cgroup = testCgroup(t)
	cmd := asRole(t, role{Run: &c})
	term := inTerminal(t, cmd)
	term.waitFor("ready", 1)
	for i := 1; i <= 3; i++ {
		term.write("\x03")
		term.waitFor(fmt.Sprintf("int-%d", i), 1)
	}
	require.NoError(t, cmd.Process.Signal(unix.SIGINT))
	require.NoError(t, cmd.Process.Signal(unix.SIGTERM))
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Wait(), &exit)
	assert.Equal(t, 3, exit.ExitCode())
	term.waitFor("total-3", 1)
}

// Ctrl-C ends a command that does not care, with the code that a shell gives it.
func TestTerminalInterruptEnds(t *testing.T) {
	c := shell("echo ready; exec sleep infinity")
	c.Cgroup = testCgroup(t)
	cmd := asRole(t, role{Run: &c})
	term := inTerminal(t, cmd)
	term.waitFor("ready", 1)
	term.write("\x03")
	var exit *exec.ExitError
	require.ErrorAs(t, cmd.Wait(), &exit)
	assert.Equal(t, 128+2, exit.ExitCode())
}

// jobControl starts an interactive shell in a terminal, in which $RUN is a runner of the command.
func jobControl(t *testing.T, c Command) *terminal {
	t.Helper()
	bash, err := exec.LookPath("bash")
	require.NoError(t, err)
	c.Cgroup = testCgroup(t)
	runner := asRole(t, role{Run: &c})
	cmd := exec.Command(bash, "--norc", "--noprofile", "-i")
	cmd.Env = append(runner.Env, "RUN="+runner.Path, "TERM=dumb", "PS1=outer> ", "HISTFILE=")
	term := inTerminal(t, cmd)
	term.waitFor("outer> ", 1)
	return term
}

func TestTerminalStop(t *testing.T) {
	term := jobControl(t, shell(`echo rea''dy; while read x; do echo got-$x; done`))
	term.write("$RUN\n")
	term.waitFor("ready", 1)
	pid := term.pid()
	for i := 1; i <= 3; i++ {
		term.write("\x1a")
		term.waitFor("Stopped", i)
		term.waitStopped(pid, true)
		term.write("fg\n")
		term.waitStopped(pid, false)
		term.write(fmt.Sprintf("line%d\n", i))
		term.waitFor(fmt.Sprintf("got-line%d", i), 1)
	}
	term.write("\x04echo code-$?\n")
	term.waitFor("code-0", 1)
}

// A shell in a sandbox has jobs of its own, and can be suspended as a whole.
func TestTerminalShell(t *testing.T) {
	c := Command{Path: "/bin/bash", Args: []string{"bash", "--norc", "--noprofile", "-i"}, Dir: "/", Hostname: "inner",
		Env: []string{"TERM=dumb", "PS1=inner> ", "HISTFILE=", "PATH=" + os.Getenv("PATH")}}
	term := jobControl(t, c)
	term.write("$RUN\n")
	term.waitFor("inner> ", 1)
	pid := term.pid()
	term.write("sleep 1000\n")
	lab.Eventually(t, patience, "sleep in the foreground", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", term.foreground()))
		return err == nil && string(b) == "sleep\x001000\x00"
	})
	term.write("\x03")
	term.write("echo code-$? on $HOSTNAME\n")
	term.waitFor("code-130 on inner", 1)
	for i := 1; i <= 3; i++ {
		term.write("suspend\n")
		term.waitFor("Stopped", i)
		term.waitStopped(pid, true)
		term.write(fmt.Sprintf("echo outer-$((%d+10))\n", i))
		term.waitFor(fmt.Sprintf("outer-%d", i+10), 1)
		term.write("fg\n")
		term.waitStopped(pid, false)
		lab.Eventually(t, patience, "inner shell in the foreground", func() bool { return term.foreground() == pid })
		term.write(fmt.Sprintf("echo $HOSTNAME-$((%d+20))\n", i))
		term.waitFor(fmt.Sprintf("inner-%d", i+20), 1)
	}
	term.write("exit 5\n")
	term.write("echo code-$?\n")
	term.waitFor("code-5", 1)
}

// pid waits for what the runner says.
func (x *terminal) pid() (pid int) {
	x.t.Helper()
	lab.Eventually(x.t, patience, "PID of the command", func() bool {
		x.mu.Lock()
		defer x.mu.Unlock()
		_, rest, _ := strings.Cut(x.text.String(), "PID ")
		line, _, whole := strings.Cut(rest, "\r\n")
		var err error
		pid, err = strconv.Atoi(line)
		return whole && err == nil
	})
	return pid
}

// waitStopped waits until a process is stopped, or is not. One that is only about to stop may take
// what is typed.
func (x *terminal) waitStopped(pid int, stopped bool) {
	x.t.Helper()
	lab.Eventually(x.t, patience, fmt.Sprintf("process %d stopped: %t", pid, stopped), func() bool {
		stat, err := procStat(strconv.Itoa(pid))
		return err == nil && (stat[0] == "T") == stopped
	})
}

// foreground is the terminal's foreground process group.
func (x *terminal) foreground() (group int) {
	x.t.Helper()
	conn, err := x.master.SyscallConn()
	require.NoError(x.t, err)
	var inner error
	require.NoError(x.t, conn.Control(func(fd uintptr) { group, inner = unix.IoctlGetInt(int(fd), unix.TIOCGPGRP) }))
	require.NoError(x.t, inner)
	return group
}
