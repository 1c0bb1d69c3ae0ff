// SPDX-License-Identifier: Apache-2.0

// Command testsum reads the output of "go test -json" and writes what a person wants of it: one line a
// package, the output of tests that failed, why tests were skipped, and a last line with the counts.
// It fails if anything failed, or if the stream ends before its packages do.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

func main() {
	s, err := summarise(os.Stdin, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testsum:", err)
	}
	fmt.Println(s)
	if err != nil || s.failed > 0 || s.passed == 0 {
		os.Exit(1)
	}
}

// event is a line of "go test -json": see "go doc test2json" and "go help buildjson".
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Output     string
	Elapsed    float64 // seconds
}

// slow is from when on, in seconds, a test gets a line although it passed: a long run shows progress.
const slow = 10

// sums counts tests without those that only hold others. A package that failed outside of its tests
// (it did not compile, it panicked) counts as a failed one.
type sums struct{ passed, failed, skipped int }

func (s sums) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", s.passed, s.failed, s.skipped)
}

// pkg is a package whose tests run.
type pkg struct {
	output   []string            // of no test
	tests    map[string][]string // output of those that have not ended
	parents  map[string]bool     // tests that hold others
	failures int
}

func summarise(r io.Reader, w io.Writer) (sums, error) {
	var total sums
	var skips []string
	running := make(map[string]*pkg)
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var ev event
			if jerr := json.Unmarshal(line, &ev); jerr != nil {
				// The go command itself speaks, "go: cannot find module".
				fmt.Fprintf(w, "%s", line)
				continue
			}
			handle(ev, running, &total, &skips, w)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return total, err
		}
	}
	for _, s := range skips {
		fmt.Fprintln(w, "skipped:", s)
	}
	if len(running) == 0 {
		return total, nil
	}
	var names []string
	for name, p := range running {
		p.flush(w)
		names = append(names, name)
		total.failed++
	}
	slices.Sort(names)
	return total, fmt.Errorf("the tests ended in the middle of %s", strings.Join(names, ", "))
}

func handle(ev event, running map[string]*pkg, total *sums, skips *[]string, w io.Writer) {
	if ev.Action == "build-output" {
		fmt.Fprint(w, ev.Output)
		return
	}
	if ev.Package == "" {
		return // build-fail: the package's own event follows
	}
	p := running[ev.Package]
	if p == nil {
		p = &pkg{tests: make(map[string][]string), parents: make(map[string]bool)}
		running[ev.Package] = p
	}
	if ev.Test != "" {
		p.test(ev, total, skips, w)
		return
	}
	switch ev.Action {
	case "output":
		p.output = append(p.output, ev.Output)
	case "pass":
		for _, line := range p.output {
			if strings.HasPrefix(line, "ok") {
				fmt.Fprint(w, line)
			}
		}
		delete(running, ev.Package)
	case "skip": // no test files
		delete(running, ev.Package)
	case "fail":
		if p.failures == 0 {
			total.failed++
		}
		p.flush(w)
		delete(running, ev.Package)
	}
}

// flush writes all that is held back.
func (p *pkg) flush(w io.Writer) {
	for _, name := range slices.Sorted(keys(p.tests)) {
		for _, line := range p.tests[name] {
			fmt.Fprint(w, line)
		}
	}
	for _, line := range p.output {
		fmt.Fprint(w, line)
	}
}

func keys(m map[string][]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

func (p *pkg) test(ev event, total *sums, skips *[]string, w io.Writer) {
	switch ev.Action {
	case "run":
		p.tests[ev.Test] = nil
		for i, c := range ev.Test {
			if c == '/' {
				p.parents[ev.Test[:i]] = true
			}
		}
		return
	case "output":
		if !strings.HasPrefix(ev.Output, "=== ") {
			p.tests[ev.Test] = append(p.tests[ev.Test], ev.Output)
		}
		return
	case "pass":
		if !p.parents[ev.Test] {
			total.passed++
		}
		if ev.Elapsed >= slow && !strings.Contains(ev.Test, "/") {
			fmt.Fprintf(w, "passed in %.0fs: %s\n", ev.Elapsed, ev.Test)
		}
	case "skip":
		if !p.parents[ev.Test] {
			total.skipped++
		}
		*skips = append(*skips, fmt.Sprintf("%s %s: %s", ev.Package, ev.Test, reason(p.tests[ev.Test])))
	case "fail":
		if p.failures == 0 || !p.parents[ev.Test] {
			total.failed++
		}
		p.failures++
		for _, line := range p.tests[ev.Test] {
			fmt.Fprint(w, line)
		}
	default:
		return
	}
	delete(p.tests, ev.Test)
}

// reason is the last line that a skipped test wrote itself.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "--- ") {
			return line
		}
	}
	return "no reason given"
}
