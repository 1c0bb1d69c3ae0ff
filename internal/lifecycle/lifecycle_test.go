// SPDX-License-Identifier: Apache-2.0

// Package lifecycle starts, refuses, kills, stops and cleans up the daemon, as a process in a lab
// without Docker. Needs root.
package lifecycle

import (
	"context"
	"errors"
	"fmt"
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

func TestMain(m *testing.M) { lab.Main(m) }

// refused runs a command that must fail with status 1 and one line, and returns that line.
func refused(t *testing.T, err error) string {
	t.Helper()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	assert.Equal(t, 1, exit.ExitCode())
	_, line, ok := strings.Cut(err.Error(), "exit status 1: ")
	require.True(t, ok, err)
	assert.Regexp(t, `^bpfnet: [^\n]+$`, line)
	return line
}

// settings are the host's sysctls that a daemon may change.
func settings(t *testing.T, l *lab.Lab) string {
	t.Helper()
	return l.Host.MustRun(t, "sysctl", "-a", "-r", `ip_forward$|\.forwarding|accept_ra$|accept_redirects|bridge-nf-call|route_localnet|ip_local_reserved_ports`)
}

// pins lists what an instance has pinned. Programs that are kept for the next start are left out: some
// are loaded behind the daemon's back, and come a moment later.
func pins(t *testing.T, l *lab.Lab) []string {
	t.Helper()
	var found []string
	require.NoError(t, filepath.WalkDir(l.BPFFS, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Base(filepath.Dir(path)) != "programs" {
			found = append(found, path)
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}))
	return found
}

func TestStatusAndCleanupOverALife(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	before := settings(t, l)
	b := l.StartBpfnet(t, nil, "--docker", "off")
	assert.Regexp(t, `Daemon: +running for`, b.MustCLI(t, "status"))
	assert.Regexp(t, `up0 +ingress +from_uplink`, b.MustCLI(t, "status"))
	assert.NotEqual(t, before, settings(t, l), "forwarding is on")
	attached := pins(t, l)

	line := refused(t, lastErr(b.CLI("daemon", "--docker", "off")))
	assert.Contains(t, line, "second daemon on the same state: "+b.State)
	line = refused(t, lastErr(b.CLI("cleanup")))
	assert.Contains(t, line, "stop it first")
	assert.Equal(t, attached, pins(t, l), "a refusal changes nothing")
	assert.Regexp(t, `Daemon: +running for`, b.MustCLI(t, "status"), "the first daemon is not disturbed")

	b.Kill()
	assert.Equal(t, attached, pins(t, l), "the network runs on")
	assert.Regexp(t, `Daemon: +not running`, b.MustCLI(t, "status"))
	b.MustCLI(t, "stats")
	b.Start(t)
	assert.Regexp(t, `Daemon: +running for`, b.MustCLI(t, "status"))
	b.Stop(t)
	assert.NoFileExists(t, b.Socket)
	assert.Equal(t, attached, pins(t, l))

	b.MustCLI(t, "cleanup")
	assert.Equal(t, before, settings(t, l))
	assert.NoDirExists(t, l.BPFFS)
	entries, err := os.ReadDir(b.State)
	require.NoError(t, err)
	assert.Empty(t, entries)
	refused(t, lastErr(b.CLI("stats")))
	b.MustCLI(t, "cleanup") // idempotent
}

func TestRefusalsChangeNothing(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	b := l.StartBpfnet(t, nil, "--docker", "off")
	binary, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", b.PID()))
	require.NoError(t, err)
	b.Stop(t)
	b.MustCLI(t, "cleanup")
	before := settings(t, l)

	check := func(t *testing.T, err error, want string) {
		t.Helper()
		assert.Regexp(t, want, refused(t, err))
		assert.Equal(t, before, settings(t, l))
		assert.Empty(t, pins(t, l))
	}
	t.Run("unknown uplink", func(t *testing.T) {
		check(t, lastErr(b.CLI("daemon", "--docker", "off", "--uplink", "up2")), `^bpfnet: daemon: .*up2.*up0, up1`)
	})
	t.Run("not a cgroup", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, err := l.Host.Run(ctx, binary, "daemon", "--docker", "off", "--state", b.State, "--socket", b.Socket, "--bpffs", l.BPFFS, "--cgroup", l.Dir)
		check(t, err, regexp.QuoteMeta("--cgroup "+l.Dir+": not a directory of cgroup2"))
	})
	t.Run("not in a bpffs", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, err := l.Host.Run(ctx, binary, "daemon", "--docker", "off", "--state", b.State, "--socket", b.Socket, "--bpffs", filepath.Join(l.Dir, "pins"), "--cgroup", l.Cgroup)
		check(t, err, `^bpfnet: daemon: .*--bpffs`)
	})
	t.Run("missing capability", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, err := l.Host.Run(ctx, "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", binary, "daemon", "--docker", "off",
			"--state", b.State, "--socket", b.Socket, "--bpffs", l.BPFFS, "--cgroup", l.Cgroup)
		check(t, err, `^bpfnet: daemon: not permitted: missing CAP_NET_ADMIN; run this as root$`)
	})
	t.Run("damaged state", func(t *testing.T) {
		path := filepath.Join(b.State, "state.db")
		require.NoError(t, os.MkdirAll(b.State, 0o755))
		require.NoError(t, os.WriteFile(path, []byte("nonsense"), 0o600))
		check(t, lastErr(b.CLI("daemon", "--docker", "off")), "^bpfnet: daemon: state file "+path+": damaged .* to start over")
		raw, err := os.ReadFile(path)
		require.NoError(t, err)
		assert.Equal(t, "nonsense", string(raw))
		require.NoError(t, os.Remove(path))
	})
	t.Run("socket of another", func(t *testing.T) {
		require.NoError(t, os.WriteFile(b.Socket, nil, 0o600))
		check(t, lastErr(b.CLI("daemon", "--docker", "off")), "^bpfnet: daemon: socket "+b.Socket+": there is a file that is no socket")
		require.NoError(t, os.Remove(b.Socket))
	})
}

func lastErr(_ string, err error) error { return err }
