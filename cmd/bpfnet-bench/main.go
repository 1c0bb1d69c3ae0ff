// SPDX-License-Identifier: Apache-2.0

// Command bpfnet-bench measures the container data path, bpfnet's against what it replaces.
package main

import (
	"os"

	"github.com/bpfnet/bpfnet/bench/load"
)

func main() {
	// The same binary is both ends of the traffic, in namespaces and in containers.
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(load.Main(os.Args[2:]))
	}
	if len(os.Args) > 1 && readers[os.Args[1]].run != nil {
		os.Exit(read(os.Args[1], os.Args[2:], os.Stdout, os.Stderr))
	}
	os.Exit(run(os.Args[1:]))
}
