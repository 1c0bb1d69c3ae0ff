// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/daemon"
	"github.com/bpfnet/bpfnet/doctor"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/store"
)

// Where the one instance of most hosts lives. Both directories are nobody else's.
const (
	defaultState  = "/var/lib/bpfnet"
	defaultSocket = "/run/bpfnet/bpfnet.sock"
)

// App is one run of the command line. Every effect on the world outside is a field, so that all of it
// runs inside a test.
type App struct {
	Stdout, Stderr io.Writer
	Now            func() time.Time
	Std            [3]*os.File // what the commands in sandboxes get
	ProcStatus     string      // /proc/self/status: what this process may do
	ProcMounts     string      // /proc/mounts: where cgroup2 is
	Version        string
	Environ        func() []string
	Getwd          func() (string, error)

	RunDaemon      func(context.Context, daemon.Config) error
	Alive          func(pid int, startTime uint64) bool
	HasLink        func(ifindex int) bool
	OpenCounters   func(bpffs string) (counters, error)
	OpenEvents     func(bpffs string) (events, error)
	OpenCapture    func(bpffs string, f loader.CaptureFilter) (capture, error)
	RemovePrograms func(loader.Paths) error
	RestoreSysctls func([]store.Change) error
	RemoveOwn      func(st *store.Store, dir, cgroup string, force bool) error
	Handover       func(context.Context) (doctor.Handover, error)
	HandFlows      func(bpffs string) (int, error)
	CloseForward   func(context.Context, doctor.Handover) error

	// ReadConfig reads the configuration file.
	ReadConfig func(path string) ([]byte, error)
	// Hangups tells of every SIGHUP until stop is called. Optional: the configuration is read once.
	Hangups func() (told <-chan os.Signal, stop func())

	paths    daemon.Paths
	args     []string
	file     string // of the configuration
	daemon   *daemonFlags
	level    *slog.LevelVar
	settings []setting // effective ones of the command that runs
}

// counters is what the reading commands read of the pinned maps.
type counters interface {
	Drops() ([]maps.Drop, error)
	Fates() ([]maps.Fate, error)
	EndpointStats(slot uint16) (maps.EndpointCount, error)
	PortStats(slot uint16) (maps.PortCount, error)
	Fill() ([]maps.Fill, error)
	BusiestDestination(share float64) (maps.Busiest, error)
	Denied() ([]maps.Denied, error)
	EachFlow(each func(*maps.Flow) error) error
	Masquerade() (maps.Masquerade, error)
	Close()
}

func newApp() *App {
	a := &App{
		Stdout:     os.Stdout,
		Stderr:     os.Stderr,
		Now:        time.Now,
		Std:        [3]*os.File{os.Stdin, os.Stdout, os.Stderr},
		ProcStatus: "/proc/self/status",
		ProcMounts: "/proc/mounts",
		Version:    version,
		Environ:    os.Environ,
		Getwd:      os.Getwd,
		Alive:      alive,
		HasLink:    hasLink,
		RunDaemon:  daemon.Run,
		OpenCounters: func(bpffs string) (counters, error) {
			m, err := maps.Open(bpffs)
			if err != nil {
				return nil, err
			}
			return m, nil
		},
		OpenEvents:     openEvents,
		OpenCapture:    openCapture,
		RemovePrograms: func(p loader.Paths) error { return loader.Cleanup(p, netdev.Clsact{}) },
		RemoveOwn:      removeOwn,
		RestoreSysctls: func(changes []store.Change) error {
			back := make([]netdev.Change, 0, len(changes))
			for _, c := range changes {
				back = append(back, netdev.Change(c))
			}
			return netdev.Restore(back)
		},
		ReadConfig:   os.ReadFile,
		Hangups:      hangups,
		HandFlows:    handFlows,
		CloseForward: closeForward,
	}
	a.Handover = a.handover
	return a
}

// The exit statuses. A usage error changes nothing and has looked at nothing. Run and exec have those of
// their command besides.
const (
	statusOK       = 0
	statusError    = 1
	statusUsage    = 2
	statusDisagree = 3 // explain: policy and the data path contradict each other
)

// usageError is an error in the command line itself.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitError ends the process with a status of its own. Without an error, nothing is said.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.status)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// Run runs one command line and returns its exit status. An error is exactly one line on Stderr.
func (a *App) Run(ctx context.Context, args []string) int {
	a.args = append([]string{}, args...) // nil would be the process's own
	root := a.command()
	root.SetArgs(a.args)
	root.SetOut(a.Stdout)
	root.SetErr(a.Stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return statusOK
	}
	status := statusError
	var exit *exitError
	if errors.As(err, &exit) {
		status = exit.status
		if exit.err == nil {
			return status
		}
	}
	line := root.Name() + ": "
	if cmd != root {
		line += strings.TrimPrefix(cmd.CommandPath(), root.Name()+" ") + ": "
	}
	line += oneLine(err.Error())
	if errors.As(err, &usageError{}) {
		status = statusUsage
		line += fmt.Sprintf("; see \"%s --help\"", cmd.CommandPath())
	}
	fmt.Fprintln(a.Stderr, line)
	return status
}

// oneLine joins the lines of an error that has several.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

func (a *App) command() *cobra.Command {
	a.level = new(slog.LevelVar)
	root := &cobra.Command{
		Use:                   "bpfnet",
		DisableFlagsInUseLine: true,
		Short:                 "Container networking in eBPF, without iptables and docker-proxy",
		Long: `Container networking in eBPF, without iptables and docker-proxy.

"bpfnet daemon" takes the data path of a Docker Engine over whose iptables are
off. Without Docker, two commands give a container network: the daemon, and in
another terminal a sandbox, which is a process in a network of its own:

  bpfnet daemon --docker off
  bpfnet run -d -p 8080:8000 python3 -m http.server

The commands that read (stats, status, top, drops, flows, nat, capture, shield, ps,
port, logs, doctor, network ls and inspect) work with the daemon down too.`,
		SilenceErrors:     true,
		SilenceUsage:      true,
		DisableAutoGenTag: true,
		Args:              noSuchCommand,
		RunE:              showHelp,
	}
	root.Version = a.Version // which adds --version
	root.SetVersionTemplate("bpfnet {{.Version}}\n")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.CompletionOptions.HiddenDefaultCmd = true

	flags := root.PersistentFlags()
	flags.StringVar(&a.paths.State, "state", defaultState, "`directory` of what outlives the daemon")
	flags.StringVar(&a.paths.Socket, "socket", defaultSocket, "`path` of the daemon's socket")
	flags.StringVar(&a.paths.BPFFS, "bpffs", "/sys/fs/bpf/bpfnet", "`directory` of the pinned maps and links, below a bpffs mount")
	flags.StringVar(&a.paths.Cgroup, "cgroup", "", "cgroup2 `directory` whose processes reach published ports on this host (default: where cgroup2 is mounted)")
	flags.StringVar(&a.file, configFlag, defaultConfig, "configuration `file`; empty: none")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if err := a.configure(cmd); err != nil {
			return err
		}
		return a.located(a.checkPaths())
	}

	root.AddCommand(
		a.daemonCommand(),
		a.configCommand(),
		a.statusCommand(),
		a.statsCommand(),
		a.topCommand(),
		a.dropsCommand(),
		a.flowsCommand(),
		a.natCommand(),
		a.explainCommand(),
		a.captureCommand(),
		a.doctorCommand(),
		a.networkCommand(),
		a.endpointCommand(),
		a.shieldCommand(),
		a.denyCommand(),
		a.runCommand(),
		a.createCommand(),
		a.startCommand(),
		a.stopCommand(),
		a.waitCommand(),
		a.logsCommand(),
		a.psCommand(),
		a.rmCommand(),
		a.execCommand(),
		a.portCommand(),
		a.publishCommand(),
		a.unpublishCommand(),
		a.takeoverCommand(),
		a.cleanupCommand(),
		a.versionCommand(),
	)
	root.InitDefaultHelpCmd()
	return root
}

func (a *App) checkPaths() error {
	for _, p := range []struct{ flag, value string }{
		{"--state", a.paths.State}, {"--socket", a.paths.Socket}, {"--bpffs", a.paths.BPFFS},
	} {
		if p.value == "" {
			return usagef("%s: empty path", p.flag)
		}
	}
	return nil
}

func (a *App) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version",
		Args:  exactArgs(),
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(a.Stdout, "bpfnet", a.Version)
			return err
		},
	}
}

// showHelp is what a command does that only holds others.
func showHelp(cmd *cobra.Command, _ []string) error { return cmd.Help() }

// noSuchCommand refuses the arguments of a command that only holds others.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		slices.Sort(near)
		return usagef("unknown command %q; did you mean %s?", args[0], strings.Join(near, ", "))
	}
	return usagef("unknown command %q", args[0])
}

// exactArgs wants one argument for each name.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usagef("missing %s", strings.Join(names[len(args):], " and "))
		case len(args) > len(names):
			return usagef("unexpected argument %q", args[len(names)])
		}
		return nil
	}
}

// atLeastArgs wants one argument for each name, and takes more of the last.
func atLeastArgs(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usagef("missing %s", strings.Join(names[len(args):], " and "))
		}
		return nil
	}
}

// outputFlag adds -o. The value is checked by the returned function.
func outputFlag(cmd *cobra.Command) func() (asJSON bool, err error) {
	var format string
	cmd.Flags().StringVarP(&format, "output", "o", "text", "`format`: text or json")
	return func() (bool, error) {
		switch format {
		case "text", "json":
			return format == "json", nil
		}
		return false, usagef("--output %q: want text or json", format)
	}
}
