// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var builtBpfnet = build("cmd/bpfnet", "bpfnet")

func bpfnetBinary() (string, error) {
	if given.Bpfnet != "" {
		return given.Bpfnet, nil
	}
	return builtBpfnet()
}

// Bpfnet is the daemon under test, a process of the lab's host.
type Bpfnet struct {
	// State is the daemon's directory on disk, Socket its API.
	State, Socket string

	lab    *Lab
	binary string
	via    []string // program and arguments that come before the daemon's own
	tools  string   // directory of the image's programs, PATH of all commands
	args   []string
	extra  []string // of Use
	proc   *Process
	notify *net.UnixConn // what the service manager would listen on
}

// StartBpfnet builds bpfnet, once per test process, starts its daemon in the host's
// namespace and waits until it has told the service manager that it is ready. Without an
// engine (nil) it serves its own networks only. Extra arguments go behind the lab's own.
// It ends with the test, and its sandboxes with it; its log is part of the output of a
// test that failed.
func (l *Lab) StartBpfnet(t testing.TB, d *Docker, extra ...string) *Bpfnet {
	t.Helper()
	return l.StartBpfnetVia(t, nil, d, extra...)
}

// StartBpfnetVia is StartBpfnet by way of another program, which executes what follows its own arguments.
func (l *Lab) StartBpfnetVia(t testing.TB, via []string, d *Docker, extra ...string) *Bpfnet {
	t.Helper()
	binary, err := bpfnetBinary()
	if err != nil {
		t.Fatal(err)
	}
	tools, err := toolsDir()
	if err != nil {
		t.Fatal(err)
	}
	b := &Bpfnet{
		State:  filepath.Join(l.Dir, "state"),
		Socket: filepath.Join(l.Dir, "bpfnet.sock"),
		lab:    l,
		binary: binary,
		via:    via,
		tools:  tools,
	}
	engine := "off"
	if d != nil {
		engine = d.Host
	}
	b.args = slices.Concat(b.flags(), []string{"daemon", "--docker", engine}, extra)
	t.Cleanup(func() {
		b.closeNotify()
		if b.proc == nil {
			return
		}
		b.proc.Kill()
		b.endSandboxes(t)
		if t.Failed() {
			t.Logf("bpfnet: %s\n%s", tail(b.proc.stdout), tail(b.proc.stderr))
		}
	})
	b.Start(t)
	return b
}

// flags are those that tell every command which daemon is meant. They stand before the
// command's own words: behind some commands, another program's command line begins.
func (b *Bpfnet) flags() []string {
	return []string{"--state", b.State, "--socket", b.Socket, "--bpffs", b.lab.BPFFS, "--cgroup", b.lab.Cgroup}
}

// Start starts the daemon again after Stop or Kill, and waits until it is ready. It
// fails the test at once when the daemon ends, and after thirty seconds otherwise.
func (b *Bpfnet) Start(t testing.TB) {
	t.Helper()
	b.Launch(t)
	b.WaitReady(t)
}

// Launch is Start without the waiting.
func (b *Bpfnet) Launch(t testing.TB) {
	t.Helper()
	b.closeNotify()
	notify := filepath.Join(b.lab.Dir, "notify.sock")
	_ = os.Remove(notify)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	b.notify = conn
	words := slices.Concat(b.via, []string{b.binary}, b.args, b.extra)
	cmd := b.lab.Host.command(words[0], words[1:]...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify)
	if b.proc, err = b.lab.start(cmd, "bpfnet"); err != nil {
		t.Fatal(err)
	}
}

// StartVia is Start by way of another program, as [Lab.StartBpfnetVia] does it, for a daemon that may refuse: the error
// is what it said. Later starts go that way too.
func (b *Bpfnet) StartVia(t testing.TB, via ...string) error {
	t.Helper()
	b.via = via
	b.Launch(t)
	return b.awaitReady(t)
}

// WaitReady waits until the daemon that Launch has started is ready, as Start does.
func (b *Bpfnet) WaitReady(t testing.TB) {
	t.Helper()
	if err := b.awaitReady(t); err != nil {
		t.Fatal(err)
	}
}

// awaitReady fails when the daemon ends before it is ready.
func (b *Bpfnet) awaitReady(t testing.TB) (ended error) {
	t.Helper()
	buf := make([]byte, 4096)
	Eventually(t, 30*time.Second, "bpfnet says READY=1", func() bool {
		exited := b.proc.Exited() // before the look, so that no message is missed
		for {
			_ = b.notify.SetReadDeadline(time.Now().Add(time.Millisecond))
			n, err := b.notify.Read(buf)
			if err != nil {
				break
			}
			for line := range strings.Lines(string(buf[:n])) {
				if strings.TrimSpace(line) == "READY=1" {
					return true
				}
			}
		}
		if exited {
			ended = fmt.Errorf("bpfnet ended before it was ready: %w: %s", b.proc.err, tail(b.proc.stderr))
		}
		return exited
	})
	return ended
}

func (b *Bpfnet) closeNotify() {
	if b.notify != nil {
		b.notify.Close()
	}
}

// Kill ends the daemon with SIGKILL. What it has loaded and pinned stays.
func (b *Bpfnet) Kill() { b.proc.Kill() }

// Stop ends the daemon with SIGTERM and waits for it. An exit status other than zero
// fails the test.
func (b *Bpfnet) Stop(t testing.TB) {
	t.Helper()
	_ = b.proc.Signal(syscall.SIGTERM)
	if err := b.proc.Wait(20 * time.Second); err != nil {
		_ = b.proc.Signal(syscall.SIGQUIT) // what it waits for, in its log
		_ = b.proc.Wait(5 * time.Second)
		t.Fatalf("stop bpfnet: %v\n%s", err, b.proc.Stderr())
	}
}

// Restart is Stop and Start.
func (b *Bpfnet) Restart(t testing.TB) {
	t.Helper()
	b.Stop(t)
	b.Start(t)
}

// Binary is the path of the binary under test.
func (b *Bpfnet) Binary() string { return b.binary }

// PID is the daemon's process id.
func (b *Bpfnet) PID() int { return b.proc.PID() }

// Log is what the daemon has logged since it was last started.
func (b *Bpfnet) Log() string { return b.proc.Stderr() + b.proc.Stdout() }

// Command prepares a command of bpfnet, as [Bpfnet.CLI] runs it. PATH, which sandboxes
// inherit, leads to the programs of [Image] and to nothing else.
func (b *Bpfnet) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := b.lab.Host.Command(ctx, b.binary, slices.Concat(b.flags(), args)...)
	cmd.Env = append(os.Environ(), "PATH="+b.tools)
	return cmd
}

// CLI runs a command of bpfnet against this daemon's state, socket, pins and cgroup, as
// a process of the host. It works with the daemon down as far as bpfnet does. The error
// carries what the command wrote to its standard error.
func (b *Bpfnet) CLI(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return run(b.Command(ctx, args...))
}

// MustCLI is CLI for commands that must succeed.
func (b *Bpfnet) MustCLI(t testing.TB, args ...string) string {
	t.Helper()
	out, err := b.CLI(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// StatsJSON decodes the output of "bpfnet stats -o json" into v.
func (b *Bpfnet) StatsJSON(t testing.TB, v any) {
	t.Helper()
	out := b.MustCLI(t, "stats", "-o", "json")
	if err := json.Unmarshal([]byte(out), v); err != nil {
		t.Fatal(errors.Join(err, errors.New(out)))
	}
}
