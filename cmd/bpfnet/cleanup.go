// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/daemon"
	"github.com/bpfnet/bpfnet/embedded"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/relay"
	"github.com/bpfnet/bpfnet/store"
)

func (a *App) cleanupCommand() *cobra.Command {
	var force, leaveOpen bool
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything that the daemon left on this host",
		Long: `Remove everything that the daemon left on this host: programs, links, maps,
networks of bpfnet's own, the state directory's files and the socket. Settings of
the host (sysctls) that the daemon changed get their old values back, unless
somebody else has changed them since.

Where an Engine makes rules of its own again, it goes on with Docker's networks:
flows are handed to netfilter with their translation, and forwarding stays on, with
the FORWARD policy DROP that the Engine would have set with it. Where no rules of
an Engine stand for a network of Docker's, cleanup is refused, as its containers
would be open to each other and to the world; --leave-open does it nonetheless.
They have neither published ports nor a way out then, until a daemon runs again.

Refused while a daemon runs, or a sandbox of bpfnet's own: stop it first.`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.cleanup(cmd.Context(), force, leaveOpen) },
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "end sandboxes that run")
	cmd.Flags().BoolVar(&leaveOpen, "leave-open", false, "go on where networks of Docker's are left without anything that guards them")
	return cmd
}

func (a *App) cleanup(ctx context.Context, force, leaveOpen bool) error {
	if err := a.checkPrivilege(); err != nil {
		return err
	}
	cgroup, err := a.findCgroup()
	if err != nil && !errors.Is(err, errNoCgroup) {
		return err
	}
	if _, err := api.Dial(ctx, a.paths.Socket); err == nil {
		return fmt.Errorf("a daemon listens on %s; stop it first", a.paths.Socket)
	}
	// From here on no daemon can start on this state.
	st, err := a.openState()
	if err != nil {
		return err
	}
	if st == nil {
		return a.removePrograms(cgroup)
	}
	defer st.Close()
	changes, err := st.Sysctls()
	if err != nil {
		return err
	}
	to, err := a.Handover(ctx)
	switch {
	case err != nil && !leaveOpen:
		return fmt.Errorf("see whether Docker's networks would stand open: %w; --leave-open goes on nonetheless", err)
	case len(to.Open) > 0 && !leaveOpen:
		return fmt.Errorf(`without rules of an Engine these networks would stand open: %s; take "iptables": false and "ip6tables": false out of the Engine's settings and restart it, or go on with --leave-open`, strings.Join(to.Open, ", "))
	}
	// While the programs still guard them.
	if err := a.RemoveOwn(st, filepath.Join(a.paths.State, daemon.SandboxDir), cgroup, force); err != nil {
		return err
	}
	if err := relay.End(a.paths.State, cgroup); err != nil {
		return err
	}
	// Settings first: once the programs are gone, nothing isolates what a forwarding host forwards.
	changes, kept := forDocker(changes, to)
	if kept.V4 || kept.V6 {
		if err := a.CloseForward(ctx, kept); err != nil {
			return fmt.Errorf("%w; nothing was changed", err)
		}
		fmt.Fprintln(a.Stdout, "forwarding stays on for Docker; the FORWARD policy is DROP, as the Engine sets it")
	}
	if err := a.RestoreSysctls(changes); err != nil {
		return fmt.Errorf("restore settings: %w; the rest is left as it was, try again", err)
	}
	if err := st.SetSysctls(nil); err != nil {
		return err
	}
	if n := len(changes); n > 0 {
		fmt.Fprintf(a.Stdout, "restored settings: %d\n", n)
	}
	// As late as can be: what begins after it is cut.
	if to.V4 || to.V6 {
		n, err := a.HandFlows(a.paths.BPFFS)
		if err != nil {
			fmt.Fprintln(a.Stderr, "bpfnet: cleanup: some flows end:", oneLine(err.Error()))
		}
		fmt.Fprintf(a.Stdout, "flows handed to netfilter: %d\n", n)
	}
	if err := a.removePrograms(cgroup); err != nil {
		return err
	}
	return a.removeState(st)
}

// openState opens the store, or returns nil where there is no state directory, which it does not make.
func (a *App) openState() (*store.Store, error) {
	if _, err := os.Stat(a.paths.State); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	st, err := store.Open(a.paths.State)
	if errors.Is(err, store.ErrLocked) {
		return nil, fmt.Errorf("a daemon uses the state %s; stop it first", a.paths.State)
	}
	return st, err
}

func (a *App) removePrograms(cgroup string) error {
	if err := a.RemovePrograms(loader.Paths{BPFFS: a.paths.BPFFS, Cgroup: cgroup}); err != nil {
		return fmt.Errorf("remove programs: %w", err)
	}
	fmt.Fprintf(a.Stdout, "removed programs, links and maps: %s\n", a.paths.BPFFS)
	return nil
}

func (a *App) removeState(st *store.Store) error {
	snapshot := filepath.Join(a.paths.State, api.SnapshotName)
	for _, path := range []string{snapshot, snapshot + ".new"} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove state: %w", err)
		}
	}
	// Nobody listens on it, but it may be something else that a flag named by mistake.
	if info, err := os.Lstat(a.paths.Socket); err == nil && info.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(a.paths.Socket); err != nil {
			return fmt.Errorf("remove state: %w", err)
		}
	}
	if err := st.Remove(); err != nil {
		return fmt.Errorf("remove state: %w", err)
	}
	// A directory that the user named is the user's; ours go when nothing else is in them.
	if a.paths.State == defaultState {
		_ = os.Remove(a.paths.State)
	}
	if a.paths.Socket == defaultSocket {
		_ = os.Remove(filepath.Dir(a.paths.Socket))
	}
	fmt.Fprintf(a.Stdout, "removed state: %s\n", a.paths.State)
	return nil
}

// removeOwn takes networks and sandboxes of bpfnet's own away.
func removeOwn(st *store.Store, dir, cgroup string, force bool) error {
	devices, err := netdev.Open(netdev.Options{})
	if err != nil {
		return err
	}
	defer devices.Close()
	return embedded.Cleanup(st, devices, dir, cgroup, force)
}
