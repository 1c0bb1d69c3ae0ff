// SPDX-License-Identifier: Apache-2.0

// Command tool (labtool) is both ends of the lab's tests: servers that say how they see
// their peer, and clients that use sockets in all the ways that programs do. It is
// static and runs in containers, in namespaces and on the host alike.
//
// Clients print one JSON object on standard output, exit with status 0 when they have
// got what they wanted, and with status 1 otherwise. Servers print "ready" when they
// listen. SIGTERM ends all of them, with status 0.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/bpfnet/bpfnet/bench/load"
)

var commands = map[string]struct {
	run  func(ctx context.Context, args []string) error
	help string
}{
	"serve":         {serve, "TCP, UDP and HTTP servers that tell their peer's address, then echo"},
	"stun":          {stun, "UDP servers that answer with the source address they see"},
	"udp-sink":      {udpSink, "count datagrams"},
	"get":           {get, "one exchange over TCP or UDP"},
	"talk":          {talk, "an exchange for each line of standard input, on one socket"},
	"stream":        {stream, "a long exchange of numbered messages, every echo checked"},
	"flood-connect": {floodConnect, "connect and close at full rate"},
	"confine":       {confine, "run a program as the service of a unit"},
	"crowd":         {runCrowd, "many flows at once, each of which must get its own answers"},
	"crowd-serve":   {crowdServe, "answer crowds, and notice who speaks for another"},
	"burst":         {burst, "send in every way to many, from the first instruction on"},
	"udp-count":     {udpCount, "send a number of datagrams"},
	"witness":       {witness, "answer probes of all protocols, and tell who sent them"},
	"probe":         {probe, "try to reach many addresses at once, by all protocols"},
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "worker" { // the ends of measured traffic, as bpfnet-bench has them
		os.Exit(load.Main(os.Args[2:]))
	}
	if len(os.Args) < 2 || commands[os.Args[1]].run == nil {
		fmt.Fprintln(os.Stderr, "usage: labtool COMMAND [flags]; -h behind a command lists its flags")
		for name, c := range commands {
			fmt.Fprintf(os.Stderr, "  %-14s %s\n", name, c.help)
		}
		os.Exit(2)
	}
	// The first process of a container gets no signal that it does not ask for.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := commands[os.Args[1]].run(ctx, os.Args[2:])
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "labtool %s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}

func newFlags(name string) *flag.FlagSet { return flag.NewFlagSet(name, flag.ExitOnError) }

// target is the one argument behind the flags: an address and port.
func target(f *flag.FlagSet, args []string) (string, error) {
	if err := f.Parse(args); err != nil {
		return "", err
	}
	if f.NArg() != 1 {
		return "", fmt.Errorf("want one HOST:PORT behind the flags, got %q", f.Args())
	}
	return f.Arg(0), nil
}

func printJSON(v any) error { return json.NewEncoder(os.Stdout).Encode(v) }

func ready() { fmt.Println("ready") }
