// SPDX-License-Identifier: Apache-2.0

// Command bpfnet replaces iptables and docker-proxy for containers by eBPF programs: the daemon, and
// the commands that show and change what it does.
package main

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"

	"github.com/bpfnet/bpfnet/relay"
)

// version is set at link time: see the Makefile.
var version = "dev"

// The main thread stays in the namespaces that the program was started in, since it is what all of
// /proc/self shows. Work moves threads elsewhere, and the runtime cannot end the main thread as it does
// others that come back changed: it would stay there for good.
func init() { runtime.LockOSThread() }

// main waits. A goroutine bound to a thread is slow to wake, so that the work is another's.
func main() {
	code := make(chan int)
	go func() { code <- runAs(os.Args) }()
	os.Exit(<-code)
}

// runAs does what the name asks for under which the program was started.
func runAs(argv []string) int {
	ctx, stop := interruptible()
	defer stop()
	switch {
	case isPortHook(argv[0]):
		return runPortHook(ctx, argv[1:])
	case filepath.Base(argv[0]) == relay.Name:
		return relay.Main(ctx, argv[1:])
	case isRunner(argv[0]):
		return runRunner(ctx, argv[1:])
	}
	return newApp().Run(ctx, argv[1:])
}

// interruptible ends with the signals that ask for an end, but those that the caller wants ignored.
func interruptible() (context.Context, context.CancelFunc) {
	signals := slices.DeleteFunc([]os.Signal{os.Interrupt, syscall.SIGTERM}, signal.Ignored)
	if len(signals) == 0 { // for Notify, that were all
		return context.WithCancel(context.Background())
	}
	return signal.NotifyContext(context.Background(), signals...)
}
