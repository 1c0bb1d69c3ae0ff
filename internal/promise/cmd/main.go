// SPDX-License-Identifier: Apache-2.0

// Command cmd, run in the module's root, tells make which tests keep promises ("tests": arguments for go test), or takes
// figures from the file that they wrote into docs/reliability ("page FILE").
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/internal/promise"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "promise:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	calls, err := promise.Calls(".")
	if err != nil {
		return err
	}
	switch {
	case len(args) == 1 && args[0] == "tests":
		var names, dirs []string
		for _, c := range calls {
			_, name, _ := strings.Cut(c.Test, ".")
			names, dirs = append(names, name), append(dirs, "./"+c.Dir)
		}
		slices.Sort(names)
		slices.Sort(dirs)
		fmt.Printf("-run ^(%s)$ %s\n", strings.Join(slices.Compact(names), "|"), strings.Join(slices.Compact(dirs), " "))
		return nil
	case len(args) == 2 && args[0] == "page":
		return page(calls, args[1])
	}
	return errors.New("usage: tests | page FILE")
}

func page(calls []promise.Call, file string) error {
	figures := filepath.Join("docs", "reliability", "figures.jsonl")
	old, err := promise.ReadRecords(figures)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	newer, err := promise.ReadRecords(file)
	if err != nil {
		return err
	}
	records := promise.Merge(calls, old, newer)
	text, err := promise.Page(calls, records)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(figures), 0o755); err != nil {
		return err
	}
	if err := promise.WriteRecords(figures, records); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join("docs", "reliability.md"), []byte(text), 0o644)
}
