// SPDX-License-Identifier: Apache-2.0

// Command cmd compares bpfnet with Docker's own data path, cell by cell, and writes the report: "make
// conformance". It needs root, a Docker Engine, and to be run from within the module. Its last line is
// the summary; its status is 0 if no cell differs and every departure has occurred.
//
// The run itself is TestConformance, because the labs that it builds belong to tests. This command builds
// that test, runs it over the whole matrix, and shows what the test framework has to say only where
// something went wrong.
package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
)

const pkg = "github.com/bpfnet/bpfnet/internal/conformance"

func main() {
	md := flag.String("report", "docs/generated/conformance.md", "`FILE` for the tables")
	list := flag.String("json", "bin/conformance.json", "`FILE` for every cell's outcomes")
	flag.Parse()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	summary, err := run(*md, *list, signals)
	if err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
	}
	if summary != "" {
		fmt.Print(summary)
	}
	if err != nil {
		os.Exit(1)
	}
}

// run returns the last line of the test, which is shown last.
func run(md, list string, signals <-chan os.Signal) (summary string, err error) {
	if os.Geteuid() != 0 {
		return "", errors.New("needs root: it makes network namespaces and loads eBPF programs")
	}
	dir, err := os.MkdirTemp("", "bpfnet-conformance-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	binary := filepath.Join(dir, "conformance.test")
	if out, err := exec.Command("go", "test", "-c", "-o", binary, pkg).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}

	var framework bytes.Buffer
	test := exec.Command(binary, "-test.run", "^TestConformance$", "-test.count", "1")
	test.Stdout, test.Stderr = &framework, &framework
	test.ExtraFiles = []*os.File{os.Stdout}
	test.Env = append(os.Environ(), "BPFNET_REQUIRE_ROOT=1", "BPFNET_CONFORMANCE=full",
		"BPFNET_CONFORMANCE_OUTPUT=3", "BPFNET_CONFORMANCE_REPORT="+dir)
	if err := test.Start(); err != nil {
		return "", err
	}
	ended := make(chan error, 1)
	go func() { ended <- test.Wait() }()
	interrupted := false
	for {
		select {
		case <-signals: // the terminal sends it to the test as well, which takes its lab down
			interrupted = true
			_ = test.Process.Signal(syscall.SIGTERM)
		case err := <-ended:
			if interrupted {
				return "", errors.New("interrupted; the lab is gone")
			}
			if err != nil {
				_, _ = os.Stderr.Write(framework.Bytes())
			}
			line, _ := os.ReadFile(filepath.Join(dir, "summary")) // none where the run did not get so far
			return string(line), errors.Join(err, keep(dir, md, list))
		}
	}
}

// keep copies the report to where it belongs. A run that did not get so far has none.
func keep(dir, md, list string) error {
	for from, to := range map[string]string{"conformance.md": md, "conformance.json": list} {
		text, err := os.ReadFile(filepath.Join(dir, from))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err == nil {
			err = os.MkdirAll(filepath.Dir(to), 0o755)
		}
		if err == nil {
			err = os.WriteFile(to, text, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
