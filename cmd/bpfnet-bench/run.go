// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/bpfnet/bpfnet/bench"
	"github.com/bpfnet/bpfnet/internal/lab"
)

const (
	statusFailed      = 1
	statusUsage       = 2
	statusInterrupted = 130
)

// What a run measures unless told otherwise.
const (
	rounds = 5
	window = 400 * time.Millisecond
)

var errInterrupted = errors.New("interrupted; the labs are gone")

// command is what the command line asks for.
type command struct {
	options bench.Options
	output  string // of JSON lines; empty: none
	bpfnet  string // the binary under test
	quote   string // an earlier result; empty: none
}

// run is the command line but for workers. It returns the exit status.
func run(args []string) int {
	c, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(os.Stderr, "bpfnet-bench:", err)
		return statusUsage
	}
	ctx, stop := interruptible()
	defer stop()
	err = c.run(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bpfnet-bench:", err)
	}
	switch {
	case errors.Is(err, errInterrupted):
		return statusInterrupted
	case err != nil:
		return statusFailed
	}
	return 0
}

// list is a flag of names with commas between them, which may be given more than once.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(s string) error {
	for _, name := range strings.Split(s, ",") {
		if name = strings.TrimSpace(name); name != "" {
			*l = append(*l, name)
		}
	}
	return nil
}

func parse(args []string) (command, error) {
	var c command
	o := &c.options
	f := flag.NewFlagSet("bpfnet-bench", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.Var((*list)(&o.Scenarios), "scenario", "`names` of what to measure, with commas between them; default: all")
	f.Var((*list)(&o.Modes), "mode", "`names` of the modes to measure, with commas between them; default: all")
	f.IntVar(&o.Rounds, "rounds", rounds, "`number` of samples of each")
	f.DurationVar(&o.Window, "window", window, "`time` that a sample of traffic takes, after its warm-up")
	f.BoolVar(&o.Quick, "quick", false, "five minutes: the traffic that the targets speak of, and host-only traffic")
	f.StringVar(&c.output, "o", "", "`file` for the results, as JSON lines")
	f.StringVar(&c.bpfnet, "bpfnet", "", "`path` of the bpfnet to measure; default: beside bpfnet-bench, else in PATH")
	f.StringVar(&c.quote, "quote", "", "an earlier `result` to quote in the table of targets where this one has nothing")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fmt.Printf("usage: bpfnet-bench [flags]\n%s\nMeasures bpfnet's data path and those that it replaces, in labs of its own. Needs root.\n\n", readerUsages())
			f.SetOutput(os.Stdout)
			f.PrintDefaults()
		}
		return c, err
	}
	switch {
	case f.NArg() > 0:
		return c, fmt.Errorf("unexpected argument %q: names follow --scenario and --mode", f.Arg(0))
	case o.Rounds < 1:
		return c, fmt.Errorf("--rounds %d: want at least 1", o.Rounds)
	case o.Window <= 0:
		return c, fmt.Errorf("--window %v: want a time above 0", o.Window)
	}
	if c.quote != "" { // before half an hour of measuring
		if _, err := bench.ReadFile(c.quote); err != nil {
			return c, fmt.Errorf("--quote: %w", err)
		}
	}
	return c, o.Check(bench.Groups())
}

// interruptible is a context that the terminal and the service manager end.
func interruptible() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-signals:
				fmt.Fprintln(os.Stderr, "\nbpfnet-bench: interrupted: taking the labs down")
				cancel(errInterrupted)
			case <-done:
				return
			}
		}
	}()
	return ctx, func() { signal.Stop(signals); close(done); cancel(nil) }
}

func (c command) run(ctx context.Context) (err error) {
	if c.bpfnet, err = findBpfnet(c.bpfnet); err != nil {
		return err
	}
	header, err := c.header(ctx)
	if err != nil {
		return err
	}
	if err := bench.Retire(); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	session, err := lab.Open(lab.Programs{Bpfnet: c.bpfnet, Tool: self})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, session.Close()) }()
	out, err := create(c.output)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.close(err == nil)) }()
	records, err := bench.NewWriter(out, header)
	if err != nil {
		return err
	}

	report := bench.Report{Header: header}
	lines := newLines(os.Stderr)
	if !c.options.Quick {
		fmt.Fprintf(os.Stderr, "bpfnet-bench: this takes up to %v\n", bench.Estimate(bench.Groups(), c.options).Round(time.Minute))
	}
	var log bytes.Buffer
	c.options.Progress, c.options.Log = lines, &log
	err = bench.Run(ctx, session, bench.Groups(), c.options, func(r bench.Record) error {
		report.Records = append(report.Records, r)
		return records.Record(r)
	})
	lines.end()
	if err != nil && !errors.Is(err, errInterrupted) {
		fmt.Fprintln(os.Stderr, lastLines(log.String(), 30))
	}
	if len(report.Records) > 0 {
		err = errors.Join(err, summary(os.Stdout, report, c.quote))
	}
	return err
}

// lastLines are the last n lines of a log: engines have much to say.
func lastLines(log string, n int) string {
	all := strings.Split(strings.TrimSpace(log), "\n")
	return strings.Join(all[max(0, len(all)-n):], "\n")
}

// findBpfnet is the binary under test.
func findBpfnet(path string) (string, error) {
	if path != "" {
		return path, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "bpfnet")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	path, err := exec.LookPath("bpfnet")
	if err != nil {
		return "", errors.New("no bpfnet beside bpfnet-bench, and none in PATH: make build, or say --bpfnet PATH")
	}
	return path, nil
}

// peers are the programs that labs need, with the arguments that make them tell their version; none
// where that is of no interest.
var peers = []struct{ name, version string }{
	{"/usr/sbin/dockerd", "--version"}, {"/usr/bin/docker", ""}, {"iptables", "--version"}, {"ip6tables", ""},
	{"iptables-save", ""}, {"ip6tables-save", ""}, {"nft", "--version"}, {"iperf3", "--version"}, {"busybox", ""},
	{"nsenter", ""}, {"taskset", ""}, {"ethtool", ""}, {"ip", ""},
}

// header describes the run. It fails when a program is missing.
func (c command) header(ctx context.Context) (bench.Header, error) {
	h := bench.Header{
		Started: time.Now().UTC().Truncate(time.Second),
		CPUs:    runtime.NumCPU(),
		Pinning: bench.Pinning(),
		Rounds:  c.options.Rounds,
		Quick:   c.options.Quick,
		Peers:   map[string]string{},
	}
	var missing []string
	for _, p := range peers {
		path, err := exec.LookPath(p.name)
		if err != nil {
			missing = append(missing, filepath.Base(p.name))
			continue
		}
		if p.version != "" {
			h.Peers[filepath.Base(p.name)] = firstLine(ctx, path, p.version)
		}
	}
	if len(missing) > 0 {
		return h, fmt.Errorf("missing on this machine: %s; scripts/deps.sh test installs what labs need", strings.Join(missing, ", "))
	}
	if h.Version = firstLine(ctx, c.bpfnet, "version"); h.Version == "" {
		return h, fmt.Errorf("%s version says nothing: is it bpfnet?", c.bpfnet)
	}
	var uts syscall.Utsname
	if err := syscall.Uname(&uts); err != nil {
		return h, err
	}
	for _, b := range uts.Release {
		if b == 0 {
			break
		}
		h.Kernel += string(rune(byte(b)))
	}
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return h, err
	}
	for line := range strings.Lines(string(info)) {
		if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "model name" {
			h.CPU = strings.TrimSpace(value)
			break
		}
	}
	return h, nil
}

func firstLine(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line)
}

// results is a file of results. Until it is complete, its name ends in ".partial".
type results struct {
	f    *os.File
	name string
}

func create(name string) (*results, error) {
	if name == "" {
		return &results{}, nil
	}
	f, err := os.Create(name + ".partial")
	if err != nil {
		return nil, fmt.Errorf("-o: %w", err)
	}
	return &results{f, name}, nil
}

func (r *results) Write(b []byte) (int, error) {
	if r.f == nil {
		return len(b), nil
	}
	return r.f.Write(b)
}

// close gives a complete file its name. Of an incomplete one, what there is stays, unless that is the
// header alone.
func (r *results) close(complete bool) error {
	if r.f == nil {
		return nil
	}
	written, err := os.ReadFile(r.f.Name())
	if err := errors.Join(err, r.f.Close()); err != nil {
		return err
	}
	switch {
	case complete:
		return os.Rename(r.f.Name(), r.name)
	case bytes.Count(written, []byte("\n")) < 2:
		return os.Remove(r.f.Name())
	}
	fmt.Fprintf(os.Stderr, "bpfnet-bench: what was measured is in %s; what was not can be, by --scenario, and put in by bpfnet-bench merge\n", r.f.Name())
	return nil
}
