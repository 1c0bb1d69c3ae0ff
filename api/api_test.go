// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// networks allows among the names that it holds.
type networks struct {
	Embedded // nil: not asked here
	mu       sync.Mutex
	names    []string
	allowed  map[Pair]bool
	fail     error
}

func (n *networks) Status(context.Context) (Status, error) {
	return Status{Version: "1.2.3", PID: 42, Started: time.Unix(1700000000, 0).UTC()}, nil
}

func (n *networks) set(p Pair, to bool) (bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.fail != nil {
		return false, n.fail
	}
	for _, name := range []string{p.A, p.B} {
		if !strings.Contains(strings.Join(n.names, ","), name) {
			return false, &UnknownError{What: "network", Name: name, Nearest: n.names}
		}
	}
	changed := n.allowed[p] != to
	n.allowed[p] = to
	return changed, nil
}

func (n *networks) Allow(_ context.Context, p Pair) (bool, error) { return n.set(p, true) }
func (n *networks) Announce(_ context.Context, p PortBinding) error {
	if p.Proto == "sctp" {
		return errors.New("no container has that address")
	}
	return nil
}

func (n *networks) AllowEndpoint(context.Context, ByHand) (Result, error) {
	return Result{true}, n.fail
}

func (n *networks) DisallowEndpoint(context.Context, Named) (Result, error) { return Result{}, n.fail }

func (n *networks) Deny(_ context.Context, s DenySpec) (DenyResult, error) {
	return DenyResult{Changed: len(s.Prefixes), Shield: s.Force}, n.fail
}

func (n *networks) Undeny(_ context.Context, s DenySpec) (DenyResult, error) {
	return DenyResult{Changed: len(s.Prefixes)}, n.fail
}

func (n *networks) Denied(context.Context) (DenyList, error) {
	return DenyList{Prefixes: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24")}}, n.fail
}

func (n *networks) Explain(_ context.Context, q Question) (Explanation, error) {
	if q.To == "nobody" {
		return Explanation{}, &UnknownError{What: "container", Name: q.To, Nearest: n.names}
	}
	return Explanation{Path: "dropped", Reason: "isolated", Sent: Ends{To: q.Source.String()}}, nil
}

func (n *networks) Disallow(_ context.Context, p Pair) (bool, error) { return n.set(p, false) }

// serve runs a server until the test ends and returns its socket.
func serve(t *testing.T, h Handler) string {
	t.Helper()
	return serveAt(t, h, filepath.Join(t.TempDir(), "run", "bpfnet.sock"), "")
}

func serveAt(t *testing.T, h Handler, path, group string) string {
	t.Helper()
	l, err := Listen(path, group)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- NewServer(h).Run(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
		assert.NoFileExists(t, path)
	})
	return path
}

func dial(t *testing.T, path string) *Client {
	t.Helper()
	c, err := Dial(t.Context(), path)
	require.NoError(t, err)
	return c
}

func TestVerbs(t *testing.T) {
	h := &networks{names: []string{"fe", "be"}, allowed: map[Pair]bool{}}
	path := serve(t, h)
	c := dial(t, path)

	st, err := c.Status(t.Context())
	require.NoError(t, err)
	assert.Equal(t, Status{Version: "1.2.3", PID: 42, Started: time.Unix(1700000000, 0).UTC()}, st)

	for _, step := range []struct {
		do      func(context.Context, Pair) (bool, error)
		changed bool
	}{{c.Allow, true}, {c.Allow, false}, {c.Disallow, true}, {c.Disallow, false}} {
		changed, err := step.do(t.Context(), Pair{"fe", "be"})
		require.NoError(t, err)
		assert.Equal(t, step.changed, changed)
	}

	_, err = c.Allow(t.Context(), Pair{"fe", "bee"})
	var unknown *UnknownError
	require.ErrorAs(t, err, &unknown)
	assert.Equal(t, &UnknownError{What: "network", Name: "bee", Nearest: []string{"fe", "be"}}, unknown)
	assert.EqualError(t, err, `network "bee": no such network; the nearest names are fe, be`)

	_, err = c.Allow(t.Context(), Pair{"fe", "fe"})
	require.ErrorContains(t, err, "two different names")

	h.mu.Lock()
	h.fail = errors.New("disk full")
	h.mu.Unlock()
	_, err = c.Allow(t.Context(), Pair{"fe", "be"})
	require.EqualError(t, err, "disk full")
}

func TestSocketIsForOwnerAndGroup(t *testing.T) {
	info, err := os.Stat(serve(t, &networks{}))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o660), info.Mode().Perm())
}

func TestNotRunning(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	check := func() {
		t.Helper()
		_, err := Dial(t.Context(), path)
		require.ErrorIs(t, err, ErrNotRunning)
		assert.ErrorContains(t, err, path)
		assert.ErrorContains(t, err, "bpfnet daemon")
	}
	check()
	leaveStale(t, path)
	check()
}

// leaveStale makes a socket as a killed daemon leaves it.
func leaveStale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	leaveStale(t, path)
	l, err := Listen(path, "")
	require.NoError(t, err, "a stale socket is replaced")

	_, err = Listen(path, "")
	require.ErrorIs(t, err, ErrInUse)
	require.NoError(t, l.Close())
	assert.NoFileExists(t, path)

	require.NoError(t, os.WriteFile(path, []byte("mine"), 0o600))
	_, err = Listen(path, "")
	require.ErrorContains(t, err, "no socket")
	raw, err := os.ReadFile(path)
	require.NoError(t, err)
	assert.Equal(t, "mine", string(raw))

	_, err = Listen(filepath.Join(t.TempDir(), strings.Repeat("x", 120)), "")
	require.ErrorContains(t, err, "too long")
}

func TestForeignServerIsTold(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	srv := &http.Server{Handler: http.NotFoundHandler()}
	done := make(chan error)
	go func() { done <- srv.Serve(l) }()
	defer func() { srv.Close(); <-done }()
	_, err = dial(t, path).Status(t.Context())
	require.ErrorContains(t, err, "not a bpfnet daemon")
}

func TestRequestsAreChecked(t *testing.T) {
	path := serve(t, &networks{})
	c := dial(t, path)
	for body, why := range map[string]string{
		`{`:                       "read request",
		`{"a":"x"}`:               "two different names",
		`{"a":"x","b":"y","c":1}`: "unknown field",
		`{"a":"` + strings.Repeat("x", maxBody) + `"}`: "too large",
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://bpfnet"+pathAllow, strings.NewReader(body))
		require.NoError(t, err)
		resp, err := c.http.Do(req)
		require.NoError(t, err)
		var buf bytes.Buffer
		_, err = buf.ReadFrom(resp.Body)
		resp.Body.Close()
		require.NoError(t, err)
		assert.Equal(t, http.StatusBadRequest, resp.StatusCode)
		assert.Contains(t, buf.String(), why)
	}
}

func TestSnapshot(t *testing.T) {
	dir := t.TempDir()
	_, err := ReadSnapshot(dir)
	require.ErrorIs(t, err, ErrNoSnapshot)
	want := &Snapshot{
		Version: "1", PID: 7, Started: time.Unix(1, 0).UTC(), Written: time.Unix(2, 0).UTC(),
		Networks: []Network{{Slot: 1, Name: "fe"}}, Allowed: []Pair{{"a", "b"}},
	}
	for range 2 {
		require.NoError(t, WriteSnapshot(dir, want))
		got, err := ReadSnapshot(dir)
		require.NoError(t, err)
		assert.Equal(t, want, got)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, SnapshotName), []byte("{"), 0o600))
	_, err = ReadSnapshot(dir)
	require.ErrorContains(t, err, filepath.Join(dir, SnapshotName))
}

func TestAnnounce(t *testing.T) {
	c := dial(t, serve(t, &networks{}))
	b := PortBinding{
		Proto: "tcp", Host: netip.MustParseAddrPort("[::]:8080"), Container: netip.MustParseAddrPort("172.17.0.2:80"),
	}
	require.NoError(t, c.Announce(t.Context(), b))
	b.Proto = "sctp"
	require.EqualError(t, c.Announce(t.Context(), b), "no container has that address")
}

func TestExplain(t *testing.T) {
	c := dial(t, serve(t, &networks{names: []string{"db"}}))
	e, err := c.Explain(t.Context(), Question{From: "web", To: "db", Port: 80, Source: netip.MustParseAddr("10.0.0.1")})
	require.NoError(t, err)
	assert.Equal(t, Explanation{Path: "dropped", Reason: "isolated", Sent: Ends{To: "10.0.0.1"}}, e)
	_, err = c.Explain(t.Context(), Question{From: "web", To: "nobody"})
	unknown := new(UnknownError)
	require.ErrorAs(t, err, &unknown)
	assert.Equal(t, []string{"db"}, unknown.Nearest)
}
