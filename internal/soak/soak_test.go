// SPDX-License-Identifier: Apache-2.0

// Package soak lets everything happen at once, for as long as one likes: containers come and go, ports are
// published and withdrawn, and the daemon is killed and replaced by another version, while long flows with
// content checked from end to end run through. "make soak" runs it for twenty minutes.
package soak

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/promise"
	bpfmaps "github.com/bpfnet/bpfnet/maps"
)

var (
	length = flag.Duration("soak", 30*time.Second, "how long")
	output = flag.String("soak-out", "", "JSON `file` for the result")
)

func TestMain(m *testing.M) { lab.Main(m) }

// period is the life of a daemon.
const period = 10 * time.Second

// result is what the soak writes.
type result struct {
	Kernel    string               `json:"kernel"`
	Seconds   int                  `json:"seconds"`
	Kills     int                  `json:"kills"`          // SIGKILL, and another start
	InStart   int                  `json:"kills_in_start"` // of these, before the daemon was ready
	Upgrades  int                  `json:"version_changes"`
	Sandboxes int                  `json:"sandboxes"` // that came and went
	Published int                  `json:"ports_published"`
	Requests  int                  `json:"requests"` // to them, over TCP and UDP, from outside
	Streams   map[string]lab.Usage `json:"streams"`
	Before    state                `json:"before"`
	After     state                `json:"after"`
}

// state is what must not grow.
type state struct {
	DaemonKiB int            `json:"daemon_rss_kib"`
	DaemonFDs int            `json:"daemon_fds"`
	Runners   int            `json:"runners_rss_kib"` // of the sandboxes that live all the time
	RunnerFDs int            `json:"runners_fds"`
	Pins      int            `json:"pins"`
	Belong    int            `json:"devices_cgroups_mounts"`
	Entries   map[string]int `json:"map_entries"`
}

type soak struct {
	*lab.Lab
	b   *lab.Bpfnet
	res result
	rng *rand.Rand
}

// Needs root and clang 14.
func TestSoak(t *testing.T) {
	s := &soak{Lab: lab.New(t, lab.Opts{})}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	s.rng = rand.New(rand.NewPCG(seed, 0))
	// Short, so that what is over is gone when the end is compared with the beginning.
	s.b = s.StartBpfnet(t, nil, "--flows", "8192", "--timeout", "tcp-closed=5s", "--timeout", "tcp-fin=5s", "--timeout", "tcp-syn=5s",
		"--timeout", "udp=30s", "--timeout", "udp-new=5s", "--timeout", "icmp=5s")
	versions := []string{s.b.Binary(), lab.Later(t)}
	s.b.MustCLI(t, "network", "create", "--subnet", "172.30.0.0/16", "--subnet", "fd00:30::/64", "blue")
	for name, args := range map[string][]string{"web": {"-p", "8080:80", "-p", "8080:80/udp"}, "peer": nil} {
		s.b.Serve(t, append(append([]string{"--name", name, "--network", "blue"}, args...), "--", "--tcp", "80", "--udp", "80")...)
	}
	s.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	streams := s.stream(t)
	s.settle(t, nil)
	s.kept(t)
	least := s.leastKiB(t)
	s.res.Before = s.look(t)
	s.res.Before.DaemonKiB = least

	begin := time.Now()
	for version := 0; time.Since(begin) < *length; {
		until := time.Now().Add(period)
		for i := 0; time.Now().Before(until) && time.Since(begin) < *length; i++ {
			s.comeAndGo(t, i)
		}
		s.b.Kill()
		s.res.Kills++
		version = 1 - version
		s.b.Use(versions[version])
		s.res.Upgrades++
		// Every other time the next one dies too, wherever it is in its start.
		if s.res.Kills%2 == 0 {
			s.b.Launch(t)
			time.Sleep(time.Duration(s.rng.Int64N(int64(2 * time.Second))))
			s.b.Kill()
			s.res.Kills++
			s.res.InStart++
		}
		s.b.Start(t)
	}
	s.res.Seconds = int(time.Since(begin).Seconds())
	// Compared with itself, and as in the beginning: another build, or one that loads its programs, may need more.
	s.b.Kill()
	s.b.Use(versions[0])
	s.b.Start(t)
	s.kept(t)
	least = s.leastKiB(t)
	s.settle(t, &s.res.Before)
	s.res.After = s.look(t)
	s.res.After.DaemonKiB = least
	s.res.Streams = make(map[string]lab.Usage)
	for name, stream := range streams {
		s.res.Streams[name] = stream.Finish(t).Usage()
	}
	s.res.Kernel = kernel(t)
	s.write(t)
	s.check(t)
	s.b.MustCLI(t, "rm", "-f", "web", "peer")
	promise.Kept(t, promise.Soak,
		"While containers come and go, ports are published and withdrawn and the daemon is killed and replaced by another version every ten seconds, no byte is wrong, no connection is reset, and nothing grows.",
		"%v, %d kills, %d changes of version, %d sandboxes, %d streams", time.Duration(s.res.Seconds)*time.Second, s.res.Kills, s.res.Upgrades, s.res.Sandboxes, len(streams))
}

// stream starts the long flows.
func (s *soak) stream(t *testing.T) map[string]*lab.Stream {
	web4, web6 := s.b.Addrs(t, "web", "blue")
	peer := s.b.NS(t, "peer")
	streams := make(map[string]*lab.Stream)
	for _, c := range []struct {
		name string
		from *lab.NS
		to   netip.AddrPort
	}{
		{"published", s.Client, netip.AddrPortFrom(lab.Host4, 8080)},
		{"published v6", s.Client, netip.AddrPortFrom(lab.Host6, 8080)},
		{"container", peer, netip.AddrPortFrom(web4, 80)},
		{"container v6", peer, netip.AddrPortFrom(web6, 80)},
		{"masqueraded", peer, netip.AddrPortFrom(lab.Client24, 7000)},
		{"masqueraded v6", peer, netip.AddrPortFrom(lab.Client26, 7000)},
		{"host", s.Host, netip.AddrPortFrom(lab.Host4, 8080)},
	} {
		for _, network := range []string{"tcp", "udp"} {
			streams[c.name+" "+network] = c.from.Stream(t, "--network", network, "--interval", "10ms", "--size", "1000",
				"--duration", (*length + time.Hour).String(), "--grace", "10s", c.to.String())
		}
	}
	return streams
}

// comeAndGo has a sandbox with a published port come, be used, be given another port, and go.
func (s *soak) comeAndGo(t *testing.T, i int) {
	port := 9000 + i%100
	name := fmt.Sprintf("guest%d", i)
	s.b.Serve(t, "--name", name, "--network", "blue", "-p", fmt.Sprintf("%d:80", port), "-p", fmt.Sprintf("%d:80/udp", port),
		"--", "--tcp", "80", "--udp", "80")
	for _, network := range []string{"tcp", "udp"} {
		for _, host := range []netip.Addr{lab.Host4, lab.Host6} {
			s.Client.MustGet(t, "--network", network, netip.AddrPortFrom(host, uint16(port)).String())
			s.res.Requests++
		}
	}
	s.b.MustCLI(t, "publish", name, fmt.Sprintf("%d:80", port+100))
	s.Client.MustGet(t, netip.AddrPortFrom(lab.Host4, uint16(port+100)).String())
	s.b.MustCLI(t, "unpublish", name, fmt.Sprintf("%d:80", port+100))
	s.b.MustGet(t, name, netip.AddrPortFrom(lab.Client24, 7000).String())
	s.b.MustCLI(t, "rm", "-f", name)
	s.res.Sandboxes++
	s.res.Published += 3
	s.res.Requests += 2
}

// settle waits until no more is left of what came and went than there was before.
func (s *soak) settle(t *testing.T, before *state) {
	last := -1
	lab.Eventually(t, 3*time.Minute, "flows of what is over are gone", func() bool {
		n := s.entries(t)["flows4"]
		if before != nil {
			return n <= before.Entries["flows4"]
		}
		same := n == last
		last = n
		return same
	})
}

// leastKiB is the resident memory of a daemon that took up what another left: the least of five. What Go's heap
// keeps of a start's peak differs by some ten MiB from start to start; a leak is in all of them.
func (s *soak) leastKiB(t *testing.T) int {
	least := 0
	for i := range 5 {
		s.b.Kill()
		s.b.Start(t)
		if kib := lab.ResidentKiB(t, s.b.PID()); i == 0 || kib < least {
			least = kib
		}
	}
	return least
}

// look counts what must not grow, but for the daemon's memory.
func (s *soak) look(t *testing.T) state {
	st := state{
		DaemonFDs: atRest(t, s.b.PID()),
		Belong:    len(s.b.Belongings(t)), Entries: s.entries(t),
	}
	for _, pid := range s.b.Runners() {
		st.Runners += lab.ResidentKiB(t, pid)
		st.RunnerFDs += descriptors(t, pid)
	}
	for _, dir := range []string{"maps", "links", "next", "programs"} {
		st.Pins += s.pins(dir)
	}
	return st
}

// kept waits until all programs are pinned for the next start: those that sweep come last.
func (s *soak) kept(t *testing.T) {
	lab.Eventually(t, time.Minute, "all programs are kept for the next start", func() bool {
		n := 0
		for _, program := range []string{"expire", "purge", "gauge"} {
			found, err := filepath.Glob(filepath.Join(s.BPFFS, "programs", program+"-*"))
			require.NoError(t, err)
			n += len(found)
		}
		return n == 3
	})
}

// pins counts what is pinned in a directory of the instance's.
func (s *soak) pins(dir string) int {
	list, err := os.ReadDir(filepath.Join(s.BPFFS, dir))
	if err != nil {
		return 0
	}
	return len(list)
}

// entries are what the maps that can fill up hold. Entries are counted, and compared with the gauge.
func (s *soak) entries(t *testing.T) map[string]int {
	m, err := bpfmaps.Open(s.BPFFS)
	require.NoError(t, err)
	defer m.Close()
	fill, err := m.Fill()
	require.NoError(t, err)
	out := make(map[string]int)
	for _, f := range fill {
		out[f.Map] = f.Entries
	}
	for _, name := range []string{"flows4", "flows6"} {
		out[name+" (gauge)"] = out[name]
		out[name], err = bpfmaps.Entries(m.Map(name))
		require.NoError(t, err)
	}
	return out
}

func (s *soak) write(t *testing.T) {
	raw, err := json.MarshalIndent(s.res, "", "\t")
	require.NoError(t, err)
	t.Logf("%s", raw)
	if *output != "" {
		require.NoError(t, os.WriteFile(*output, append(raw, '\n'), 0o644))
	}
}

// check tells all that is wrong, not the first alone.
func (s *soak) check(t *testing.T) {
	for _, name := range slices.Sorted(maps.Keys(s.res.Streams)) {
		u := s.res.Streams[name]
		assert.Zero(t, u.Corrupt+u.Resets, "%s: wrong bytes or resets: %+v", name, u)
		assert.Greater(t, u.Sent, int64(s.res.Seconds), "%s: too little was sent", name)
		if strings.HasSuffix(name, " tcp") {
			assert.Zero(t, u.Lost, "%s: lost: %+v", name, u)
		} else {
			assert.Less(t, u.Lost*1000, u.Sent, "%s: lost: %+v", name, u)
		}
	}
	b, a := s.res.Before, s.res.After
	assert.LessOrEqual(t, a.Pins, b.Pins, "pins")
	assert.LessOrEqual(t, a.DaemonFDs, b.DaemonFDs, "the daemon's file descriptors")
	assert.LessOrEqual(t, a.RunnerFDs, b.RunnerFDs, "the sandboxes' file descriptors")
	assert.LessOrEqual(t, a.Belong, b.Belong, "devices, cgroups and mounts")
	for name, n := range b.Entries {
		assert.LessOrEqual(t, a.Entries[name], n, "entries of %s", name)
	}
	assert.Less(t, a.DaemonKiB, b.DaemonKiB*5/4+4096, "the daemon's memory")
	assert.Less(t, a.Runners, b.Runners*5/4+4096, "the sandboxes' memory")
	require.False(t, t.Failed())
}

// atRest is how many file descriptors a process has while it does nothing: a round opens some and closes them.
func atRest(t *testing.T, pid int) int {
	last, same := -1, 0
	lab.Eventually(t, time.Minute, "the number of file descriptors stays", func() bool {
		n := descriptors(t, pid)
		if n != last {
			last, same = n, 0
		}
		same++
		return same == 20
	})
	return last
}

func descriptors(t *testing.T, pid int) int {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	require.NoError(t, err)
	return len(list)
}

func kernel(t *testing.T) string {
	var u unix.Utsname
	require.NoError(t, unix.Uname(&u))
	return unix.ByteSliceToString(u.Release[:])
}
