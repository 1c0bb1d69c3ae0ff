// SPDX-License-Identifier: Apache-2.0

package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/policy"
)

func TestMain(m *testing.M) { lab.Main(m) }

// engine answers as an Engine with one network "n" does. It stands for what is hard to bring
// about with a real one: absence, locks held for long, lost events.
type engine struct {
	socket string
	root   string

	mu       sync.Mutex
	srv      *httptest.Server
	eps      map[string]string // container → endpoint, of network n
	ports    map[string]string // container → Ports of its inspect; absent: not running
	locked   chan struct{}     // not nil: container inspects wait until it is closed
	events   []chan string
	inspects int // of the network
}

func newEngine(t *testing.T) *engine {
	t.Helper()
	dir := t.TempDir()
	e := &engine{socket: filepath.Join(dir, "s"), root: dir, eps: map[string]string{}, ports: map[string]string{}}
	t.Cleanup(e.stop)
	return e
}

func (e *engine) start(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", e.socket)
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.HandleFunc("/_ping", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Api-Version", "1.41") })
	mux.HandleFunc("GET /v1.41/info", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"ServerVersion":"20.10.24","DockerRootDir":%q}`, e.root)
	})
	mux.HandleFunc("GET /v1.41/networks", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `[{"Name":"host","Id":"00","Driver":"host"},{"Name":"n","Id":"01","Driver":"bridge"}]`)
	})
	mux.HandleFunc("GET /v1.41/networks/{id}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("id") != "01" {
			http.Error(w, `{"message":"no such network"}`, http.StatusNotFound)
			return
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		e.inspects++
		ctrs := map[string]any{}
		for c, ep := range e.eps {
			ctrs[c] = map[string]string{"Name": c, "EndpointID": ep, "IPv4Address": "172.18.0.2/16", "MacAddress": "02:42:ac:12:00:02"}
		}
		_ = json.NewEncoder(w).Encode(map[string]any{
			"Name": "n", "Id": "01", "Driver": "bridge", "Containers": ctrs,
			"IPAM": map[string]any{"Config": []map[string]string{{"Subnet": "172.18.0.0/16"}}},
		})
	})
	mux.HandleFunc("GET /v1.41/containers/json", func(w http.ResponseWriter, _ *http.Request) {
		// A snapshot without ports, so that what is seen comes from the inspect.
		fmt.Fprint(w, `[]`)
	})
	mux.HandleFunc("GET /v1.41/containers/{id}/json", func(w http.ResponseWriter, r *http.Request) {
		e.mu.Lock()
		locked := e.locked
		e.mu.Unlock()
		if locked != nil {
			select {
			case <-locked:
			case <-r.Context().Done():
				return
			}
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		id := r.PathValue("id")
		ports, running := e.ports[id]
		if !running {
			ports = "{}"
		}
		fmt.Fprintf(w, `{"Id":%q,"State":{"Running":%t},"NetworkSettings":{"Ports":%s,"Networks":{"n":{"EndpointID":%q}}}}`,
			id, running, ports, e.eps[id])
	})
	mux.HandleFunc("GET /v1.41/events", func(w http.ResponseWriter, r *http.Request) {
		ch := make(chan string, 16)
		e.mu.Lock()
		e.events = append(e.events, ch)
		e.mu.Unlock()
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		for {
			select {
			case ev := <-ch:
				fmt.Fprintln(w, ev)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	e.srv = &httptest.Server{Listener: l, Config: &http.Server{Handler: mux}}
	e.srv.Start()
}

func (e *engine) stop() {
	if e.srv != nil {
		e.srv.CloseClientConnections()
		e.srv.Close()
		e.srv = nil
	}
}

func (e *engine) set(f func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	f()
}

func (e *engine) emit(typ, action, id string, attrs map[string]string) {
	b, _ := json.Marshal(map[string]any{"Type": typ, "Action": action, "Actor": map[string]any{"ID": id, "Attributes": attrs}})
	e.set(func() {
		for _, ch := range e.events {
			select {
			case ch <- string(b):
			default:
			}
		}
	})
}

func (e *engine) wish(t *testing.T, id, hostconfig string) {
	t.Helper()
	dir := filepath.Join(e.root, "containers", id)
	require.NoError(t, os.MkdirAll(dir, 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "hostconfig.json"), []byte(hostconfig), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.v2.json"), []byte(`{"Config":{"Labels":{"bpfnet.allowed_addresses":"10.0.0.0/8"}}}`), 0o600))
}

// follow runs a source until the test ends, and collects its states.
func follow(t *testing.T, opts Options) (*Source, <-chan policy.State) {
	t.Helper()
	s, err := New(opts)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	states := make(chan policy.State, 1000)
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, func(st policy.State) { states <- st }) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
		require.False(t, s.Status().Connected)
	})
	return s, states
}

// await returns the first state that matches, and what came before it.
func await(t *testing.T, states <-chan policy.State, what string, match func(policy.State) bool) (st policy.State, before []policy.State) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case st := <-states:
			if match(st) {
				return st, before
			}
			before = append(before, st)
		case <-deadline:
			if n := len(before); n > 0 {
				t.Log("last state:\n" + format(before[n-1]))
			}
			require.FailNow(t, "no such state", what)
		}
	}
}

func portList(st policy.State) string {
	var s []string
	for _, p := range st.Ports {
		s = append(s, p.String())
	}
	return strings.Join(s, " ")
}

func TestNewRefusesOtherHosts(t *testing.T) {
	for _, host := range []string{"", "tcp://127.0.0.1:2375", "/run/docker.sock", "unix://relative"} {
		_, err := New(Options{Host: host})
		require.ErrorContains(t, err, "write it as unix:///run/docker.sock", host)
	}
}

func TestSocketErrors(t *testing.T) {
	for errno, text := range map[syscall.Errno]string{
		syscall.EACCES:       "connect to docker socket /run/docker.sock: permission denied: run as root, or in the group that owns the socket",
		syscall.ENOENT:       "connect to docker socket /run/docker.sock: no such file or directory: start Docker, or name its socket with --docker unix:///PATH, or do without by --docker off",
		syscall.ECONNREFUSED: "connect to docker socket /run/docker.sock: connection refused: nobody listens there; start Docker, or name its socket with --docker unix:///PATH",
		syscall.EMFILE:       "connect to docker socket /run/docker.sock: too many open files",
	} {
		err := &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError("connect", errno)}
		require.EqualError(t, socketError("/run/docker.sock", err), text)
		require.ErrorIs(t, socketError("/run/docker.sock", err), errno)
	}
	require.EqualError(t, socketError("/s", errors.New("odd")), "connect to docker socket /s: odd")
}

// The Engine is absent, starts late, goes away and comes back: no state is ever lost.
func TestEngineComesAndGoes(t *testing.T) {
	e := newEngine(t)
	s, states := follow(t, Options{Host: "unix://" + e.socket})
	lab.Eventually(t, 5*time.Second, "an error that names the socket", func() bool {
		return strings.Contains(s.Status().LastError, e.socket)
	})
	require.Contains(t, s.Status().LastError, "start Docker")
	require.False(t, s.Status().Connected)

	e.set(func() { e.eps["c1"] = "e1" })
	e.start(t)
	st, before := await(t, states, "first state", func(policy.State) bool { return true })
	require.Empty(t, before)
	require.Len(t, st.Networks, 1)
	require.Len(t, st.Endpoints, 1)
	<-s.Ready()
	got := s.Status()
	require.True(t, got.Connected)
	require.Equal(t, "20.10.24", got.Version)
	require.Empty(t, got.LastError)
	require.WithinDuration(t, time.Now(), got.LastSync, time.Minute)

	e.stop()
	lab.Eventually(t, 5*time.Second, "disconnected", func() bool { return !s.Status().Connected })
	e.set(func() { e.eps = map[string]string{"c2": "e2"} })
	e.start(t)
	st, before = await(t, states, "state after the restart", func(policy.State) bool { return true })
	require.Empty(t, before)
	require.Equal(t, "c2", st.Endpoints[0].SandboxID)
}

// From connect to die: fixed ports before the start, all of them after it, while another
// container's lock is held all the time.
func TestContainerLife(t *testing.T) {
	e := newEngine(t)
	e.start(t)
	e.wish(t, "c1", `{"PortBindings":{"80/tcp":[{"HostPort":"8080"}],"81/tcp":[{"HostPort":""}]}}`)
	_, states := follow(t, Options{Host: "unix://" + e.socket})
	await(t, states, "nothing yet", func(st policy.State) bool { return len(st.Networks) == 1 && len(st.Endpoints) == 0 })

	locked := make(chan struct{})
	e.set(func() { e.eps["c1"] = "e1"; e.locked = locked })
	e.emit("container", "start", "stuck", nil) // its inspect hangs
	e.emit("network", "connect", "01", map[string]string{"container": "c1", "type": "bridge"})
	st, _ := await(t, states, "fixed port", func(st policy.State) bool { return portList(st) == "0.0.0.0:8080->80/tcp" })
	require.Equal(t, "10.0.0.0/8", st.Endpoints[0].Allowed[0].String())

	e.set(func() {
		e.ports["c1"] = `{"80/tcp":[{"HostIp":"0.0.0.0","HostPort":"8080"}],"81/tcp":[{"HostIp":"0.0.0.0","HostPort":"32768"}]}`
		e.locked = nil
	})
	e.emit("container", "start", "c1", nil)
	const all = "0.0.0.0:8080->80/tcp 0.0.0.0:32768->81/tcp [::]:8080->80/tcp [::]:32768->81/tcp"
	await(t, states, "all ports", func(st policy.State) bool { return portList(st) == all })

	// A new run starts with the fixed ones again, although the end of the first was not seen.
	e.set(func() { e.eps["c1"] = "e1-again" })
	e.emit("network", "connect", "01", map[string]string{"container": "other", "type": "bridge"})
	await(t, states, "second run", func(st policy.State) bool {
		return portList(st) == "0.0.0.0:8080->80/tcp" && st.Endpoints[0].ID == "e1-again"
	})
	e.set(func() { delete(e.eps, "c1"); delete(e.ports, "c1") })
	e.emit("container", "die", "c1", nil)
	await(t, states, "gone", func(st policy.State) bool { return len(st.Endpoints)+len(st.Ports) == 0 })
	close(locked)
}

// Events can be lost; the next full read finds what they were about.
func TestLostEvent(t *testing.T) {
	e := newEngine(t)
	e.start(t)
	_, states := follow(t, Options{Host: "unix://" + e.socket, Resync: 50 * time.Millisecond})
	await(t, states, "empty", func(st policy.State) bool { return len(st.Endpoints) == 0 })
	e.set(func() { e.eps["c1"] = "e1" })
	await(t, states, "endpoint", func(st policy.State) bool { return len(st.Endpoints) == 1 })
}

// A build's endpoint appears without event or container, a little later than its device.
func TestRefresh(t *testing.T) {
	e := newEngine(t)
	e.start(t)
	s, states := follow(t, Options{Host: "unix://" + e.socket, Resync: time.Hour})
	await(t, states, "empty", func(st policy.State) bool { return len(st.Endpoints) == 0 })
	inspects := 0
	e.set(func() { inspects = e.inspects })
	s.Refresh("br-01")
	lab.Eventually(t, 5*time.Second, "the read that was too early", func() bool {
		now := 0
		e.set(func() { now = e.inspects })
		return now > inspects
	})
	e.set(func() { e.eps["ep-e9"] = "e9" })
	st, _ := await(t, states, "endpoint", func(st policy.State) bool { return len(st.Endpoints) == 1 })
	require.Equal(t, "ep-e9", st.Endpoints[0].SandboxID)
	for range 1000 {
		s.Refresh("unknown") // never blocks
	}
}
