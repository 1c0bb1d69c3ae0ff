// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/loader"
)

// openAs opens a daemon in the lab's host, which runs rounds when the test has it do so.
func openAs(t *testing.T, l *lab.Lab, cfg Config) *Daemon {
	t.Helper()
	cfg.Docker, cfg.Flows = "off", 1024
	cfg.Paths = Paths{State: filepath.Join(l.Dir, "state"), Socket: filepath.Join(l.Dir, "s.sock"), BPFFS: l.BPFFS, Cgroup: l.Cgroup}
	var d *Daemon
	require.NoError(t, l.Host.Do(func() (err error) {
		d, err = open(cfg)
		return err
	}))
	t.Cleanup(d.close)
	return d
}

// Needs root. What cannot be read of the host's settings stays as it was, and what else there is to do is done; if they
// have never been read, nothing is.
func TestHostSettingsUnreadable(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := openAs(t, l, Config{})
	broken := filepath.Join(l.Dir, "broken")
	require.NoError(t, os.WriteFile(broken, []byte("neither two\n"), 0o600))
	// round runs one; in a view of its own of the file system, a setting of the host reads as nobody expects.
	round := func(unreadable bool) error {
		return l.Host.Do(func() error {
			if unreadable {
				runtime.LockOSThread() // never unlocked: the view ends with the thread
				const setting = "/proc/sys/net/ipv4/ip_local_port_range"
				for _, step := range []func() error{
					func() error { return syscall.Unshare(syscall.CLONE_FS | syscall.CLONE_NEWNS) },
					func() error { return syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "") },
					func() error { return syscall.Mount(broken, setting, "", syscall.MS_BIND, "") },
				} {
					if err := step(); err != nil {
						return err
					}
				}
			}
			return d.reconcile()
		})
	}
	config := func() (c bpf.DatapathConfig) {
		t.Helper()
		m, err := ebpf.LoadPinnedMap(filepath.Join(l.BPFFS, "maps", "config"), nil)
		require.NoError(t, err)
		defer m.Close()
		require.NoError(t, m.Lookup(uint32(0), &c))
		return c
	}
	forwarding := l.Host.MustRun(t, "sysctl", "net.ipv4.ip_forward")

	require.ErrorContains(t, round(true), "net/ipv4/ip_local_port_range: ")
	require.Zero(t, config(), "nothing is served by half of the settings")
	require.Empty(t, d.loader.Attachments())
	require.Equal(t, forwarding, l.Host.MustRun(t, "sysctl", "net.ipv4.ip_forward"))

	require.NoError(t, round(false))
	good := config()
	require.NotZero(t, good.Snat[0].Count)
	require.True(t, d.loader.Attached(loader.FromUplink, l.Host.Ifindex(t, lab.HostIf)))

	d.timeouts["udp"] = 10 * time.Second
	require.ErrorContains(t, round(true), "net/ipv4/ip_local_port_range: ")
	want := good
	want.Timeouts.Udp = toTicks(10 * time.Second)
	require.Equal(t, want, config(), "the ports are those of before, and all else is as it is now")
	require.NoError(t, round(false))
	require.Equal(t, want, config())
}

// Needs root. An uplink that carried VLANs gets the shield as soon as it carries none.
func TestShieldComesBack(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := openAs(t, l, Config{Shield: loader.ShieldGeneric})
	require.NoError(t, l.Host.Do(d.reconcile))
	round := func(tagged bool) string {
		t.Helper()
		uplinks := slices.Clone(d.seen.Uplinks)
		require.NotEmpty(t, uplinks)
		for i := range uplinks {
			uplinks[i].Tagged = tagged
		}
		require.NoError(t, l.Host.Do(func() error {
			_, err := d.shield.apply(uplinks, nil, false)
			return err
		}))
		return d.shield.why[l.Host.Ifindex(t, lab.HostIf)]
	}
	require.Empty(t, round(false))
	require.Contains(t, round(true), "VLANs")
	require.Contains(t, round(true), "VLANs")
	require.Empty(t, round(false))
	attached := false
	for _, a := range d.loader.Attachments() {
		attached = attached || a.Hook == "xdp" && a.Ifindex == l.Host.Ifindex(t, lab.HostIf)
	}
	assert.True(t, attached)
}

// Needs root. Forwarding that cannot be remembered as the daemon's own is not left on: the next start would take it for the
// host's, and let it route for everybody.
func TestForwardingIsRemembered(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := openAs(t, l, Config{})
	before := l.Host.GetSysctl(t, "net.ipv4.ip_forward")
	require.Equal(t, "0", before)
	// Behind the store's file descriptor, the file turns read-only.
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	turned := 0
	for _, e := range fds {
		path, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || !strings.HasPrefix(path, l.Dir) || filepath.Base(path) != "state.db" {
			continue
		}
		fd, err := strconv.Atoi(e.Name())
		require.NoError(t, err)
		good, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		require.NoError(t, err)
		reads, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Dup3(reads, fd, unix.O_CLOEXEC))
		defer func() {
			require.NoError(t, unix.Dup3(good, fd, unix.O_CLOEXEC))
			require.NoError(t, errors.Join(unix.Close(good), unix.Close(reads)))
		}()
		turned++
	}
	require.Equal(t, 1, turned)
	require.ErrorContains(t, l.Host.Do(d.reconcile), "turn forwarding on: ")
	require.Equal(t, before, l.Host.GetSysctl(t, "net.ipv4.ip_forward"))
	require.Empty(t, d.changes)
}
