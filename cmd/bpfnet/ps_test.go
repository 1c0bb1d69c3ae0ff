// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/sandbox"
)

// id is an ID that begins with some digits.
func id(begin string) string { return begin + strings.Repeat("0", 64-len(begin)) }

// The one process of ownSnapshot that lives.
const livePID = 4242

// ownSnapshot is a host with sandboxes in all states, and with a Docker Engine that has a network and
// a container of the same names.
func ownSnapshot() *api.Snapshot {
	three := 3
	return &api.Snapshot{
		Version: "1.2.3", PID: 4711, Written: now.Add(-time.Minute),
		Networks: []api.Network{
			{
				ID: id("beef1"), Name: "backend", Source: "bpfnet", Bridge: "bpn-beef1", Internal: true,
				Subnets: []string{"172.30.0.0/16", "fd00:1::/64"}, Created: now.Add(-time.Hour),
				Gateways: []netip.Addr{netip.MustParseAddr("172.30.5.254"), netip.MustParseAddr("fd00:1::1")},
				Ranges:   []netip.Prefix{netip.MustParsePrefix("172.30.5.0/24")},
				Labels:   map[string]string{"tier": "back"},
			},
			{
				ID: id("d0c4"), Name: "backend", Source: "docker", Bridge: "br-d0c4", Subnets: []string{"172.19.0.0/16"},
				Gateways: []netip.Addr{netip.MustParseAddr("172.19.0.1")},
			},
			{
				ID: id("beef2"), Name: "bpfnet", Source: "bpfnet", Bridge: "bpfnet0", Subnets: []string{"172.17.0.0/16"},
				Gateways: []netip.Addr{netip.MustParseAddr("172.17.0.1")}, Created: now.Add(-2 * time.Hour),
			},
		},
		Sandboxes: []api.Sandbox{
			{
				ID: id("a1"), Name: "api", Status: "running", Command: []string{"python3", "-m", "http.server", "8000"}, Dir: "/nowhere/api",
				Created: now.Add(-3 * time.Minute), Started: now.Add(-2 * time.Minute), PID: livePID, StartTime: 99, Networks: []string{"backend", "bpfnet"},
			},
			{
				ID: id("a2"), Name: "lost", Status: "running", Command: []string{"sleep", "1000"}, Created: now.Add(-4 * time.Minute),
				Started: now.Add(-4 * time.Minute), PID: livePID, StartTime: 98, Networks: []string{"bpfnet"},
			},
			{
				ID: id("b1"), Name: "batch", Status: "exited", Command: []string{"make", "all"}, Created: now.Add(-time.Hour),
				Started: now.Add(-time.Hour), Ended: now.Add(-5 * time.Minute), ExitCode: &three, Networks: []string{"bpfnet"},
			},
			{
				ID: id("b2"), Name: "reboot", Status: "exited", Command: []string{"true"}, Created: now.Add(-26 * time.Hour),
				Started: now.Add(-25 * time.Hour), Ended: now.Add(-24 * time.Hour), Why: "the host restarted", Mode: "none",
			},
			{ID: id("c"), Name: "fresh", Status: "created", Command: []string{"nc", "-l", "9000"}, Created: now.Add(-time.Second), Mode: "host"},
		},
		Endpoints: []api.Endpoint{
			{
				ID: id("e1"), Name: "api", SandboxID: id("a1"), Source: "bpfnet", Network: "backend", NetworkID: id("beef1"),
				Addresses: []string{"172.30.5.1", "fd00:1::2"}, MAC: "02:42:ac:1e:05:01", Ready: true, Ifindex: 10,
			},
			{
				ID: id("e2"), Name: "api", SandboxID: id("a1"), Source: "bpfnet", Network: "bpfnet", NetworkID: id("beef2"),
				Addresses: []string{"172.17.0.2"}, MAC: "02:42:ac:11:00:02", Ready: true, Ifindex: 11,
			},
			{
				ID: id("e3"), Name: "web", SandboxID: id("dd1"), Source: "docker", Network: "backend", NetworkID: id("d0c4"),
				Addresses: []string{"172.19.0.2"}, MAC: "02:42:ac:13:00:02", Ready: true, Ifindex: 12,
			},
			{
				ID: id("e4"), Name: "gone", SandboxID: id("dd2"), Source: "docker", Network: "backend", NetworkID: id("d0c4"),
				Addresses: []string{"172.19.0.3"}, MAC: "02:42:ac:13:00:03", Ready: true, Ifindex: 13,
			},
		},
		Ports: []api.Port{
			{Proto: "tcp", Host: "[::]:18000", Target: "172.17.0.2:8000", Container: "api", SandboxID: id("a1")},
			{Proto: "tcp", Host: "0.0.0.0:18000", Target: "172.17.0.2:8000", Container: "api", SandboxID: id("a1")},
			{Proto: "tcp", Host: "0.0.0.0:32768", Target: "172.17.0.2:8000", Container: "api", SandboxID: id("a1")},
			{Proto: "udp", Host: "127.0.0.1:5300", Target: "172.17.0.2:53", Container: "api", SandboxID: id("a1")},
			{Proto: "tcp", Host: "0.0.0.0:9000", Target: "172.17.0.2:7000", Container: "api", SandboxID: id("a1")},
			{Proto: "tcp", Host: "0.0.0.0:9001", Target: "172.17.0.2:7001", Container: "api", SandboxID: id("a1")},
			{Proto: "tcp", Host: "0.0.0.0:9003", Target: "172.17.0.2:7002", Container: "api", SandboxID: id("a1")},
			{Proto: "tcp", Host: "0.0.0.0:1234", Target: "172.17.0.9:1", Container: "lost", SandboxID: id("a2")},
			{Proto: "tcp", Host: "0.0.0.0:8080", Target: "172.19.0.2:80", Container: "web", SandboxID: id("dd1")},
		},
	}
}

// owned is a world with that snapshot and no daemon.
func owned(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.pid = livePID
	w.write(ownSnapshot())
	return w
}

func TestListings(t *testing.T) {
	for name, args := range map[string][]string{
		"ps.txt":                      {"ps"},
		"ps-all.txt":                  {"ps", "-a"},
		"ps-all.json":                 {"ps", "--all", "-o", "json"},
		"ps-quiet.txt":                {"ps", "-aq"},
		"ps-no-trunc.txt":             {"ps", "--no-trunc"},
		"network-ls.txt":              {"network", "ls"},
		"network-ls.json":             {"network", "ls", "-o", "json"},
		"network-ls-quiet.txt":        {"network", "ls", "-q", "--no-trunc"},
		"network-inspect.json":        {"network", "inspect", "bpfnet/backend", "beef2"},
		"network-inspect-docker.json": {"network", "inspect", "docker/backend"},
		"port.txt":                    {"port", "api"},
		"port.json":                   {"port", "api", "-o", "json"},
		"port-one.txt":                {"port", "api", "8000"},
		"port-udp.json":               {"port", "api", "53/udp", "-o", "json"},
		"port-docker.txt":             {"port", "web"},
	} {
		t.Run(name, func(t *testing.T) {
			golden(t, filepath.Join("testdata", name), owned(t).must(args...))
		})
	}
}

func TestListingsOfNothing(t *testing.T) {
	w := newWorld(t)
	w.write(&api.Snapshot{})
	assert.Equal(t, "SANDBOX ID   NAME   SOURCE   COMMAND   CREATED   STATUS   PORTS\n", w.must("ps"))
	assert.Equal(t, "NETWORK ID   NAME   DRIVER   SCOPE   SOURCE\n", w.must("network", "ls"))
	assert.Equal(t, "[]\n", w.must("ps", "-a", "-o", "json"))
	assert.Equal(t, "[]\n", w.must("network", "ls", "-o", "json"))
	assert.Empty(t, w.must("ps", "-q"))
	assert.Equal(t, `bpfnet: port: sandbox "api": no such sandbox; no sandbox is known yet`, w.fails(1, "port", "api"))
	assert.Equal(t, `bpfnet: network inspect: network "fe": no such network; no network is known yet`, w.fails(1, "network", "inspect", "fe"))

	s := ownSnapshot()
	s.Ports = nil
	w.write(s)
	assert.Empty(t, w.must("port", "api"))
	assert.Equal(t, "[]\n", w.must("port", "api", "-o", "json"))
	assert.Equal(t, `bpfnet: port: sandbox "api": port 80/tcp is not published; none of its ports is`, w.fails(1, "port", "api", "80"))
}

// The shape is that of an Engine: what it printed of a network with a container is what we print of one
// that is the same.
func TestInspectIsDockers(t *testing.T) {
	const engine = "testdata/docker-20.10-network-inspect.json"
	created, err := time.Parse(time.RFC3339Nano, "2026-11-21T11:33:35.018523486Z")
	require.NoError(t, err)
	w := newWorld(t)
	network := "11aa30158593e6c23f744662c63c125669a96b4103af8b9248750c62aa1da29a"
	w.write(&api.Snapshot{
		Networks: []api.Network{{
			ID: network, Name: "backend", Source: "bpfnet", Bridge: "br-1", Created: created,
			Subnets:  []string{"172.30.0.0/16", "fd00:1::/64"},
			Gateways: []netip.Addr{netip.MustParseAddr("172.30.5.254"), netip.MustParseAddr("fd00:1::1")},
			Ranges:   []netip.Prefix{netip.MustParsePrefix("172.30.5.0/24")},
			Options:  map[string]string{"com.docker.network.driver.mtu": "1400"},
			Labels:   map[string]string{"tier": "back"},
		}},
		Endpoints: []api.Endpoint{{
			ID:        "df405146514862b2f98662350a9ec6100e3e3a1c2b2321d54e9e42943abbb218",
			SandboxID: "0870c9f2a3935526e16545dd0fbf6b5eba6c005b08a6e9393ac14fc351d4f59b",
			Name:      "web", Source: "bpfnet", Network: "backend", NetworkID: network,
			Addresses: []string{"172.30.5.0", "fd00:1::2"}, MAC: "02:42:ac:1e:05:00",
		}},
	})
	want, err := os.ReadFile(engine)
	require.NoError(t, err)
	assert.Equal(t, string(want), w.must("network", "inspect", "backend"))
}

func TestNamesOfReaders(t *testing.T) {
	w := owned(t)
	for _, word := range []string{"api", id("a1"), "a10", "bpfnet/api"} {
		assert.Equal(t, "0.0.0.0:9000\n", w.must("port", word, "7000"), word)
	}
	assert.Equal(t, `bpfnet: port: sandbox "a": 2 IDs begin so; write more of it`, w.fails(1, "port", "a"))
	assert.Equal(t, `bpfnet: port: sandbox "apo": no such sandbox; the nearest names are api, web, batch`, w.fails(1, "port", "apo"))
	assert.Equal(t, `bpfnet: port: sandbox "": no such sandbox; the nearest names are api, web, gone`, w.fails(1, "port", ""))
	assert.Equal(t, `bpfnet: network inspect: network "backend": there are several of that name; say bpfnet/backend or docker/backend`,
		w.fails(1, "network", "inspect", "backend"))
	assert.Equal(t, `bpfnet: network inspect: network "beckend": no such network; the nearest names are backend, bpfnet`,
		w.fails(1, "network", "inspect", "bpfnet", "beckend"))
	assert.Equal(t, `bpfnet: port: sandbox "api": port 81/tcp is not published; published are 53/udp, 7000/tcp, 7001/tcp, 7002/tcp, 8000/tcp`,
		w.fails(1, "port", "api", "81"))
	assert.Equal(t, `bpfnet: port: port "x": invalid containerPort: x; want PORT[-END][/PROTO]`, w.fails(1, "port", "api", "x"))
	assert.Equal(t, `bpfnet: port: port "80:80": has no host port; want PORT[-END][/PROTO]`, w.fails(1, "port", "api", "80:80"))
	assert.Equal(t, `bpfnet: port: port "80-81": want one port`, w.fails(1, "port", "api", "80-81"))
	assert.Empty(t, w.must("port", "lost"), "of the dead, nothing is reached")
}

func TestReadersOfDamagedState(t *testing.T) {
	for _, args := range [][]string{{"ps"}, {"network", "ls"}, {"network", "inspect", "x"}, {"port", "x"}, {"logs", "x"}} {
		verb := strings.TrimSuffix(strings.Join(args, " "), " x")
		w := newWorld(t)
		assert.Equal(t, "bpfnet: "+verb+": state "+w.state()+
			`: no daemon has run there; start one with "bpfnet daemon", or name its directory with --state`, w.fails(1, args...))
		assert.NoDirExists(t, w.state(), "readers make nothing")
	}
	w := newWorld(t)
	s := ownSnapshot()
	s.Ports[0].Target = "nonsense"
	w.write(s)
	assert.Contains(t, w.fails(1, "ps"), "bpfnet: ps: port [::]:18000: read snapshot: ")
	s = ownSnapshot()
	s.Networks[0].Subnets = []string{"nonsense"}
	w.write(s)
	assert.Contains(t, w.fails(1, "network", "inspect", "beef1"), `bpfnet: network inspect: network "backend": read snapshot: `)
}

// A process is known by its number and its start: another of that number is not it.
func TestAlive(t *testing.T) {
	self, err := sandbox.Identify(os.Getpid())
	require.NoError(t, err)
	assert.True(t, alive(self.PID, self.StartTime))
	assert.False(t, alive(self.PID, self.StartTime+1))
	assert.False(t, alive(0, 0))
	assert.True(t, hasLink(1), "lo")
	assert.False(t, hasLink(1<<30))
}

func TestLogs(t *testing.T) {
	w := owned(t)
	s := ownSnapshot()
	dir := t.TempDir()
	s.Sandboxes[0].Dir = dir
	w.write(s)
	assert.Equal(t, `bpfnet: logs: sandbox "api": has no log; only what runs detached has one`, w.fails(1, "logs", "api"))
	assert.Equal(t, `bpfnet: logs: sandbox "web": is a container of Docker; use "docker logs web"`, w.fails(1, "logs", "web"))
	assert.Equal(t, `bpfnet: logs: sandbox "apl": no such sandbox; the nearest names are api, web, batch`, w.fails(1, "logs", "apl"))

	path := filepath.Join(dir, logName)
	require.NoError(t, os.WriteFile(path, []byte("one\n"), 0o600))
	assert.Equal(t, "one\n", w.must("logs", "api"))
	assert.Equal(t, "one\n", w.must("logs", "a1"))

	// What is written while it is followed is shown, to the last line before the end.
	out := &shared{}
	w.Stdout = out
	done := make(chan int)
	go func() { done <- w.Run(t.Context(), append(w.flags(), "logs", "-f", "api")) }()
	lab.Eventually(t, 10*time.Second, "the first line", func() bool { return out.String() == "one\n" })
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	defer log.Close()
	_, err = log.WriteString("two\n")
	require.NoError(t, err)
	lab.Eventually(t, 10*time.Second, "the second line", func() bool { return out.String() == "one\ntwo\n" })
	_, err = log.WriteString("three\n")
	require.NoError(t, err)
	s.Sandboxes[0].Status = api.StatusExited
	w.write(s)
	assert.Zero(t, <-done)
	assert.Equal(t, "one\ntwo\nthree\n", out.String())
}

// shared is a buffer for a writer and a reader.
type shared struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *shared) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(b)
}

func (s *shared) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}
