// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/config"
	"github.com/bpfnet/bpfnet/daemon"
)

// configFile writes a configuration file and returns its path.
func (w *world) configFile(text string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, "config.yaml")
	require.NoError(w.t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func (w *world) environment(env ...string) {
	w.Environ = func() []string { return append([]string{"PATH=/bin"}, env...) }
}

// A flag is stronger than the environment, that is stronger than the file, and that than the default.
func TestPrecedence(t *testing.T) {
	w := newWorld(t)
	path := w.configFile("flows: 100\nmetrics-limit: 10\nrelay: all\nuplink: [eth0, eth1]\ntimeout: {udp: 5m}\ndocker: off\n")
	w.environment("BPFNET_FLOWS=200", "BPFNET_METRICS_LIMIT=20", "BPFNET_UPLINK=wg0,wg1", "BPFNET_NONSENSE=1")
	w.must("--config", path, "daemon", "--flows", "300")
	assert.Equal(t, 300, w.daemon.Flows, "flag")
	assert.Equal(t, 20, w.daemon.MetricsLimit, "environment")
	assert.Equal(t, []string{"wg0", "wg1"}, w.daemon.Uplinks, "environment, not added to the file's")
	assert.Equal(t, "all", w.daemon.Relay, "file")
	assert.Equal(t, "off", w.daemon.Docker, "file")
	assert.Equal(t, map[string]time.Duration{"udp": 5 * time.Minute}, w.daemon.Timeouts, "file")
	assert.Empty(t, w.daemon.Attach, "default")

	w.environment("BPFNET_CONFIG=" + path)
	w.must("daemon")
	assert.Equal(t, 100, w.daemon.Flows, "the file is named by the environment")
	w.must("--config=", "daemon")
	assert.Zero(t, w.daemon.Flows, "no file")
}

// What is wrong is named where it stands, by check and by the daemon alike, and nothing starts.
func TestConfigErrors(t *testing.T) {
	for text, want := range map[string]string{
		"flows: many":            `FILE:1: flows: want a whole number, have "many"`,
		"\nflow: 5":              `FILE:2: flow: no such key; the nearest are flows, relay, bpffs`,
		"attach: xdp":            `FILE:1: attach "xdp": want tcx or clsact`,
		"timeout: {udq: 5m}":     `FILE:1: timeout "udq=5m": no such timeout; the nearest names are udp, icmp, other`,
		"timeout: {udp: 1ms}":    `FILE:1: timeout udp=1ms: out of range; use 2s to 8760h`,
		"log-level: loud":        `FILE:1: log-level "loud": want one of debug, error, info, warn`,
		"metrics-listen: 9633":   `FILE:1: metrics-listen "9633": want ADDR:PORT, like 127.0.0.1:9633 or [::]:9633`,
		"metrics-limit: 0":       `FILE:1: metrics-limit 0: want a positive number`,
		"strict: maybe\nflow: 1": `FILE:1: strict: want true or false, have "maybe"; FILE:2: flow: no such key; the nearest are flows, relay, bpffs`,
		"flows: [":               `FILE:1: no YAML: did not find expected node content`,
	} {
		w := newWorld(t)
		path := w.configFile(text)
		want = strings.ReplaceAll(want, "FILE", path)
		assert.Equal(t, "bpfnet: config check: "+want, w.fails(1, "--config", path, "config", "check"), text)
		assert.Equal(t, "bpfnet: config show: "+want, w.fails(1, "--config", path, "config", "show"), text)
		assert.Equal(t, "bpfnet: daemon: "+want, w.fails(1, "--config", path, "daemon"), text)
		assert.Nil(t, w.daemon)
	}
	w := newWorld(t)
	w.environment("BPFNET_FLOWS=many")
	assert.Equal(t, `bpfnet: config check: BPFNET_FLOWS: want a whole number, have "many"`, w.fails(1, "config", "check"))
	w.environment("BPFNET_ATTACH=xdp")
	assert.Equal(t, `bpfnet: daemon: BPFNET_ATTACH "xdp": want tcx or clsact`, w.fails(1, "daemon"))
	assert.Equal(t, "bpfnet: config check: configuration "+w.dir+"/none: no such file; make it, or name another with --config",
		w.fails(1, "--config", w.dir+"/none", "config", "check"))
}

// Who is called when something is wrong works with a file that has an error, as far as its paths are known.
func TestReadersMindNoMoreThanPaths(t *testing.T) {
	w := readable(t)
	path := w.configFile(fmt.Sprintf("flow: 5\nattach: xdp\nstate: %s\nbpffs: %s\n", w.state(), w.bpffs()))
	status, out, errs := w.bare("--config", path, "stats")
	assert.Zero(t, status, errs)
	assert.Contains(t, out, "web")
	status, _, errs = w.bare("--config", w.configFile("state: ["), "stats")
	assert.Equal(t, 1, status)
	assert.Contains(t, errs, "no YAML")
	w.ReadConfig = func(string) ([]byte, error) { return nil, &fs.PathError{Op: "open", Path: "f", Err: fs.ErrPermission} }
	assert.Equal(t, `bpfnet: stats: configuration: open f: permission denied; run as root, or go without it (--config "")`, w.fails(1, "stats"))
}

// A path that is wrong in the file is not replaced by the default: that may be another daemon's.
func TestBrokenPaths(t *testing.T) {
	w := readable(t)
	for _, text := range []string{"bpffs: [a, b]", "bpffs: /a\nbpffs: /b", "flow: 5\nbpffs: {a: b}\nattach: [1]"} {
		path := w.configFile(text)
		status, _, errs := w.bare("--config", path, "--state", w.state(), "stats")
		assert.Equal(t, 1, status)
		assert.Regexp(t, `^bpfnet: stats: `+path+`:\d: bpffs: [^;]*(; the first is in line 1)?\n$`, errs, "nothing but that")
		status, _, errs = w.bare("--config", path, "--state", w.state(), "--bpffs", w.bpffs(), "stats")
		assert.Zero(t, status, errs)
	}
	dir := t.TempDir()
	path := w.configFile("cgroup: " + dir)
	assert.Equal(t, "bpfnet: daemon: "+path+":1: cgroup "+dir+": not a directory of cgroup2; name one below its mount", w.fails(1, "--config", path, "daemon"))
}

func TestUnreadableConfig(t *testing.T) {
	w := newWorld(t)
	w.ReadConfig = func(string) ([]byte, error) { return nil, &fs.PathError{Op: "open", Path: "f", Err: fs.ErrPermission} }
	for _, args := range [][]string{{"version"}, {"completion", "bash"}, {"__complete", "net"}, {"network"}, {"help", "run"}, {}} {
		status, out, errs := w.bare(args...)
		assert.Zero(t, status, errs)
		assert.NotEmpty(t, out, args)
	}
	assert.Contains(t, w.fails(1, "ps"), "run as root")
}

func TestConfigShow(t *testing.T) {
	w := newWorld(t)
	path := w.configFile("flows: 100\nuplink: [eth0, eth1]\n")
	w.environment("BPFNET_LOG_LEVEL=debug")
	var got []setting
	require.NoError(t, json.Unmarshal([]byte(w.must("--config", path, "config", "show", "-o", "json")), &got))
	by := make(map[string]setting)
	for _, s := range got {
		by[s.Key] = s
	}
	assert.Equal(t, setting{"flows", []string{"100"}, fromFile, path + ":1"}, by["flows"])
	assert.Equal(t, setting{"uplink", []string{"eth0", "eth1"}, fromFile, path + ":2"}, by["uplink"])
	assert.Equal(t, setting{"log-level", []string{"debug"}, fromEnvironment, "BPFNET_LOG_LEVEL"}, by["log-level"])
	assert.Equal(t, setting{"relay", []string{"own"}, fromDefault, ""}, by["relay"])
	assert.Equal(t, setting{"state", []string{w.state()}, fromFlag, ""}, by["state"])
	text := w.must("--config", path, "config", "show")
	assert.Regexp(t, `(?m)^uplink +eth0,eth1 +`+path+`:2$`, text)
	assert.Regexp(t, `(?m)^attach +- +default$`, text)
	assert.Equal(t, path+": ok, 2 effective keys\n", w.must("--config", path, "config", "check"))
}

// On SIGHUP a broken file leaves everything as it is; a good one is taken up as far as that goes, and what needs
// a restart is named, again each time.
func TestReload(t *testing.T) {
	w := newWorld(t)
	const path = "config.yaml"
	texts := []string{ // one for each time that it is read
		"metrics-limit: 10\n",
		"metrics-limit: 20\nfloes: 1\n",
		"metrics-limit: 0\n",
		"metrics-limit: 20\nflows: 100\nlog-level: debug\ntimeout: {udp: 10s}\n",
		"metrics-limit: 20\nflows: 100\nlog-level: debug\ntimeout: {udp: 10s}\n",
	}
	w.ReadConfig = func(string) ([]byte, error) {
		text := texts[0]
		texts = texts[1:]
		return []byte(text), nil
	}
	told := make(chan os.Signal)
	stopped := false
	w.Hangups = func() (<-chan os.Signal, func()) { return told, func() { stopped = true } }
	w.RunDaemon = func(_ context.Context, cfg daemon.Config) error {
		assert.Equal(t, 10, cfg.MetricsLimit)
		cfg.Logger.Debug("hidden")
		for range 3 {
			told <- syscall.SIGHUP
		}
		got := <-cfg.Changes
		assert.Equal(t, daemon.Live{MetricsLimit: 20, Timeouts: map[string]time.Duration{"udp": 10 * time.Second}}, got)
		cfg.Logger.Debug("shown")
		told <- syscall.SIGHUP
		assert.Equal(t, 20, (<-cfg.Changes).MetricsLimit)
		return nil
	}
	_, _, errs := w.run("--config", path, "daemon")
	assert.Contains(t, errs, `configuration not taken; the one before stays" err="`+path+`:2: floes: no such key; the nearest are flows,`)
	assert.Contains(t, errs, `err="`+path+`:1: metrics-limit 0: want a positive number"`)
	assert.Contains(t, errs, `msg="configuration read again" applied=log-level,metrics-limit,timeout needs_a_restart=flows`)
	assert.Contains(t, errs, `msg="configuration read again" applied=none needs_a_restart=flows`)
	assert.NotContains(t, errs, "hidden")
	assert.Contains(t, errs, "shown")
	assert.True(t, stopped)
}

// TestReferenceConfig writes the keys into the documentation.
func TestReferenceConfig(t *testing.T) {
	var doc strings.Builder
	doc.WriteString("# Configuration\n\nMade by `make generate` from the flags. How file, environment and flags go together: [operations](../operations.md#configuration).\n\n" +
		"| key | value | environment | default | on SIGHUP | meaning |\n|---|---|---|---|---|---|\n")
	w := newWorld(t)
	keys, flags := keysOf(w.command())
	for _, k := range keys {
		f := flags[k.Name]
		def := "–"
		if f.DefValue != "" && f.DefValue != "[]" {
			def = "`" + f.DefValue + "`"
		}
		applied := "needs a restart"
		for _, l := range live {
			if l == k.Name {
				applied = "applied"
			}
		}
		fmt.Fprintf(&doc, "| `%s` | %s | `%s` | %s | %s | %s |\n", k.Name, k.Kind, config.Variable(k.Name), def, applied, strings.ReplaceAll(f.Usage, "`", ""))
	}
	for _, l := range live {
		assert.Contains(t, flags, l)
	}
	golden(t, "../../docs/generated/config.md", doc.String())
}
