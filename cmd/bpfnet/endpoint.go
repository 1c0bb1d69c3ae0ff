// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
)

func (a *App) endpointCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:                   "endpoint",
		DisableFlagsInUseLine: true,
		Short:                 "Say which devices that no engine made are served",
		Args:                  noSuchCommand,
		RunE:                  showHelp,
	}
	cmd.AddCommand(a.endpointAllowCommand(), a.endpointDisallowCommand())
	return cmd
}

func (a *App) endpointAllowCommand() *cobra.Command {
	var mac string
	cmd := &cobra.Command{
		Use:   "allow DEVICE ADDRESS...",
		Short: "Serve a device that was made a port of a network's bridge by hand",
		Long: `Serve a device that was made a port of a network's bridge by hand.

Whoever is behind a port that no engine has told of has no traffic. DEVICE is the
host's side of it; ADDRESS is what is behind it may send from, of the network's
subnets, at most one a family. It is then like any container of that network. It
holds for a device of that name over restarts of the daemon and of the host.`,
		Example: "  bpfnet endpoint allow veth-lab 172.17.0.200\n  bpfnet endpoint allow --mac 52:54:00:12:34:56 tap0 172.17.0.201",
		Args:    atLeastArgs("DEVICE", "ADDRESS"),
		RunE: func(cmd *cobra.Command, args []string) error {
			addrs, err := parseAddrs("ADDRESS", args[1:])
			if err != nil {
				return err
			}
			client, err := api.Dial(cmd.Context(), a.paths.Socket)
			if err != nil {
				return err
			}
			res, err := client.AllowEndpoint(cmd.Context(), api.ByHand{Device: args[0], Addrs: addrs, MAC: mac})
			if err != nil {
				return err
			}
			format := "%s was served already\n"
			if res.Changed {
				format = "%s is served now\n"
			}
			_, err = fmt.Fprintf(a.Stdout, format, args[0])
			return err
		},
	}
	cmd.Flags().StringVar(&mac, "mac", "", "MAC `address` behind the device (default: that of its peer)")
	return cmd
}

func (a *App) endpointDisallowCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "disallow DEVICE",
		Short:   "Close a device again that \"bpfnet endpoint allow\" has opened",
		Long:    "Close a device again that \"bpfnet endpoint allow\" has opened, for flows that are under way too.",
		Example: "  bpfnet endpoint disallow veth-lab",
		Args:    exactArgs("DEVICE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := api.Dial(cmd.Context(), a.paths.Socket)
			if err != nil {
				return err
			}
			res, err := client.DisallowEndpoint(cmd.Context(), api.Named{Name: args[0]})
			if err != nil {
				return err
			}
			format := "%s was not served\n"
			if res.Changed {
				format = "%s is closed now\n"
			}
			_, err = fmt.Fprintf(a.Stdout, format, args[0])
			return err
		},
	}
}
