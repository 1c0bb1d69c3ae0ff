// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"context"
	"fmt"
	"net/netip"
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

// machine is a root directory with a dpkg database of its own and as much of a system as maintainer scripts need: a
// static busybox, and what they take for systemd.
type machine struct {
	h    *host
	root string
	pins string // if not empty, the directory that is the machine's /sys/fs/bpf/bpfnet
}

// systemctl stands in the machine's PATH. It writes down what is asked of it, and of that does what the daemon must
// really meet: to be ended, and to be asked whether it runs. Starting is the test's. A daemon that does not run is in the
// state that daemon.state says.
const systemctl = `#!/bin/sh
echo "$*" >>/systemctl.log
pid=$(cat /daemon.pid 2>/dev/null)
runs() { [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; }
case "$*" in
*is-active*)
	state=$(cat /daemon.state 2>/dev/null) || state=inactive
	if runs; then state=active; fi
	[ "$1" = --quiet ] || echo "$state"
	[ "$state" = active ]
	;;
"stop bpfnet.service")
	if runs; then kill "$pid"; fi
	while runs; do usleep 10000; done
	;;
esac
`

func newMachine(t *testing.T, h *host) *machine {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	require.NoError(t, err, "scripts/deps.sh test")
	m := &machine{h: h, root: t.TempDir()}
	for _, dir := range []string{"bin", "usr/bin", "usr/local/bin", "usr/sbin", "sbin", "dev", "etc", "proc", "sys", "tmp", "run/systemd/system", "var/lib/dpkg/info", "var/lib/dpkg/updates"} {
		require.NoError(t, os.MkdirAll(filepath.Join(m.root, dir), 0o755))
	}
	m.write(t, "var/lib/dpkg/status", "", 0o644)
	m.write(t, "usr/bin/systemctl", systemctl, 0o755)
	require.NoError(t, copyFile(busybox, filepath.Join(m.root, "bin/busybox"), 0o755))
	for _, applet := range []string{"sh", "cat", "kill", "rm", "rmdir", "usleep", "["} {
		require.NoError(t, os.Symlink("busybox", filepath.Join(m.root, "bin", applet)))
	}
	return m
}

func (m *machine) write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	require.NoError(t, os.WriteFile(filepath.Join(m.root, path), []byte(text), mode))
}

// dpkg runs dpkg on the machine: in the lab's host, with the kernel's file systems and the lab's own directory where they
// are outside. The mounts are in a namespace of dpkg's own, and end with it.
func (m *machine) dpkg(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	const script = `set -e
root=$1 lab=$2
pins=$3
shift 3
mount --rbind /dev "$root/dev"
mount --rbind /proc "$root/proc"
mount --rbind /sys "$root/sys"
if [ -n "$pins" ]; then
	mount -t tmpfs none "$root/sys/fs/bpf"
	mkdir "$root/sys/fs/bpf/bpfnet"
	mount --bind "$pins" "$root/sys/fs/bpf/bpfnet"
fi
mkdir -p "$root$lab"
mount --bind "$lab" "$root$lab"
exec dpkg --root="$root" --force-unsafe-io "$@"`
	argv := append([]string{"--mount", "--", "sh", "-c", script, "sh", m.root, m.h.Dir, m.pins}, args...)
	cmd := m.h.Host.Command(ctx, "unshare", argv...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (m *machine) mustDpkg(t *testing.T, args ...string) string {
	t.Helper()
	out, err := m.dpkg(args...)
	require.NoError(t, err, "dpkg %v: %s", args, out)
	return out
}

// asked is what the scripts have asked of systemctl since the last call.
func (m *machine) asked(t *testing.T) []string {
	t.Helper()
	log := filepath.Join(m.root, "systemctl.log")
	raw, err := os.ReadFile(log)
	if os.IsNotExist(err) {
		return nil
	}
	require.NoError(t, err)
	require.NoError(t, os.Remove(log))
	return strings.Split(strings.TrimSpace(string(raw)), "\n")
}

// ours are the machine's files that are bpfnet's.
func (m *machine) ours(t *testing.T) []string {
	t.Helper()
	var out []string
	for path := range files(t, m.root) {
		if strings.Contains(path, "bpfnet") && !strings.HasPrefix(path, m.h.Dir) {
			out = append(out, path)
		}
	}
	return out
}

// state is what dpkg says of the package.
func (m *machine) state(t *testing.T) string {
	t.Helper()
	return regexp.MustCompile(`(?m)^Status: (.*)$`).FindString(read(t, filepath.Join(m.root, "var/lib/dpkg/status")))
}

// edition makes another version of a package, with another binary and one more key in the configuration's template.
func edition(t *testing.T, deb, version string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "deb")
	do := func(name string, args ...string) {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "DPKG_DEB_COMPRESSOR_TYPE=none", "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	do("dpkg-deb", "--raw-extract", deb, dir)
	do("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -X main.version=v"+version, "-o", filepath.Join(dir, "usr/bin/bpfnet"), "github.com/bpfnet/bpfnet/cmd/bpfnet")
	control := filepath.Join(dir, "DEBIAN/control")
	text := regexp.MustCompile(`(?m)^Version: .*$`).ReplaceAllString(read(t, control), "Version: "+version)
	require.NoError(t, os.WriteFile(control, []byte(text), 0o644))
	template := filepath.Join(dir, "usr/share/bpfnet/config.yaml")
	require.NoError(t, os.WriteFile(template, []byte(read(t, template)+"# More.\n"), 0o644))
	out := filepath.Join(t.TempDir(), "bpfnet.deb")
	do("dpkg-deb", "--root-owner-group", "--build", dir, out)
	return out
}

// debLife installs the package, upgrades it under traffic, and removes and purges it, which it refuses while it is needed:
// by dpkg on a system of its own, with the daemon that it installed serving a host.
func debLife(t *testing.T, h *host, first string) {
	m := newMachine(t, h)
	before := h.Host.GetSysctl(t, "net.ipv4.ip_forward")
	h.b = h.StartBpfnet(t, nil)
	h.b.Stop(t)
	h.b.MustCLI(t, "cleanup")

	// The configuration is there already, as from whatever keeps many hosts alike, and says where this host has its things.
	// So is a program of the same name that goes first in PATH, and a unit that goes before the package's.
	config := filepath.Join(m.root, "etc/bpfnet/config.yaml")
	edited := fmt.Sprintf("state: %s\nsocket: %s\nbpffs: %s\ncgroup: %s\ndocker: off\n", h.b.State, h.b.Socket, h.BPFFS, h.Cgroup)
	require.NoError(t, os.Mkdir(filepath.Dir(config), 0o755))
	require.NoError(t, os.WriteFile(config, []byte(edited), 0o644))
	const other, shadow = "usr/local/bin/bpfnet", "etc/systemd/system/bpfnet.service"
	m.write(t, other, "#!/bin/sh\n", 0o755)
	require.NoError(t, os.MkdirAll(filepath.Join(m.root, filepath.Dir(shadow)), 0o755))
	m.write(t, shadow, read(t, unit), 0o644)

	// Installed, with nothing asked, and nothing is started or enabled: that is the operator's to say.
	ready := []string{"daemon-reload", "try-restart bpfnet.service", "--quiet is-active bpfnet.service"}
	const idle = "bpfnet: the daemon does not run; systemctl enable --now bpfnet"
	said := m.mustDpkg(t, "--install", first)
	assert.Equal(t, ready, m.asked(t))
	assert.Contains(t, said, idle)
	assert.Contains(t, said, "bpfnet: /"+shadow+" goes before the unit of this package")
	require.NoError(t, os.Remove(filepath.Join(m.root, shadow)))
	assert.Equal(t, edited, read(t, config))
	installed := filepath.Join(m.root, "usr/bin/bpfnet")
	assert.Equal(t, "bpfnet "+version, h.Host.MustRun(t, installed, "--version"))
	for _, path := range []string{
		"/usr/lib/systemd/system/bpfnet.service", "/usr/share/bpfnet/docker.service.d/bpfnet.conf", "/usr/share/bpfnet/config.yaml",
		"/usr/share/man/man8/bpfnet.8.gz", "/usr/share/man/man8/bpfnet-run.8.gz", "/usr/share/bash-completion/completions/bpfnet",
		"/usr/share/zsh/vendor-completions/_bpfnet", "/usr/share/fish/vendor_completions.d/bpfnet.fish",
		"/usr/libexec/bpfnet/docker-proxy", "/usr/share/doc/bpfnet/copyright", "/usr/share/doc/bpfnet/changelog.gz",
		"/usr/share/doc/bpfnet/third-party.txt",
	} {
		assert.Contains(t, m.ours(t), path)
	}
	assert.Empty(t, m.mustDpkg(t, "--verify", "bpfnet"), "the files are as their sums say")
	assert.NotContains(t, m.ours(t), "/etc/systemd/system/docker.service.d/bpfnet.conf", "an Engine that has its iptables goes on without bpfnet")

	// The daemon is the installed one.
	serving := func(start func(testing.TB)) {
		t.Helper()
		h.b.Use(installed)
		start(t)
		m.write(t, "daemon.pid", fmt.Sprintln(h.b.PID()), 0o644)
	}
	serving(h.b.Start)
	h.b.MustCLI(t, "network", "create", "--subnet", "172.30.0.0/16", "blue")
	h.serve(t, "web", "--network", "blue", "-p", "8080:80")
	published := netip.AddrPortFrom(lab.Host4, 8080).String()
	stream := h.Client.Stream(t, "--interval", "5ms", "--duration", "5m", published)

	// Upgraded, by nobody who could answer a question: the new files, the old configuration, and the daemon that is asked to
	// restart is the only thing that ends.
	pid := h.b.PID()
	said = m.mustDpkg(t, "--install", edition(t, first, "1.2.3+5"))
	assert.Equal(t, ready, m.asked(t))
	assert.NotContains(t, said, "bpfnet: ")
	assert.Equal(t, pid, h.b.PID())
	h.Client.MustGet(t, published)
	assert.Equal(t, edited, read(t, config))
	assert.Contains(t, read(t, filepath.Join(m.root, "usr/share/bpfnet/config.yaml")), "# More.")
	serving(h.b.Restart)
	assert.Contains(t, h.b.MustCLI(t, "status"), "version v1.2.3+5")
	h.Client.MustGet(t, published)
	// And back, as after an upgrade that did not please.
	m.mustDpkg(t, "--force-downgrade", "--install", first)
	assert.Equal(t, ready, m.asked(t))
	serving(h.b.Restart)
	sum := stream.Finish(t)
	assert.Zero(t, sum.Lost+sum.Corrupt+sum.Resets, "%+v", sum)
	assert.Positive(t, sum.Received)
	assert.Equal(t, edited, read(t, config))

	// Removed it cannot be while a sandbox runs: what says so is cleanup, and all goes on.
	refused := func(why ...string) {
		t.Helper()
		out, err := m.dpkg("--remove", "bpfnet")
		require.Error(t, err, out)
		for _, w := range why {
			assert.Contains(t, out, w)
		}
		assert.Contains(t, m.state(t), "installed")
		h.Client.MustGet(t, published)
	}
	stopped := []string{"is-active bpfnet.service", "stop bpfnet.service"}
	inTheWay := []string{"web", "bpfnet: not removed: the line above says what is in the way"}
	refused(inTheWay...)
	assert.Equal(t, append(stopped[:2:2], "start bpfnet.service"), m.asked(t))
	// One that systemd is about to try again is asked for again, and one that the operator has stopped is not.
	m.write(t, "daemon.pid", "", 0o644)
	refused(inTheWay...)
	assert.Equal(t, stopped, m.asked(t))
	m.write(t, "daemon.state", "activating\n", 0o644)
	refused(inTheWay...)
	assert.Equal(t, append(stopped[:2:2], "start bpfnet.service"), m.asked(t))
	require.NoError(t, os.Remove(filepath.Join(m.root, "daemon.state")))

	// Nor where there is no systemd to end the daemon by: neither while it runs nor while its programs do. Its things are
	// where an operator has them who has not named other places.
	systemd := filepath.Join(m.root, "run/systemd")
	require.NoError(t, os.Rename(systemd, systemd+".away"))
	for _, dir := range []string{"run/bpfnet", "var/lib/bpfnet"} {
		require.NoError(t, os.MkdirAll(filepath.Join(m.root, dir), 0o755))
	}
	const inPlace = `bpfnet: not removed: its data path is in place`
	m.pins = h.BPFFS
	refused(inPlace)
	m.pins = ""
	serving(h.b.Start) // which it has asked for
	socket := filepath.Join(m.root, "run/bpfnet/bpfnet.sock")
	require.NoError(t, os.Symlink(h.b.Socket, socket))
	refused(inPlace)
	require.NoError(t, os.Remove(socket))
	require.NoError(t, os.Rename(systemd+".away", systemd))
	assert.Empty(t, m.asked(t))
	h.b.MustCLI(t, "rm", "--force", "web")

	m.mustDpkg(t, "--remove", "bpfnet")
	assert.Equal(t, []string{"is-active bpfnet.service", "stop bpfnet.service", "--quiet disable bpfnet.service", "daemon-reload"}, m.asked(t))
	pins, err := os.ReadDir(h.BPFFS)
	if err == nil {
		assert.Empty(t, pins, "the data path is taken away")
	}
	assert.Equal(t, before, h.Host.GetSysctl(t, "net.ipv4.ip_forward"))
	assert.Empty(t, h.b.Belongings(t))
	assert.Equal(t, edited, read(t, config), "the configuration stays")
	assert.NoFileExists(t, installed)
	assert.Contains(t, m.state(t), "config-files")

	// Installed once more it waits for the operator as at first.
	require.NoError(t, os.Remove(filepath.Join(m.root, other)))
	assert.Contains(t, m.mustDpkg(t, "--install", first), idle)
	m.mustDpkg(t, "--purge", "bpfnet")
	require.NoError(t, os.Remove(filepath.Join(m.root, "run/bpfnet")))
	assert.Empty(t, m.ours(t), "nothing is left")
	assert.Empty(t, m.state(t))
	assert.NoDirExists(t, filepath.Dir(config))
}

// Where systemd does not run, as in an image that is being made, the scripts touch nothing but files, even if a host's
// pins are in sight, and of those none that somebody still uses.
func debInImage(t *testing.T, h *host, deb string) {
	m := newMachine(t, h)
	require.NoError(t, os.RemoveAll(filepath.Join(m.root, "run/systemd")))
	m.pins = t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(m.pins, "maps"), 0o700))
	m.mustDpkg(t, "--install", deb)
	m.mustDpkg(t, "--remove", "bpfnet")

	// A bpfnet that was installed by other means has come meanwhile: purging leaves what is its.
	require.NoError(t, os.MkdirAll(filepath.Join(m.root, "var/lib/bpfnet"), 0o755))
	m.write(t, "var/lib/bpfnet/state.db", "sysctls", 0o600)
	assert.Contains(t, m.mustDpkg(t, "--purge", "bpfnet"), "bpfnet: left: /etc/bpfnet and /var/lib/bpfnet")
	assert.Equal(t, []string{"/var/lib/bpfnet/state.db"}, m.ours(t))

	m.pins = ""
	m.mustDpkg(t, "--install", deb)
	m.mustDpkg(t, "--purge", "bpfnet")
	assert.Empty(t, m.asked(t))
	assert.Empty(t, m.ours(t))
}
