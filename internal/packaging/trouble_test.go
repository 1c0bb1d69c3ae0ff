// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// documented are the rows of the table in docs/operations.md: by the command, what it prints.
func documented(t *testing.T) map[string]string {
	t.Helper()
	text := read(t, root+"/docs/operations.md")
	_, text, _ = strings.Cut(text, "\n## Troubleshooting\n")
	text, _, _ = strings.Cut(text, "\n##") // the next section, or one below this
	out := make(map[string]string)
	for _, m := range regexp.MustCompile("(?m)^\\|[^|]*\\| `([^`]+)`[^|]* \\| `([^`]+)`[^|]*\\|").FindAllStringSubmatch(text, -1) {
		out[m[1]] = m[2]
	}
	require.NotEmpty(t, out)
	return out
}

var blanks = regexp.MustCompile(` +`)

// prints says whether a text has some words in it, whole ones, with as many blanks between them as may be. Counts are part
// of them.
func prints(text, words string) bool {
	return regexp.MustCompile(`(?m)(^|\s)` + regexp.QuoteMeta(words) + `(\s|,|$)`).MatchString(blanks.ReplaceAllString(text, " "))
}

// Needs root. Each fault of the troubleshooting table is made by a user's means, and the command that the table names prints what
// the table says, to the last number, and had not printed it before.
func TestTroubleshooting(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	h := &host{Lab: l}
	h.b = l.StartBpfnet(t, nil, "--shield")
	h.b.MustCLI(t, "network", "create", "--subnet", "172.30.0.0/16", "frontend")
	h.b.MustCLI(t, "network", "create", "--subnet", "172.31.0.0/16", "backend")
	h.serve(t, "web", "--network", "frontend", "-p", "8080:80")
	h.serve(t, "db", "--network", "backend")
	db4, _ := h.b.Addrs(t, "db", "backend")
	unanswered := func(from *lab.NS, network, to string) {
		t.Helper()
		_, err := from.Get("--network", network, "--timeout", "200ms", to)
		require.Error(t, err)
	}
	config := filepath.Join(l.Dir, "config.yaml")
	write := func(text string) { require.NoError(t, os.WriteFile(config, []byte(text), 0o600)) }
	write("uplink: [eth0]\n")
	faults := []struct {
		command string
		make    func()
	}{
		{"bpfnet drops", func() { unanswered(h.b.NS(t, "web"), "tcp", db4.String()+":80") }},
		{"bpfnet stats web", func() { l.Client.MustGet(t, lab.Host4.String()+":8080") }},
		{"bpfnet shield", func() {
			h.b.MustCLI(t, "deny", "add", lab.Client4.String())
			unanswered(l.Client, "tcp", lab.Host4.String()+":8080")
		}},
		{"bpfnet config check", func() { write("uplink: [eth0]\nmetrics-lisen: 127.0.0.1:9633\n") }},
		{"bpfnet doctor", func() { l.Host.Sysctl(t, "net.ipv4.ip_forward", "0") }},
		{"bpfnet status", func() { h.b.Kill() }},
	}
	want := documented(t)
	for _, f := range faults {
		t.Run(f.command, func(t *testing.T) {
			require.Contains(t, want, f.command, "the table does not tell of it")
			args := strings.Fields(f.command)[1:]
			if f.command == "bpfnet config check" {
				args = append([]string{"--config", config}, args...)
			}
			out := ""
			defer func() {
				if t.Failed() {
					t.Logf("%s", out)
				}
			}()
			printed := func() bool {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				raw, err := h.b.Command(ctx, args...).CombinedOutput()
				if exit := new(exec.ExitError); err != nil {
					require.ErrorAs(t, err, &exit)
				}
				out = strings.ReplaceAll(string(raw), config, "/etc/bpfnet/config.yaml")
				return prints(out, want[f.command])
			}
			require.False(t, printed(), "before anything is wrong")
			f.make()
			lab.Eventually(t, 10*time.Second, want[f.command], printed)
		})
	}
	assert.Len(t, want, len(faults), "a row that nobody has tried")
}
