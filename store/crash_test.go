// SPDX-License-Identifier: Apache-2.0

package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/policy"
)

// The tests of this file and of power_test.go start this program again as a writer, which opens a store
// and takes the steps below, under strace(1): that ends it before a system call, lets a call fail, or
// just records.
const (
	envWriter = "BPFNET_TEST_STORE_WRITER" // its state directory
	envStep   = "BPFNET_TEST_STORE_STEP"   // the last step that an earlier writer took
)

// strace counts the calls to inject into by thread, so that the writer keeps to one.
func init() {
	if os.Getenv(envWriter) != "" {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(envWriter); dir != "" {
		if err := writeSteps(dir, os.Getenv(envStep)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// writeSteps prints the number of each step when it is done, that of the last one first. What fails is
// tried again, a few times.
func writeSteps(dir, last string) error {
	done, err := strconv.Atoi(last)
	if err != nil {
		return err
	}
	var s *Store
	if err := retry(func() (err error) { s, err = Open(dir); return err }); err != nil {
		return err
	}
	fmt.Println(done)
	for ; done < len(steps); fmt.Println(done) {
		if err := retry(func() error { return steps[done](s) }); err != nil {
			return err
		}
		done++
	}
	return s.Close()
}

func retry(f func() error) error {
	var errs []error
	for range 3 {
		err := f()
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func network(i int) Network {
	return Network{
		ID: fmt.Sprintf("%064x", i+1), Name: fmt.Sprintf("net%d", i),
		Created: time.Date(2026, 11, 1, 12, 0, 0, i, time.UTC), Bridge: fmt.Sprintf("bpn-%011x", i+1),
		Subnets: []Subnet{{
			Prefix:  netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), 0, 0}), 16),
			Gateway: netip.AddrFrom4([4]byte{10, byte(i), 0, 1}),
		}},
		Labels: map[string]string{"tier": "front"},
	}
}

func sandbox(i int) Sandbox {
	return Sandbox{
		ID: fmt.Sprintf("%064x", i+1), Name: fmt.Sprintf("web%d", i), Hostname: "web",
		Networks: []Attach{{NetworkID: network(0).ID, Aliases: []string{"w"}}},
		Publish:  []PortWish{{Proto: policy.TCP, First: 8080, Last: 8080, Target: 80}},
		Command:  []string{"sleep", "1000"}, Dir: "/", Env: []string{"A=B"}, Status: "created",
		Created: time.Date(2026, 11, 1, 12, 0, 0, i, time.UTC),
	}
}

func endpoint(i int) Endpoint {
	return Endpoint{
		ID: fmt.Sprintf("%064x", i+1), NetworkID: network(0).ID, SandboxID: sandbox(i).ID,
		Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})},
		MAC:   policy.MAC{2, 0x42, 10, 0, byte(i >> 8), byte(i)},
		Link:  fmt.Sprintf("bpv-%011x", i+1), Name: "eth0", Aliases: []string{"w"},
	}
}

func release(i int) Release {
	return Release{
		NetworkID: network(0).ID, Addr: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}),
		At: time.Date(2026, 11, 1, 12, 0, 0, i, time.UTC),
	}
}

// several returns f of n numbers from first on.
func several[T any](f func(int) T, first, n int) []T {
	list := make([]T, n)
	for i := range list {
		list[i] = f(first + i)
	}
	return list
}

func ids[T any](f func(int) T, id func(T) string, first, n int) []string {
	return several(func(i int) string { return id(f(i)) }, first, n)
}

func endpointID(e Endpoint) string { return e.ID }

func sandboxID(x Sandbox) string { return x.ID }

// steps are what the writer does: one transaction each, and each can be repeated. The file grows, pages
// split, merge and have overflows.
var steps = []func(*Store) error{
	func(s *Store) error { return s.Write(Batch{Networks: several(network, 0, 1)}) },
	func(s *Store) error {
		return s.Write(Batch{
			Sandboxes: several(sandbox, 0, 1), Endpoints: several(endpoint, 0, 1), Releases: several(release, 0, 1),
		})
	},
	func(s *Store) error { _, err := s.Allow("docker/fe", "bpfnet/net0"); return err },
	func(s *Store) error { return s.SetSlots(Slots{Endpoints: map[string]uint16{"e": 1}}) },
	func(s *Store) error {
		return s.Write(Batch{Endpoints: several(endpoint, 1, 60), Sandboxes: several(sandbox, 1, 60)})
	},
	func(s *Store) error { return s.SetState(policy.SourceDocker, bigState(9000)) },
	func(s *Store) error {
		ended := sandbox(0)
		ended.Status, ended.Why = "exited", strings.Repeat("x", 3000)
		return s.Write(Batch{
			Sandboxes: []Sandbox{ended}, Networks: several(network, 1, 3),
			DeleteEndpoints: ids(endpoint, endpointID, 0, 1), DeleteReleases: several(release, 0, 1),
			Releases: several(release, 1, 9),
		})
	},
	func(s *Store) error { return s.Write(Batch{Endpoints: several(endpoint, 100, 80)}) },
	func(s *Store) error { _, err := s.Disallow("docker/fe", "bpfnet/net0"); return err },
	func(s *Store) error {
		return s.Write(Batch{
			DeleteEndpoints: ids(endpoint, endpointID, 1, 170), DeleteSandboxes: ids(sandbox, sandboxID, 0, 50),
		})
	},
	func(s *Store) error { return s.SetSysctls([]Change{{Path: "net/ipv4/ip_forward", Old: "0", New: "1"}}) },
	func(s *Store) error { return s.SetState(policy.SourceDocker, bigState(100)) },
	func(s *Store) error { return s.Write(Batch{Endpoints: several(endpoint, 0, 40)}) },
}

func bigState(size int) policy.State {
	return policy.State{Networks: []policy.Network{{ID: "n1", Name: strings.Repeat("y", size)}}}
}

// content is all that a store knows, as text.
func content(t *testing.T, s *Store) string {
	t.Helper()
	own, err := s.Own()
	require.NoError(t, err)
	pairs, err := s.Allowed()
	require.NoError(t, err)
	slots, err := s.Slots()
	require.NoError(t, err)
	changes, err := s.Sysctls()
	require.NoError(t, err)
	state, _, err := s.State(policy.SourceDocker)
	require.NoError(t, err)
	text, err := json.Marshal([]any{own, pairs, slots, changes, state})
	require.NoError(t, err)
	return string(text)
}

// A start is what the writer finds in its directory.
type start struct {
	name  string
	file  []byte   // nil: none
	after []string // the content after each number of steps, as the same steps leave it in this process
}

func starts(t *testing.T) []start {
	t.Helper()
	all := []start{{name: "none"}, {name: "of schema 1", file: schema1(t)}}
	for i := range all {
		s := open(t, all[i].dir(t, t.TempDir()))
		all[i].after = []string{content(t, s)}
		for _, step := range steps {
			require.NoError(t, step(s))
			all[i].after = append(all[i].after, content(t, s))
		}
		require.NoError(t, s.Close())
	}
	return all
}

// dir makes a state directory below root; without a file, Open has to make the directory too.
func (b start) dir(t *testing.T, root string) string {
	t.Helper()
	dir := filepath.Join(root, "lib", "bpfnet")
	if b.file != nil {
		require.NoError(t, os.MkdirAll(dir, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, FileName), b.file, 0o600))
	}
	return dir
}

// check opens what a writer left and expects the content after its last acknowledged step (-1: it had not
// opened the store), or after the next one, and that the store can be written to.
func (b start) check(t *testing.T, dir string, acked int, what string) {
	t.Helper()
	s, err := Open(dir)
	require.NoError(t, err, what)
	defer func() { s.Close() }()
	have := content(t, s)
	want := b.after[max(acked, 0):min(max(acked, -1)+2, len(b.after))]
	require.True(t, want[0] == have || want[len(want)-1] == have, "%s: step %d was acknowledged; have %s", what, acked, have)

	extra := Network{ID: "extra", Name: "extra", Bridge: "br-extra"}
	require.NoError(t, s.Write(Batch{Networks: []Network{extra}, Releases: several(release, 500, 50)}), what)
	require.NoError(t, s.Close(), what)
	s, err = Open(dir)
	require.NoError(t, err, what)
	own, err := s.Own()
	require.NoError(t, err, what)
	require.Contains(t, own.Networks, extra, what)
}

// The calls that change a file, a name, or what of it is on the disk. A question mark is for an
// architecture that lacks the call.
const calls = "?open,openat,?creat,close,write,?writev,pwrite64,?pwritev,?pwritev2,?ftruncate,?truncate,fallocate," +
	"fsync,fdatasync,?sync_file_range,?rename,renameat,?renameat2,?unlink,unlinkat,?mkdir,mkdirat,?link,linkat"

func needStrace(t *testing.T) {
	t.Helper()
	// Debuggers may be forbidden altogether.
	out, err := exec.Command("strace", "-f", "-o", os.DevNull, "true").CombinedOutput()
	if err != nil {
		missing(t, fmt.Sprintf("strace: %v %s", err, out))
	}
}

// missing skips a test that lacks what it needs, or fails it where every test must have run.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("BPFNET_REQUIRE_ROOT") != "" {
		t.Fatal("needs " + what)
	}
	t.Skip("needs " + what)
}

// A run is one life of a writer.
type run struct {
	log      []byte // strace's
	acked    int    // the last step that it acknowledged, or -1
	finished bool
}

func runWriter(t *testing.T, dir string, step int, options ...string) run {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	args := []string{"-f", "-q", "-xx", "-s", "10000000", "-e", "signal=none", "-e", "trace=" + calls, "-o", log}
	args = append(append(args, options...), os.Args[0])
	cmd := exec.Command("strace", args...)
	cmd.Env = append(os.Environ(), envWriter+"="+dir, envStep+"="+strconv.Itoa(step), "GODEBUG=asyncpreemptoff=1")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() != -1 { // not by a signal
		t.Fatalf("writer: %v: %s", err, stderr.String())
	} else if exit == nil {
		require.NoError(t, err)
	}
	r := run{acked: -1, finished: err == nil}
	r.log, err = os.ReadFile(log)
	require.NoError(t, err)
	for line := range strings.Lines(stdout.String()) {
		r.acked, err = strconv.Atoi(strings.TrimSpace(line))
		require.NoError(t, err)
	}
	return r
}

// fullCount reports whether all of a stated count is to be done, and not a tenth.
func fullCount() bool { return os.Getenv("BPFNET_FULL") == "1" }

func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// A writer that is killed before any of its system calls leaves all that it acknowledged, and whole
// steps only.
func TestKilledBetweenSystemCalls(t *testing.T) {
	needStrace(t)
	random := seeded(t)
	all := starts(t)
	for _, b := range all {
		t.Run("file "+b.name, func(t *testing.T) {
			killed := 0
			for _, call := range []string{
				"openat", "pwrite64", "fdatasync", "fsync", "ftruncate", "renameat", "mkdirat", "write", "close", "flock", "mmap",
			} {
				stride, first := 1, 1
				if !fullCount() {
					stride = 10
					first += random.IntN(4)
				}
				for n := first; ; n += stride {
					dir := b.dir(t, t.TempDir())
					r := runWriter(t, dir, 0, "-e", "trace="+call,
						"-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, n))
					if r.finished {
						assert.Equal(t, len(steps), r.acked)
						break
					}
					killed++
					b.check(t, dir, r.acked, fmt.Sprintf("killed before %s number %d", call, n))
				}
			}
			t.Logf("killed %d times", killed)
			assert.Greater(t, killed, 10)
		})
	}
}
