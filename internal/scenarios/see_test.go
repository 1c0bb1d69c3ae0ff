// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// noAnswer is how long a probe waits that is to stay without an answer: long against the
// microseconds that an answer takes, short against TCP's first retransmission after a second, so
// that each probe is one packet.
const noAnswer = 500 * time.Millisecond

// usualPort is what servers listen on where the scenario names none, TCP and UDP.
const usualPort = "80"

// protocols are those by which isolation is tried.
var protocols = []string{"tcp", "udp", "icmp"}

// ttls runs ping in a namespace and returns the TTL (hop limit) of each answer.
func ttls(n *lab.NS, to netip.Addr, count int) []int {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	out, _ := n.Run(ctx, "ping", "-n", "-c", strconv.Itoa(count), "-i", "0.2", "-W", fmt.Sprint(noAnswer.Seconds()), to.String())
	return ttlsIn(out)
}

// ttlsIn reads the TTLs out of what ping has printed.
func ttlsIn(out string) []int {
	var all []int
	for _, field := range strings.Fields(out) {
		if value, ok := strings.CutPrefix(field, "ttl="); ok {
			n, err := strconv.Atoi(value)
			if err != nil {
				n = -1
			}
			all = append(all, n)
		}
	}
	return all
}

// addrPort is a server's address as a probe dials it.
func addrPort(a netip.Addr, port string) string { return net.JoinHostPort(a.String(), port) }

// remote is the client's address as the server saw it.
func remote(t *testing.T, r lab.Reply) netip.Addr {
	t.Helper()
	a, err := netip.ParseAddrPort(r.View.Remote)
	require.NoError(t, err, "%+v", r)
	return a.Addr()
}

// open requires that every protocol reaches every address, and that the server at it sees the
// address that the packets left with: seen, or the one of the same family.
func open(t *testing.T, from *lab.NS, seen []netip.Addr, to ...netip.Addr) {
	t.Helper()
	for _, a := range to {
		for _, network := range []string{"tcp", "udp"} {
			r, err := from.Get("--network", network, addrPort(a, usualPort))
			require.NoError(t, err, "%s %s to %v: %+v", from.Name, network, a, r)
			if client := remote(t, r); len(seen) > 0 {
				assert.Contains(t, seen, client, "%s %s to %v: who the server saw", from.Name, network, a)
			}
		}
		assert.Len(t, ttls(from, a, 1), 1, "%s pings %v", from.Name, a)
	}
}

// closed requires that no protocol reaches any of the addresses, and that each packet is counted
// as that drop, once.
func (w *world) closed(t *testing.T, from *lab.NS, why drop, to ...netip.Addr) {
	t.Helper()
	delta := w.dropped(t, func() {
		var wait sync.WaitGroup
		for _, a := range to {
			for _, protocol := range protocols {
				wait.Go(func() {
					if err := unanswered(from, protocol, a); err != nil {
						t.Errorf("%s %s to %v: %v", from.Name, protocol, a, err)
					}
				})
			}
		}
		wait.Wait()
	})
	assert.Equal(t, map[drop]uint64{why: uint64(len(to) * len(protocols))}, delta, "drops of %s to %v", from.Name, to)
}

// unanswered sends one packet and fails when anything comes back.
func unanswered(from *lab.NS, protocol string, to netip.Addr) error {
	if protocol == "icmp" {
		if got := ttls(from, to, 1); len(got) > 0 {
			return fmt.Errorf("answered, ttl %v", got)
		}
		return nil
	}
	r, err := from.Get("--network", protocol, "--timeout", noAnswer.String(), addrPort(to, usualPort))
	if err == nil {
		return fmt.Errorf("answered: %+v", r)
	}
	if r.Errno != "ETIMEDOUT" && r.Errno != "EAGAIN" {
		return fmt.Errorf("refused, not ignored: %+v", r)
	}
	return nil
}

// both are a container's addresses on a network; a test fails that has asked for one that is not.
func (w *world) both(t *testing.T, container, network string) []netip.Addr {
	t.Helper()
	v4, v6 := w.Addrs(t, container, network)
	require.True(t, v4.IsValid() && v6.IsValid(), "%s on %s has %v, %v", container, network, v4, v6)
	return []netip.Addr{v4, v6}
}

// v4 is a container's IPv4 address on a network.
func (w *world) v4(t *testing.T, container, network string) netip.Addr {
	t.Helper()
	a, _ := w.Addrs(t, container, network)
	require.True(t, a.IsValid(), "%s on %s has no address", container, network)
	return a
}

// noSuchName is a name server in a namespace that knows no name at all. A container that asks it
// has its answer at once.
func noSuchName(t *testing.T, n *lab.NS, at netip.Addr) {
	t.Helper()
	var c net.PacketConn
	err := n.Do(func() (err error) {
		c, err = net.ListenPacket("udp", addrPort(at, "53"))
		return err
	})
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 512)
		for {
			size, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			if size < 4 {
				continue
			}
			buf[2] |= 0x80               // an answer, RFC 1035 4.1.1
			buf[3] = buf[3]&^0x0f | 0x03 // NXDOMAIN
			_, _ = c.WriteTo(buf[:size], from)
		}
	}()
	t.Cleanup(func() {
		c.Close()
		<-done
	})
}

// fetch gets a page as curl does and returns it without the last newline.
func fetch(t *testing.T, from *lab.NS, url string) string {
	t.Helper()
	return from.MustRun(t, "curl", "--silent", "--show-error", "--fail", "--max-time", "5", "--noproxy", "*", url)
}
