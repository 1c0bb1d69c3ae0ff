// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// The relay's socket takes requests and gives answers, each a length (4 bytes, big endian), and that
// much JSON. Sockets of ports come with the length: at most maxFiles of them, in the order of Ports.

const (
	// maxFiles is below the kernel's SCM_MAX_FD, 253.
	maxFiles = 128
	// maxMessage has room for all ports that the data path serves.
	maxMessage = 8 << 20
)

// The requests.
const (
	opAsk    = "ask"    // what is served, and how it goes
	opAdd    = "add"    // ports, with their sockets
	opLead   = "lead"   // ports that lead elsewhere
	opRemove = "remove" // ports that end
	opYield  = "yield"  // ports whose sockets are given up for a while
	opTake   = "take"   // the sockets of ports, to serve them in another process
	opRetire = "retire" // end when the last client has gone
	opStop   = "stop"   // end now
)

type request struct {
	Op    string `json:"op"`
	Ports []Port `json:"ports,omitempty"`
}

type answer struct {
	Error string `json:"error,omitempty"`
	State State  `json:"state"`
	Ports []Port `json:"ports,omitempty"` // opTake: those whose sockets come with it
}

// State is what a relay tells of itself.
type State struct {
	Version string      `json:"version"`
	PID     int         `json:"pid"`
	Active  int         `json:"active"` // clients at work now
	Ports   []PortState `json:"ports,omitempty"`
}

// PortState is a port that is relayed.
type PortState struct {
	Port
	Counters
}

// Serve answers on a relay's socket until it is told to end, or ctx ends. Only those who may connect
// to the socket are answered: its file's mode says who.
func Serve(ctx context.Context, r *Relay, l *net.UnixListener, version string) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	s := &controller{r: r, version: version, listener: l, end: end, conns: make(map[net.Conn]struct{})}
	defer s.work.Wait()
	defer context.AfterFunc(ctx, func() {
		l.Close()
		s.closeAll()
	})()
	for {
		c, err := l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed): // retired
			<-ctx.Done()
			return nil
		case err != nil:
			return fmt.Errorf("relay's socket: %w", err)
		}
		if s.add(c) {
			s.work.Go(func() { s.serve(ctx, c) })
		}
	}
}

type controller struct {
	r        *Relay
	version  string
	listener *net.UnixListener
	end      context.CancelFunc
	work     sync.WaitGroup

	mu      sync.Mutex
	conns   map[net.Conn]struct{}
	closed  bool
	retired bool
}

func (s *controller) add(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		c.Close()
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *controller) closeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.conns {
		c.Close()
	}
}

func (s *controller) serve(ctx context.Context, c *net.UnixConn) {
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		c.Close()
	}()
	for {
		var q request
		fds, err := receive(c, &q)
		if err != nil {
			closeFiles(fds)
			return
		}
		a, give := s.do(q, fds)
		a.State.Version, a.State.PID, a.State.Active = s.version, os.Getpid(), s.r.Active()
		if send(c, a, give) != nil {
			return
		}
		switch q.Op {
		case opStop:
			s.end()
			return
		case opRetire:
			s.listener.Close() // its successor listens at the same place
			s.work.Go(func() {
				s.r.drained(ctx)
				s.end()
			})
		}
	}
}

// do does one request. Descriptors that it is given are its own.
func (s *controller) do(q request, fds []int) (a answer, give []int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if q.Op != opAdd || len(fds) != len(q.Ports) || s.retired {
		closeFiles(fds)
	}
	var errs []error
	switch {
	case q.Op == opAsk:
		counters := s.r.Counters()
		for _, p := range s.r.Ports() {
			a.State.Ports = append(a.State.Ports, PortState{p, counters[p.Key]})
		}
	case s.retired && q.Op != opStop:
		errs = append(errs, errors.New("the relay is about to end"))
	case q.Op == opAdd && len(fds) != len(q.Ports):
		errs = append(errs, fmt.Errorf("%d sockets for %d ports", len(fds), len(q.Ports)))
	case q.Op == opAdd:
		for i, p := range q.Ports {
			errs = append(errs, s.r.Add(p, fds[i]))
		}
	case q.Op == opLead:
		for _, p := range q.Ports {
			s.r.Lead(p)
		}
	case q.Op == opRemove:
		for _, p := range q.Ports {
			s.r.Remove(p.Key)
		}
	case q.Op == opYield:
		for _, p := range q.Ports {
			s.r.Yield(p.Key)
		}
	case q.Op == opTake:
		var keys []Key
		for _, p := range q.Ports[:min(len(q.Ports), maxFiles)] {
			keys = append(keys, p.Key)
		}
		a.Ports, give = s.r.sockets(keys)
	case q.Op == opRetire:
		s.retired = true
		s.r.stop()
	case q.Op == opStop:
		s.r.removeAll() // who hears the answer may bind the ports
	default:
		errs = append(errs, fmt.Errorf("request %q: unknown", q.Op))
	}
	if err := errors.Join(errs...); err != nil {
		a.Error = err.Error()
	}
	return a, give
}

func closeFiles(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// send writes a message, with descriptors.
func send(c *net.UnixConn, v any, fds []int) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var control []byte
	if len(fds) > 0 {
		control = unix.UnixRights(fds...)
	}
	length := binary.BigEndian.AppendUint32(nil, uint32(len(body)))
	if _, _, err := c.WriteMsgUnix(length, control, nil); err != nil {
		return err
	}
	_, err = c.Write(body)
	return err
}

// receive reads a message. The descriptors are the caller's, whatever the error.
func receive(c *net.UnixConn, v any) (fds []int, err error) {
	var length [4]byte
	control := make([]byte, unix.CmsgSpace(4*maxFiles))
	// The kernel gives no more than one sender's message at once, and this is a part of one.
	n, nc, _, _, err := c.ReadMsgUnix(length[:], control)
	if err != nil {
		return nil, err
	}
	list, err := unix.ParseSocketControlMessage(control[:nc])
	for _, m := range list {
		if got, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, got...)
		}
	}
	if err != nil {
		return fds, err
	}
	if n == 0 {
		return fds, io.EOF
	}
	if _, err := io.ReadFull(c, length[n:]); err != nil {
		return fds, err
	}
	size := binary.BigEndian.Uint32(length[:])
	if size > maxMessage {
		return fds, fmt.Errorf("a message of %d bytes; %d are the most", size, maxMessage)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(c, body); err != nil {
		return fds, err
	}
	return fds, json.Unmarshal(body, v)
}
