// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root, as all tests that start a command.
func TestExitCode(t *testing.T) {
	for script, want := range map[string]int{
		"true":                       0,
		"exit 7":                     7,
		"exit 255":                   255,
		"kill -TERM $$":              128 + 15,
		"kill -KILL $$":              128 + 9,
		"kill -64 $$":                128 + 64,
		"ulimit -c 0; kill -ABRT $$": 128 + 6,
	} {
		_, code := run(t, shell(script))
		assert.Equal(t, want, code, script)
	}
}

func TestStreams(t *testing.T) {
	in, err := os.CreateTemp(t.TempDir(), "in")
	require.NoError(t, err)
	defer in.Close()
	_, err = in.WriteString("told\n")
	require.NoError(t, err)
	_, err = in.Seek(0, 0)
	require.NoError(t, err)
	errs, w := pipe(t)
	c := shell("cat; echo complaint >&2")
	c.Stdin, c.Stderr = in, w
	out, _ := run(t, c)
	w.Close()
	assert.Equal(t, "told\n", out)
	assert.Equal(t, "complaint", errs.next())

	// What this process was started with goes on, as in a shell; what it opened itself does not.
	script := "readlink /proc/self/fd/0; ls /proc/self/fd"
	want, err := exec.Command("sh", "-c", script).Output()
	require.NoError(t, err)
	out, _ = run(t, shell(script))
	assert.Equal(t, string(want), out)
	assert.True(t, strings.HasPrefix(out, "/dev/null\n"), out)
}

func TestSurroundings(t *testing.T) {
	dir := t.TempDir()
	c := shell("pwd; echo $A; env | wc -l")
	c.Env = []string{"A=first", "B=x", "A=last"}
	c.Dir = dir
	out, _ := run(t, c)
	assert.Equal(t, dir+"\nlast\n3\n", out, "A, B and the shell's PWD")

	c = shell("echo ${A-none}")
	c.Env = nil
	t.Setenv("A", "the caller's")
	out, _ = run(t, c)
	assert.Equal(t, "none\n", out)
}

func TestStartErrors(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), mode))
		return path
	}
	plain := file("plain", "text\n", 0o644)
	for _, c := range []struct {
		name   string
		change func(*Command)
		is     error
		text   string
	}{
		{"no program", func(c *Command) { c.Path = dir + "/none" }, ErrNotFound, `execute "` + dir + `/none": command not found: no such file or directory`},
		{"no interpreter", func(c *Command) { c.Path = file("script", "#!/none\n", 0o755) }, ErrNotFound, "command not found"},
		{"not executable", func(c *Command) { c.Path = plain }, ErrNotExecutable, "not executable: permission denied"},
		{"directory", func(c *Command) { c.Path = dir }, ErrNotExecutable, "not executable"},
		{"no format", func(c *Command) { c.Path = file("text", "text\n", 0o755) }, ErrNotExecutable, "exec format error"},
		{"no directory", func(c *Command) { c.Dir = dir + "/none" }, nil, `working directory "` + dir + `/none": does not exist`},
		{"directory a file", func(c *Command) { c.Dir = plain }, nil, `is not a directory`},
		{"no source", func(c *Command) { c.Files = map[string]string{plain: dir + "/none"} }, nil, "mount " + dir + "/none over " + plain + ": no such file or directory"},
		{"no target", func(c *Command) { c.Files = map[string]string{dir + "/none": plain} }, nil, dir + "/none does not exist; make it, an empty one is enough"},
		{"no directory of target", func(c *Command) { c.Files = map[string]string{dir + "/none/none": plain} }, nil, dir + "/none/none does not exist; make it"},
		{"target a directory", func(c *Command) { c.Files = map[string]string{dir: plain} }, nil, "invalid argument"},
		{"hostname too long", func(c *Command) { c.Hostname = strings.Repeat("x", 65) }, nil, "set hostname"},
		{"no cgroup", func(c *Command) { c.Cgroup = plain + "/x" }, nil, "make cgroup"},
	} {
		t.Run(c.name, func(t *testing.T) {
			command := shell("true")
			command.Cgroup = testCgroup(t)
			cgroup := command.Cgroup
			c.change(&command)
			_, err := newThread(t).Start(command)
			require.ErrorContains(t, err, c.text)
			assert.NotContains(t, err.Error(), "\n")
			if c.is != nil {
				assert.ErrorIs(t, err, c.is)
			}
			assert.NoDirExists(t, cgroup, "what was made for the command")
		})
	}
	_, err := os.Lstat(dir + "/none")
	assert.ErrorIs(t, err, os.ErrNotExist)
}

// A cgroup that was there stays when the command cannot be started.
func TestStartKeepsCgroup(t *testing.T) {
	c := shell("true")
	c.Cgroup = testCgroup(t)
	require.NoError(t, os.Mkdir(c.Cgroup, 0o755))
	c.Path = "/none"
	_, err := newThread(t).Start(c)
	require.ErrorIs(t, err, ErrNotFound)
	assert.DirExists(t, c.Cgroup)
}

func TestNamespaces(t *testing.T) {
	host, err := os.Hostname()
	require.NoError(t, err)
	mounted := filepath.Join(t.TempDir(), "file")
	writeFile(t, mounted, "")

	for _, x := range []struct {
		name          string
		change        func(*Command)
		mounts, names bool
	}{
		{"network only", func(*Command) {}, false, false},
		{"hostname", func(c *Command) { c.Hostname = "web" }, false, true},
		{"files", func(c *Command) { c.Files = map[string]string{mounted: mounted} }, true, false},
		{"sysfs", func(c *Command) { c.Sysfs = true }, true, false},
	} {
		c := shell("exec sleep infinity")
		x.change(&c)
		p := begin(t, c)
		self := os.Getpid()
		assert.NotEqual(t, namespace(t, self, "net"), namespace(t, p.PID(), "net"), x.name)
		assert.Equal(t, x.mounts, namespace(t, self, "mnt") != namespace(t, p.PID(), "mnt"), x.name)
		assert.Equal(t, x.names, namespace(t, self, "uts") != namespace(t, p.PID(), "uts"), x.name)
	}
	c := shell("hostname")
	c.Hostname = "web"
	out, _ := run(t, c)
	assert.Equal(t, "web\n", out)
	after, err := os.Hostname()
	require.NoError(t, err)
	assert.Equal(t, host, after)
}

// The process's other threads, and what they start, stay where they were.
func TestThreads(t *testing.T) {
	lab.NeedRoot(t)
	home := namespace(t, os.Getpid(), "net")
	var threads []*Thread
	for range 20 {
		th := NewThread()
		assert.NotEqual(t, os.Getpid(), th.TID(), "the main thread stands for the process")
		require.NoError(t, th.NewNetNS())
		link, err := os.Readlink(fmt.Sprintf("/proc/self/task/%d/ns/net", th.TID()))
		require.NoError(t, err)
		assert.NotEqual(t, home, link)
		threads = append(threads, th)
	}
	out, err := exec.Command("readlink", "/proc/self/ns/net").Output()
	require.NoError(t, err)
	assert.Equal(t, home, strings.TrimSpace(string(out)))
	for _, th := range threads {
		th.Close()
	}
	lab.Eventually(t, 10*time.Second, "threads end", func() bool {
		return !slices.ContainsFunc(threads, func(th *Thread) bool {
			_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", th.TID()))
			return err == nil
		})
	})
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	require.NoError(t, err)
	for _, task := range tasks {
		if link, err := os.Readlink(task); err == nil {
			assert.Equal(t, home, link)
		}
	}
}

func TestJoinNetNS(t *testing.T) {
	first := begin(t, shell("exec sleep infinity"))
	th := NewThread()
	defer th.Close()
	require.NoError(t, th.JoinNetNS(first.PID()))
	second, err := th.Start(shell("exec sleep infinity"))
	require.NoError(t, err)
	assert.Equal(t, namespace(t, first.PID(), "net"), namespace(t, second.PID(), "net"))
	require.NoError(t, second.Signal(os.Kill))

	// Ended, but not yet waited for: there is no namespace any more.
	lab.Eventually(t, 10*time.Second, "second process ends", func() bool {
		id, err := Identify(second.PID())
		return err == nil && !id.Alive()
	})
	other := NewThread()
	defer other.Close()
	require.ErrorIs(t, other.JoinNetNS(second.PID()), ErrGone)
	code, err := second.Wait()
	require.NoError(t, err)
	assert.Equal(t, 128+9, code)
	require.NoError(t, second.Signal(unix.SIGTERM), "has ended")
	require.ErrorIs(t, other.JoinNetNS(second.PID()), ErrGone)
	require.ErrorIs(t, other.JoinNetNS(0), ErrGone)
}

func TestStartTime(t *testing.T) {
	p := begin(t, shell("exec sleep infinity"))
	id, err := Identify(p.PID())
	require.NoError(t, err)
	assert.Equal(t, id.StartTime, p.StartTime())
	assert.NotZero(t, p.StartTime())
}

func TestCgroupOfProcess(t *testing.T) {
	c := shell("grep ^0:: /proc/self/cgroup")
	c.Cgroup = filepath.Join(testCgroup(t), "deep", "er")
	out, _ := run(t, c)
	assert.True(t, strings.HasSuffix(out, "/sandbox/deep/er\n"), out)
	assert.NoDirExists(t, c.Cgroup)
}

// What the command leaves running in the background does not outlive it.
func TestDaemonsEnd(t *testing.T) {
	out, w := pipe(t)
	c := shell("setsid sh -c 'sleep infinity & echo $!; exec >&-; wait' & wait; trap : USR1; sleep infinity & wait; exit 4")
	c.Stdout = w
	c.Cgroup = testCgroup(t)
	p, err := newThread(t).Start(c)
	w.Close()
	require.NoError(t, err)
	var pid int
	_, err = fmt.Sscan(out.next(), &pid)
	require.NoError(t, err)
	id, err := Identify(pid)
	require.NoError(t, err)
	watch, err := Open(id)
	require.NoError(t, err)
	defer watch.Close()

	require.NoError(t, p.Signal(unix.SIGTERM))
	code, err := Supervise(p, nil, c.Cgroup)
	require.NoError(t, err)
	assert.Equal(t, 128+15, code)
	<-watch.Done()
	assert.NoDirExists(t, c.Cgroup)
}

func TestSupervisePassesSignals(t *testing.T) {
	// What the test ignores, as below nohup, a process that it starts ignores too.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, unix.SIGINT, unix.SIGHUP)
	defer signal.Stop(caught)
	out, w := pipe(t)
	c := shell(`
		trap 'echo usr1' USR1; trap 'echo hup' HUP; trap 'echo int' INT; trap 'echo no' PIPE URG CHLD
		trap 'echo term; exit 9' TERM
		sleep infinity >&- & echo ready
		while :; do wait; done`)
	c.Stdout = w
	c.Cgroup = testCgroup(t)
	p, err := newThread(t).Start(c)
	w.Close()
	require.NoError(t, err)
	require.Equal(t, "ready", out.next())
	signals := make(chan os.Signal)
	type result struct {
		code int
		err  error
	}
	ended := make(chan result, 1)
	go func() {
		code, err := Supervise(p, signals, c.Cgroup)
		ended <- result{code, err}
	}()
	for _, s := range []os.Signal{unix.SIGPIPE, unix.SIGURG, unix.SIGCHLD} {
		signals <- s
	}
	for sig, want := range map[syscall.Signal]string{unix.SIGUSR1: "usr1", unix.SIGHUP: "hup", unix.SIGINT: "int"} {
		signals <- sig
		assert.Equal(t, want, out.next())
	}
	signals <- unix.SIGTERM
	assert.Equal(t, "term", out.next())
	r := <-ended
	require.NoError(t, r.err)
	assert.Equal(t, 9, r.code)
}

func TestForwarded(t *testing.T) {
	list := Forwarded()
	for _, s := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH} {
		assert.Contains(t, list, s)
	}
	for _, s := range []os.Signal{unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE, unix.SIGTSTP, unix.SIGKILL, unix.SIGSEGV, unix.SIGPROF} {
		assert.NotContains(t, list, s)
	}
}

// Cost of all that a sandbox needs of this package: the limit for "bpfnet run --rm -- true" is 100 ms,
// and the daemon wants most of that.
func TestCost(t *testing.T) {
	s := measure(t, 21)
	total := s[len(s)-1]
	t.Logf("p50 of 21: %v", s)
	assert.LessOrEqual(t, total.p50, 25*time.Millisecond)
}

// BenchmarkSandbox runs "true" in a sandbox with all that one can have. It does not measure the
// daemon, and the network namespace's end, which the kernel does later.
func BenchmarkSandbox(b *testing.B) {
	for _, s := range measure(b, b.N) {
		b.ReportMetric(float64(s.p50.Microseconds()), s.name+"-µs")
	}
}

type step struct {
	name string
	p50  time.Duration
}

func (s step) String() string { return fmt.Sprintf("%s %v", s.name, s.p50.Round(time.Microsecond)) }

// measure starts and ends n sandboxes.
func measure(t testing.TB, n int) []step {
	lab.NeedRoot(t)
	file := filepath.Join(t.TempDir(), "file")
	writeFile(t, file, "127.0.0.1 localhost\n")
	cgroup := testCgroup(t)
	names := []string{"thread", "netns", "start", "exit", "cgroup", "close", "total"}
	times := make([][]time.Duration, len(names))
	for range n {
		begun := time.Now()
		last := begun
		i := 0
		mark := func() {
			now := time.Now()
			times[i] = append(times[i], now.Sub(last))
			last = now
			i++
		}
		th := NewThread()
		mark()
		require.NoError(t, th.NewNetNS())
		mark()
		p, err := th.Start(Command{
			Path: "/bin/true", Args: []string{"true"}, Dir: "/",
			Files: map[string]string{"/etc/hosts": file, "/etc/resolv.conf": file},
			Sysfs: true, Hostname: "web", Cgroup: cgroup,
		})
		require.NoError(t, err)
		mark()
		code, err := p.Wait()
		require.NoError(t, err)
		require.Zero(t, code)
		mark()
		require.NoError(t, KillCgroup(cgroup))
		require.NoError(t, RemoveCgroup(cgroup))
		mark()
		th.Close()
		mark()
		last = begun
		mark()
	}
	var steps []step
	for i, name := range names {
		slices.Sort(times[i])
		steps = append(steps, step{name, times[i][len(times[i])/2]})
	}
	return steps
}
