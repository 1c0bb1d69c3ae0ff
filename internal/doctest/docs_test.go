// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/daemon"
	"github.com/bpfnet/bpfnet/policy"
)

// documents are the Markdown files of the tree, relative to its root.
func documents(t *testing.T) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "testdata") {
			return fs.SkipDir
		}
		if strings.HasSuffix(path, ".md") {
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			out = append(out, rel)
		}
		return nil
	})
	require.NoError(t, err)
	require.Contains(t, out, "README.md")
	return out
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	require.NoError(t, err)
	return string(b)
}

var (
	link    = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ +(.*)$`)
	noSlug  = regexp.MustCompile(`[^a-z0-9 _-]`)
)

// anchors are the headings of a document as GitHub turns them into fragments.
func anchors(text string) []string {
	var out []string
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		out = append(out, strings.ReplaceAll(noSlug.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
	}
	return out
}

func TestLinks(t *testing.T) {
	for _, doc := range documents(t) {
		for _, m := range link.FindAllStringSubmatch(read(t, doc), -1) {
			target, fragment, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			path := doc
			if target != "" {
				path = filepath.Join(filepath.Dir(doc), target)
			}
			info, err := os.Stat(filepath.Join(root, path))
			if !assert.NoError(t, err, "%s links to %s", doc, m[1]) || fragment == "" || info.IsDir() {
				continue
			}
			assert.Contains(t, anchors(read(t, path)), fragment, "%s links to %s", doc, m[1])
		}
	}
}

var (
	code = regexp.MustCompile("`([^`\n]+)`")
	// usage is the first line below "Usage:", up to what stands for arguments.
	usage = regexp.MustCompile(`(?m)^Usage:\n  bpfnet((?: [a-z]+)*)(.*)$`)
)

// commandLines are the command lines of a program that a document shows: in blocks of code behind a
// prompt, and in the running text.
func commandLines(text, program string) [][]string {
	var out [][]string
	add := func(line string) {
		words := strings.Fields(strings.TrimSpace(line))
		// "..." stands for what is left out, NAME=DURATION and the like for what the user puts in.
		if len(words) > 0 && words[0] == program {
			out = append(out, slices.DeleteFunc(words[1:], func(w string) bool { return w == "..." || w == "…" }))
		}
	}
	block := false
	for line := range strings.Lines(text) {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			block = !block
			continue
		}
		if block || strings.HasPrefix(line, "    ") {
			add(strings.TrimPrefix(strings.TrimPrefix(strings.TrimSpace(line), "# "), "$ "))
			continue
		}
		for _, m := range code.FindAllStringSubmatch(line, -1) {
			add(m[1])
		}
	}
	return out
}

// Every bpfnet command line in the documents is one that bpfnet knows.
func TestCommandLines(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "bpfnet")
	build := exec.Command("go", "build", "-o", binary, "github.com/bpfnet/bpfnet/cmd/bpfnet")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	seen := make(map[string]bool)
	for _, doc := range documents(t) {
		if strings.HasPrefix(doc, "docs/generated/") {
			continue
		}
		for _, args := range commandLines(read(t, doc), "bpfnet") {
			line := strings.Join(args, " ")
			if seen[line] {
				continue
			}
			seen[line] = true
			// Behind the command's own words, since what follows may be another program's.
			own := 1
			if len(args) > 1 && slices.Contains([]string{"network", "endpoint", "config", "deny"}, args[0]) {
				own = 2
			}
			own = min(own, len(args))
			out, err := exec.Command(binary, slices.Insert(slices.Clone(args), own, "--help")...).CombinedOutput()
			if !assert.NoError(t, err, "%s: bpfnet %s: %s", doc, line, out) {
				continue
			}
			assert.NoError(t, known(args, string(out)), "%s: bpfnet %s", doc, line)
		}
	}
	require.Contains(t, seen, "stats", "no command lines found")
}

// known reports whether help is that of the command that args name: --help of an unknown one shows
// its parent's.
func known(args []string, help string) error {
	m := usage.FindStringSubmatch(help)
	if m == nil {
		return fmt.Errorf("no usage in its help:\n%s", help)
	}
	path := strings.Fields(m[1])
	if len(args) < len(path) || !slices.Equal(args[:len(path)], path) {
		return fmt.Errorf("its help is that of %q", path)
	}
	rest := slices.DeleteFunc(slices.Clone(args[len(path):]), func(w string) bool { return strings.HasPrefix(w, "-") })
	if strings.Contains(help, "Available Commands:") && len(rest) > 0 {
		return fmt.Errorf("%q: no such command", rest[0])
	}
	return nil
}

// Every target of make in the documents is one that the Makefile has.
func TestMakeTargets(t *testing.T) {
	makefile := read(t, "Makefile")
	for _, doc := range documents(t) {
		for _, args := range commandLines(read(t, doc), "make") {
			for _, target := range args {
				if name, _, set := strings.Cut(target, "="); set {
					assert.Regexp(t, `(?m)^`+regexp.QuoteMeta(name)+` *[:?]?=`, makefile, "%s: make %s", doc, target)
					continue
				}
				assert.Regexp(t, `(?m)^`+regexp.QuoteMeta(target)+`:`, makefile, "%s: make %s", doc, target)
			}
		}
	}
}

// Every timeout and every sysctl that the daemon knows is explained.
func TestOperations(t *testing.T) {
	doc := read(t, "docs/operations.md")
	for _, name := range daemon.TimeoutNames() {
		assert.Contains(t, doc, "`"+name+"`")
	}
	// What there is room for; slot 0 is nobody's.
	for what, room := range map[string]int{
		"networks": policy.MaxNetworks - 1, "endpoints": policy.MaxEndpoints - 1, "published ports": policy.MaxPorts - 1,
	} {
		assert.Regexp(t, fmt.Sprintf(`(?m)^\| %s.* \| %d,%03d \|`, what, room/1000, room%1000), doc)
	}
}
