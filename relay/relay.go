// SPDX-License-Identifier: Apache-2.0

// Package relay carries what packets cannot: from a host port on an IPv6 address to a container that
// has IPv4 only, by two sockets and a copy, as docker-proxy does. It knows ports and their targets, and
// no containers. One process does it for all ports of a host; it outlives the daemon, which gives it
// the bound sockets and tells it where they lead ([Keeper]).
package relay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// Key is what a client dials; [::] stands for all IPv6 addresses.
type Key = policy.PortKey

func name(k Key) string { return fmt.Sprintf("%s/%s", k.Host, k.Proto) }

// Port is a host port and where it leads.
type Port struct {
	Key
	Target netip.AddrPort
}

// Counters of a port, since its socket was given.
type Counters struct {
	Clients uint64 `json:"clients"` // TCP connections and UDP clients so far
	Active  int    `json:"active"`  // of them, at work now
	Dropped uint64 `json:"dropped"` // clients beyond a limit
	Failed  uint64 `json:"failed"`  // the target could not be reached
}

// Limits bound what a relay holds. The zero value means the defaults.
type Limits struct {
	PerPort int // clients at one time
	Total   int
	// Idle is after how long without a packet a UDP client is forgotten; docker-proxy's default, 90 s.
	Idle time.Duration
	// Unanswered is the same for a client that has got no answer yet, 30 s: it may not exist.
	Unanswered time.Duration
	Dial       time.Duration // how long a TCP target may take to answer
}

const (
	defaultPerPort = 4096
	defaultTotal   = 16384
	// filesPerClient: two sockets, and two pipes that the kernel splices through.
	filesPerClient = 6
)

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	dur := func(v *time.Duration, d time.Duration) {
		if *v == 0 {
			*v = d
		}
	}
	total := defaultTotal
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil && files.Cur/filesPerClient/2 < defaultTotal {
		total = max(int(files.Cur/filesPerClient/2), 16) // the other half is for the ports
	}
	def(&l.Total, total)
	def(&l.PerPort, min(defaultPerPort, (l.Total+1)/2)) // one port cannot starve the others
	dur(&l.Idle, 90*time.Second)
	dur(&l.Unanswered, 30*time.Second)
	dur(&l.Dial, 10*time.Second)
	return l
}

// Relay serves ports. It is safe for concurrent use.
type Relay struct {
	limits Limits
	begun  time.Time
	idle   chan struct{} // of one: a client has gone

	mu    sync.Mutex
	ports map[Key]*served
	work  sync.WaitGroup // clients

	count  sync.Mutex // of active, here and in served
	active int
}

// served is a port with its socket.
type served struct {
	r   *Relay
	key Key
	fd  int // the socket as it was given, for whoever takes it over; -1: yielded

	stop  func() // takes no more clients; those there are go on
	close func() // optional: what clients need until they end
	mu    sync.Mutex
	cut   map[*func()]struct{} // how clients are ended
	ended bool

	target  atomic.Pointer[netip.AddrPort]
	active  int
	clients atomic.Uint64
	dropped atomic.Uint64
	failed  atomic.Uint64
}

// New makes a relay that serves nothing yet.
func New(l Limits) *Relay {
	return &Relay{limits: l.withDefaults(), begun: time.Now(), ports: make(map[Key]*served), idle: make(chan struct{}, 1)}
}

// Add serves a port by a bound socket, which is the relay's from here on. One that is served already
// gets the target; its socket stays.
func (r *Relay) Add(p Port, fd int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.ports[p.Key]
	switch {
	case s == nil:
		s = &served{r: r, key: p.Key, cut: make(map[*func()]struct{})}
		s.target.Store(&p.Target)
	case s.fd < 0:
		s.lead(p.Target)
	default:
		s.lead(p.Target)
		return unix.Close(fd)
	}
	s.fd = fd
	var err error
	switch p.Proto {
	case policy.TCP:
		err = s.serveTCP()
	case policy.UDP:
		err = s.serveUDP()
	default:
		err = errors.New("only tcp and udp can be relayed")
	}
	if err != nil {
		unix.Close(fd)
		s.fd = -1
		return fmt.Errorf("relay host port %s: %w", name(p.Key), err)
	}
	r.ports[p.Key] = s
	return nil
}

// Lead has a port lead elsewhere. Clients of the old target are cut off.
func (r *Relay) Lead(p Port) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.ports[p.Key]; s != nil {
		s.lead(p.Target)
	}
}

// Remove ends a port and its clients' connections. Its socket is closed when Remove returns.
func (r *Relay) Remove(k Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.ports[k]
	if s == nil {
		return
	}
	delete(r.ports, k)
	s.stop()
	s.end(true)
	s.letGo()
}

// Yield gives the port's socket up for a while: somebody else may be about to bind it. TCP connections go
// on; UDP clients come back with Add.
func (r *Relay) Yield(k Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.ports[k]
	if s == nil || s.fd < 0 {
		return
	}
	s.stop()
	if k.Proto == policy.UDP {
		s.end(false)
	}
	s.letGo()
}

// letGo closes the socket of a stopped port.
func (s *served) letGo() {
	if s.fd < 0 {
		return
	}
	if s.close != nil {
		s.close()
	}
	unix.Close(s.fd)
	s.fd = -1
}

// Ports lists what is served, in no order.
func (r *Relay) Ports() []Port {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Port, 0, len(r.ports))
	for k, s := range r.ports {
		if s.fd >= 0 {
			list = append(list, Port{Key: k, Target: *s.target.Load()})
		}
	}
	return list
}

// Counters are those of each port.
func (r *Relay) Counters() map[Key]Counters {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count.Lock()
	defer r.count.Unlock()
	out := make(map[Key]Counters, len(r.ports))
	for k, s := range r.ports {
		out[k] = Counters{s.clients.Load(), s.active, s.dropped.Load(), s.failed.Load()}
	}
	return out
}

// Active is the number of clients.
func (r *Relay) Active() int {
	r.count.Lock()
	defer r.count.Unlock()
	return r.active
}

// Close ends all ports and waits for their clients' ends.
func (r *Relay) Close() {
	r.removeAll()
	r.work.Wait()
}

func (r *Relay) removeAll() {
	for k := range r.Counters() {
		r.Remove(k)
	}
}

// sockets are the sockets of some ports, for another process. They stay the relay's.
func (r *Relay) sockets(keys []Key) (ports []Port, fds []int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range keys {
		if s := r.ports[k]; s != nil && s.fd >= 0 {
			ports = append(ports, Port{k, *s.target.Load()})
			fds = append(fds, s.fd)
		}
	}
	return ports, fds
}

// stop takes no more clients: somebody else does by the same sockets.
func (r *Relay) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.ports {
		s.stop()
	}
}

// drained returns when the last client has gone.
func (r *Relay) drained(ctx context.Context) {
	for r.Active() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-r.idle:
		}
	}
}

// lead is Lead. The caller holds r.mu.
func (s *served) lead(to netip.AddrPort) {
	if *s.target.Load() == to {
		return
	}
	s.target.Store(&to)
	s.end(false)
}

// enter counts a client in, or refuses it, and remembers how it is ended. A client is entered before
// the target is read, so that none goes on to one that is given up.
func (s *served) enter(cut func()) (leave func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.r.count.Lock()
	defer s.r.count.Unlock()
	if s.ended || s.active >= s.r.limits.PerPort || s.r.active >= s.r.limits.Total {
		s.dropped.Add(1)
		return nil, false
	}
	s.active++
	s.r.active++
	s.clients.Add(1)
	s.cut[&cut] = struct{}{}
	return func() {
		s.mu.Lock()
		delete(s.cut, &cut)
		s.mu.Unlock()
		s.r.count.Lock()
		s.active--
		s.r.active--
		s.r.count.Unlock()
		select {
		case s.r.idle <- struct{}{}:
		default:
		}
	}, true
}

// end ends all clients, and if it is for good, takes no more.
func (s *served) end(forGood bool) {
	s.mu.Lock()
	s.ended = s.ended || forGood
	var cuts []func()
	for c := range s.cut {
		cuts = append(cuts, *c)
	}
	s.mu.Unlock()
	for _, c := range cuts {
		c()
	}
}

// dup is another descriptor of the socket, as package net wants it.
func (s *served) dup() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name(s.key)), nil
}

// receiveAll takes a filter off a socket that discarded what came while nobody served.
func receiveAll(fd int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
