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
	"path/filepath"
	"syscall"
	"time"
)

// Handler does what clients ask for. Its methods are called concurrently.
type Handler interface {
	Status(ctx context.Context) (Status, error)
	// Allow lets two networks talk, in both directions, from when it returns on. It fails with
	// UnknownNetworkError. changed is false if they were allowed to already.
	Allow(ctx context.Context, p Pair) (changed bool, err error)
	// Disallow takes Allow back. It fails with UnknownNetworkError for a name that is neither a
	// network's nor part of an allowed pair.
	Disallow(ctx context.Context, p Pair) (changed bool, err error)
	// Publish has a port lead to a container that is about to start, from when it returns on.
	Publish(ctx context.Context, p PortBinding) error
}

const (
	socketMode = 0o660
	// maxSocketPath is what struct sockaddr_un has room for, with its zero.
	maxSocketPath = 107
	// maxBody is far more than two names need.
	maxBody = 1 << 16
	// requestTimeout: a verb waits for one round of reconciliation at most.
	requestTimeout = 30 * time.Second
	// shutdownTimeout is how long the end waits for requests under way.
	shutdownTimeout = 2 * time.Second
)

// Listen makes the socket, and its directory where that is missing. A socket that nobody listens on
// any more is replaced; it fails with ErrInUse where somebody does. Close removes the socket.
func Listen(path string) (net.Listener, error) {
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
	if err := os.Chmod(path, socketMode); err != nil {
		l.Close()
		return nil, fmt.Errorf("socket: %w", err)
	}
	return l, nil
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
}

// NewServer makes a server. It has nothing to close.
func NewServer(h Handler) *Server { return &Server{h} }

// Run serves until ctx ends, lets requests under way finish, and returns nil. It closes l.
func (s *Server) Run(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: requestTimeout,
		ReadTimeout:       requestTimeout,
		MaxHeaderBytes:    maxBody,
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve the api: %w", err)
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
	mux.HandleFunc("POST "+pathPublish, func(w http.ResponseWriter, r *http.Request) {
		var p PortBinding
		if err := readBody(w, r, &p); err != nil {
			write(w, http.StatusBadRequest, failure{Error: err.Error()})
			return
		}
		answer(w, Result{Changed: true}, s.h.Publish(r.Context(), p))
	})
	mux.HandleFunc("POST "+pathAllow, verb(s.h.Allow))
	mux.HandleFunc("POST "+pathDisallow, verb(s.h.Disallow))
	return mux
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
	if errors.As(err, &f.UnknownNetwork) {
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
