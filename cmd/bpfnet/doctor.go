// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/doctor"
)

func (a *App) doctorCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what would break traffic on this host",
		Long: `Look for what would break traffic on this host: what the kernel lacks, programs
and firewall rules of others in the way, settings, what an Engine that ran with
iptables left, what is missing or left of bpfnet's own. Each finding comes with
the command that mends it. Nothing is changed: what is loaded to try the kernel
is gone at the end. Works with the daemon down, and before it has ever run.

ok        nothing to do
note      worth knowing; all traffic flows
broken    some traffic does not flow, or will not: the exit status is 1
unknown   it could not be looked at`,
		Args: exactArgs(),
	}
	asJSON := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		jsonWanted, err := asJSON()
		if err != nil {
			return err
		}
		if err := a.checkPrivilege(); err != nil {
			return err
		}
		list, err := a.diagnose(cmd.Context())
		if err != nil {
			return err
		}
		if jsonWanted {
			err = writeJSON(a.Stdout, list)
		} else {
			err = writeFindings(a.Stdout, list)
		}
		if err == nil && doctor.AnyBroken(list) {
			return &exitError{status: statusError}
		}
		return err
	}
	return cmd
}

// secondLook is how long what seems amiss under a running daemon may take to be so no more: containers come
// and go while they are looked at.
const secondLook = 700 * time.Millisecond

func (a *App) diagnose(ctx context.Context) ([]doctor.Finding, error) {
	f, err := a.gatherFacts(ctx, nil)
	if err != nil {
		return nil, err
	}
	list := doctor.Judge(f)
	if !f.Daemon.Running || len(f.Suspected) == 0 {
		return list, nil
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(secondLook):
	}
	again, err := a.gatherFacts(ctx, f)
	if err != nil {
		return nil, err
	}
	again.Suspects = f.Suspected
	return doctor.Judge(again), nil
}

// writeFindings writes a line a finding, and below it the command that mends it.
func writeFindings(w io.Writer, list []doctor.Finding) error {
	state, check := 0, 0
	for _, x := range list {
		state, check = max(state, len(x.State)), max(check, len(x.Check))
	}
	for _, x := range list {
		if _, err := fmt.Fprintf(w, "%-*s   %-*s   %s\n", state, x.State, check, x.Check, x.Detail); err != nil {
			return err
		}
		if x.Fix == "" {
			continue
		}
		if _, err := fmt.Fprintf(w, "%s   fix: %s\n", strings.Repeat(" ", state+3+check), x.Fix); err != nil {
			return err
		}
	}
	return nil
}
