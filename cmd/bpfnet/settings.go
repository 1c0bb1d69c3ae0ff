// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/bpfnet/bpfnet/config"
	"github.com/bpfnet/bpfnet/daemon"
	"github.com/bpfnet/bpfnet/netdev"
)

const (
	configFlag    = "config"
	defaultConfig = "/etc/bpfnet/config.yaml"
)

// live are the keys that a running daemon takes up on SIGHUP.
var live = []string{"allow-direct-routing", "bridge-accept-fwmark", "endpoint-flows", "log-level", "metrics-limit", "timeout"}

// Where a value comes from, the stronger first.
const (
	fromFlag        = "flag"
	fromEnvironment = "environment"
	fromFile        = "file"
	fromDefault     = "default"
)

// setting is a key with its effective value.
type setting struct {
	Key   string   `json:"key"`
	Value []string `json:"value"`
	From  string   `json:"from"`
	Where string   `json:"where,omitempty"` // the variable, or file and line
}

// keysOf are the keys that the file may have: the flags of the daemon and those of all commands.
func keysOf(root *cobra.Command) (keys []config.Key, flags map[string]*pflag.Flag) {
	flags = make(map[string]*pflag.Flag)
	add := func(f *pflag.Flag) {
		if f.Name == "help" || f.Name == configFlag || flags[f.Name] != nil {
			return
		}
		kind := config.Text
		switch f.Value.Type() {
		case "int":
			kind = config.Number
		case "bool":
			kind = config.Switch
		case "stringArray":
			kind = config.List
			if f.Name == "timeout" {
				kind = config.Pairs
			}
		}
		keys = append(keys, config.Key{Name: f.Name, Kind: kind})
		flags[f.Name] = f
	}
	root.PersistentFlags().VisitAll(add)
	for _, cmd := range root.Commands() {
		if cmd.Name() == "daemon" {
			cmd.LocalNonPersistentFlags().VisitAll(add)
		}
	}
	slices.SortFunc(keys, func(a, b config.Key) int { return strings.Compare(a.Name, b.Name) })
	return keys, flags
}

// configure gives the flags that the command line does not name their values from the environment and the
// file. Commands other than the daemon take no more than the paths, and mind no more of the file than that.
func (a *App) configure(cmd *cobra.Command) error {
	root := cmd.Root()
	if cmd.Parent() != nil && cmd.Parent().Name() == "config" {
		return nil // asks by itself
	}
	if usesNoPath(cmd) {
		return nil // and works whatever the file is like
	}
	isDaemon := cmd.Parent() == root && cmd.Name() == "daemon"
	keys, flags := keysOf(root)
	env := make(map[string]string)
	for _, e := range a.Environ() {
		if name, value, _ := strings.Cut(e, "="); value != "" {
			env[name] = value
		}
	}
	file, err := a.readFile(root, env, keys)
	if !isDaemon {
		err = keepErrors(err, func(e *config.Error) bool {
			flag, known := flags[e.Key]
			return e.Key == "" || known && !flag.Changed && env[config.Variable(e.Key)] == "" && root.PersistentFlags().Lookup(e.Key) != nil
		})
	}
	if err != nil {
		return err
	}
	a.settings = nil
	for _, key := range keys {
		flag := flags[key.Name]
		if !isDaemon && root.PersistentFlags().Lookup(key.Name) == nil {
			continue
		}
		s := setting{Key: key.Name, From: fromDefault}
		var words []string
		if v, ok := file[key.Name]; ok {
			s.From, s.Where, words = fromFile, fmt.Sprintf("%s:%d", a.file, v.Line), v.Words
		}
		if text, ok := env[config.Variable(key.Name)]; ok {
			s.From, s.Where = fromEnvironment, config.Variable(key.Name)
			if words, err = config.ParseVariable(key.Kind, text); err != nil {
				return fmt.Errorf("%s: %w", s.Where, err)
			}
		}
		if flag.Changed {
			s.From, s.Where = fromFlag, ""
		} else if s.From != fromDefault {
			if err := give(flag, words); err != nil {
				return fmt.Errorf("%s: %s: %w", s.Where, key.Name, err)
			}
		}
		if list, ok := flag.Value.(pflag.SliceValue); ok {
			s.Value = notNil(list.GetSlice())
		} else {
			s.Value = []string{flag.Value.String()}
		}
		a.settings = append(a.settings, s)
	}
	return nil
}

// usesNoPath says of a command that it has nothing to do with a daemon.
func usesNoPath(cmd *cobra.Command) bool {
	names := []string{"version", "help", "completion", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}
	return cmd.HasSubCommands() || slices.Contains(names, cmd.Name()) || slices.Contains(names, cmd.Parent().Name())
}

// keepErrors leaves those errors about a file away that do not matter.
func keepErrors(err error, matters func(*config.Error) bool) error {
	list := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		list = joined.Unwrap()
	}
	return errors.Join(slices.DeleteFunc(slices.Clone(list), func(err error) bool {
		var e *config.Error
		return errors.As(err, &e) && !matters(e)
	})...)
}

func give(f *pflag.Flag, words []string) error {
	if list, ok := f.Value.(pflag.SliceValue); ok {
		return list.Replace(words)
	}
	return f.Value.Set(words[0])
}

// readFile reads the configuration file. The usual one need not be there; one that was named must.
func (a *App) readFile(root *cobra.Command, env map[string]string, keys []config.Key) (map[string]config.Value, error) {
	named := root.PersistentFlags().Changed(configFlag)
	if path, ok := env[config.Variable(configFlag)]; ok && !named {
		a.file, named = path, true
	}
	if a.file == "" {
		return nil, nil
	}
	raw, err := a.ReadConfig(a.file)
	switch {
	case err == nil:
		return config.Parse(a.file, raw, keys, netdev.Nearest)
	case errors.Is(err, fs.ErrNotExist) && !named:
		a.file = ""
		return nil, nil
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("configuration %s: no such file; make it, or name another with --%s", a.file, configFlag)
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("configuration: %w; run as root, or go without it (--%s \"\")", err, configFlag)
	}
	return nil, fmt.Errorf("configuration: %w", err)
}

var aboutFlag = regexp.MustCompile(`^--([a-z-]+)`)

// located names the place that a wrong value comes from, if that is not the command line.
func (a *App) located(err error) error {
	if err == nil {
		return nil
	}
	m := aboutFlag.FindStringSubmatch(err.Error())
	if m == nil {
		return err
	}
	for _, s := range a.settings {
		if s.Key != m[1] || s.Where == "" {
			continue
		}
		rest := strings.TrimPrefix(err.Error(), m[0])
		if s.From == fromFile {
			return fmt.Errorf("%s: %s%s", s.Where, s.Key, rest)
		}
		return fmt.Errorf("%s%s", s.Where, rest)
	}
	return err
}

// hangups tells of SIGHUP, unless the caller wants it ignored.
func hangups() (<-chan os.Signal, func()) {
	told := make(chan os.Signal, 1)
	if signal.Ignored(syscall.SIGHUP) {
		return told, func() {}
	}
	signal.Notify(told, syscall.SIGHUP)
	return told, func() { signal.Stop(told) }
}

// runReloading runs the daemon, and reads the configuration again when told to.
func (a *App) runReloading(ctx context.Context, cfg daemon.Config) error {
	if a.Hangups == nil {
		return a.RunDaemon(ctx, cfg)
	}
	told, stop := a.Hangups()
	defer stop()
	changes := make(chan daemon.Live)
	cfg.Changes = changes
	ctx, cancel := context.WithCancel(ctx)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	work.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-told:
			}
			next, err := a.reload(ctx, cfg.Logger)
			if err != nil {
				cfg.Logger.Error("configuration not taken; the one before stays", "err", err)
				continue
			}
			select {
			case <-ctx.Done():
			case changes <- next:
			}
		}
	})
	return a.RunDaemon(ctx, cfg)
}

// reload goes through the same command line once more, up to where the daemon would start.
func (a *App) reload(ctx context.Context, log *slog.Logger) (daemon.Live, error) {
	again := *a
	again.Hangups = nil
	var next daemon.Config
	again.RunDaemon = func(_ context.Context, cfg daemon.Config) error {
		next = cfg
		return nil
	}
	root := again.command()
	root.SetArgs(a.args)
	if err := root.ExecuteContext(ctx); err != nil {
		return daemon.Live{}, err
	}
	var applied, restart []string
	for i, s := range again.settings {
		old := &a.settings[i] // the same keys, in order
		if slices.Equal(old.Value, s.Value) {
			continue
		}
		if slices.Contains(live, s.Key) {
			applied = append(applied, s.Key)
			*old = s
		} else {
			restart = append(restart, s.Key)
		}
	}
	a.level.Set(again.level.Level())
	log.Info("configuration read again", "applied", listed(applied), "needs_a_restart", listed(restart))
	return next.Live(), nil
}

func listed(keys []string) string {
	if len(keys) == 0 {
		return "none"
	}
	return strings.Join(keys, ",")
}

func (a *App) configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Check and show the configuration",
		Long: `Check and show the configuration.

Every flag of the daemon, and those of all commands, can be set in a file and in
the environment too. A flag is stronger than the environment, that is stronger
than the file, and that than the default. In the file, a key is the flag's name
without dashes before it; in the environment, it is BPFNET_ and the name in
capitals, with underscores.`,
		Args: noSuchCommand,
		RunE: showHelp,
	}
	check := &cobra.Command{
		Use:   "check",
		Short: "Check the configuration file and the environment",
		Long: `Check the configuration file and the environment as the daemon would read them. What
is wrong is named with file, line and key. Nothing is changed.`,
		Example: `  bpfnet config check && systemctl reload bpfnet`,
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			settings, file, err := a.effective(cmd)
			if err != nil {
				return err
			}
			n := 0
			for _, s := range settings {
				if s.From == fromFile {
					n++
				}
			}
			if file == "" {
				file = "no file"
			}
			_, err = fmt.Fprintf(a.Stdout, "%s: ok, %s\n", file, count(n, "effective key"))
			return err
		},
	}
	show := &cobra.Command{
		Use:   "show",
		Short: "Show the effective configuration, and where each value comes from",
		Long: `Show the values that a daemon without flags would start with, and where each comes
from. A daemon that runs may have been given other flags, or have read an earlier
file.`,
		Args: exactArgs(),
	}
	asJSON := outputFlag(show)
	show.RunE = func(cmd *cobra.Command, _ []string) error {
		jsonWanted, err := asJSON()
		if err != nil {
			return err
		}
		settings, _, err := a.effective(cmd)
		if err != nil {
			return err
		}
		if jsonWanted {
			return writeJSON(a.Stdout, settings)
		}
		var rows [][]string
		for _, s := range settings {
			from := s.From
			if s.Where != "" {
				from = s.Where
			}
			rows = append(rows, []string{s.Key, strings.Join(s.Value, ","), from})
		}
		return listing(a.Stdout, []string{"KEY", "VALUE", "FROM"}, rows)
	}
	cmd.AddCommand(check, show)
	return cmd
}

// effective is what a daemon would start with, given the flags of all commands that cmd has.
func (a *App) effective(cmd *cobra.Command) (settings []setting, file string, err error) {
	with := *a
	root := with.command()
	cmd.Root().PersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Changed {
			err = errors.Join(err, root.PersistentFlags().Set(f.Name, f.Value.String()))
		}
	})
	if err != nil {
		return nil, "", err
	}
	d, _, err := root.Find([]string{"daemon"})
	if err != nil {
		return nil, "", err
	}
	if err := with.configure(d); err != nil {
		return nil, "", err
	}
	if err := with.located(with.checkPaths()); err != nil {
		return nil, "", err
	}
	if _, _, err := with.daemon.config(); err != nil {
		err = with.located(err)
		var usage usageError
		if errors.As(err, &usage) {
			err = usage.error
		}
		return nil, "", err
	}
	return with.settings, with.file, nil
}
