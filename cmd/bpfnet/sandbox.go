// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/sandbox"
)

// The verbs on sandboxes that there are. Those that start one are in run.go.

// stopMost is the longest grace that the daemon can wait for within one request.
const stopMost = 20 * time.Second

func (a *App) stopCommand() *cobra.Command {
	var seconds int
	cmd := &cobra.Command{
		Use:   "stop NAME...",
		Short: "End sandboxes",
		Long: `End sandboxes, and print their names: SIGTERM to the command, and after a time of
grace SIGKILL to all that is left. It returns when their interfaces, addresses
and published ports are free again.`,
		Example: `  bpfnet stop web
  bpfnet stop -t 60 db`,
		Args: atLeastArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.each(cmd.Context(), args, func(client *api.Client, name string) error {
				return a.stop(cmd.Context(), client, name, time.Duration(seconds)*time.Second)
			})
		},
	}
	cmd.Flags().IntVarP(&seconds, "time", "t", 10, "`seconds` of grace; negative: without end")
	return cmd
}

func (a *App) stop(ctx context.Context, client *api.Client, name string, grace time.Duration) error {
	if grace < 0 || grace > stopMost {
		if err := a.endPatiently(ctx, client, name, grace); err != nil {
			return err
		}
		grace = 0
	}
	_, err := client.StopSandbox(ctx, api.SandboxStop{Name: name, Grace: grace})
	return err
}

// endPatiently sends SIGTERM and waits for the end of the process, or of the grace.
func (a *App) endPatiently(ctx context.Context, client *api.Client, name string, grace time.Duration) error {
	info, err := a.ownSandbox(ctx, client, name, "stop")
	if err != nil || info.Status != api.StatusRunning {
		return err
	}
	id, err := sandbox.Identify(info.PID)
	if errors.Is(err, sandbox.ErrGone) || err == nil && id.StartTime != info.StartTime {
		return nil
	}
	if err != nil {
		return err
	}
	w, err := sandbox.Open(id)
	if errors.Is(err, sandbox.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	if err := w.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, sandbox.ErrGone) {
		return fmt.Errorf("sandbox %q: send SIGTERM: %w", name, err)
	}
	var over <-chan time.Time // never, without an end
	if grace > 0 {
		timer := time.NewTimer(grace)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case <-w.Done():
	case <-over:
	case <-ctx.Done():
		return fmt.Errorf("sandbox %q: still runs: %w", name, context.Cause(ctx))
	}
	return nil
}

// ownSandbox asks for a sandbox. Where the name is a container's of Docker, the error has Docker's command
// for the verb.
func (a *App) ownSandbox(ctx context.Context, client *api.Client, name, verb string) (api.SandboxInfo, error) {
	info, err := client.Sandbox(ctx, api.Named{Name: name})
	if err == nil {
		return info, nil
	}
	if row, readErr := a.readSandbox(name); readErr == nil && row.Source == sourceDocker {
		return info, errOfDocker(row.Name, verb)
	}
	return info, err
}

// errOfDocker refuses to do a verb to a container of Docker.
func errOfDocker(name, verb string) error {
	return fmt.Errorf("sandbox %q: is a container of Docker; use \"docker %s %[1]s\"", name, verb)
}

func (a *App) waitCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "wait NAME...",
		Short:   "Wait for the end of sandboxes",
		Long:    `Wait until sandboxes have ended, one after the other, and print their exit codes.`,
		Example: "  bpfnet wait batch",
		Args:    atLeastArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := api.Dial(cmd.Context(), a.paths.Socket)
			if err != nil {
				return err
			}
			var errs []error
			for _, name := range args {
				code, err := waitSandbox(cmd.Context(), client, name)
				if err == nil {
					_, err = fmt.Fprintln(a.Stdout, code)
				}
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		},
	}
}

func waitSandbox(ctx context.Context, client *api.Client, name string) (code int, err error) {
	for {
		w, err := client.WaitSandbox(ctx, api.Named{Name: name})
		if err != nil || !w.Running {
			return w.Code, err
		}
	}
}

func (a *App) rmCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove sandboxes",
		Long: `Remove sandboxes with their logs, and print their names. One that runs is refused,
or ended first with -f.`,
		Example: `  bpfnet rm web
  bpfnet rm -f web db`,
		Args: atLeastArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.each(cmd.Context(), args, func(client *api.Client, name string) error {
				_, err := client.RemoveSandbox(cmd.Context(), api.SandboxRemoval{Name: name, Force: force})
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "end those that run, with SIGKILL")
	return cmd
}

func (a *App) publishCommand() *cobra.Command {
	return a.portsCommand("publish", "Publish ports of a running sandbox",
		`Publish ports of a running sandbox, now and whenever it is started again, and print
where.`, (*api.Client).PublishPorts)
}

func (a *App) unpublishCommand() *cobra.Command {
	return a.portsCommand("unpublish", "Take published ports of a running sandbox back",
		`Take published ports of a running sandbox back, also those of "bpfnet run -p", and
print which. Their connections end. A port is meant by as much as is said of it:
80 is each place where the sandbox's port 80 is published.`, (*api.Client).UnpublishPorts)
}

func (a *App) portsCommand(verb, short, long string,
	do func(*api.Client, context.Context, api.PortChange) (api.PublishedPorts, error),
) *cobra.Command {
	return &cobra.Command{
		Use:     verb + " NAME PORTS...",
		Short:   short,
		Long:    long + "\n\nPORTS are " + publishForm + ", as in \"bpfnet run -p\".",
		Example: "  bpfnet " + verb + " web 8080:80\n  bpfnet " + verb + " web 127.0.0.1:5300:53/udp 8000-8003:8000-8003",
		Args:    atLeastArgs("NAME", "PORTS"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ports, err := parsePublished("port", args[1:])
			if err != nil {
				return err
			}
			client, err := api.Dial(cmd.Context(), a.paths.Socket)
			if err != nil {
				return err
			}
			done, err := do(client, cmd.Context(), api.PortChange{Name: args[0], Ports: ports})
			if err != nil {
				return err
			}
			for _, line := range done.Ports {
				if _, err := fmt.Fprintln(a.Stdout, line); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

func (a *App) execCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "exec NAME [--] COMMAND [ARG...]",
		Short: "Run another command in a running sandbox",
		Long: `Run another command in a running sandbox: with its network, its hosts and
resolv.conf, its environment and working directory, and for no longer than its
own command runs. The exit status is the command's.`,
		Example: `  bpfnet exec web -- ip addr
  bpfnet exec web sh`,
		Args: atLeastArgs("NAME", "COMMAND"),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, command := args[0], args[1:]
			if command[0] == "--" {
				command = command[1:]
			}
			if len(command) == 0 {
				return usagef("missing COMMAND")
			}
			return a.exec(cmd.Context(), name, command)
		},
	}
	cmd.DisableFlagsInUseLine = true
	cmd.Flags().SetInterspersed(false) // the command has flags of its own
	return cmd
}

func (a *App) exec(ctx context.Context, name string, command []string) error {
	if err := a.checkCapabilities(runnerNeeds); err != nil {
		return err
	}
	client, err := api.Dial(ctx, a.paths.Socket)
	if err != nil {
		return err
	}
	info, err := a.ownSandbox(ctx, client, name, "exec")
	if err != nil {
		return err
	}
	if info.Status != api.StatusRunning {
		return fmt.Errorf("sandbox %q: does not run; start it with \"bpfnet start %[1]s\"", info.Name)
	}
	env := environment(info)
	path, err := sandbox.LookPath(command[0], env, info.WorkDir)
	if err != nil {
		return commandError(err)
	}
	target := sandbox.Target{PID: info.PID, StartTime: info.StartTime, Cgroup: info.Cgroup}
	err = sandbox.Exec(target, path, command, env, info.WorkDir) // does not return if it can
	if errors.Is(err, sandbox.ErrGone) {
		return fmt.Errorf("sandbox %q: has just ended", info.Name)
	}
	return commandError(err)
}
