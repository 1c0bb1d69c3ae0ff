// SPDX-License-Identifier: Apache-2.0

// Command demo shows bpfnet at work: a host made of namespaces, a Docker Engine with iptables off,
// bpfnet, and real traffic. It needs root, the packages of "scripts/deps.sh test", and to be run from
// within the module. Nothing is left behind, also when it is interrupted.
//
// The demonstration itself is TestDemo, because the lab that it plays in belongs to tests. This
// command builds that test, runs it, shows what it prints, and what the test framework has to say
// only where something went wrong.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
)

const (
	// envOutput tells TestDemo that its output goes to file descriptor 3.
	envOutput         = "BPFNET_DEMO_OUTPUT"
	statusInterrupted = 130
)

func main() {
	// The terminal sends a signal to the test as well, which then takes its lab down: wait for it.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	status, err := run(signals)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
	}
	os.Exit(status)
}

func run(signals <-chan os.Signal) (int, error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("needs root: it makes network namespaces and loads eBPF programs")
	}
	dir, err := os.MkdirTemp("", "bpfnet-demo-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "demo.test")
	build := exec.Command("go", "test", "-c", "-o", binary, "github.com/bpfnet/bpfnet/internal/demo")
	if out, err := build.CombinedOutput(); err != nil {
		return 1, fmt.Errorf("build: %w\n%s", err, out)
	}

	var framework bytes.Buffer
	test := exec.Command(binary, "-test.run", "^TestDemo$", "-test.count", "1")
	test.Stdout, test.Stderr = &framework, &framework
	test.ExtraFiles = []*os.File{os.Stdout}
	test.Env = append(os.Environ(), envOutput+"=3", "BPFNET_REQUIRE_ROOT=1")
	if err := test.Start(); err != nil {
		return 1, err
	}
	ended := make(chan error, 1)
	go func() { ended <- test.Wait() }()
	interrupted := false
	for {
		select {
		case sig := <-signals:
			interrupted = true
			_ = test.Process.Signal(sig)
		case err := <-ended:
			switch {
			case interrupted:
				return statusInterrupted, errors.New("interrupted; the lab is gone")
			case err != nil:
				fmt.Fprintf(os.Stderr, "\n%s", framework.Bytes())
				return 1, err
			}
			return 0, nil
		}
	}
}
