// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/sandbox"
)

// Here the command line runs as a process of its own, under a daemon that grants everything and makes
// no interface.

// runners is a world with such a daemon, whose sandboxes have cgroups. It needs root.
func runners(t *testing.T) (*world, *engine) {
	t.Helper()
	lab.NeedRoot(t)
	w, e := newWorld(t), newEngine(t)
	root, err := w.findCgroup()
	require.NoError(t, err, "this test needs cgroup2 mounted")
	dir, err := os.MkdirTemp(root, "bl-cli-")
	require.NoError(t, err)
	t.Cleanup(func() {
		assert.NoError(t, sandbox.KillCgroup(dir))
		assert.NoError(t, sandbox.RemoveCgroup(dir))
	})
	e.cgroup = filepath.Join(dir, "box")
	t.Cleanup(w.serve(e))
	return w, e
}

// process prepares this program with a command line of the world.
func (w *world) process(args ...string) *exec.Cmd {
	w.t.Helper()
	self, err := os.Executable()
	require.NoError(w.t, err)
	return &exec.Cmd{Path: self, Args: append(append([]string{programName}, w.flags()...), args...), Dir: w.dir}
}

// result is how a process ended.
type result struct {
	code     int
	out, err string
}

func (w *world) exec(args ...string) result {
	w.t.Helper()
	cmd := w.process(args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		require.NoError(w.t, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// file is what a path is to a process.
func file(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return st.Ino
}

func TestRun(t *testing.T) {
	w, e := runners(t)
	assert.Equal(t, result{0, "hello\n", ""}, w.exec("run", "echo", "hello"))
	box := id("ab00")
	heard := e.requests()
	require.Len(t, heard, 4)
	assert.IsType(t, api.SandboxSpec{}, heard[0])
	assert.Equal(t, box, heard[1].(api.SandboxStart).Name)
	_, own := e.lastStart()
	assert.True(t, own)
	assert.NotZero(t, heard[2].(api.SandboxRunning).PID)
	assert.Equal(t, api.SandboxExited{ID: box}, heard[3])
	assert.NoDirExists(t, e.cgroup)
	code, ok, err := sandbox.ReadExit(filepath.Join(e.dir, box))
	require.NoError(t, err)
	assert.True(t, ok)
	assert.Zero(t, code)

	for script, code := range map[string]int{"exit 3": 3, "kill -TERM $$": 128 + 15, "kill -9 $$": 128 + 9, "exit 255": 255} {
		assert.Equal(t, result{code, "", ""}, w.exec("run", "--", "sh", "-c", script))
		heard = e.requests()
		assert.Equal(t, code, heard[len(heard)-1].(api.SandboxExited).Code)
	}
}

// The end has been told before the process ends: a name of --rm is free then.
func TestRunRemoves(t *testing.T) {
	w, e := runners(t)
	for range 3 {
		assert.Equal(t, result{0, "", ""}, w.exec("run", "--rm", "--name", "x", "true"))
		e.mu.Lock()
		assert.Empty(t, e.boxes)
		e.mu.Unlock()
	}
}

func TestRunsInItsOwnSurroundings(t *testing.T) {
	w, e := runners(t)
	hosts := filepath.Join(w.dir, "hosts")
	require.NoError(t, os.WriteFile(hosts, []byte("its own\n"), 0o600))
	e.set(func() { e.grant.Files = map[string]string{"/etc/hosts": hosts} })
	const script = `stat -Lc %i /proc/self/ns/net; hostname; echo $HOSTNAME; cat /etc/hosts; ls /sys/class/net; pwd; grep ^0:: /proc/self/cgroup; echo $A`
	t.Setenv("A", "of the caller")
	got := w.exec("run", "--hostname", "box", "sh", "-c", script)
	require.Zero(t, got.code, got.err)
	lines := strings.Split(got.out, "\n")
	assert.NotEqual(t, fmt.Sprint(file(t, "/proc/self/ns/net")), lines[0])
	assert.Equal(t, []string{"box", "box", "its own", "lo", w.dir}, lines[1:6])
	assert.Contains(t, lines[6], "/box")
	assert.Equal(t, "of the caller", lines[7])

	e.set(func() { e.grant.Files = nil })
	got = w.exec("run", "--network", "host", "sh", "-c", script)
	require.Zero(t, got.code, got.err)
	assert.Equal(t, fmt.Sprint(file(t, "/proc/self/ns/net")), strings.Split(got.out, "\n")[0])
	_, own := e.lastStart()
	assert.False(t, own)
}

// What the command leaves running ends with it.
func TestRunLeavesNothingRunning(t *testing.T) {
	w, e := runners(t)
	got := w.exec("run", "sh", "-c", "sleep 1000 </dev/null >/dev/null 2>&1 & echo $!")
	require.Zero(t, got.code, got.err)
	var pid int
	_, err := fmt.Sscan(got.out, &pid)
	require.NoError(t, err)
	assert.False(t, processLives(pid))
	assert.NoDirExists(t, e.cgroup)
}

func TestRunPassesSignalsOn(t *testing.T) {
	w, _ := runners(t)
	// Those who ignore a signal, as below nohup, hand that on, and there is nothing to be passed on.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(caught)
	for _, sig := range []syscall.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1} {
		cmd := w.process("run", "--rm", "sh", "-c",
			`trap 'echo got; exit 7' TERM INT HUP USR1; echo ready; while :; do sleep 0.05; done`)
		out := &shared{}
		cmd.Stdout, cmd.Stderr = out, out
		// No terminal: else what a terminal sends would be taken for that.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		require.NoError(t, cmd.Start())
		lab.Eventually(t, 20*time.Second, "the command's start", func() bool { return out.String() == "ready\n" })
		require.NoError(t, cmd.Process.Signal(sig))
		_ = cmd.Wait()
		assert.Equal(t, 7, cmd.ProcessState.ExitCode(), sig)
		assert.Equal(t, "ready\ngot\n", out.String(), sig)
	}
}

// A command that is not there is told before anybody is asked for anything.
func TestCommandNotFound(t *testing.T) {
	w, e := runners(t)
	plain := filepath.Join(w.dir, "plain")
	require.NoError(t, os.WriteFile(plain, []byte("no program"), 0o600))
	for _, verb := range []string{"run", "create"} {
		assert.Equal(t, result{127, "", "bpfnet: " + verb + ": \"no-such-program\": command not found\n"}, w.exec(verb, "no-such-program"))
		got := w.exec(verb, plain)
		assert.Equal(t, 126, got.code)
		assert.Contains(t, got.err, "bpfnet: "+verb+": \""+plain+"\": not executable")
	}
	assert.Equal(t, 127, w.exec("run", "-d", "no-such-program").code)
	assert.Empty(t, e.requests())
}

// What cannot be started is as if nobody had asked for it.
func TestRunThatFailsRemovesTheSandbox(t *testing.T) {
	w, e := runners(t)
	broken := filepath.Join(w.dir, "broken")
	require.NoError(t, os.WriteFile(broken, []byte("#!/no/such/interpreter\n"), 0o700))
	for _, flags := range [][]string{{"run"}, {"run", "-d"}, {"run", "--rm"}, {"run", "-d", "--rm"}} {
		left := func() {
			t.Helper()
			e.mu.Lock()
			defer e.mu.Unlock()
			assert.Empty(t, e.boxes)
			assert.NoDirExists(t, e.cgroup)
		}
		e.fail(map[string]error{"StartSandbox": errors.New("address 172.30.0.5: is taken by db")})
		assert.Equal(t, result{1, "", "bpfnet: run: address 172.30.0.5: is taken by db\n"}, w.exec(append(flags, "true")...))
		left()

		e.fail(map[string]error{"SandboxRuns": errors.New("disk full")})
		e.requests()
		assert.Equal(t, result{1, "", "bpfnet: run: disk full\n"}, w.exec(append(flags, "sleep", "1000")...))
		left()
		var told bool
		for _, r := range e.requests() {
			if ended, ok := r.(api.SandboxExited); ok {
				told = ended.Unstarted
			}
		}
		assert.True(t, told)

		e.fail(nil)
		got := w.exec(append(flags, broken)...)
		assert.Equal(t, 127, got.code)
		assert.Regexp(t, `^bpfnet: run: execute ".*broken": command not found: .*\n$`, got.err)
		left()
	}
}

// A signal that comes too early for the command undoes what was granted.
func TestStartThatIsInterrupted(t *testing.T) {
	w, e := runners(t)
	require.Zero(t, w.exec("create", "--name", "web", "true").code)
	e.requests()
	client, err := api.Dial(t.Context(), w.socket())
	require.NoError(t, err)
	r := runner{client: client, info: e.info("web")}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = r.start(ctx)
	require.EqualError(t, err, "interrupted")
	heard := e.requests()
	require.Len(t, heard, 2)
	assert.Equal(t, api.SandboxExited{ID: id("ab00"), Unstarted: true}, heard[1])
	assert.NoDirExists(t, e.cgroup)
}

// A daemon that is down at the end is told by the file.
func TestRunOutlivesTheDaemon(t *testing.T) {
	lab.NeedRoot(t)
	w, e := newWorld(t), newEngine(t)
	stop := w.serve(e)
	cmd := w.process("run", "sh", "-c", "read line; exit 6")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	require.NoError(t, cmd.Start())
	e.eventually("the command's start", func() bool { return len(e.heard) == 3 })
	stop()
	require.NoError(t, in.Close())
	_ = cmd.Wait()
	assert.Equal(t, 6, cmd.ProcessState.ExitCode())
	assert.Empty(t, errs.String())
	code, ok, err := sandbox.ReadExit(filepath.Join(e.dir, id("ab00")))
	require.NoError(t, err)
	assert.True(t, ok)
	assert.Equal(t, 6, code)
}

func TestDetached(t *testing.T) {
	w, e := runners(t)
	got := w.exec("run", "-d", "--name", "web", "sh", "-c", `echo out; echo err >&2; trap "exit 4" TERM; echo ready; while :; do sleep 0.1; done`)
	box := id("ab00")
	assert.Equal(t, result{0, box + "\n", ""}, got)
	info := e.info("web")
	assert.Equal(t, api.StatusRunning, info.Status, "it runs when its ID is printed")
	runner, own := e.lastStart()
	assert.True(t, own)
	log := filepath.Join(info.Dir, logName)
	logged := func() string {
		text, err := os.ReadFile(log)
		require.NoError(t, err)
		return string(text)
	}
	lab.Eventually(t, 20*time.Second, "its output", func() bool { return logged() == "out\nerr\nready\n" })

	// The runner is nobody's: not of this session, and without files of its caller's.
	sid, err := unix.Getsid(runner)
	require.NoError(t, err)
	assert.Equal(t, runner, sid)
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", runner))
	require.NoError(t, err)
	assert.Equal(t, runnerName+"\n", string(comm))
	for fd, want := range map[int]string{0: os.DevNull, 1: log, 2: log} {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", info.PID, fd))
		require.NoError(t, err)
		assert.Equal(t, want, target)
	}
	_, err = os.Readlink(fmt.Sprintf("/proc/%d/fd/3", info.PID))
	require.ErrorIs(t, err, os.ErrNotExist)

	e.requests()
	require.NoError(t, unix.Kill(runner, unix.SIGTERM))
	e.eventually("the end", func() bool { return len(e.heard) == 1 })
	assert.Equal(t, []any{api.SandboxExited{ID: box, Code: 4}}, e.requests())
	lab.Eventually(t, 20*time.Second, "the runner's end", func() bool { return !processLives(runner) })
	assert.NoDirExists(t, e.cgroup)

	// Once more: the log goes on.
	assert.Equal(t, result{0, "web\n", ""}, w.exec("start", "web"))
	lab.Eventually(t, 20*time.Second, "more output", func() bool { return logged() == "out\nerr\nready\nout\nerr\nready\n" })
	e.requests()
	assert.Equal(t, result{0, "web\n", ""}, w.exec("start", "web"), "it runs already")
	assert.Empty(t, e.requests())
	assert.Equal(t, result{1, "", "bpfnet: start: sandbox \"web\": runs already; \"bpfnet logs -f web\" shows what it writes\n"}, w.exec("start", "-a", "web"))

	assert.Equal(t, result{5, "its network\n", ""}, w.exec("exec", "web", "--", "sh", "-c",
		fmt.Sprintf(`[ $(stat -Lc %%i /proc/self/ns/net) = %d ] && echo its network; exit 5`, file(t, fmt.Sprintf("/proc/%d/ns/net", e.info("web").PID)))))
	assert.Equal(t, 127, w.exec("exec", "web", "no-such-program").code)
	runner, _ = e.lastStart()
	require.NoError(t, unix.Kill(runner, unix.SIGTERM))
	lab.Eventually(t, 20*time.Second, "the runner's end", func() bool { return !processLives(runner) })
	assert.Equal(t, result{1, "", "bpfnet: exec: sandbox \"web\": does not run; start it with \"bpfnet start web\"\n"}, w.exec("exec", "web", "true"))
	assert.Equal(t, result{1, "", "bpfnet: exec: sandbox \"wab\": no such sandbox; no sandbox is known yet\n"}, w.exec("exec", "wab", "true"))
}

// processLives is false for one that nobody has waited for, too.
func processLives(pid int) bool {
	id, err := sandbox.Identify(pid)
	return err == nil && id.Alive()
}

func TestStart(t *testing.T) {
	w, e := runners(t)
	assert.Zero(t, w.exec("create", "--name", "a", "sh", "-c", "echo attached; exit 9").code)
	assert.Zero(t, w.exec("create", "--name", "b", "sleep", "1000").code)
	e.requests()
	assert.Equal(t, result{9, "attached\n", ""}, w.exec("start", "-a", "a"))
	assert.Equal(t, result{1, "b\n", "bpfnet: start: sandbox \"c\": no such sandbox; no sandbox is known yet\n"}, w.exec("start", "c", "b"))
	runner, _ := e.lastStart()
	require.NoError(t, unix.Kill(runner, unix.SIGTERM))
	lab.Eventually(t, 20*time.Second, "the runner's end", func() bool { return !processLives(runner) })

	// A start that fails leaves what was there before.
	e.fail(map[string]error{"StartSandbox": errors.New("port 80/tcp: is taken by nginx")})
	assert.Equal(t, result{1, "", "bpfnet: start: port 80/tcp: is taken by nginx\n"}, w.exec("start", "b"))
	assert.Equal(t, result{1, "", "bpfnet: start: port 80/tcp: is taken by nginx\n"}, w.exec("start", "-a", "b"))
	assert.Equal(t, result{1, "", "bpfnet: start: sandbox \"c\": no such sandbox; no sandbox is known yet\n"}, w.exec("start", "-a", "c"))
	e.info("b")
}

// The things of Docker's are known by what the daemon last told.
func TestDockersContainersAreRefused(t *testing.T) {
	w, e := newWorld(t), newEngine(t)
	defer w.serve(e)()
	w.write(ownSnapshot())
	for line, verb := range map[string]string{"start web": "start", "start -a web": "start", "exec web true": "exec", "stop -t 60 web": "stop"} {
		assert.Equal(t, "bpfnet: "+verb+`: sandbox "web": is a container of Docker; use "docker `+verb+` web"`, w.fails(1, strings.Fields(line)...))
	}
}

// What the caller has open besides, a lock or a pipe, is not kept open by what runs in the background.
func TestDetachedKeepsNoFiles(t *testing.T) {
	w, e := runners(t)
	lock, err := os.Create(filepath.Join(t.TempDir(), "lock"))
	require.NoError(t, err)
	defer lock.Close()
	cmd := w.process("run", "-d", "--name", "web", "sleep", "1000")
	cmd.ExtraFiles = []*os.File{nil, nil, lock}
	require.NoError(t, cmd.Run())
	runner, _ := e.lastStart()
	for _, pid := range []int{runner, e.info("web").PID} {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		require.NoError(t, err)
		for _, fd := range fds {
			target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
			assert.NotEqual(t, lock.Name(), target)
		}
	}
}

// A grace that is longer than a request may take is waited for here.
func TestStopWithLongGrace(t *testing.T) {
	w, e := runners(t)
	require.Zero(t, w.exec("run", "-d", "--name", "web", "sleep", "1000").code)
	runner, _ := e.lastStart()
	info := e.info("web")
	self, err := sandbox.Identify(info.PID)
	require.NoError(t, err)
	e.set(func() { e.boxes[info.ID].StartTime = self.StartTime })
	e.requests()
	for range 2 { // the second time, there is none to wait for
		assert.Equal(t, "web\n", w.must("stop", "-t", "3600", "web"))
		lab.Eventually(t, 20*time.Second, "the runner's end", func() bool { return !processLives(runner) })
		assert.Contains(t, e.requests(), api.SandboxStop{Name: "web"})
	}
	assert.Equal(t, "web\n", w.must("stop", "-t", "-1", "web"))

	// It is not mistaken for another process of its number.
	other := exec.Command("sleep", "1000")
	require.NoError(t, other.Start())
	defer func() {
		assert.NoError(t, other.Process.Kill())
		_ = other.Wait()
		assert.Equal(t, unix.SIGKILL, other.ProcessState.Sys().(syscall.WaitStatus).Signal())
	}()
	e.set(func() {
		b := e.boxes[info.ID]
		b.Status, b.PID, b.StartTime = api.StatusRunning, other.Process.Pid, 1
	})
	assert.Equal(t, "web\n", w.must("stop", "-t", "3600", "web"))
}

func TestReports(t *testing.T) {
	for _, want := range []error{
		nil, errors.New("taken"), &exitError{127, errors.New("not found")}, errors.Join(errors.New("one"), errors.New("two")),
	} {
		var pipe bytes.Buffer
		writeReport(&pipe, want)
		got := readReport(&pipe)
		if want == nil {
			require.NoError(t, got)
			continue
		}
		require.EqualError(t, got, oneLine(want.Error()))
		code := statusError
		if exit := new(exitError); errors.As(want, &exit) {
			code = exit.status
		}
		assert.Equal(t, code, got.(*exitError).status)
	}
	require.EqualError(t, readReport(strings.NewReader("")), "the runner ended before the command ran; was it killed?")
	require.ErrorContains(t, readReport(strings.NewReader("x\n")), "read the runner's report")
}
