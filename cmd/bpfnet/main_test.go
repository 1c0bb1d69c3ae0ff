// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// programName is the name under which the test binary is the program itself.
const programName = "bpfnet"

func TestMain(m *testing.M) {
	if name := os.Args[0]; filepath.Base(name) == programName || isRunner(name) {
		os.Exit(runAs(os.Args))
	}
	lab.Main(m)
}
