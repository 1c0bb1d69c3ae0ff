// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
)

// Tests of moby's own suite, under moby's names, in this lab: docs/moby-tests.md lists them. Where moby
// asks whether an answer comes, these also ask whom the server saw, and how what did not get through
// was counted.

// A probe is one exchange that is tried: TCP or UDP to an address and port, or a ping of an address.
type probe struct {
	from    *lab.NS
	network string // tcp, udp, icmp
	to      string
	// host is the server's host name and seen the client's address that it sees, for a probe that is
	// to be answered. Empty: not looked at.
	host string
	seen netip.Addr
	// why is the counter that grows by one for a probe that is not: "reason/hook". Empty: no counter
	// does.
	why string
	// refused says that the host itself answers: with a reset, or an ICMP error.
	refused bool
}

func (p probe) String() string { return fmt.Sprintf("%s %s to %s", p.from.Name, p.network, p.to) }

// answered tries all at once and wants each answered, and nothing dropped.
func answered(t *testing.T, m *maps.Maps, probes ...probe) {
	t.Helper()
	require.NotEmpty(t, probes)
	before := readCounters(t, m)
	var wait sync.WaitGroup
	for _, p := range probes {
		wait.Go(func() {
			if p.network == "icmp" {
				// Patient: an answer is to come, on a busy machine too.
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				defer cancel()
				out, _ := p.from.Run(ctx, "ping", "-n", "-c", "1", "-W", "5", p.to)
				if len(ttlsIn(out)) != 1 {
					t.Errorf("%v: no answer: %s", p, out)
				}
				return
			}
			r, err := p.from.Get("--network", p.network, p.to)
			if err != nil {
				t.Errorf("%v: %v: %+v", p, err, r)
				return
			}
			if p.host != "" {
				assert.Equal(t, p.host, r.View.Host, "%v: who answered", p)
			}
			if p.seen.IsValid() {
				seen, err := netip.ParseAddrPort(r.View.Remote)
				assert.NoError(t, err)
				assert.Equal(t, p.seen, seen.Addr(), "%v: who the server saw", p)
			}
		})
	}
	wait.Wait()
	assert.Empty(t, since(t, m, before).drops(), "dropped")
}

// unanswerable tries all at once and wants none answered, and each counted as it says, once.
func unanswerable(t *testing.T, m *maps.Maps, probes ...probe) {
	t.Helper()
	require.NotEmpty(t, probes)
	before := readCounters(t, m)
	want, tcp := counters{}, map[string]bool{}
	var wait sync.WaitGroup
	for _, p := range probes {
		if p.why != "" {
			want[p.why]++
			tcp[p.why] = tcp[p.why] || p.network == "tcp"
		}
		wait.Go(func() {
			if p.network == "icmp" {
				if got := ttls(p.from, netip.MustParseAddr(p.to), 1); len(got) > 0 {
					t.Errorf("%v: answered, ttl %v", p, got)
				}
				return
			}
			r, err := p.from.Get("--network", p.network, "--timeout", noAnswer.String(), p.to)
			switch {
			case err == nil:
				t.Errorf("%v: answered: %+v", p, r)
			case p.refused && r.Errno != "ECONNREFUSED" && r.Errno != "EHOSTUNREACH" && r.Errno != "ENETUNREACH":
				t.Errorf("%v: not refused: %+v", p, r)
			case !p.refused && r.Errno != "ETIMEDOUT" && r.Errno != "EAGAIN":
				t.Errorf("%v: refused, not ignored: %+v", p, r)
			}
		})
	}
	wait.Wait()
	got := since(t, m, before).drops()
	for why, n := range got {
		if n > want[why] && want[why] > 0 && tcp[why] { // a busy machine lets a SYN be sent again
			got[why] = want[why]
		}
	}
	assert.Equal(t, want, got, "how it was counted")
}

// each makes probes by TCP and UDP from one template to several addresses, on one port; those of
// IPv6 with seen6 for the client's address.
func each(p probe, port int, seen4, seen6 netip.Addr, to ...netip.Addr) []probe {
	var out []probe
	for _, a := range to {
		for _, network := range []string{"tcp", "udp"} {
			p.network, p.to, p.seen = network, at(a, port), seen4
			if a.Is6() {
				p.seen = seen6
			}
			out = append(out, p)
		}
	}
	return out
}

// pings adds a ping of each address to what each made.
func pings(p probe, to ...netip.Addr) []probe {
	var out []probe
	for _, a := range to {
		p.network, p.to = "icmp", a.String()
		out = append(out, p)
	}
	return out
}

// waitCounted is how long a drop may take to be seen in its counter.
const waitCounted = 5 * time.Second

// snapshot is the daemon's last snapshot.
func (w *site) snapshot(t *testing.T) *api.Snapshot {
	t.Helper()
	s, err := api.ReadSnapshot(w.b.State)
	require.NoError(t, err)
	return s
}

// pair are a container's addresses on a network; the second is not valid where it has none.
func (w *site) pair(t *testing.T, container, network string) []netip.Addr {
	t.Helper()
	v4, v6 := w.d.Addrs(t, container, network)
	require.True(t, v4.IsValid())
	if !v6.IsValid() {
		return []netip.Addr{v4}
	}
	return []netip.Addr{v4, v6}
}

// linkLocal is the fe80:: address of an interface, once nobody else has claimed it.
func linkLocal(t *testing.T, n *lab.NS, ifname string) (a netip.Addr) {
	t.Helper()
	lab.Eventually(t, 10*time.Second, "a link-local address on "+ifname, func() bool {
		out := n.MustRun(t, "ip", "-6", "-o", "addr", "show", "dev", ifname, "scope", "link", "-tentative")
		for field := range strings.FieldsSeq(out) {
			if p, err := netip.ParsePrefix(field); err == nil {
				a = p.Addr()
				return true
			}
		}
		return false
	})
	return a
}

// settled waits until the daemon knows a container's addresses on a network, or that it left.
func (w *site) settled(t *testing.T, container, network string, there bool) {
	t.Helper()
	lab.Eventually(t, 10*time.Second, fmt.Sprintf("%s on %s: %v", container, network, there), func() bool {
		for _, e := range w.snapshot(t).Endpoints {
			if e.Name == container && e.Network == network {
				return there && e.Ready
			}
		}
		return !there
	})
}

// hooked is a site whose engine runs bpfnet in docker-proxy's place.
func newHookedSite(t *testing.T, opts lab.Opts, daemon ...string) *site {
	t.Helper()
	l := lab.New(t, opts)
	hook := filepath.Join(l.Dir, "docker-proxy")
	t.Setenv("BPFNET_SOCKET", filepath.Join(l.Dir, "bpfnet.sock"))
	w := &site{Lab: l, d: l.StartDocker(t, lab.DockerOpts{ProxyPath: hook})}
	w.networks(t)
	w.b = l.StartBpfnet(t, w.d, daemon...)
	require.NoError(t, os.Symlink(w.b.Binary(), hook))
	return w
}

// remove removes containers and networks, so that the next test has their names and ports.
func (w *site) remove(t *testing.T, containers, networks string) {
	t.Helper()
	if list := strings.Fields(containers); len(list) > 0 {
		w.d.MustRun(t, append([]string{"rm", "--force"}, list...)...)
	}
	if list := strings.Fields(networks); len(list) > 0 {
		w.d.MustRun(t, append([]string{"network", "rm"}, list...)...)
	}
}
