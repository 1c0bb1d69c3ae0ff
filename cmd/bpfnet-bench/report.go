// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/bpfnet/bpfnet/bench"
)

// errDisagree is the outcome of a comparison, which has been told already.
var errDisagree = errors.New("the runs do not agree")

// reader is a command that reads results and measures nothing.
type reader struct {
	usage, what string
	run         func(args []string, quote string, out io.Writer) error
	args        int
	quotes      bool // knows --quote
}

var readers = map[string]reader{
	"table": {"bpfnet-bench table [--quote FULL] FILE", "Shows a result: every record, then what was to be reached.",
		table, 1, true},
	"compare": {"bpfnet-bench compare A B", "Says whether two results agree within their own spread. The exit status is 1 if not.",
		compare, 2, false},
	"page": {"bpfnet-bench page FILE DIR README", "Writes performance.md and performance/ in DIR, and a section of README, from the result of a full run.",
		page, 3, false},
	"merge": {"bpfnet-bench merge FILE LATER OUT", "Writes to OUT what is in FILE, with the groups that LATER has in place of its own.",
		merge, 3, false},
}

// readerUsages are the usages of readers, a line each.
func readerUsages() string {
	var out strings.Builder
	for _, name := range slices.Sorted(maps.Keys(readers)) {
		fmt.Fprintf(&out, "       %s\n", readers[name].usage)
	}
	return out.String()
}

// read runs one of readers and returns the exit status.
func read(name string, args []string, out, errs io.Writer) int {
	r := readers[name]
	f := flag.NewFlagSet(name, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	quote := new(string)
	if r.quotes {
		quote = f.String("quote", "", "an earlier `result` to quote where this one has nothing")
	}
	err := f.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(out, "usage: %s\n\n%s\n", r.usage, r.what)
		f.SetOutput(out)
		f.PrintDefaults()
		return 0
	case err == nil && f.NArg() != r.args:
		err = fmt.Errorf("want %d arguments, not %d: usage: %s", r.args, f.NArg(), r.usage)
		fallthrough
	case err != nil:
		fmt.Fprintf(errs, "bpfnet-bench %s: %v\n", name, err)
		return statusUsage
	}
	if err := r.run(f.Args(), *quote, out); err != nil {
		if !errors.Is(err, errDisagree) {
			fmt.Fprintf(errs, "bpfnet-bench %s: %v\n", name, err)
		}
		return statusFailed
	}
	return 0
}

func table(args []string, quote string, out io.Writer) error {
	report, err := bench.ReadFile(args[0])
	if err != nil {
		return err
	}
	return summary(out, report, quote)
}

// summary shows a report, and what was to be reached; what it has nothing of is quoted from the result
// in the file quote, if there is one.
func summary(out io.Writer, report bench.Report, quote string) error {
	lines := bench.Reach(report)
	if quote != "" {
		earlier, err := bench.ReadFile(quote)
		if err != nil {
			return fmt.Errorf("--quote: %w", err)
		}
		lines = bench.Quote(lines, earlier)
	}
	if err := bench.WriteTable(out, report); err != nil {
		return err
	}
	fmt.Fprintln(out)
	return bench.WriteReach(out, lines)
}

func compare(args []string, _ string, out io.Writer) error {
	a, err := bench.ReadFile(args[0])
	if err != nil {
		return err
	}
	b, err := bench.ReadFile(args[1])
	if err != nil {
		return err
	}
	c := bench.Compare(a, b)
	if len(c.Ratios) == 0 {
		return fmt.Errorf("%s and %s have no ratio in common", args[0], args[1])
	}
	agree, err := c.Write(out)
	if err == nil && !agree {
		return errDisagree
	}
	return err
}

func page(args []string, _ string, out io.Writer) error {
	report, err := bench.ReadFile(args[0])
	if err != nil {
		return err
	}
	if report.Header.Quick {
		return fmt.Errorf("%s is of a quick run: the page is made from a full one, by make bench", args[0])
	}
	readme, err := os.ReadFile(args[2])
	if err != nil {
		return err
	}
	text, err := report.InReadme(string(readme))
	if err != nil {
		return fmt.Errorf("%s: %w", args[2], err)
	}
	if err := bench.WriteFiles(report, args[1]); err != nil {
		return err
	}
	if err := os.WriteFile(args[2], []byte(text), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s/performance.md and a section of %s are made anew, from %d records of %s\n", args[1], args[2], len(report.Records), args[0])
	return nil
}

func merge(args []string, _ string, out io.Writer) error {
	report, err := bench.ReadFile(args[0])
	if err != nil {
		return err
	}
	later, err := bench.ReadFile(args[1])
	if err != nil {
		return err
	}
	merged, err := report.Merge(later)
	if err != nil {
		return err
	}
	var lines bytes.Buffer
	if err := merged.Write(&lines); err != nil {
		return err
	}
	if err := os.WriteFile(args[2], lines.Bytes(), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(out, "%s has %d records, %d of them of %s\n", args[2], len(merged.Records), len(later.Records), args[1])
	return nil
}
