// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"golang.org/x/sys/unix"

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

// However many threads are asked for at once, the main thread is none of them.
func TestMainThreadIsKept(t *testing.T) {
	const n = 64
	var bound, done sync.WaitGroup
	threads := make([]int, n)
	bound.Add(n)
	for i := range n {
		done.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			threads[i] = unix.Gettid()
			bound.Done()
			bound.Wait()
		})
	}
	done.Wait()
	assert.NotContains(t, threads, os.Getpid())
}
