// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/config"
)

const packaging = "../../packaging"

// TestReferenceManual writes the manual: one page for each command, made from its help.
func TestReferenceManual(t *testing.T) {
	dir := filepath.Join(packaging, "man")
	if *update { // pages of commands that are gone
		old, err := filepath.Glob(filepath.Join(dir, "*.8"))
		require.NoError(t, err)
		for _, path := range old {
			require.NoError(t, os.Remove(path))
		}
	}
	pages := make(map[string]string)
	visit(newWorld(t).command(), func(cmd *cobra.Command) {
		pages[pageName(cmd)+".8"] = page(cmd)
	})
	for name, text := range pages {
		golden(t, filepath.Join(dir, name), text)
		assert.Regexp(t, `^[\n -~]*$`, text, "ASCII in %s", name)
		for _, m := range regexp.MustCompile(`\\fB([a-z\\-]+)\\fR\(8\)`).FindAllStringSubmatch(text, -1) {
			assert.Contains(t, pages, strings.ReplaceAll(m[1], `\-`, "-")+".8", "%s refers to it", name)
		}
	}
	have, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range have {
		assert.Contains(t, pages, e.Name(), "a page of no command: go test ./cmd/bpfnet -run TestReference -update")
	}
}

// The pages are what man takes without a complaint, and say what the help says.
func TestManual(t *testing.T) {
	groff := needTool(t, "groff")
	pages, err := filepath.Glob(filepath.Join(packaging, "man", "*.8"))
	require.NoError(t, err)
	require.NotEmpty(t, pages)
	for _, path := range pages {
		var out, complaints bytes.Buffer
		cmd := exec.Command(groff, "-man", "-ww", "-Tascii", "-P-c", "-rLL=200n", path)
		cmd.Stdout, cmd.Stderr = &out, &complaints
		require.NoError(t, cmd.Run(), path)
		assert.Empty(t, complaints.String(), path)
		if filepath.Base(path) != "bpfnet-run.8" {
			continue
		}
		text := regexp.MustCompile(".\b").ReplaceAllString(out.String(), "") // bold is printed twice
		for _, want := range []string{"bpfnet-run - Run a command in a sandbox", "-p, --publish ports", "\n       bpfnet run "} {
			assert.Contains(t, text, want)
		}
	}
}

// visit calls f for a command and those below it, in order, but help.
func visit(cmd *cobra.Command, f func(*cobra.Command)) {
	f(cmd)
	for _, sub := range below(cmd) {
		visit(sub, f)
	}
}

// below are a command's own, as its help lists them.
func below(cmd *cobra.Command) []*cobra.Command {
	return slices.DeleteFunc(slices.Clone(cmd.Commands()), func(c *cobra.Command) bool {
		return !c.IsAvailableCommand() || c.Name() == "help"
	})
}

func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// page is a command's page, in the macros of man(7).
func page(cmd *cobra.Command) string {
	root := cmd.Root()
	var b strings.Builder
	section := func(name string) { fmt.Fprintf(&b, ".SH %s\n", name) }
	fmt.Fprintf(&b, ".\\\" Made by make generate from the command's help.\n")
	fmt.Fprintf(&b, ".TH %s 8 \"\" bpfnet \"System Administration\"\n", strings.ToUpper(pageName(cmd)))
	section("NAME")
	fmt.Fprintf(&b, "%s \\- %s\n", roff(pageName(cmd)), roff(cmd.Short))
	section("SYNOPSIS")
	usage := strings.TrimPrefix(cmd.UseLine(), cmd.CommandPath())
	if len(below(cmd)) > 0 {
		usage = " COMMAND"
	}
	fmt.Fprintf(&b, "\\fB%s\\fR%s\n", roff(cmd.CommandPath()), roff(usage))
	section("DESCRIPTION")
	if cmd.Long != "" {
		b.WriteString(prose(cmd.Long))
	} else {
		fmt.Fprintf(&b, "%s.\n", roff(cmd.Short))
	}
	if subs := below(cmd); len(subs) > 0 {
		section("COMMANDS")
		for _, sub := range subs {
			fmt.Fprintf(&b, ".TP\n\\fB%s\\fR(8)\n%s.\n", roff(pageName(sub)), roff(sub.Short))
		}
	}
	cmd.InitDefaultVersionFlag() // else made when it runs
	own := ""
	cmd.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) { own += option(f) })
	if own != "" {
		section("OPTIONS")
		b.WriteString(own)
	}
	if cmd == root {
		section("OPTIONS OF ALL COMMANDS")
		root.PersistentFlags().VisitAll(func(f *pflag.Flag) { b.WriteString(option(f)) })
	}
	if cmd.Example != "" {
		section("EXAMPLES")
		fmt.Fprintf(&b, "%s", prose(cmd.Example))
	}
	if cmd == root {
		section("EXIT STATUS")
		b.WriteString(`.TP
0
Done.
.TP
1
It failed, and one line on standard error says why.
.TP
2
The command line is wrong. Nothing was looked at or changed.
.PP
\fBbpfnet\-run\fR(8) and \fBbpfnet\-exec\fR(8) end with the status of their command.
`)
		section("ENVIRONMENT")
		b.WriteString(prose("BPFNET_ and the name of an option of the daemon or of all commands, in capitals and with underscores, sets it: " +
			"BPFNET_SOCKET=/run/other.sock. A flag on the command line is stronger, the configuration file weaker."))
		section("FILES")
		for _, f := range [][2]string{
			{defaultConfig, "the configuration, if you have made one"},
			{"/usr/share/bpfnet/config.yaml", "every key with its default, to copy from; after make install, in /usr/local/share/bpfnet"},
			{defaultState, "what outlives the daemon"},
			{defaultSocket, "requests to the daemon"},
			{root.PersistentFlags().Lookup("bpffs").DefValue, "the pinned programs, links and maps"},
		} {
			fmt.Fprintf(&b, ".TP\n\\fI%s\\fR\n%s.\n", roff(f[0]), roff(strings.ToUpper(f[1][:1])+f[1][1:]))
		}
	}
	section("SEE ALSO")
	var others []*cobra.Command
	switch parent := cmd.Parent(); parent {
	case nil:
		others = append(others, below(cmd)...)
	case root:
		others = append([]*cobra.Command{root}, below(cmd)...)
	default:
		others = []*cobra.Command{root}
		for _, c := range append([]*cobra.Command{parent}, below(parent)...) {
			if c != cmd {
				others = append(others, c)
			}
		}
	}
	for i, c := range others {
		end := ",\n"
		if i == len(others)-1 {
			end = "\n"
		}
		fmt.Fprintf(&b, "\\fB%s\\fR(8)%s", roff(pageName(c)), end)
	}
	return b.String()
}

// option is a flag's paragraph.
func option(f *pflag.Flag) string {
	if f.Hidden || f.Name == "help" {
		return ""
	}
	name, usage := pflag.UnquoteUsage(f)
	tag := `\fB\-\-` + roff(f.Name) + `\fR`
	if f.Shorthand != "" {
		tag = `\fB\-` + f.Shorthand + `\fR, ` + tag
	}
	if name != "" {
		tag += ` \fI` + roff(name) + `\fR`
	}
	if !slices.Contains([]string{"", "0", "false", "[]"}, f.DefValue) {
		usage += " (default " + f.DefValue + ")"
	}
	return ".TP\n" + tag + "\n" + guarded(roff(strings.ToUpper(usage[:1])+usage[1:])) + ".\n"
}

// prose turns a text of help into paragraphs; lines that are indented stay as they are.
func prose(text string) string {
	var b strings.Builder
	literal, gap := false, false
	for line := range strings.Lines(strings.TrimRight(text, "\n") + "\n") {
		line = strings.TrimRight(line, "\n")
		if line == "" {
			gap = true
			continue
		}
		indented := strings.HasPrefix(line, "  ")
		switch {
		case indented && !literal:
			b.WriteString(".PP\n.RS 4\n.nf\n")
		case !indented && literal:
			b.WriteString(".fi\n.RE\n.PP\n")
		case gap && indented:
			b.WriteString("\n")
		case gap:
			b.WriteString(".PP\n")
		}
		literal, gap = indented, false
		b.WriteString(guarded(roff(strings.TrimPrefix(line, "  "))) + "\n")
	}
	if literal {
		b.WriteString(".fi\n.RE\n")
	}
	return b.String()
}

var roffEscapes = strings.NewReplacer(`\`, `\e`, "-", `\-`, "…", "...", "–", `\(en`, "→", "->")

func roff(s string) string { return roffEscapes.Replace(s) }

// guarded keeps a line from being a request.
func guarded(line string) string {
	if strings.HasPrefix(line, ".") || strings.HasPrefix(line, "'") {
		return `\&` + line
	}
	return line
}

// completions are the shells' files and who writes them.
var completions = map[string]func(*cobra.Command, io.Writer) error{
	"bpfnet.bash": func(c *cobra.Command, w io.Writer) error { return c.GenBashCompletionV2(w, true) },
	"bpfnet.zsh":  func(c *cobra.Command, w io.Writer) error { return c.GenZshCompletion(w) },
	"bpfnet.fish": func(c *cobra.Command, w io.Writer) error { return c.GenFishCompletion(w, true) },
}

// TestReferenceCompletions writes the shells' completions. They ask the program itself, so that they know what it knows.
func TestReferenceCompletions(t *testing.T) {
	for name, write := range completions {
		var b bytes.Buffer
		require.NoError(t, write(newWorld(t).command(), &b))
		golden(t, filepath.Join(packaging, "completions", name), b.String())
	}
}

// Each shell completes a command, a command below it, and a flag.
func TestCompletions(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	require.NoError(t, err)
	require.NoError(t, os.Symlink(self, filepath.Join(dir, programName))) // see TestMain
	files, err := filepath.Abs(filepath.Join(packaging, "completions"))
	require.NoError(t, err)
	shell := func(t *testing.T, name, script string, args ...string) []string {
		t.Helper()
		cmd := exec.Command(needTool(t, name), append([]string{"-c", script}, args...)...)
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "HOME="+dir, "XDG_CONFIG_HOME="+dir, "XDG_DATA_HOME="+dir)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		var words []string
		for line := range strings.Lines(string(out)) {
			words = append(words, strings.Fields(line)[0])
		}
		return words
	}
	for line, want := range map[string][]string{
		"bpfnet netw":           {"network"},
		"bpfnet network dis":    {"disallow", "disconnect"},
		"bpfnet daemon --shiel": {"--shield", "--shield-mode", "--shield-syn-rate"},
	} {
		t.Run("bash/"+line, func(t *testing.T) {
			script := `
. /usr/share/bash-completion/bash_completion
. ` + files + `/bpfnet.bash
COMP_LINE=$0 COMP_POINT=${#0}
read -ra COMP_WORDS <<<"$0"
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
__start_bpfnet
printf '%s\n' "${COMPREPLY[@]}"
`
			assert.Subset(t, shell(t, "bash", script, line), want)
		})
		t.Run("fish/"+line, func(t *testing.T) {
			assert.Subset(t, shell(t, "fish", `source `+files+`/bpfnet.fish; complete --do-complete $argv[1]`, line), want)
		})
	}
	t.Run("zsh", func(t *testing.T) {
		// Its completion needs a terminal: that it loads, and is found under the command's name.
		assert.Equal(t, []string{"_bpfnet"}, shell(t, "zsh",
			`fpath=($0 $fpath); autoload -U compinit; compinit -D -u; source `+files+`/bpfnet.zsh && print ${_comps[bpfnet]}`, dir))
	})
}

// needTool is a program's path; without it the test is skipped, or fails where all must run.
func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("BPFNET_REQUIRE_ROOT") != "" {
			t.Fatalf("%v (scripts/deps.sh test)", err)
		}
		t.Skipf("%v (scripts/deps.sh test)", err)
	}
	return path
}

// TestReferenceConfigFile writes the configuration that operators copy from: each key with what it is for and its default,
// all of them commented out.
func TestReferenceConfigFile(t *testing.T) {
	var b strings.Builder
	b.WriteString(`# Each key of bpfnet's configuration with its default. What you change counts in /etc/bpfnet/config.yaml: copy this file
# there, or the lines in question, and take the # before them away.
#
# "bpfnet config check" says what is wrong, "bpfnet config show" what counts and where it comes from. With
# "systemctl reload bpfnet" the daemon reads the file again; keys marked (restart) wait for its next start.
`)
	keys, flags := keysOf(newWorld(t).command())
	for _, k := range keys {
		_, usage := pflag.UnquoteUsage(flags[k.Name])
		if !slices.Contains(live, k.Name) {
			usage += " (restart)"
		}
		b.WriteString("\n")
		for _, line := range wrapped(usage, 118) {
			fmt.Fprintf(&b, "# %s\n", line)
		}
		fmt.Fprintf(&b, "#%s: %s\n", k.Name, yamlDefault(k.Kind, flags[k.Name].DefValue))
	}
	golden(t, filepath.Join(packaging, "config.yaml"), b.String())
}

func yamlDefault(kind config.Kind, value string) string {
	switch {
	case kind == config.List:
		return "[]"
	case kind == config.Pairs:
		return "{}"
	case value == "":
		return `""`
	}
	return value
}

// wrapped breaks a text into lines of so many bytes at most.
func wrapped(text string, width int) []string {
	var lines []string
	line := ""
	for _, w := range strings.Fields(text) {
		if line != "" && len(line)+1+len(w) > width {
			lines, line = append(lines, line), ""
		}
		line = strings.TrimPrefix(line+" "+w, " ")
	}
	return append(lines, line)
}

// As it is, the file changes nothing, and its defaults, taken in, are those of the flags.
func TestConfigFile(t *testing.T) {
	path := filepath.Join(packaging, "config.yaml")
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	w := newWorld(t)
	assert.Equal(t, path+": ok, 0 effective keys\n", w.must("--config", path, "config", "check"))

	all := regexp.MustCompile(`(?m)^#([a-z-]+: )`).ReplaceAllString(string(raw), "$1")
	keys, _ := keysOf(w.command())
	in := w.configFile(all)
	status, out, errs := w.bare("--config", in, "config", "check")
	require.Zero(t, status, errs)
	assert.Equal(t, fmt.Sprintf("%s: ok, %d effective keys\n", in, len(keys)), out)
	values := func(args ...string) string {
		status, out, errs := w.bare(append(args, "config", "show")...)
		require.Zero(t, status, errs)
		return regexp.MustCompile(`(?m) +\S+$`).ReplaceAllString(out, "") // where from
	}
	assert.Equal(t, values("--config="), values("--config", in))
}
