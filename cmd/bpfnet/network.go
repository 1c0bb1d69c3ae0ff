// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
)

func (a *App) networkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:                   "network",
		DisableFlagsInUseLine: true,
		Short:                 "Say which networks may talk",
		Args:                  noSuchCommand,
		RunE:                  showHelp,
	}
	cmd.AddCommand(
		a.pairCommand("allow", "Let the containers of two networks talk",
			`Let the containers of two networks talk, in both directions.

Networks are isolated from each other until this is said. It holds from the next
packet on, and over restarts of the daemon and of the host.`,
			"%s and %s may talk now\n", "%s and %s might talk already\n", (*api.Client).Allow),
		a.pairCommand("disallow", "Isolate two networks from each other again",
			`Isolate two networks from each other again.

It takes "bpfnet network allow" back, for flows that are under way too.`,
			"%s and %s are isolated now\n", "%s and %s were isolated already\n", (*api.Client).Disallow),
	)
	return cmd
}

func (a *App) pairCommand(verb, short, long, changed, same string,
	do func(*api.Client, context.Context, api.Pair) (bool, error),
) *cobra.Command {
	return &cobra.Command{
		Use:     verb + " NETWORK NETWORK",
		Short:   short,
		Long:    long,
		Example: "  bpfnet network " + verb + " frontend backend",
		Args:    exactArgs("the first network", "the second network"),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := api.Pair{A: args[0], B: args[1]}
			if p.A == p.B {
				return usagef("%q twice: want two different networks", p.A)
			}
			client, err := api.Dial(cmd.Context(), a.paths.Socket)
			if err != nil {
				return err
			}
			news, err := do(client, cmd.Context(), p)
			if err != nil {
				return err
			}
			format := same
			if news {
				format = changed
			}
			_, err = fmt.Fprintf(a.Stdout, format, p.A, p.B)
			return err
		},
	}
}
