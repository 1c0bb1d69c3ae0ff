// SPDX-License-Identifier: Apache-2.0

// Command bpfnet replaces iptables and docker-proxy for containers by eBPF programs: the daemon, and
// the commands that show and change what it does.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

// version is set at link time: see the Makefile.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var status int
	if isPortHook(os.Args[0]) {
		status = runPortHook(ctx, os.Args[1:])
	} else {
		status = newApp().Run(ctx, os.Args[1:])
	}
	stop()
	os.Exit(status)
}
