// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
)

// logName is the file in a sandbox's directory that a detached command writes to.
const logName = "log"

// followEvery is how often a log is looked at for more.
const followEvery = 100 * time.Millisecond

func (a *App) logsCommand() *cobra.Command {
	var follow bool
	cmd := &cobra.Command{
		Use:   "logs NAME",
		Short: "Show what a detached sandbox has written",
		Long: `Show what the command of a detached sandbox has written, to standard output and
standard error alike, whenever it was started. Works with the daemon down.`,
		Example: `  bpfnet logs web
  bpfnet logs -f web`,
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error { return a.showLog(cmd.Context(), args[0], follow) },
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until the sandbox ends")
	return cmd
}

func (a *App) showLog(ctx context.Context, name string, follow bool) error {
	row, err := a.readSandbox(name)
	if err != nil {
		return err
	}
	if row.Source == sourceDocker {
		return errOfDocker(row.Name, "logs")
	}
	log, err := os.Open(filepath.Join(row.dir, logName))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("sandbox %q: has no log; only what runs detached has one", row.Name)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; run this as root", err)
	case err != nil:
		return err
	}
	defer log.Close()
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	for {
		// Asked before the rest is read: nothing is written after the end.
		more := follow && a.stillRuns(row.ID)
		if _, err := io.Copy(a.Stdout, log); err != nil {
			return fmt.Errorf("show log: %w", err)
		}
		if !more {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// stillRuns is false for what cannot be found any more.
func (a *App) stillRuns(id string) bool {
	row, err := a.readSandbox(id)
	return err == nil && row.Status == api.StatusRunning
}
