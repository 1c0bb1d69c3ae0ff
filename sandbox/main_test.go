// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// roleEnv makes the test binary something else than a test: a runner, or what execs into a sandbox.
const roleEnv = "BPFNET_SANDBOX_TEST_ROLE"

// role is what a process that the tests start is to do.
type role struct {
	Run  *Command // with the process's own standard streams, as bpfnet run does
	Exec *Target  // with Path, Args and so on
	Path string
	Args []string
	Env  []string
	Dir  string

	Headless bool // end the first thread and live on until the standard input ends
}

func TestMain(m *testing.M) {
	text, ok := os.LookupEnv(roleEnv)
	if !ok {
		lab.Main(m)
	}
	var r role
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		panic(err)
	}
	if r.Headless {
		headless()
	}
	if r.Exec != nil {
		err := Exec(*r.Exec, r.Path, r.Args, r.Env, r.Dir)
		fmt.Fprintln(os.Stderr, err)
		os.Exit(exitCode(err))
	}
	os.Exit(runner(*r.Run))
}

func headless() {
	go func() {
		_, _ = io.ReadAll(os.Stdin)
		os.Exit(0)
	}()
	_, _, _ = unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
}

func init() {
	// Until TestMain the main goroutine is on the first thread, where a headless process wants it.
	if strings.Contains(os.Getenv(roleEnv), `"Headless":true`) {
		runtime.LockOSThread()
	}
}

func exitCode(err error) int {
	switch {
	case errors.Is(err, ErrNotFound):
		return 127
	case errors.Is(err, ErrNotExecutable):
		return 126
	}
	return 1
}

// runner is what bpfnet run is without the daemon. It says "PID N" on its standard error when the
// command runs.
func runner(c Command) int {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals, Forwarded()...)
	t := NewThread()
	if err := t.NewNetNS(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	p, err := t.Start(c)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return exitCode(err)
	}
	fmt.Fprintf(os.Stderr, "PID %d\n", p.PID())
	code, err := Supervise(p, signals, c.Cgroup)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return code
}

// asRole prepares a process with a role.
func asRole(t testing.TB, r role) *exec.Cmd {
	t.Helper()
	text, err := json.Marshal(r)
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), roleEnv+"="+string(text))
	return cmd
}

// testCgroup names a cgroup that does not exist, and removes it with what is in it after the test.
func testCgroup(t testing.TB) string {
	t.Helper()
	lab.NeedRoot(t)
	return filepath.Join(testCgroups(t), "sandbox")
}

// testCgroups makes a cgroup for a test's own.
func testCgroups(t testing.TB) string {
	t.Helper()
	lab.NeedRoot(t)
	root := ""
	for line := range strings.Lines(readFile(t, "/proc/mounts")) {
		if fields := strings.Fields(line); fields[2] == "cgroup2" {
			root = fields[1]
			break
		}
	}
	require.NotEmpty(t, root, "no cgroup2 mount")
	dir, err := os.MkdirTemp(root, "bl-sandbox-")
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, KillCgroup(dir))
		require.NoError(t, RemoveCgroup(dir))
	})
	return dir
}

// shell is a script as a command, in the root directory and with this process's environment.
func shell(script string) Command {
	return Command{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: os.Environ(), Dir: "/"}
}

// newThread makes a thread in a network namespace of its own.
func newThread(t testing.TB) *Thread {
	t.Helper()
	lab.NeedRoot(t)
	th := NewThread()
	t.Cleanup(th.Close)
	require.NoError(t, th.NewNetNS())
	return th
}

// begin starts a command in a sandbox of its own, and ends it with the test.
func begin(t testing.TB, c Command) *Process {
	t.Helper()
	p, err := newThread(t).Start(c)
	require.NoError(t, err)
	t.Cleanup(func() { end(p) })
	return p
}

func end(p *Process) {
	_ = p.Signal(os.Kill)
	_, _ = p.Wait()
}

// run runs a command to its end in a sandbox of its own, and returns its output.
func run(t testing.TB, c Command) (stdout string, code int) {
	t.Helper()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	c.Stdout = w
	if c.Stderr == nil {
		c.Stderr = os.Stderr
	}
	p, err := newThread(t).Start(c)
	w.Close()
	require.NoError(t, err)
	out := make(chan []byte)
	go func() {
		b, _ := io.ReadAll(r)
		out <- b
	}()
	code, err = Supervise(p, nil, c.Cgroup)
	require.NoError(t, err)
	return string(<-out), code
}

// lines reads a pipe that a command writes to.
type lines struct {
	t       testing.TB
	scanner *bufio.Scanner
}

// pipe makes a pipe. The writing end is to be closed when the command has it.
func pipe(t testing.TB) (lines, *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	t.Cleanup(func() { r.Close() })
	require.NoError(t, r.SetReadDeadline(time.Now().Add(10*time.Second)))
	return lines{t, bufio.NewScanner(r)}, w
}

// next waits for a line.
func (l lines) next() string {
	l.t.Helper()
	require.True(l.t, l.scanner.Scan(), "no more lines: %v", l.scanner.Err())
	return l.scanner.Text()
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(b)
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
}

// namespace is the identity of a process's namespace.
func namespace(t testing.TB, pid int, kind string) string {
	t.Helper()
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
	require.NoError(t, err)
	return link
}
