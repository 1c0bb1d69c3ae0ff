// SPDX-License-Identifier: Apache-2.0

// Package importtest holds the direction of imports: a package's place is what it may know.
package importtest

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const module = "github.com/bpfnet/bpfnet/"

// may says which of our packages each of them may import. Commands and internal/ may know everything,
// but nobody outside knows internal/.
var may = map[string][]string{
	"policy":     {},
	"bpf":        {},
	"maps":       {"bpf", "policy"},
	"netdev":     {"policy"},
	"docker":     {"policy"},
	"store":      {"policy"},
	"api":        {"policy"},
	"loader":     {"bpf", "maps"},
	"sandbox":    {},
	"ipam":       {},
	"reserve":    {"policy"},
	"relay":      {"policy", "reserve"},
	"embedded":   {"api", "ipam", "netdev", "policy", "reserve", "sandbox", "store"},
	"explain":    {"loader", "policy"},
	"daemon":     {"policy", "bpf", "maps", "netdev", "docker", "store", "api", "loader", "embedded", "relay", "metrics", "explain"},
	"config":     {},
	"metrics":    {"api", "maps", "policy", "reserve"},
	"doctor":     {"policy", "maps", "loader", "netdev", "api"},
	"bench":      {"bench/load", "internal/lab", "internal/lab/packet", "maps"}, // a harness, not a part of the daemon
	"bench/load": {},
}

// only says who alone may import a package of others. Packages below a named one count too.
var only = map[string][]string{
	"github.com/vishvananda/netlink": {"netdev"},
	"github.com/moby/moby":           {"docker"},
	"go.etcd.io/bbolt":               {"store"},
	"github.com/prometheus":          {"metrics"},
	"github.com/cilium/ebpf":         {"bpf", "maps", "loader", "bench"}, // bench: to make frames, and the limit of dropping them
	"github.com/spf13/cobra":         {"cmd/bpfnet"},
	"charm.land":                     {"cmd/bpfnet"},
	"gonum.org/v1/plot":              {"bench"},
	"github.com/HdrHistogram":        {"bench/load"},
	"github.com/gopacket/gopacket":   {"cmd/bpfnet"}, // pcapng
}

// testOnly are packages of others that only tests and internal/ may import.
var testOnly = []string{
	"github.com/vishvananda/netns", "github.com/stretchr/testify", "testing",
	"github.com/rogpeppe/go-internal",
}

// harness is what may use the tests' lab: it measures, and is no part of the daemon.
var harness = []string{"bench", "cmd/bpfnet-bench"}

type listed struct {
	ImportPath string
	Standard   bool
	Imports    []string
	Module     *struct{ Main bool }
}

// packages lists everything that the module's packages need, tests apart.
func packages(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-deps", "-json=ImportPath,Standard,Imports,Module", module+"...")
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("go list: %s", exit.Stderr)
	}
	require.NoError(t, err)
	var list []listed
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return list
		} else {
			require.NoError(t, err)
		}
		if p.Module != nil && p.Module.Main {
			list = append(list, p)
		}
	}
}

func below(path, root string) bool { return path == root || strings.HasPrefix(path, root+"/") }

func TestImports(t *testing.T) {
	seen := make(map[string]bool)
	for _, p := range packages(t) {
		name := strings.TrimPrefix(p.ImportPath, module)
		seen[name] = true
		if below(name, "internal") {
			continue
		}
		allowed, listed := may[name]
		command := below(name, "cmd")
		if !listed && !command {
			t.Errorf("%s: not in the import table; say there what it may know", name)
		}
		for _, imp := range p.Imports {
			if ours, ok := strings.CutPrefix(imp, module); ok {
				if !command && !slices.Contains(allowed, ours) || below(ours, "internal") && !slices.Contains(harness, name) {
					t.Errorf("%s imports %s", name, ours)
				}
			}
			for root, users := range only {
				if below(imp, root) && !slices.Contains(users, name) {
					t.Errorf("%s imports %s, which is for %s", name, imp, strings.Join(users, ", "))
				}
			}
			for _, root := range testOnly {
				if below(imp, root) && name != "bench" {
					t.Errorf("%s imports %s, which is for tests", name, imp)
				}
			}
		}
	}
	for name := range may {
		assert.True(t, seen[name], "the import table names %s, which does not exist", name)
	}
}
