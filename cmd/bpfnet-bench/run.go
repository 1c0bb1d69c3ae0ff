// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
)

// run is the command line but for workers.
func run([]string) int {
	fmt.Fprintln(os.Stderr, "bpfnet-bench: no command but worker yet")
	return 2
}
