// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/promise"
)

// traffic is what must not notice the daemon's ups and downs.
type traffic struct {
	streams map[string]*lab.Stream
	pings   map[string]*lab.Process
}

// begin starts streams and pings: remote to a published port, container to container, and egress.
func begin(t *testing.T, w *site) *traffic {
	t.Helper()
	tr := &traffic{streams: map[string]*lab.Stream{}, pings: map[string]*lab.Process{}}
	web4, web6 := w.places().Addrs(t, "web", "blue")
	peer := w.places().NS(t, "peer")
	for _, c := range []struct {
		name string
		from *lab.NS
		to   string
	}{
		{"published", w.Client, at(lab.Host4, 8080)},
		{"published v6", w.Client, at(lab.Host6, 8080)},
		{"container", peer, at(web4, 80)},
		{"container v6", peer, at(web6, 80)},
		{"egress", peer, at(lab.Client24, 7000)},
		{"egress v6", peer, at(lab.Client26, 7000)},
		{"host", w.Host, "127.0.0.1:8080"},
	} {
		for _, network := range []string{"tcp", "udp"} {
			tr.streams[c.name+" "+network] = c.from.Stream(t, "--network", network, "--interval", "5ms", "--duration", "5m", c.to)
		}
	}
	for name, to := range map[string]netip.Addr{
		"container": web4, "container v6": web6, "egress": lab.Client24, "egress v6": lab.Client26,
	} {
		tr.pings[name] = peer.Start(t, "stdbuf", "-oL", "ping", "-i", "0.01", "-W", "2", to.String())
	}
	tr.flow(t)
	return tr
}

// flow waits until every ping has had some more answers, and streams have gone on for as long.
func (tr *traffic) flow(t *testing.T) {
	t.Helper()
	const answers = 30 * int64(len("64 bytes from 172.18.0.2: icmp_seq=1 ttl=64 time=0.100 ms\n"))
	for name, p := range tr.pings {
		n := p.Written()
		lab.Eventually(t, 10*time.Second, name+": ping is answered", func() bool { return p.Written() >= n+answers })
	}
}

var pingSummary = regexp.MustCompile(`(\d+) packets transmitted, (\d+) received`)

// end stops all and wants every byte and every echo back; but datagrams only where exact is set.
func (tr *traffic) end(t *testing.T, exact bool) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(tr.streams)) {
		sum := tr.streams[name].Finish(t)
		t.Logf("%s: %d sent, %d lost, longest gap %.0f ms", name, sum.Sent, sum.Lost, sum.MaxGap)
		if exact || strings.HasSuffix(name, "tcp") {
			assert.Zero(t, sum.Lost, "%s: %+v", name, sum)
		}
		assert.Zero(t, sum.Corrupt+sum.Resets, "%s: %+v", name, sum)
		require.Greater(t, sum.Received, int64(20), name)
	}
	for name, p := range tr.pings {
		require.NoError(t, p.Signal(syscall.SIGINT))
		require.NoError(t, p.Wait(10*time.Second))
		found := pingSummary.FindStringSubmatch(p.Stdout())
		require.Len(t, found, 3, p.Stdout())
		sent, _ := strconv.Atoi(found[1])
		received, _ := strconv.Atoi(found[2])
		t.Logf("ping %s: %d of %d", name, received, sent)
		if exact { // the signal may fall between an echo request and its reply
			assert.LessOrEqual(t, sent-received, 1, name)
		}
		require.NotContains(t, p.Stdout(), "DUP!", name)
	}
}

// works does one exchange of each kind.
func (w *site) works(t *testing.T) {
	t.Helper()
	web4, web6 := w.places().Addrs(t, "web", "blue")
	peer := w.places().NS(t, "peer")
	for _, network := range []string{"tcp", "udp"} {
		for _, to := range []netip.Addr{lab.Host4, lab.Host6} {
			r := w.Client.MustGet(t, "--network", network, at(to, 8080))
			require.Contains(t, []netip.Addr{lab.Client4, lab.Client6}, clientSeen(t, r))
			w.Host.MustGet(t, "--network", network, at(to, 8080))
		}
		w.Host.MustGet(t, "--network", network, "127.0.0.1:8080")
		w.Host.MustGet(t, "--network", network, "[::1]:8080")
		_, err := w.getOutside("--network", network, "127.0.0.1:8080")
		require.NoError(t, err)
		for _, to := range []netip.Addr{web4, web6} {
			peer.MustGet(t, "--network", network, at(to, 80))
		}
		for _, to := range []netip.Addr{lab.Client24, lab.Client26} {
			r := peer.MustGet(t, "--network", network, at(to, 7000))
			require.Contains(t, []netip.Addr{lab.HostB4, lab.HostB6}, clientSeen(t, r))
		}
	}
	r, err := w.places().NS(t, "far").Get("--timeout", "200ms", at(web4, 80))
	require.Error(t, err, "%+v", r)
}

// devicePrograms are the tcx programs and clsact filters on the host's devices. A clsact qdisc without
// filters may be anybody's, and is left.
func (w *site) devicePrograms(t *testing.T) (tcx, filters []string) {
	t.Helper()
	require.NoError(t, w.Host.Do(func() error {
		devices, err := net.Interfaces()
		if err != nil {
			return err
		}
		for _, d := range devices {
			for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
				r, err := link.QueryPrograms(link.QueryOptions{Target: d.Index, Attach: at})
				if err != nil {
					continue
				}
				for range r.Programs {
					tcx = append(tcx, d.Name+" "+at.String())
				}
			}
		}
		return nil
	}))
	for line := range strings.Lines(w.Host.MustRun(t, "tc", "qdisc", "show")) {
		if !strings.Contains(line, "clsact") {
			continue
		}
		fields := strings.Fields(line)
		dev := fields[slices.Index(fields, "dev")+1]
		for _, side := range []string{"ingress", "egress"} {
			for filter := range strings.Lines(w.Host.MustRun(t, "tc", "filter", "show", "dev", dev, side)) {
				if strings.Contains(filter, "handle") {
					filters = append(filters, dev+" "+side)
				}
			}
		}
	}
	return tcx, filters
}

// cgroupPrograms counts programs at the lab's cgroup.
func (w *site) cgroupPrograms(t *testing.T) (n int) {
	t.Helper()
	dir, err := os.Open(w.Cgroup)
	require.NoError(t, err)
	defer dir.Close()
	for _, at := range []ebpf.AttachType{
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect, ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
		ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg, ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
		ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind, ebpf.AttachCgroupInetSockRelease,
	} {
		r, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: at})
		require.NoError(t, err)
		n += len(r.Programs)
	}
	return n
}

// sysctls are all of /proc/sys/net of the host, but for what counts by itself.
func (w *site) sysctls(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	require.NoError(t, w.Host.Do(func() error {
		return filepath.WalkDir("/proc/sys/net", func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() || strings.HasSuffix(path, "nf_conntrack_count") || strings.HasSuffix(path, "stable_secret") {
				return nil //nolint:nilerr // devices come and go
			}
			if raw, err := os.ReadFile(path); err == nil {
				out[path] = string(raw)
			}
			return nil
		})
	}))
	return out
}

// Needs root. The daemon is killed, started, stopped and started under traffic; then cleanup takes
// everything away.
func TestAcceptLife(t *testing.T) {
	// Forwarding is bpfnet's to switch on, and to switch off again.
	w := &site{Lab: lab.New(t, lab.Opts{})}
	w.d = w.StartDocker(t, lab.DockerOpts{ExtraArgs: []string{"--ip-forward=false"}})
	w.networks(t)
	for _, c := range []struct{ name, network string }{{"web", "blue"}, {"peer", "blue"}, {"far", "red"}} {
		w.serve(t, c.name, c.network, map[bool][]string{true: {"-p", "8080:80", "-p", "8080:80/udp"}}[c.name == "web"]...)
	}
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	before := w.sysctls(t)
	require.Equal(t, "0\n", before["/proc/sys/net/ipv4/ip_forward"])

	streams := 0
	for _, attach := range []string{"tcx", "clsact"} {
		t.Run(attach, func(t *testing.T) {
			w.b = w.StartBpfnet(t, w.d, "--attach", attach)
			w.works(t)
			tr := begin(t, w)
			w.b.Kill()
			tr.flow(t)
			w.works(t)
			w.b.Start(t)
			tr.flow(t)
			w.b.Restart(t)
			tr.flow(t)
			w.works(t)
			w.b.Stop(t)
			tr.flow(t)
			w.works(t)
			tr.end(t, true)
			streams += len(tr.streams)
			w.b.MustCLI(t, "stats") // needs no daemon

			tcx, filters := w.devicePrograms(t)
			if attach == "tcx" {
				require.NotEmpty(t, tcx)
				require.Empty(t, filters)
			} else {
				require.NotEmpty(t, filters)
				require.Empty(t, tcx)
			}
			require.NotZero(t, w.cgroupPrograms(t))
			_, err := w.b.CLI("cleanup")
			require.ErrorContains(t, err, "these networks would stand open: blue (IPv4), blue (IPv6)")
			require.NotZero(t, w.cgroupPrograms(t), "a refusal changes nothing")
			w.b.MustCLI(t, "cleanup", "--leave-open")
			w.clean(t, before)
		})
	}
	promise.Kept(t, promise.Lifecycle,
		"Killing, stopping and starting the daemon loses no packet, and cleanup leaves nothing of it on the host.",
		"%d streams through two kills or stops each lost nothing", streams)
	promise.Kept(t, promise.Kernels, "With --attach clsact the programs do all that they do by tcx.",
		"Traffic through kill, start, restart and stop, then cleanup, on the same kernel by both.")
}

// clean wants nothing of bpfnet in the host.
func (w *site) clean(t *testing.T, before map[string]string) {
	t.Helper()
	var tcx, filters []string
	lab.Eventually(t, 5*time.Second, "programs are gone", func() bool {
		tcx, filters = w.devicePrograms(t)
		return len(tcx)+len(filters)+w.cgroupPrograms(t) == 0
	})
	pins, err := os.ReadDir(w.BPFFS)
	if err != nil {
		require.ErrorIs(t, err, fs.ErrNotExist)
	}
	require.Empty(t, pins)
	_, err = os.Stat(w.b.Socket)
	require.ErrorIs(t, err, fs.ErrNotExist)
	require.Equal(t, before, w.sysctls(t))
}

// Needs root. One daemon hands its devices to the next one by the other way to attach: no connection
// ends. A datagram may be lost while both ways' programs stand on a device: what the first has judged,
// the second takes for a stranger.
func TestAcceptSwitchAttach(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{}, "--attach", "tcx")
	for _, c := range []struct{ name, network string }{{"web", "blue"}, {"peer", "blue"}, {"far", "red"}} {
		w.serve(t, c.name, c.network, map[bool][]string{true: {"-p", "8080:80", "-p", "8080:80/udp"}}[c.name == "web"]...)
	}
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	tr := begin(t, w)
	m := w.maps(t)
	before := readCounters(t, m)
	for _, attach := range []string{"clsact", "tcx", "clsact"} {
		w.b.Stop(t)
		w.b = w.StartBpfnet(t, w.d, "--attach", attach)
		tr.flow(t)
		w.works(t)
		tcx, filters := w.devicePrograms(t)
		if attach == "tcx" {
			require.NotEmpty(t, tcx)
			require.Empty(t, filters)
		} else {
			require.NotEmpty(t, filters)
			require.Empty(t, tcx)
		}
	}
	drops := since(t, m, before).drops()
	delete(drops, "isolated/container") // what works tries
	t.Log(drops)
	tr.end(t, false)
}
