// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/api"
)

func (a *App) networkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:                   "network",
		DisableFlagsInUseLine: true,
		Short:                 "Make networks, and say which may talk",
		Args:                  noSuchCommand,
		RunE:                  showHelp,
	}
	cmd.AddCommand(
		a.networkCreateCommand(),
		a.networkListCommand(),
		a.networkInspectCommand(),
		a.networkRemoveCommand(),
		a.networkConnectCommand(),
		a.networkDisconnectCommand(),
		a.pairCommand("allow", "Let the containers of two networks talk",
			`Let the containers of two networks talk, in both directions.

Networks are isolated from each other until this is said. It holds from the next
packet on, and over restarts of the daemon and of the host. Where Docker and
bpfnet have networks of one name, docker/NAME and bpfnet/NAME tell them apart.`,
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
		Example: "  bpfnet network " + verb + " frontend backend\n  bpfnet network " + verb + " docker/bridge bpfnet/backend",
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

func (a *App) networkCreateCommand() *cobra.Command {
	var (
		spec                                       api.NetworkSpec
		subnets, gateways, ranges, options, labels []string
	)
	cmd := &cobra.Command{
		Use:   "create NAME",
		Short: "Make a network",
		Long: `Make a network and print its ID.

Without --subnet it gets the first subnet of the pools (172.17.0.0/16 and on, then
192.168.0.0/16 in pieces) that overlaps no other network and no route of this
host; with --ipv6, a generated one too. Its sandboxes find each other by name, and
nothing of other networks reaches them until "bpfnet network allow" says so.

Options are those of Docker's driver "bridge":
  com.docker.network.bridge.name                   name of the bridge device
  com.docker.network.bridge.enable_icc             false: its sandboxes cannot talk
  com.docker.network.bridge.enable_ip_masquerade   false: they keep their addresses
  com.docker.network.bridge.host_binding_ipv4      address of published ports
  com.docker.network.driver.mtu                    in bytes`,
		Example: `  bpfnet network create backend
  bpfnet network create -d bridge --subnet 172.30.0.0/16 --gateway 172.30.0.1 backend
  bpfnet network create --ipv6 --subnet fd00:1::/64 --label tier=back backend`,
		Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			spec.Name = args[0]
			var errs [5]error
			spec.Subnets, errs[0] = parsePrefixes("--subnet", subnets)
			spec.Gateways, errs[1] = parseAddrs("--gateway", gateways)
			spec.Ranges, errs[2] = parsePrefixes("--ip-range", ranges)
			spec.Options, errs[3] = parsePairs("--opt", options, false)
			spec.Labels, errs[4] = parsePairs("--label", labels, true)
			if err := errors.Join(errs[:]...); err != nil {
				return err
			}
			client, err := api.Dial(cmd.Context(), a.paths.Socket)
			if err != nil {
				return err
			}
			created, err := client.CreateNetwork(cmd.Context(), spec)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.Stdout, created.ID)
			return err
		},
	}
	flags := cmd.Flags()
	flags.StringVarP(&spec.Driver, "driver", "d", "bridge", "`driver` of the network; there is bridge")
	flags.StringArrayVar(&subnets, "subnet", nil, "`subnet` of the network, at most one a family; repeatable")
	flags.StringArrayVar(&gateways, "gateway", nil, "`address` of the gateway in the subnet of its family (default: the first); repeatable")
	flags.StringArrayVar(&ranges, "ip-range", nil, "`part` of a subnet that addresses are taken from (default: all); repeatable")
	flags.BoolVar(&spec.Internal, "internal", false, "give it no way out, and let no published port in")
	flags.BoolVar(&spec.IPv6, "ipv6", false, "give it IPv6 too; without a subnet for it, one is generated")
	flags.StringArrayVarP(&options, "opt", "o", nil, "option of the driver, as `KEY=VALUE`; repeatable")
	flags.StringArrayVar(&labels, "label", nil, "label, as `KEY=VALUE`; repeatable")
	return cmd
}

func (a *App) networkRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove networks",
		Long: `Remove networks that no sandbox is in, and print their names.

What "bpfnet network allow" has said of a name stays said.`,
		Example: "  bpfnet network rm backend",
		Args:    atLeastArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.each(cmd.Context(), args, func(client *api.Client, name string) error {
				_, err := client.RemoveNetwork(cmd.Context(), api.Named{Name: name})
				return err
			})
		},
	}
}

// each does a verb to one after the other, and prints the names of those that it was done to. One that
// fails does not stop the rest.
func (a *App) each(ctx context.Context, names []string, do func(client *api.Client, name string) error) error {
	client, err := api.Dial(ctx, a.paths.Socket)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		err := do(client, name)
		if err == nil {
			_, err = fmt.Fprintln(a.Stdout, name)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (a *App) networkConnectCommand() *cobra.Command {
	var (
		ip4, ip6 string
		attach   api.Attach
	)
	cmd := &cobra.Command{
		Use:   "connect NETWORK SANDBOX",
		Short: "Give a sandbox an interface in a network",
		Long: `Give a sandbox an interface in a network: at once while it runs, and whenever it is
started again. It is known there by its name and aliases.`,
		Example: `  bpfnet network connect backend web
  bpfnet network connect --ip 172.30.0.5 --alias db backend web`,
		Args: exactArgs("NETWORK", "SANDBOX"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err4, err6 error
			attach.IP4, err4 = parseAddr("--ip", ip4, ip4Family)
			attach.IP6, err6 = parseAddr("--ip6", ip6, ip6Family)
			if err := errors.Join(err4, err6); err != nil {
				return err
			}
			client, err := api.Dial(cmd.Context(), a.paths.Socket)
			if err != nil {
				return err
			}
			attach.Network = args[0]
			_, err = client.Connect(cmd.Context(), api.Connection{Attach: attach, Sandbox: args[1]})
			return err
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&ip4, "ip", "", "IPv4 `address` (default: the lowest that is free)")
	flags.StringVar(&ip6, "ip6", "", "IPv6 `address` (default: the lowest that is free)")
	flags.StringArrayVar(&attach.Aliases, "alias", nil, "another `name` of it in that network; repeatable")
	return cmd
}

func (a *App) networkDisconnectCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "disconnect NETWORK SANDBOX",
		Short: "Take a sandbox's interface in a network away",
		Long: `Take a sandbox's interface in a network away, for good. Ports that were published
by it go with the sandbox's next network, or are not reached any more.`,
		Example: "  bpfnet network disconnect backend web",
		Args:    exactArgs("NETWORK", "SANDBOX"),
		RunE: func(cmd *cobra.Command, args []string) error {
			client, err := api.Dial(cmd.Context(), a.paths.Socket)
			if err != nil {
				return err
			}
			_, err = client.Disconnect(cmd.Context(), api.Connection{Attach: api.Attach{Network: args[0]}, Sandbox: args[1]})
			if unknown := new(api.UnknownError); force && errors.As(err, &unknown) {
				return nil
			}
			return err
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "no error if there is no such network or sandbox")
	return cmd
}
