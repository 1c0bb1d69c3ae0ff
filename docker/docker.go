// SPDX-License-Identifier: Apache-2.0

// Package docker turns what a Docker Engine knows about its bridge networks into a
// policy.State. It reads, and never changes anything in the Engine.
//
// The Engine's full state is the truth and is read on every connect and periodically; its
// events, which it drops silently when a reader is slow, and the kernel's news about bridge
// ports are hints that make a part be read again sooner.
//
// The package knows the Engine's API and two files below its root directory, and nothing of
// devices, maps or programs. Translation is pure and stands apart from the reading.
package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"github.com/bpfnet/bpfnet/policy"
)

// Options of New.
type Options struct {
	// Host is the Engine's socket: unix:///run/docker.sock.
	Host string
	// Logger gets what is not worth an error: state read, connection lost. Optional.
	Logger *slog.Logger
	// DefaultBridge replaces labels of the Engine's default bridge network.
	DefaultBridge DefaultBridgeSettings
	// Resync is the time between full reads. Optional: 30 s.
	Resync time.Duration
}

// DefaultBridgeSettings are the options of the default network "bridge", whose labels say
// nothing: an Engine with iptables off reports enable_ip_masquerade=false whatever was asked
// for, and refuses icc=false.
type DefaultBridgeSettings struct {
	NoMasquerade bool
	NoICC        bool
	// HostBinding is the host address of ports that are published without one. Optional: any.
	HostBinding netip.Addr
}

// Status is the state of the connection.
type Status struct {
	Connected bool
	// Version is the Engine's, empty before the first connect.
	Version string
	// LastSync is when the last full read ended.
	LastSync time.Time
	// LastError is why there is no connection, empty while there is one.
	LastError string
}

const (
	// defaultResync bounds how long a lost event stays unnoticed.
	defaultResync = 30 * time.Second
	// dialTimeout and requestTimeout: an Engine under load answers within seconds; one that is
	// still starting accepts connections and answers later, and is asked again then.
	dialTimeout    = 5 * time.Second
	requestTimeout = 20 * time.Second
	// The back-off is short, as asking costs one connect(2), and containers with a restart
	// policy start as soon as the Engine does.
	minBackoff = 50 * time.Millisecond
	maxBackoff = time.Second
)

// Source follows one Engine.
type Source struct {
	opts    Options
	socket  string // path
	log     *slog.Logger
	refresh chan string

	ready     chan struct{}
	readyOnce sync.Once

	mu     sync.Mutex
	status Status
}

// Exists reports whether there is a socket to connect to.
func (s *Source) Exists() bool {
	_, err := os.Stat(s.socket)
	return err == nil
}

// New checks the options. It does not connect: the Engine may be absent.
func New(opts Options) (*Source, error) {
	path, ok := strings.CutPrefix(opts.Host, "unix://")
	if !ok || !filepath.IsAbs(path) {
		return nil, fmt.Errorf("docker host %q: not a unix socket; write it as unix:///run/docker.sock", opts.Host)
	}
	if opts.Resync <= 0 {
		opts.Resync = defaultResync
	}
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Source{
		opts:    opts,
		socket:  filepath.Clean(path),
		log:     log,
		refresh: make(chan string, 256),
		ready:   make(chan struct{}),
		status:  Status{LastError: "not connected yet"},
	}, nil
}

// Run follows the Engine until ctx ends, and then returns nil. It calls update, never
// concurrently, with the complete state after each connect and each time it has changed.
//
// While there is no Engine update is not called: the last state stays valid, as containers
// outlive their Engine or take their endpoints with them. Run never gives up.
func (s *Source) Run(ctx context.Context, update func(policy.State)) error {
	backoff := minBackoff
	for ctx.Err() == nil {
		connected, err := s.session(ctx, update)
		if ctx.Err() != nil {
			break
		}
		if connected {
			backoff = minBackoff
		}
		s.failed(err)
		select {
		case <-ctx.Done():
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
	}
	s.setStatus(func(st *Status) { st.Connected = false; st.LastError = "stopped" })
	return nil
}

// Refresh says that a network, given by its bridge device, name or ID, gained or lost a port.
// It is read again at once, and some more times within the next half second: the Engine makes
// an endpoint visible only after the device. It never blocks.
func (s *Source) Refresh(network string) {
	select {
	case s.refresh <- network:
	default: // so many hints are waiting that nearly everything is read again anyway
	}
}

// Ready is closed after the first complete state was handed over.
func (s *Source) Ready() <-chan struct{} { return s.ready }

// Status returns the state of the connection.
func (s *Source) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

func (s *Source) setStatus(f func(*Status)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.status)
}

// failed records why a session ended. Repetitions are not logged.
func (s *Source) failed(err error) {
	text := "connection closed"
	if err != nil {
		text = err.Error()
	}
	was := s.Status()
	s.setStatus(func(st *Status) { st.Connected = false; st.LastError = text })
	if was.LastError != text {
		s.log.Warn("docker engine not connected", "error", text)
	}
}

// probe connects to the socket once, for the sake of an error that says what to do.
func (s *Source) probe(ctx context.Context) error {
	d := net.Dialer{Timeout: dialTimeout}
	conn, err := d.DialContext(ctx, "unix", s.socket)
	if err != nil {
		return socketError(s.socket, err)
	}
	return conn.Close()
}

// Bridges are the bridge devices of an Engine's networks.
func Bridges(ctx context.Context, host string) ([]string, error) {
	cli, err := client.New(client.WithHost(host))
	if err != nil {
		return nil, fmt.Errorf("docker socket %s: %w", host, err)
	}
	defer cli.Close()
	res, err := cli.NetworkList(ctx, client.NetworkListOptions{Filters: make(client.Filters).Add("driver", "bridge")})
	if err != nil {
		return nil, fmt.Errorf("docker socket %s: list networks: %w", host, err)
	}
	var out []string
	for _, n := range res.Items {
		out = append(out, bridgeName(network.Inspect{Network: n.Network}))
	}
	return out, nil
}

// socketError names the socket and the way out.
func socketError(socket string, err error) error {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return fmt.Errorf("connect to docker socket %s: %w", socket, err)
	}
	switch {
	case errors.Is(errno, fs.ErrPermission):
		return fmt.Errorf("connect to docker socket %s: %w: run as root, or in the group that owns the socket", socket, errno)
	case errors.Is(errno, fs.ErrNotExist):
		return fmt.Errorf("connect to docker socket %s: %w: start Docker, or name its socket with --docker unix:///PATH, or do without by --docker off", socket, errno)
	case errno == syscall.ECONNREFUSED:
		return fmt.Errorf("connect to docker socket %s: %w: nobody listens there; start Docker, or name its socket with --docker unix:///PATH", socket, errno)
	case errno == syscall.ENOTSOCK:
		return fmt.Errorf("connect to docker socket %s: %w: name Docker's socket with --docker unix:///PATH", socket, errno)
	}
	return fmt.Errorf("connect to docker socket %s: %w", socket, errno)
}
