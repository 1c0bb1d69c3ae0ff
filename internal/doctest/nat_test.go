// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// requirements are those of each RFC, by the heading of its table, with the letters that say more
// than their number.
var requirements = map[string][]string{
	"RFC 4787: UDP": append(numbers(14), "REQ-3a", "REQ-5a", "REQ-5b", "REQ-5c", "REQ-6a", "REQ-8a", "REQ-9a", "REQ-10a",
		"REQ-12a", "REQ-12b", "REQ-13a", "REQ-14a"),
	"RFC 5382: TCP": append(numbers(10), "REQ-2a", "REQ-3a", "REQ-3b", "REQ-4a", "REQ-5a", "REQ-8a"),
	"RFC 5508: ICMP": append(numbers(11), "REQ-1a", "REQ-2a", "REQ-3a", "REQ-3b", "REQ-3c", "REQ-3d", "REQ-4a", "REQ-4b", "REQ-4c",
		"REQ-5a", "REQ-5b", "REQ-5c", "REQ-7a", "REQ-10a", "REQ-10b", "REQ-10c"),
	"RFC 7857: updates": {
		"section 2.1", "section 2.2", "section 3", "section 4", "section 5", "section 6", "section 7", "section 7.1",
		"section 8", "section 9", "section 10", "section 11", "section 12",
	},
}

func numbers(last int) (all []string) {
	for i := range last {
		all = append(all, fmt.Sprintf("REQ-%d", i+1))
	}
	return all
}

// namedTest is a test as the document names it: package, function, and perhaps a subtest.
var namedTest = regexp.MustCompile("`([a-z]+) (Test[A-Za-z0-9_]+)(?:/([^`]+))?`")

// packages are the directories that the document's short names stand for.
var packages = map[string]string{
	"bpf": "bpf", "daemon": "daemon", "ipam": "ipam", "embedded": "embedded", "scenarios": "internal/scenarios",
}

// Every requirement stands in docs/nat-behaviour.md once, with a verdict, and every test that is
// named there exists.
func TestNATBehaviour(t *testing.T) {
	doc := read(t, "docs/nat-behaviour.md")
	sections := map[string]string{}
	for _, s := range strings.Split(doc, "\n## ")[1:] {
		title, body, _ := strings.Cut(s, "\n")
		sections[title] = body
	}
	row := regexp.MustCompile(`(?m)^\| ((?:REQ-\d+[a-z]?|section [\d.]+)) [^|]*\| ([^|]*) \| ([^|]*)\| ([^|]*) \|$`)
	for title, want := range requirements {
		body := sections[title]
		require.NotEmpty(t, body, "no section %q", title)
		var have []string
		for _, m := range row.FindAllStringSubmatch(body, -1) {
			have = append(have, m[1])
			assert.Contains(t, []string{"yes", "no", "own", "n/a"}, m[2], "%s %s", title, m[1])
			if m[2] != "yes" {
				assert.NotEmpty(t, strings.TrimSpace(m[3]), "%s %s deviates and does not say why", title, m[1])
			}
			assert.Regexp(t, namedTest, m[4], "%s %s names no test", title, m[1])
		}
		assert.ElementsMatch(t, want, have, title)
	}

	tests := namedTest.FindAllStringSubmatch(doc, -1)
	require.Greater(t, len(tests), 80, "the look at the document is blind")
	for _, m := range tests {
		dir, ok := packages[m[1]]
		if assert.True(t, ok, "%s: no such package", m[0]) {
			assert.NoError(t, findTest(dir, m[2], m[3]), m[0])
		}
	}
	// What the RFCs have no table for must be shown too.
	for line := range strings.Lines(sections["What the stack did"]) {
		if strings.HasPrefix(line, "| ") && !strings.HasPrefix(line, "| | what") {
			assert.Regexp(t, namedTest, line)
		}
	}
}

// findTest says what is missing: the function, or the subtest's name in the file that has it.
func findTest(dir, function, sub string) error {
	files, err := filepath.Glob(filepath.Join(root, dir, "*_test.go"))
	if err != nil {
		return err
	}
	all := ""
	found := false
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if strings.Contains(string(text), "\nfunc "+function+"(t *testing.T)") {
			found = true
			all = string(text)
		}
	}
	if !found {
		return fmt.Errorf("no function %s in %s", function, dir)
	}
	if sub != "" && !strings.Contains(all, fmt.Sprintf("t.Run(%q", sub)) {
		return fmt.Errorf("%s has no subtest %q", function, sub)
	}
	return nil
}
