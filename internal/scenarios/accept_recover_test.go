// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/promise"
)

// said are the lines of the daemon's log with that text.
func (w *site) said(text string) []string {
	return regexp.MustCompile(regexp.QuoteMeta(text)+".*").FindAllString(w.b.Log(), -1)
}

// recovers waits until the daemon has said more often what it said before, and until what is published on addr
// can be reached from outside.
func (w *site) recovers(t *testing.T, before int, text string, addr netip.Addr) {
	t.Helper()
	lab.Eventually(t, 20*time.Second, "the log says: "+text, func() bool { return len(w.said(text)) > before })
	t.Log(w.said(text)[before])
	var err error
	lab.Eventually(t, 20*time.Second, "what is published can be reached", func() bool {
		_, err = w.Client.Get("--timeout", "200ms", at(addr, 8080))
		return err == nil
	})
}

// detach takes a program off its device, as "bpftool link detach" does.
func (w *site) detach(t *testing.T, pattern string) {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(w.BPFFS, "links", pattern))
	require.NoError(t, err)
	require.NotEmpty(t, pins)
	for _, pin := range pins {
		k, err := link.LoadPinnedLink(pin, nil)
		require.NoError(t, err)
		require.NoError(t, k.Detach())
		require.NoError(t, k.Close())
	}
}

// Needs root. Each fault is what a user, another program or the kernel does to a running host. The daemon mends
// it without help and says so in one line; connections that the fault does not touch go on.
func TestAcceptRecovery(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	mount := filepath.Join(l.Dir, "bpffs")
	require.NoError(t, os.Mkdir(mount, 0o755))
	attach := func() { require.NoError(t, syscall.Mount("bpf", mount, "bpf", 0, "")) }
	attach()
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(mount, syscall.MNT_DETACH)) })
	l.BPFFS = filepath.Join(mount, "bpfnet")
	w := ownSite(t, l, "--attach", "tcx")
	w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.sandbox(t, "peer", "blue")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	web4, _ := w.b.Addrs(t, "web", "blue")
	peer := w.b.NS(t, "peer")
	streams := map[string]*lab.Stream{}
	for _, network := range []string{"tcp", "udp"} {
		for name, to := range map[string]string{"container": at(web4, 80), "masqueraded": at(lab.Client24, 7000)} {
			streams[name+" "+network] = peer.Stream(t, "--network", network, "--interval", "10ms", "--duration", "10m", to)
		}
	}
	host := func(args ...string) { w.Host.MustRun(t, "ip", args...) }
	addr := lab.Host4
	other := netip.MustParseAddr("192.0.2.99")
	const putBack, repinned, uplinks = "a program was taken off by other hands", "pins were gone, and are made again", "uplinks have changed"
	faults := []struct {
		name, says string
		fault      func()
	}{
		{"a link is detached", putBack, func() { w.detach(t, fmt.Sprintf("*_uplink-%d", w.Host.Ifindex(t, lab.HostIf))) }},
		{"the sock programs are detached", putBack, func() { w.detach(t, "sock_connect4-0") }},
		{"the pins are removed", repinned, func() {
			// At once, or the daemon might make the first anew while the last goes.
			require.NoError(t, os.Rename(w.BPFFS, filepath.Join(mount, "gone")))
			require.NoError(t, os.RemoveAll(filepath.Join(mount, "gone")))
		}},
		{"bpffs is unmounted", "not pinned as they should be", func() { require.NoError(t, syscall.Unmount(mount, syscall.MNT_DETACH)) }},
		{"bpffs is mounted again", repinned, attach},
		{"an uplink is renamed", uplinks, func() { host("link", "set", lab.HostIf, "name", "wan0") }},
		{"an uplink's address changes", uplinks, func() {
			host("addr", "del", lab.Host4.String()+"/24", "dev", "wan0")
			host("addr", "add", other.String()+"/24", "dev", "wan0")
			addr = other
		}},
		{"an uplink is removed and made again", uplinks, func() {
			host("link", "delete", "wan0")
			lab.Join(t, lab.End{NS: w.Client, If: lab.ClientIf, Addrs: []netip.Prefix{netip.PrefixFrom(lab.Client4, 24)}},
				lab.End{NS: w.Host, If: lab.HostIf, Addrs: []netip.Prefix{netip.PrefixFrom(lab.Host4, 24)}})
			addr = lab.Host4
		}},
		{"news is lost", "more news about devices than could be read", func() {
			require.NoError(t, syscall.Kill(w.b.PID(), syscall.SIGSTOP))
			var batch strings.Builder
			for i := range 20000 {
				fmt.Fprintf(&batch, "addr %s 203.0.113.%d/32 dev lo\n", []string{"add", "del"}[i%2], 100+i/2%100)
			}
			fmt.Fprintf(&batch, "addr add %s/24 dev %s\n", other, lab.HostIf)
			file := filepath.Join(l.Dir, "batch")
			require.NoError(t, os.WriteFile(file, []byte(batch.String()), 0o600))
			host("-batch", file)
			require.NoError(t, syscall.Kill(w.b.PID(), syscall.SIGCONT))
			addr = other
		}},
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			before := len(w.said(f.says))
			f.fault()
			w.recovers(t, before, f.says, addr)
		})
	}
	// What was pinned again is what the next daemon finds.
	w.b.Kill()
	w.b.Start(t)
	for name, s := range streams {
		sum := s.Finish(t)
		require.Zero(t, sum.Lost+sum.Corrupt+sum.Resets, "%s: %+v", name, sum)
		require.Greater(t, sum.Received, int64(500), name)
	}
	w.b.MustCLI(t, "rm", "-f", "web", "peer")
	w.b.Stop(t)
	w.b.MustCLI(t, "cleanup")
	if !t.Failed() {
		promise.Kept(t, promise.Lifecycle,
			"Programs that somebody detaches, pins or a bpffs that are lost, uplinks that are renamed, readdressed or replaced and lost kernel news are noticed and mended without help, each with one line in the log.",
			"%d faults; %d streams beside them lost nothing", len(faults), len(streams))
	}
}
