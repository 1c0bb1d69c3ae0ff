// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// LaterVersion is how the build of [Bpfnet.Later] calls itself.
const LaterVersion = "later"

// generateLine is a line of bpf/gen.go, from the arguments of bpf2go on.
var generateLine = regexp.MustCompile(`(?m)^//go:generate go tool bpf2go (.*)-cflags "([^"]*)"(.*)$`)

// builtLater is bpfnet as a later version would be, in which a flow's entry is eight bytes longer: the same
// sources, with objects and Go twins made anew.
var builtLater = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", module+"/bpf").Output()
	if err != nil {
		return "", fmt.Errorf("find package bpf: %w", err)
	}
	src := strings.TrimSpace(string(out))
	text, err := os.ReadFile(filepath.Join(src, "gen.go"))
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(binDir, "later")
	if err != nil {
		return "", err
	}
	for _, line := range generateLine.FindAllStringSubmatch(string(text), -1) {
		args := append([]string{"tool", "bpf2go", "-go-package", "bpf", "-output-dir", dir}, strings.Fields(line[1])...)
		args = append(append(args, "-cflags", line[2]+" -DFLOW_PAD=8"), strings.Fields(line[3])...)
		cmd := exec.Command("go", args...)
		cmd.Dir = src
		if msg, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("%s: %w\n%s", cmd, err, msg)
		}
	}
	made, err := os.ReadDir(dir)
	if err != nil {
		return "", err
	}
	overlay := struct{ Replace map[string]string }{make(map[string]string)}
	for _, e := range made {
		overlay.Replace[filepath.Join(src, e.Name())] = filepath.Join(dir, e.Name())
	}
	raw, err := json.Marshal(overlay)
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		return "", err
	}
	return build("cmd/bpfnet", "bpfnet-later", "-overlay", file, "-ldflags", "-X main.version="+LaterVersion)()
})

// Later is a binary of bpfnet as a later version might be: a flow's entry is eight bytes longer. It is
// built once a test process, and needs clang 14.
func Later(t testing.TB) string {
	t.Helper()
	path, err := builtLater()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Use has the next Start, and all commands, use another binary, and other flags of the daemon behind those
// that it was first started with.
func (b *Bpfnet) Use(binary string, extra ...string) {
	b.binary, b.extra = binary, extra
}
