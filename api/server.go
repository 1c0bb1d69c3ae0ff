// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Handler does what clients ask for. Its methods are called concurrently.
type Handler interface {
	Status(ctx context.Context) (Status, error)
	// Allow lets two networks talk, in both directions, from when it returns on. It fails with
	// UnknownError. changed is false if they were allowed to already.
	Allow(ctx context.Context, p Pair) (changed bool, err error)
	// Disallow takes Allow back. It fails with UnknownError for a name that is neither a
	// network's nor part of an allowed pair.
	Disallow(ctx context.Context, p Pair) (changed bool, err error)
	// Announce has a port lead to a container that is about to start, from when it returns on.
	Announce(ctx context.Context, p PortBinding) error
	// AllowEndpoint serves a device that no engine made, from when it returns on.
	AllowEndpoint(ctx context.Context, e ByHand) (Result, error)
	// DisallowEndpoint takes AllowEndpoint back.
	DisallowEndpoint(ctx context.Context, n Named) (Result, error)
	// Deny puts prefixes on the shield's deny list, in force from when it returns on.
	Deny(ctx context.Context, s DenySpec) (DenyResult, error)
	// Undeny takes Deny back.
	Undeny(ctx context.Context, s DenySpec) (DenyResult, error)
	// Denied is the deny list.
	Denied(ctx context.Context) (DenyList, error)
	// Explain says what becomes of a connection's first packet, without one. It fails with UnknownError, and changes nothing.
	Explain(ctx context.Context, q Question) (Explanation, error)
	Embedded
}

const (
	socketMode = 0o660
	// maxSocketPath is what struct sockaddr_un has room for, with its zero.
	maxSocketPath = 107
	// maxHeader is far more than our headers need.
	maxHeader = 1 << 16
	// maxBody has room for a command and its environment: the kernel takes no more than 2 MiB of them.
	maxBody = 4 << 20
	// requestTimeout: a verb waits for one round of reconciliation at most.
	requestTimeout = 30 * time.Second
	// headerTimeout: a client says at once what it wants.
	headerTimeout = 5 * time.Second
	// shutdownTimeout is how long the end waits for requests under way.
	shutdownTimeout = 2 * time.Second
)

// Listen makes the socket, and its directory where that is missing. A socket that nobody listens on
// any more is replaced; it fails with ErrInUse where somebody does. Close removes the socket. Its group, a name or a
// number, may ask beside root; empty: the process's own.
func Listen(path, group string) (net.Listener, error) {
	gid, err := groupID(group)
	if err != nil {
		return nil, err
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("socket %s: %d bytes are too long for a socket's path; %d are the most", path, len(path), maxSocketPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("socket directory: %w", err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, bare(err))
	}
	if err := errors.Join(os.Chown(path, -1, gid), os.Chmod(path, socketMode)); err != nil {
		l.Close()
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
}

// groupID is the number of a group; -1: none is named.
func groupID(group string) (int, error) {
	if group == "" {
		return -1, nil
	}
	if n, err := strconv.ParseUint(group, 10, 31); err == nil {
		return int(n), nil
	}
	g, err := user.LookupGroup(group)
	if err != nil {
		return 0, fmt.Errorf("group of the socket: %w", err)
	}
	return strconv.Atoi(g.Gid)
}

// removeStale removes a socket that its owner left behind.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("socket: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("socket %s: there is a file that is no socket; move it away, or name another path with --socket", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
		return fmt.Errorf("socket %s: %w; stop that one, or give this one a socket of its own with --socket", path, ErrInUse)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("socket %s: %w", path, bare(err))
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("socket: %w", err)
	}
	return nil
}

// bare takes the operation and the address, which the caller names, off an error of package net.
func bare(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

// Server answers clients.
type Server struct {
	h Handler
	// Metrics answers GET /metrics. Optional.
	Metrics http.Handler
}

// NewServer makes a server. It has nothing to close.
func NewServer(h Handler) *Server { return &Server{h: h} }

// Run serves until ctx ends, lets requests under way finish, and returns nil. It closes l.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	who, err := rightsAt(l)
	if err != nil {
		l.Close()
		return fmt.Errorf("serve the api: %w", err)
	}
	srv := &http.Server{
		Handler:           who.guard(s.routes()),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		MaxHeaderBytes:    maxHeader,
		ConnContext:       withPeer,
	}
	if err := Serve(ctx, srv, &door{Listener: l, rights: who}); err != nil {
		return fmt.Errorf("serve the api: %w", err)
	}
	return nil
}

// Serve has srv serve l until ctx ends, and then waits a moment for requests under way. It closes l. The
// error is that of a server that ended by itself.
func Serve(ctx context.Context, srv *http.Server, l net.Listener) error {
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(end); err != nil {
		srv.Close()
	}
	<-served
	return nil
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	if s.Metrics != nil {
		mux.Handle("GET "+pathMetrics, s.Metrics)
	}
	mux.HandleFunc("GET "+pathStatus, func(w http.ResponseWriter, r *http.Request) {
		st, err := s.h.Status(r.Context())
		answer(w, st, err)
	})
	verb := func(do func(context.Context, Pair) (bool, error)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			p, err := readPair(w, r)
			if err != nil {
				write(w, http.StatusBadRequest, failure{Error: err.Error()})
				return
			}
			ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
			defer cancel()
			changed, err := do(ctx, p)
			answer(w, Result{changed}, err)
		}
	}
	post(mux, pathAnnounce, func(ctx context.Context, p PortBinding) (Result, error) {
		return Result{Changed: true}, s.h.Announce(ctx, p)
	})
	post(mux, pathAllowEndpoint, s.h.AllowEndpoint)
	post(mux, pathDisallowEndpoint, s.h.DisallowEndpoint)
	post(mux, pathDeny, s.h.Deny)
	post(mux, pathUndeny, s.h.Undeny)
	mux.HandleFunc("GET "+pathDenied, func(w http.ResponseWriter, r *http.Request) {
		l, err := s.h.Denied(r.Context())
		answer(w, l, err)
	})
	post(mux, pathExplain, s.h.Explain)
	post(mux, pathNetwork+"create", s.h.CreateNetwork)
	post(mux, pathNetwork+"remove", s.h.RemoveNetwork)
	post(mux, pathNetwork+"connect", s.h.Connect)
	post(mux, pathNetwork+"disconnect", s.h.Disconnect)
	post(mux, pathSandbox+"create", s.h.CreateSandbox)
	post(mux, pathSandbox+"inspect", s.h.Sandbox)
	post(mux, pathSandbox+"start", s.h.StartSandbox)
	post(mux, pathSandbox+"runs", s.h.SandboxRuns)
	post(mux, pathSandbox+"ended", s.h.SandboxEnded)
	post(mux, pathSandbox+"stop", s.h.StopSandbox)
	post(mux, pathSandbox+"wait", s.h.WaitSandbox)
	post(mux, pathSandbox+"remove", s.h.RemoveSandbox)
	post(mux, pathPort+"publish", s.h.PublishPorts)
	post(mux, pathPort+"unpublish", s.h.UnpublishPorts)
	mux.HandleFunc("POST "+pathAllow, verb(s.h.Allow))
	mux.HandleFunc("POST "+pathDisallow, verb(s.h.Disallow))
	return mux
}

// post answers requests of one shape. A verb that has begun is not left half done because its client
// went away: it ends with the daemon, or in its own time.
func post[Q, A any](mux *http.ServeMux, path string, do func(context.Context, Q) (A, error)) {
	mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		var q Q
		if err := readBody(w, r, &q); err != nil {
			write(w, http.StatusBadRequest, failure{Error: err.Error()})
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), requestTimeout)
		defer cancel()
		a, err := do(ctx, q)
		answer(w, a, err)
	})
}

func readBody(w http.ResponseWriter, r *http.Request, into any) error {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	return nil
}

func readPair(w http.ResponseWriter, r *http.Request) (Pair, error) {
	var p Pair
	if err := readBody(w, r, &p); err != nil {
		return p, err
	}
	if p.A == "" || p.B == "" || p.A == p.B {
		return p, fmt.Errorf("networks %q and %q: want two different names", p.A, p.B)
	}
	return p, nil
}

func answer(w http.ResponseWriter, v any, err error) {
	if err == nil {
		write(w, http.StatusOK, v)
		return
	}
	f := failure{Error: err.Error()}
	code := http.StatusInternalServerError
	if errors.As(err, &f.Unknown) {
		code = http.StatusNotFound
	}
	write(w, code, f)
}

func write(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// A client that has gone gets nothing.
	_ = json.NewEncoder(w).Encode(v)
}
