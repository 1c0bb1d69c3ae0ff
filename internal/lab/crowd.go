// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// CrowdSummary is the outcome of "labtool crowd".
type CrowdSummary struct {
	Opened   int            // flows
	Messages int            // whose answers came back
	Again    int            // datagrams that were sent once more
	Crossed  int            // answers that were another's
	Moved    int            // flows that were seen with another address or port than before
	Lost     int            // messages without an answer
	Resets   int            // flows that ended with an error
	Own      int            // flows that were seen with the address and port that they have
	Refused  map[string]int // flows that were not to be had, by call and error: "connect EADDRNOTAVAIL"
	Seen     map[string]int // flows, by the address that they were seen with
	Some     []struct {     // of the flows, the first to each destination
		Network, To, Seen string
	}
}

// CrowdServed is the outcome of "labtool crowd-serve".
type CrowdServed struct {
	Flows    int // that it has heard of
	Messages int // that it has answered
	Crossed  int // that came over another's addresses and ports
	Resets   int
}

// Crowd is a "labtool crowd" that runs: many flows at once, each with messages of its own.
type Crowd struct{ *Process }

// Crowd starts "labtool crowd" in the namespace, and waits for nothing.
func (n *NS) Crowd(t testing.TB, args ...string) *Crowd {
	t.Helper()
	return &Crowd{n.Start(t, n.lab.Tool, slices.Concat([]string{"crowd"}, args)...)}
}

// Standing waits until all flows are open, and returns how that went.
func (c *Crowd) Standing(t testing.TB, timeout time.Duration) (sum CrowdSummary) {
	t.Helper()
	Eventually(t, timeout, "a crowd is there", func() bool {
		exited := c.Exited()
		if out := c.Stdout(); strings.HasPrefix(out, "ready\n") && strings.Count(out, "\n") > 1 {
			return true
		}
		if exited {
			t.Fatalf("crowd: %s%s", tail(c.stdout), tail(c.stderr))
		}
		return false
	})
	c.decode(t, strings.Split(c.Stdout(), "\n")[1], &sum)
	return sum
}

// Finish has each flow exchange a last message, ends all, and returns how they went.
func (c *Crowd) Finish(t testing.TB, timeout time.Duration) (sum CrowdSummary) {
	t.Helper()
	c.end(t, timeout, &sum)
	return sum
}

// CrowdServer is a "labtool crowd-serve" that runs.
type CrowdServer struct{ *Process }

// CrowdServe starts "labtool crowd-serve" in the namespace, at these addresses and ports, and waits until it listens.
func (n *NS) CrowdServe(t testing.TB, at ...string) *CrowdServer {
	t.Helper()
	return &CrowdServer{n.startServer(t, "crowd-serve", at)}
}

// Finish ends the server and returns what it has seen.
func (s *CrowdServer) Finish(t testing.TB, timeout time.Duration) (sum CrowdServed) {
	t.Helper()
	(&Crowd{s.Process}).end(t, timeout, &sum)
	return sum
}

// end stops the process and decodes what it says last. Its status says no more than that does.
func (c *Crowd) end(t testing.TB, timeout time.Duration, sum any) {
	t.Helper()
	_ = c.Signal(syscall.SIGTERM)
	if err := c.Wait(timeout); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("stop %s: %v", c.cmd.Path, err)
	}
	lines := strings.Split(strings.TrimSpace(c.Stdout()), "\n")
	c.decode(t, lines[len(lines)-1], sum)
}

func (c *Crowd) decode(t testing.TB, line string, sum any) {
	t.Helper()
	if err := json.Unmarshal([]byte(line), sum); err != nil {
		t.Fatalf("%s: %v: %s\n%s", strings.Join(c.cmd.Args, " "), err, line, tail(c.stderr))
	}
}
