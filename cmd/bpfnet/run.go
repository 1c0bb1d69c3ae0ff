// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/embedded"
	"github.com/bpfnet/bpfnet/sandbox"
)

// wishes are the flags that say what a sandbox is to be like.
type wishes struct {
	spec                                  api.SandboxSpec
	networks, publish, expose, dns, alias []string
	ip4, ip6                              string
}

func (w *wishes) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.SetInterspersed(false) // the command has flags of its own
	flags.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		switch name {
		case "net":
			name = "network"
		case "net-alias":
			name = "network-alias"
		}
		return pflag.NormalizedName(name)
	})
	flags.StringVar(&w.spec.Name, "name", "", "`name` of the sandbox (default: made up)")
	flags.StringVar(&w.spec.Hostname, "hostname", "", "`name` that it has for itself (default: the beginning of its ID)")
	flags.StringArrayVar(&w.networks, "network", nil, "`network` to be in, also written --net; repeatable; or host, none or container:NAME (default: bpfnet)")
	flags.StringVar(&w.ip4, "ip", "", "IPv4 `address` in the first network (default: the lowest that is free)")
	flags.StringVar(&w.ip6, "ip6", "", "IPv6 `address` in the first network (default: the lowest that is free)")
	flags.StringArrayVar(&w.alias, "network-alias", nil, "another `name` of it in the first network; repeatable")
	flags.StringArrayVarP(&w.publish, "publish", "p", nil, "`ports` to publish on this host, as "+publishForm+"; repeatable")
	flags.BoolVarP(&w.spec.PublishAll, "publish-all", "P", false, "publish each exposed port on a host port that is free")
	flags.StringArrayVar(&w.expose, "expose", nil, "`port` that -P publishes, as PORT[-END][/PROTO]; repeatable")
	flags.StringArrayVar(&w.dns, "dns", nil, "`address` of a name server, instead of this host's; repeatable")
	flags.BoolVar(&w.spec.AutoRemove, "rm", false, "remove the sandbox when it ends")
}

// parse reads what the flags and the arguments say.
func (w *wishes) parse(args []string) (api.SandboxSpec, error) {
	spec := w.spec
	spec.Command = args
	first := api.Attach{Aliases: w.alias}
	var errs [5]error
	first.IP4, errs[0] = parseAddr("--ip", w.ip4, ip4Family)
	first.IP6, errs[1] = parseAddr("--ip6", w.ip6, ip6Family)
	spec.Publish, errs[2] = parsePublished("--publish", w.publish)
	spec.Expose, errs[3] = parseExposed("--expose", w.expose)
	spec.DNS, errs[4] = parseAddrs("--dns", w.dns)
	if err := errors.Join(errs[:]...); err != nil {
		return spec, err
	}
	for i, word := range w.networks {
		mode, join, special, err := networkMode(word)
		switch {
		case err != nil:
			return spec, err
		case special && len(w.networks) > 1:
			return spec, fmt.Errorf("--network %s: goes with no other network; want it alone", word)
		case special:
			spec.Mode, spec.Join = mode, join
		case i == 0:
			first.Network = word
			spec.Networks = append(spec.Networks, first)
		default:
			spec.Networks = append(spec.Networks, api.Attach{Network: word})
		}
	}
	return spec, w.checkMode(&spec, first)
}

// networkMode tells whether a value of --network is no network, but one of Docker's other words.
func networkMode(word string) (mode, join string, special bool, err error) {
	switch word {
	case "":
		return "", "", false, errors.New("--network: empty name")
	case api.ModeHost, api.ModeNone:
		return word, "", true, nil
	}
	if other, ok := strings.CutPrefix(word, api.ModeContainer+":"); ok {
		if other == "" {
			return "", "", false, fmt.Errorf("--network %q: want container:NAME, with the name of a sandbox", word)
		}
		return api.ModeContainer, other, true, nil
	}
	return "", "", false, nil
}

// checkMode refuses what only a sandbox with networks can have.
func (w *wishes) checkMode(spec *api.SandboxSpec, first api.Attach) error {
	if spec.Mode == "" {
		if len(spec.Networks) == 0 && (first.IP4.IsValid() || first.IP6.IsValid() || len(first.Aliases) > 0) {
			// Of the network that there is always.
			first.Network = embedded.DefaultNetwork
			spec.Networks = []api.Attach{first}
		}
		return nil
	}
	for _, f := range []struct {
		flag string
		set  bool
	}{
		{"--ip", first.IP4.IsValid()},
		{"--ip6", first.IP6.IsValid()},
		{"--network-alias", len(first.Aliases) > 0},
		{"--publish", len(spec.Publish) > 0},
		{"--publish-all", spec.PublishAll},
		{"--hostname", spec.Hostname != "" && spec.Mode == api.ModeContainer},
		{"--dns", len(spec.DNS) > 0 && spec.Mode == api.ModeContainer},
	} {
		if f.set {
			return fmt.Errorf("%s: not with --network %s, which is no network of the sandbox's own; leave one of them out", f.flag, w.networks[0])
		}
	}
	return nil
}

func (a *App) runCommand() *cobra.Command {
	var (
		w      wishes
		detach bool
	)
	cmd := &cobra.Command{
		Use:   "run [flags] [--] COMMAND [ARG...]",
		Short: "Run a command in a sandbox",
		Long: `Run a command in a new sandbox: in a network namespace of its own, with an
interface and an address in each of its networks, and with its own hosts,
resolv.conf and hostname. There are no images: files, users and processes are
this host's.

Signals go to the command, and the exit status is the command's; 127 if there is
no such command, 126 if it cannot be executed. What it leaves running ends with
it. With -d it runs in the background, its output goes to "bpfnet logs", and the
sandbox's ID is printed as soon as the network carries its packets.`,
		Example: `  bpfnet run --rm ip addr
  bpfnet run -d --name web -p 8080:8000 python3 -m http.server
  bpfnet run --rm --network backend --ip 172.30.0.5 -- ping -c 2 172.30.0.1
  bpfnet run --rm --network container:web curl 127.0.0.1:8000`,
		Args: atLeastArgs("COMMAND"),
		RunE: func(cmd *cobra.Command, args []string) error {
			spec, err := w.parse(args)
			if err != nil {
				return err
			}
			return a.run(cmd.Context(), spec, detach)
		},
	}
	cmd.DisableFlagsInUseLine = true
	w.add(cmd)
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "run it in the background, and print the sandbox's ID")
	return cmd
}

func (a *App) createCommand() *cobra.Command {
	var w wishes
	cmd := &cobra.Command{
		Use:   "create [flags] [--] COMMAND [ARG...]",
		Short: "Make a sandbox, and start nothing",
		Long: `Make a sandbox and print its ID. "bpfnet start" runs its command, with the
environment and the working directory of now. Networks can be connected before.`,
		Example: `  bpfnet create --name web --network frontend -p 8080:8000 python3 -m http.server
  bpfnet network connect backend web
  bpfnet start web`,
		Args: atLeastArgs("COMMAND"),
		RunE: func(cmd *cobra.Command, args []string) error {
			spec, err := w.parse(args)
			if err != nil {
				return err
			}
			_, info, err := a.create(cmd.Context(), spec)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.Stdout, info.ID)
			return err
		},
	}
	cmd.DisableFlagsInUseLine = true
	w.add(cmd)
	return cmd
}

// create makes a sandbox of this process's environment and working directory. A command that is not
// there is told before anything is made.
func (a *App) create(ctx context.Context, spec api.SandboxSpec) (*api.Client, api.SandboxInfo, error) {
	var err error
	spec.Env = a.Environ()
	if spec.Dir, err = a.Getwd(); err != nil {
		return nil, api.SandboxInfo{}, fmt.Errorf("working directory: %w", err)
	}
	if _, err := sandbox.LookPath(spec.Command[0], spec.Env, spec.Dir); err != nil {
		return nil, api.SandboxInfo{}, commandError(err)
	}
	client, err := api.Dial(ctx, a.paths.Socket)
	if err != nil {
		return nil, api.SandboxInfo{}, err
	}
	info, err := client.CreateSandbox(context.WithoutCancel(ctx), spec)
	return client, info, err
}

// run makes a sandbox and starts it; what cannot be started is removed again.
func (a *App) run(ctx context.Context, spec api.SandboxSpec, detach bool) error {
	if err := a.checkCapabilities(runnerNeeds); err != nil {
		return err
	}
	client, info, err := a.create(ctx, spec)
	if err != nil {
		return err
	}
	var started bool
	if detach {
		err = a.runDetached(ctx, info)
		started = err == nil
	} else {
		started, err = a.runForeground(ctx, client, info)
	}
	if !started {
		_, removal := client.RemoveSandbox(context.WithoutCancel(ctx), api.SandboxRemoval{Name: info.ID, Force: true})
		var unknown *api.UnknownError
		if errors.As(removal, &unknown) || errors.Is(removal, api.ErrNotRunning) {
			removal = nil // it was one of --rm; or that has been said
		}
		return errors.Join(err, removal)
	}
	if detach {
		_, err = fmt.Fprintln(a.Stdout, info.ID)
	}
	return err
}

// runForeground runs a sandbox in this process. An error that has an exit status is the command's.
func (a *App) runForeground(ctx context.Context, client *api.Client, info api.SandboxInfo) (started bool, err error) {
	// From here on, they are for the command.
	signals := make(chan os.Signal, signalsHeld)
	signal.Notify(signals, sandbox.Forwarded()...)
	defer signal.Stop(signals)
	r := runner{client: client, info: info, std: a.Std}
	p, err := r.start(ctx)
	if err != nil {
		return false, err
	}
	code, err := r.supervise(ctx, p, signals)
	if code == statusOK && err == nil {
		return true, nil
	}
	return true, &exitError{code, err}
}

func (a *App) startCommand() *cobra.Command {
	var attach bool
	cmd := &cobra.Command{
		Use:   "start NAME...",
		Short: "Start sandboxes that were created, or have ended",
		Long: `Start sandboxes in the background, and print their names; or with -a one, like
"bpfnet run" without -d.`,
		Example: `  bpfnet start web
  bpfnet start -a batch`,
		Args: atLeastArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if attach && len(args) > 1 {
				return usagef("--attach: unexpected argument %q; want one sandbox", args[1])
			}
			if err := a.checkCapabilities(runnerNeeds); err != nil {
				return err
			}
			if attach {
				return a.startAttached(ctx, args[0])
			}
			err := a.each(ctx, args, func(client *api.Client, name string) error {
				info, err := a.ownSandbox(ctx, client, name, "start")
				if err != nil || info.Status == api.StatusRunning {
					return err
				}
				return a.runDetached(ctx, info)
			})
			if exit := new(exitError); errors.As(err, &exit) { // codes are the command's where it is attached
				return errors.New(err.Error())
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&attach, "attach", "a", false, "run it in the foreground")
	return cmd
}

func (a *App) startAttached(ctx context.Context, name string) error {
	client, err := api.Dial(ctx, a.paths.Socket)
	if err != nil {
		return err
	}
	info, err := a.ownSandbox(ctx, client, name, "start")
	if err != nil {
		return err
	}
	if info.Status == api.StatusRunning {
		return fmt.Errorf("sandbox %q: runs already; \"bpfnet logs -f %[1]s\" shows what it writes", info.Name)
	}
	_, err = a.runForeground(ctx, client, info)
	return err
}

// commandError gives the errors of a command that cannot be run the statuses that shells have for them.
func commandError(err error) error {
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		return &exitError{statusNotFound, err}
	case errors.Is(err, sandbox.ErrNotExecutable):
		return &exitError{statusNotExecutable, err}
	}
	return err
}

// environment is what the sandbox was made with. HOSTNAME is the sandbox's, as in a container.
func environment(info api.SandboxInfo) []string {
	if info.Hostname == "" {
		return info.Env
	}
	return append(info.Env[:len(info.Env):len(info.Env)], "HOSTNAME="+info.Hostname)
}
