// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// View is how a server of the test tool sees an exchange.
type View struct {
	Proto  string // "tcp", "udp" or "http"
	Remote string // the client's address and port, as the server sees them
	Local  string // the address and port that the client has reached
	Host   string // the server's host name: for a container, its id's first 12 digits
	Text   string // the server's --text
	Echo   string // UDP: what the client has sent
}

// Reply is the outcome of "labtool get".
type Reply struct {
	Text  string // the line or datagram that came back
	Local string // getsockname
	Peer  string // getpeername; empty with --unconnected
	From  string // with --unconnected: the source that recvfrom gave
	RTT   int64  `json:"rtt_us"` // from before connect to the answer, in microseconds
	Error string // what failed; empty if nothing
	Errno string // its symbol, "ECONNREFUSED"; empty where there is none
	Stage string // in which it failed: resolve, socket, bind, connect, send, receive

	// View is Text, decoded, if it is a view.
	View View `json:"-"`
}

// Summary is the outcome of "labtool stream".
type Summary struct {
	Sent, Received int64
	Lost           int64   // sent, and not come back within the grace period
	Corrupt        int64   // came back out of order (TCP), twice or changed
	Resets         int64   // ends of the connection that were not asked for
	MaxGap         float64 `json:"max_gap_ms"` // longest time without an echo, in milliseconds
	View           string  // TCP: what the server said first
	Error          string
}

// Usage is what of a summary is worth writing down.
type Usage struct {
	Sent    int64   `json:"sent"`
	Lost    int64   `json:"lost"`
	Corrupt int64   `json:"corrupt"`
	Resets  int64   `json:"resets"`
	MaxGap  float64 `json:"max_gap_ms"`
}

// Usage is what of the summary is worth writing down.
func (s Summary) Usage() Usage { return Usage{s.Sent, s.Lost, s.Corrupt, s.Resets, s.MaxGap} }

// Get runs "labtool get" in the namespace: n.Get("--network", "udp", "192.0.2.1:53").
// The error says that nothing came back; the reply is filled in as far as it got then.
func (n *NS) Get(args ...string) (Reply, error) {
	return get(func(ctx context.Context) *exec.Cmd {
		return n.Command(ctx, n.lab.Tool, append([]string{"get"}, args...)...)
	})
}

// Get runs "labtool get" in a running container.
func (d *Docker) Get(container string, args ...string) (Reply, error) {
	return get(func(ctx context.Context) *exec.Cmd {
		cmd := d.lab.Host.Command(ctx, dockerCLI,
			slices.Concat([]string{"exec", container, "labtool", "get"}, args)...)
		cmd.Env = d.Env()
		return cmd
	})
}

func get(command func(context.Context) *exec.Cmd) (Reply, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, err := run(command(ctx))
	var r Reply
	if jsonErr := json.Unmarshal([]byte(out), &r); jsonErr != nil {
		return r, errors.Join(err, fmt.Errorf("labtool get printed %q: %w", out, jsonErr))
	}
	if json.Unmarshal([]byte(r.Text), &r.View) != nil {
		r.View = View{}
	}
	return r, err
}

// MustGet is Get for exchanges that must succeed.
func (n *NS) MustGet(t testing.TB, args ...string) Reply {
	t.Helper()
	r, err := n.Get(args...)
	if err != nil {
		t.Fatalf("in %s: %v: %+v", n.Name, err, r)
	}
	return r
}

// MustGet is Get for exchanges that must succeed.
func (d *Docker) MustGet(t testing.TB, container string, args ...string) Reply {
	t.Helper()
	r, err := d.Get(container, args...)
	if err != nil {
		t.Fatalf("in container %s: %v: %+v", container, err, r)
	}
	return r
}

// Serve starts "labtool serve" in the namespace and waits until it listens.
func (n *NS) Serve(t testing.TB, args ...string) *Process {
	t.Helper()
	return n.startServer(t, "serve", args)
}

// Stun starts "labtool stun" in the namespace and waits until it listens.
func (n *NS) Stun(t testing.TB, args ...string) *Process {
	t.Helper()
	return n.startServer(t, "stun", args)
}

// Sink starts "labtool udp-sink" in the namespace and waits until it listens.
func (n *NS) Sink(t testing.TB, args ...string) *Process {
	t.Helper()
	return n.startServer(t, "udp-sink", args)
}

func (n *NS) startServer(t testing.TB, command string, args []string) *Process {
	t.Helper()
	p := n.Start(t, n.lab.Tool, append([]string{command}, args...)...)
	p.WaitOutput(t, "ready")
	return p
}

// Stream is a "labtool stream" that runs.
type Stream struct{ *Process }

// Stream starts "labtool stream" in the namespace and waits until it is connected.
func (n *NS) Stream(t testing.TB, args ...string) *Stream {
	t.Helper()
	s := &Stream{n.Start(t, n.lab.Tool, append([]string{"stream"}, args...)...)}
	Eventually(t, 10*time.Second, "stream is connected", func() bool {
		exited := s.Exited()
		if strings.Contains(s.Stderr(), "streaming") {
			return true
		}
		if exited {
			t.Fatalf("stream: %s%s", s.Stderr(), s.Stdout())
		}
		return false
	})
	return s
}

// Finish ends the stream and returns how it went. A stream that ended before, because
// its connection did, is no failure here: the summary tells.
func (s *Stream) Finish(t testing.TB) Summary {
	t.Helper()
	var sum Summary
	out := s.Stop(t)
	if err := json.Unmarshal([]byte(out), &sum); err != nil {
		t.Fatalf("stream: %v: %s%s", err, out, s.Stderr())
	}
	return sum
}
