// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// output is what a process has written so far.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// Needs root. The command itself looks for what its labs leave behind.
func TestInterruptTakesLabsDown(t *testing.T) {
	lab.NeedRoot(t)
	dir := t.TempDir()
	bench := filepath.Join(dir, "bpfnet-bench")
	build := exec.Command("go", "build", "-o", bench, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	msg, err := build.CombinedOutput()
	require.NoError(t, err, "%s", msg)
	// The limit needs no bpfnet, but a run says which one it had.
	bpfnet := filepath.Join(dir, "bpfnet")
	require.NoError(t, os.WriteFile(bpfnet, []byte("#!/bin/sh\necho bpfnet test\n"), 0o755))

	var stderr output
	results := filepath.Join(dir, "results")
	run := exec.Command(bench, "--scenario", "hairpin", "--mode", "loopback", "--rounds", "1000", "-o", results, "--bpfnet", bpfnet)
	run.Stderr = &stderr
	require.NoError(t, run.Start())
	done := make(chan error, 1)
	go func() { done <- run.Wait() }()
	lab.Eventually(t, time.Minute, "a round", func() bool { return bytes.Contains([]byte(stderr.String()), []byte("round 1 of 1000")) })
	require.FileExists(t, results+".partial")
	require.NoError(t, run.Process.Signal(syscall.SIGINT))
	<-done
	assert.Equal(t, statusInterrupted, run.ProcessState.ExitCode(), "%s", stderr.String())
	assert.Contains(t, stderr.String(), "interrupted; the labs are gone")
	assert.NotContains(t, stderr.String(), "left behind:\n\tnamespace")
	assert.NoFileExists(t, results)
	assert.NoFileExists(t, results+".partial")
}

// Nothing is changed before names and numbers are known to be right.
func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"--scenario", "nowhere"}, {"--mode", "magic"}, {"--rounds", "0"}, {"--window", "0s"}, {"egress"}, {"--nope"},
	} {
		assert.Equal(t, statusUsage, run(args), "%v", args)
	}
}
