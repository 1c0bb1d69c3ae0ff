// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/sandbox"
)

// A runner is the process that has a sandbox's command as its child, from before its start to the end:
// "bpfnet run" itself, or with -d a copy of it that runs in the background.

// runnerName is the name under which the copy runs: bpfnet-runner SOCKET ID.
const runnerName = "bpfnet-runner"

// signalsHeld is how many signals may wait for the command's start.
const signalsHeld = 64

// What shells return for a command that is not there, or cannot be executed.
const (
	statusNotFound      = 127
	statusNotExecutable = 126
)

type runner struct {
	client *api.Client
	info   api.SandboxInfo
	std    [3]*os.File
	thread *sandbox.Thread
}

// start starts the command in its namespaces. After an error there is nothing left of it.
func (r *runner) start(ctx context.Context) (*sandbox.Process, error) {
	c := sandbox.Command{
		Args: r.info.Command, Env: environment(r.info), Dir: r.info.WorkDir,
		Stdin: r.std[0], Stdout: r.std[1], Stderr: r.std[2],
		Sysfs: r.info.Mode != api.ModeHost, Hostname: r.info.Hostname, Cgroup: r.info.Cgroup,
	}
	var err error
	if c.Path, err = sandbox.LookPath(c.Args[0], c.Env, c.Dir); err != nil {
		return nil, commandError(err)
	}
	r.thread = sandbox.NewThread()
	p, err := r.startOn(ctx, c)
	if err != nil {
		r.thread.Close()
		return nil, err
	}
	return p, nil
}

func (r *runner) startOn(ctx context.Context, c sandbox.Command) (*sandbox.Process, error) {
	start := api.SandboxStart{Name: r.info.ID}
	if r.ownNetNS() {
		if err := r.thread.NewNetNS(); err != nil {
			return nil, err
		}
		start.TID = r.thread.TID()
	}
	// What is asked for is not taken back by a signal, but brought to an end and then undone.
	asking := context.WithoutCancel(ctx)
	grant, err := r.client.StartSandbox(asking, start)
	if err != nil {
		return nil, err
	}
	c.Files = grant.Files
	p, err := r.startGranted(ctx, c)
	if err == nil {
		return p, nil
	}
	_, told := r.client.SandboxEnded(asking, api.SandboxExited{ID: r.info.ID, Unstarted: true})
	if errors.Is(told, api.ErrNotRunning) {
		told = nil // it finds out when it is back
	}
	return nil, commandError(errors.Join(err, told))
}

func (r *runner) startGranted(ctx context.Context, c sandbox.Command) (*sandbox.Process, error) {
	if r.info.Mode == api.ModeContainer {
		if err := r.thread.JoinNetNS(r.info.JoinPID); err != nil {
			return nil, err
		}
	}
	if ctx.Err() != nil {
		return nil, errors.New("interrupted")
	}
	p, err := r.thread.Start(c)
	if err != nil {
		return nil, err
	}
	_, err = r.client.SandboxRuns(context.WithoutCancel(ctx), api.SandboxRunning{ID: r.info.ID, PID: p.PID()})
	if err != nil {
		return nil, errors.Join(err, r.abort(p))
	}
	return p, nil
}

// ownNetNS says whether the sandbox has a network namespace that no other has.
func (r *runner) ownNetNS() bool {
	return r.info.Mode != api.ModeHost && r.info.Mode != api.ModeContainer
}

// abort ends a command whose start the daemon did not take.
func (r *runner) abort(p *sandbox.Process) error {
	if err := p.Signal(unix.SIGKILL); err != nil {
		return err
	}
	_, err := sandbox.Supervise(p, nil, r.info.Cgroup)
	return err
}

// supervise waits for the command's end and tells it. The code is the command's whatever the error.
func (r *runner) supervise(ctx context.Context, p *sandbox.Process, signals <-chan os.Signal) (code int, err error) {
	// The namespace stays until the daemon has been told: the kernel would hold the daemon up while it
	// takes the devices in it down.
	defer r.thread.Close()
	code, err = sandbox.Supervise(p, signals, r.info.Cgroup)
	// For a daemon that is down now. Nothing of --rm stays that somebody would read.
	written := sandbox.WriteExit(r.info.Dir, code)
	_, told := r.client.SandboxEnded(context.WithoutCancel(ctx), api.SandboxExited{ID: r.info.ID, Code: code})
	if errors.Is(told, api.ErrNotRunning) {
		told = nil
	}
	return code, errors.Join(err, written, told)
}

// runDetached has a copy of this program run a sandbox, and returns when its command runs.
func (a *App) runDetached(ctx context.Context, info api.SandboxInfo) error {
	socket, err := filepath.Abs(a.paths.Socket)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(info.Dir, logName), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		return fmt.Errorf("sandbox %q: log: %w", info.Name, err)
	}
	defer log.Close()
	// A lock or a pipe of the caller's would be held for as long as the sandbox runs.
	if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("start runner: %w", err)
	}
	report, toParent, err := os.Pipe()
	if err != nil {
		return err
	}
	defer report.Close()
	cmd := exec.Cmd{
		Path: "/proc/self/exe", Args: []string{runnerName, socket, info.ID}, Dir: "/",
		// It waits most of the time, in small memory.
		Env:    []string{"GOMAXPROCS=1", "GOGC=25"},
		Stdout: log, Stderr: log, ExtraFiles: []*os.File{toParent},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	err = cmd.Start()
	toParent.Close()
	if err != nil {
		return fmt.Errorf("start runner: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })()
	if err := readReport(report); err != nil {
		_ = cmd.Wait()
		return err
	}
	return cmd.Process.Release()
}

// The report of a runner is a line with an exit status, 0 when the command runs, and after another
// status a line that says why.

func readReport(r io.Reader) error {
	in := bufio.NewReader(r)
	first, err := in.ReadString('\n')
	if err != nil {
		return errors.New("the runner ended before the command ran; was it killed?")
	}
	status, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil {
		return fmt.Errorf("read the runner's report: %w", err)
	}
	if status == statusOK {
		return nil
	}
	why, err := io.ReadAll(in)
	if err != nil {
		return fmt.Errorf("read the runner's report: %w", err)
	}
	return &exitError{status, errors.New(strings.TrimSpace(string(why)))}
}

func writeReport(w io.Writer, err error) {
	if err == nil {
		fmt.Fprintln(w, statusOK)
		return
	}
	status := statusError
	if exit := new(exitError); errors.As(err, &exit) {
		status = exit.status
	}
	fmt.Fprintf(w, "%d\n%s\n", status, oneLine(err.Error()))
}

// isRunner reports whether this process is the copy.
func isRunner(name string) bool { return filepath.Base(name) == runnerName }

// runRunner is main under the name bpfnet-runner. The report goes to file descriptor 3.
func runRunner(ctx context.Context, args []string) int {
	unix.CloseOnExec(3)
	_ = os.WriteFile("/proc/self/comm", []byte(runnerName), 0) // for ps; else it is "exe"
	report := os.NewFile(3, "report")
	// A caller in the background ignores signals that are none of the command's business.
	signal.Notify(make(chan os.Signal, 1))
	signals := make(chan os.Signal, signalsHeld)
	signal.Notify(signals, sandbox.Forwarded()...)

	r, p, err := startDetached(ctx, args)
	writeReport(report, err)
	report.Close()
	if err != nil {
		return statusError
	}
	debug.FreeOSMemory()
	code, err := r.supervise(ctx, p, signals)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", runnerName, oneLine(err.Error()))
	}
	return code
}

func startDetached(ctx context.Context, args []string) (*runner, *sandbox.Process, error) {
	if len(args) != 2 {
		return nil, nil, fmt.Errorf("%s: want a socket and an ID; this is for \"bpfnet run -d\"", runnerName)
	}
	client, err := api.Dial(ctx, args[0])
	if err != nil {
		return nil, nil, err
	}
	info, err := client.Sandbox(ctx, api.Named{Name: args[1]})
	if err != nil {
		return nil, nil, err
	}
	r := &runner{client: client, info: info, std: [3]*os.File{nil, os.Stdout, os.Stderr}}
	p, err := r.start(ctx)
	if err != nil {
		return nil, nil, err
	}
	r.info.Env, r.info.Command = nil, nil
	return r, p, nil
}
