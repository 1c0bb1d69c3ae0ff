// SPDX-License-Identifier: Apache-2.0

package clitest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// With -update, a script's "says ?" becomes what was said: to be read before it is committed.
var update = flag.Bool("update", false, "write into the scripts what is said where they have a ?")

func TestMain(m *testing.M) { lab.Main(m) }

// stage is what scripts play on: one lab and one daemon for all of them, one after another.
type stage struct {
	t        *testing.T // of the script that is on
	l        *lab.Lab
	b        *lab.Bpfnet
	listener *lab.Process // the last one
	down     bool         // the daemon is
	said     []string     // for -update, in the order of the script
}

// Needs root.
func TestScripts(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	// Docker's subnet for its default network, so that addresses are those of its tutorials.
	s := &stage{l: l, b: l.StartBpfnet(t, nil, "--default-subnet", "172.17.0.0/16", "--default-subnet", "fd00:d0c::/64")}
	s.play(t, "testdata")
}

// Needs root. The state directory is on a file system that scripts fill to the last byte.
func TestDiskFull(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	state := filepath.Join(l.Dir, "state") // where the daemon's will be
	require.NoError(t, os.Mkdir(state, 0o700))
	require.NoError(t, syscall.Mount("bpfnet-clitest", state, "tmpfs", 0, "size=4m"))
	t.Cleanup(func() {
		if err := syscall.Unmount(state, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", state, err)
		}
	})
	s := &stage{l: l, b: l.StartBpfnet(t, nil)}
	s.play(t, "testdata/full")
}

// Every command has a script of its name.
func TestEveryCommandHasAScript(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	b := l.StartBpfnet(t, nil)
	var walk func(command ...string)
	entry := regexp.MustCompile(`(?m)^  ([a-z]+) +\S`)
	walk = func(command ...string) {
		help := b.MustCLI(t, append(command, "--help")...)
		_, list, group := strings.Cut(help, "Available Commands:\n")
		list, _, _ = strings.Cut(list, "\n\n")
		if !group {
			name := filepath.Join("testdata", strings.Join(command, "-")+".txtar")
			script, err := os.ReadFile(name)
			if assert.NoError(t, err) {
				assert.Contains(t, string(script), "bpfnet "+strings.Join(command, " ")+" --help\n", name)
			}
		}
		for _, m := range entry.FindAllStringSubmatch(list, -1) {
			if m[1] != "help" {
				walk(append(command[:len(command):len(command)], m[1])...)
			}
		}
	}
	walk()
}

// shim runs scripts one after another: they share a host.
type shim struct{ *testing.T }

func (s shim) Parallel()     {}
func (s shim) Verbose() bool { return testing.Verbose() }
func (s shim) Run(name string, f func(testscript.T)) {
	s.T.Run(name, func(t *testing.T) { f(shim{t}) })
}

func (s *stage) play(t *testing.T, dir string) {
	t.Helper()
	empty := s.all(t)
	testscript.RunT(shim{t}, testscript.Params{
		Dir:                dir,
		RequireUniqueNames: true,
		ContinueOnError:    *update,
		Setup: func(env *testscript.Env) error {
			st := env.T().(shim).T
			s.t = st
			env.Setenv("STATE", s.b.State)
			env.Setenv("SOCKET", s.b.Socket)
			env.Setenv("BIG", strings.Repeat("x", 100_000))
			s.said = nil
			env.Defer(func() {
				if *update {
					s.write(st, filepath.Join(dir, filepath.Base(st.Name())+".txtar"))
				}
				if s.down {
					s.b.Start(st)
					s.down = false
				}
				s.clear(st)
				lab.Eventually(st, 10*time.Second, "the host is as before the script", func() bool {
					return s.all(st) == empty
				})
			})
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"bpfnet": s.bpfnet, "usage": s.usage, "exits": s.exits, "says": s.says, "prints": prints, "keep": keep,
			"listen": s.listen, "hush": s.hush, "host": s.host, "client": s.client, "ready": s.ready, "daemon": s.daemon,
			"fill": s.fill, "free": s.free,
		},
	})
}

// clear removes what a script has made.
func (s *stage) clear(t *testing.T) {
	t.Helper()
	snap := s.b.Snapshot(t)
	for _, p := range snap.Allowed {
		s.b.MustCLI(t, "network", "disallow", p.A, p.B)
	}
	for _, sb := range snap.Sandboxes {
		s.b.MustCLI(t, "rm", "--force", sb.Name)
	}
	for _, n := range snap.Networks {
		if n.Name != "bpfnet" {
			s.b.MustCLI(t, "network", "rm", n.Name)
		}
	}
}

// all is what the host has of bpfnet, as one text.
func (s *stage) all(t *testing.T) string {
	t.Helper()
	raw, err := json.MarshalIndent(map[string]any{
		"look": s.look(t), "attachments": s.b.Snapshot(t).Attachments, "belongings": s.b.Belongings(t),
	}, "", " ")
	require.NoError(t, err)
	return string(raw)
}

// look is what a command could change and is there to stay when it has returned, as one text: the
// daemon tidies up behind earlier commands meanwhile.
func (s *stage) look(t *testing.T) string {
	t.Helper()
	snap := s.b.Snapshot(t)
	var addresses []string // device and address; a bridge goes down after its last port
	for line := range strings.Lines(s.l.Host.MustRun(t, "ip", "-o", "addr", "show", "scope", "global")) {
		fields := strings.Fields(line)
		addresses = append(addresses, fields[1]+" "+fields[3])
	}
	raw, err := json.MarshalIndent(map[string]any{
		"networks": snap.Networks, "sandboxes": snap.Sandboxes, "endpoints": snap.Endpoints, "ports": snap.Ports,
		"allowed": snap.Allowed, "addresses": addresses,
	}, "", " ")
	require.NoError(t, err)
	return string(raw)
}

// run runs bpfnet with its output for the script to see, and returns its exit status.
func (s *stage) run(ts *testscript.TestScript, args []string) (status int, out, errs string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := s.b.Command(ctx, args...)
	cmd.Dir = ts.MkAbs(".")
	cmd.Stdin = strings.NewReader("")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	fmt.Fprint(ts.Stdout(), stdout.String())
	fmt.Fprint(ts.Stderr(), stderr.String())
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		ts.Fatalf("%v: %s", err, stderr.String())
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

func (s *stage) bpfnet(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		s.refused(ts, 1, args)
		return
	}
	status, _, errs := s.run(ts, args)
	if status != 0 || errs != "" {
		ts.Fatalf("exit status %d: %s", status, errs)
	}
}

var oneLine = regexp.MustCompile(`^bpfnet: [^\n]+\n$`)

// refused runs a command that must fail, say why in a line, and change nothing.
func (s *stage) refused(ts *testscript.TestScript, want int, args []string) string {
	before := s.look(s.t)
	status, out, errs := s.run(ts, args)
	switch {
	case status != want:
		ts.Fatalf("exit status %d, want %d", status, want)
	case out != "":
		ts.Fatalf("an error, and output: %s", out)
	case !oneLine.MatchString(errs):
		ts.Fatalf("want one line that begins with \"bpfnet: \": %s", errs)
	}
	if after := s.look(s.t); after != before {
		ts.Fatalf("it has changed something:\n%s", difference(before, after))
	}
	return errs
}

// difference are the lines that only one of two texts has.
func difference(before, after string) string {
	var out []string
	only := func(mark, a, b string) {
		have := make(map[string]int)
		for line := range strings.Lines(b) {
			have[line]++
		}
		for line := range strings.Lines(a) {
			if have[line]--; have[line] < 0 {
				out = append(out, mark+line)
			}
		}
	}
	only("-", before, after)
	only("+", after, before)
	return strings.Join(out, "")
}

func (s *stage) usage(ts *testscript.TestScript, neg bool, args []string) {
	if neg {
		ts.Fatalf("usage is an error as it is")
	}
	if errs := s.refused(ts, 2, args); !strings.HasSuffix(errs, " --help\"\n") {
		ts.Fatalf("it does not say where help is: %s", errs)
	}
}

func (s *stage) exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits STATUS ARGS...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	if status, _, errs := s.run(ts, args[1:]); status != want {
		ts.Fatalf("exit status %d, want %d: %s", status, want, errs)
	}
}

// says and prints compare whole outputs; testscript's own stderr and stdout search in them.
func (s *stage) says(ts *testscript.TestScript, neg bool, args []string) {
	if *update && len(args) == 1 && args[0] == "?" {
		s.said = append(s.said, strings.TrimSuffix(ts.ReadFile("stderr"), "\n"))
		return
	}
	compare(ts, neg, "stderr", args)
}

func prints(ts *testscript.TestScript, neg bool, args []string) { compare(ts, neg, "stdout", args) }

func compare(ts *testscript.TestScript, neg bool, stream string, args []string) {
	if neg {
		ts.Fatalf("want the lines that there are")
	}
	want := strings.Join(args, "\n")
	if got := strings.TrimSuffix(ts.ReadFile(stream), "\n"); got != want {
		ts.Fatalf("%s:\n got %s\nwant %s", stream, got, want)
	}
}

// write puts what was said in the places of the question marks.
func (s *stage) write(t *testing.T, path string) {
	t.Helper()
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	parts := strings.Split(string(raw), "\nsays ?\n")
	if len(parts) != len(s.said)+1 {
		t.Errorf("%s: %d question marks, %d answers", path, len(parts)-1, len(s.said))
		return
	}
	out := parts[0]
	for i, said := range s.said {
		said = strings.ReplaceAll(said, "'", "''")
		// What is another one each time.
		said = strings.NewReplacer(s.b.Socket, "'$SOCKET'", s.b.State, "'$STATE'").Replace(said)
		said = regexp.MustCompile(`\(pid \d+\)`).ReplaceAllString(said, "(pid '$$LISTENER')")
		out += "\nsays '" + said + "'\n" + parts[i+1]
	}
	require.NoError(t, os.WriteFile(path, []byte(out), 0o644))
}

func keep(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 || neg {
		ts.Fatalf("want one name")
	}
	line, _, _ := strings.Cut(ts.ReadFile("stdout"), "\n")
	if line == "" {
		ts.Fatalf("nothing to keep")
	}
	ts.Setenv(args[0], line)
}

func (s *stage) listen(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: listen PROTO PORT")
	}
	s.listener = s.l.Host.Serve(s.t, append([]string{"--" + args[0], args[1]}, args[2:]...)...)
	ts.Setenv("LISTENER", strconv.Itoa(s.listener.PID()))
}

func (s *stage) hush(*testscript.TestScript, bool, []string) { s.listener.Kill() }

func (s *stage) host(ts *testscript.TestScript, neg bool, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := s.l.HostCommand(ctx, args[0], args[1:]...)
	if args[0] == "labtool" {
		cmd = s.l.HostCommand(ctx, s.l.Tool, args[1:]...)
	}
	cmd.Dir = ts.MkAbs(".")
	cmd.Stdout, cmd.Stderr = ts.Stdout(), ts.Stderr()
	if err := cmd.Run(); (err != nil) != neg {
		ts.Fatalf("%s: %v", args[0], err)
	}
}

func (s *stage) client(ts *testscript.TestScript, neg bool, args []string) {
	r, err := s.l.Client.Get(args...)
	fmt.Fprintf(ts.Stdout(), "%+v\n", r)
	if (err != nil) != neg {
		ts.Fatalf("%v", err)
	}
}

// ready waits until the server in a sandbox listens.
func (s *stage) ready(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: ready SANDBOX")
	}
	s.b.WaitLog(s.t, args[0], "ready")
}

func (s *stage) daemon(ts *testscript.TestScript, neg bool, args []string) {
	switch {
	case neg || len(args) != 1:
		ts.Fatalf("usage: daemon start|stop")
	case args[0] == "start":
		s.b.Start(s.t)
		s.down = false
	case args[0] == "stop":
		s.b.Stop(s.t)
		s.down = true
	}
}

// fill takes all that is free of the state directory's file system. What a file that is being replaced takes for a moment would be room again
// behind it, so the daemon has to be done with writing first.
func (s *stage) fill(ts *testscript.TestScript, _ bool, _ []string) {
	lab.Eventually(s.t, 30*time.Second, "nothing is written any more", func() bool {
		for _, name := range []string{"state.db", api.SnapshotName} {
			info, err := os.Stat(filepath.Join(s.b.State, name))
			if err != nil || time.Since(info.ModTime()) < time.Second {
				return false
			}
		}
		return true
	})
	f, err := os.Create(filepath.Join(s.b.State, "ballast"))
	ts.Check(err)
	defer f.Close()
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, syscall.ENOSPC) {
		ts.Fatalf("fill: %v", err)
	}
}

func (s *stage) free(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Check(os.Remove(filepath.Join(s.b.State, "ballast")))
}
