// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
)

// talks are connections that are open while the policy changes.
type talks map[string]*lab.Talk

func (k talks) add(t *testing.T, name string, from *lab.NS, args ...string) {
	t.Helper()
	k[name] = from.Talk(t, append([]string{"--timeout", noAnswer.String()}, args...)...)
}

// flow wants an answer from every one, at once or, for TCP, when a segment that was lost is sent again.
func (k talks) flow(t *testing.T) {
	t.Helper()
	text := nextWords()
	for name, c := range k {
		lab.Eventually(t, 20*time.Second, name+" goes on", func() bool {
			r := c.Say(t, text)
			if r.Errno != "" && r.Errno != "EAGAIN" {
				t.Fatalf("%s: %+v", name, r)
			}
			return strings.Contains(r.Text, text)
		})
	}
}

var words int

// nextWords is what nobody has said before: an answer may come late.
func nextWords() string {
	words++
	return fmt.Sprintf("words %d.", words)
}

// stop wants silence from every one, and each packet counted under the reason.
func (k talks) stop(t *testing.T, m *maps.Maps, reason string) {
	t.Helper()
	before, text := readCounters(t, m), nextWords()
	for name, c := range k {
		r := c.Say(t, text)
		assert.NotContains(t, r.Text, text, name)
		assert.Contains(t, []string{"", "EAGAIN"}, r.Errno, "%s: %+v", name, r)
	}
	got := since(t, m, before).drops()
	assert.GreaterOrEqual(t, got[reason], uint64(len(k)), "%v", got)
	delete(got, reason)
	assert.Empty(t, got, "other reasons")
}

// reset wants every one told that it is over.
func (k talks) reset(t *testing.T) {
	t.Helper()
	for name, c := range k {
		var r lab.Reply
		lab.Eventually(t, 10*time.Second, name+" is reset", func() bool {
			r = c.Say(t, "hello")
			return r.Errno != "EAGAIN"
		})
		assert.True(t, isReset(r), "%s: %+v", name, r)
	}
}

// Needs root. What is allowed, forbidden, published and taken back applies to connections that are open.
func TestHygienePolicy(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "blue1", "blue")
	w.sandbox(t, "red1", "red")
	m := w.maps(t)
	a, b := w.b.NS(t, "blue1"), w.b.NS(t, "red1")
	a4, a6 := w.b.Addrs(t, "blue1", "blue")
	b4, _ := w.b.Addrs(t, "red1", "red")

	t.Run("networks", func(t *testing.T) {
		allow := func() { w.b.MustCLI(t, "network", "allow", "blue", "red") }
		allow()
		open := talks{}
		open.add(t, "tcp", b, at(a4, 80))
		open.add(t, "tcp v6", b, at(a6, 80))
		open.add(t, "tcp back", a, at(b4, 80))
		open.add(t, "udp", b, "--network", "udp", at(a4, 80))
		open.add(t, "udp v6", b, "--network", "udp", at(a6, 80))
		for range 2 {
			open.flow(t)
			w.b.MustCLI(t, "network", "disallow", "blue", "red")
			open.stop(t, m, "isolated/container")
			allow()
		}
		open.flow(t)
		w.b.MustCLI(t, "network", "disallow", "blue", "red")
	})

	t.Run("one of two networks", func(t *testing.T) {
		w.b.MustCLI(t, "publish", "blue1", "8088:80")
		stay, gone := talks{}, talks{}
		stay.add(t, "remote", w.Client, at(lab.Host4, 8088))
		stay.add(t, "host", w.Host, "127.0.0.1:8088")
		stay.add(t, "host by container address", w.Host, at(a6, 80))
		for range 3 {
			w.b.MustCLI(t, "network", "connect", "red", "blue1")
			second4, _ := w.b.Addrs(t, "blue1", "red")
			stay.add(t, "host unconnected", w.Host, "--network", "udp", "--unconnected", at(a4, 80))
			gone["host"] = w.Host.Talk(t, at(second4, 80))
			stay.flow(t)
			w.b.MustCLI(t, "network", "disconnect", "red", "blue1")
			gone.reset(t)
			stay.flow(t)
		}
		w.b.MustCLI(t, "unpublish", "blue1", "8088:80")
	})

	t.Run("ports", func(t *testing.T) {
		for i := range 2 { // the second time with the successor there before the next packet
			w.b.MustCLI(t, "publish", "blue1", "8088:80", "5300:80/udp", "8090:80")
			stay, gone, udp := talks{}, talks{}, talks{}
			stay.add(t, "another port", w.Client, at(lab.Host4, 8090))
			stay.add(t, "another port from the host", w.Host, "127.0.0.1:8090")
			stay.add(t, "the container's address", w.Host, at(a4, 80))
			gone.add(t, "remote", w.Client, at(lab.Host4, 8088))
			gone.add(t, "remote v6", w.Client, at(lab.Host6, 8088))
			gone.add(t, "neighbour", b, at(lab.Host4, 8088))
			gone.add(t, "host", w.Host, "127.0.0.1:8088")
			gone.add(t, "host v6", w.Host, "[::1]:8088")
			gone.add(t, "host by lo", w.Host, "--bind", "127.0.0.1:0", "127.0.0.1:8088")
			udp.add(t, "remote udp", w.Client, "--network", "udp", at(lab.Host4, 5300))
			udp.add(t, "neighbour udp", b, "--network", "udp", at(lab.Host4, 5300))
			udp.add(t, "host udp", w.Host, "--network", "udp", "--unconnected", "127.0.0.1:5300")
			stay.flow(t)
			gone.flow(t)
			udp.flow(t)
			w.b.MustCLI(t, "unpublish", "blue1", "8088:80", "5300:80/udp")
			if i == 1 {
				w.b.MustCLI(t, "publish", "red1", "8088:80", "5300:80/udp")
				for name, k := range udp {
					r := k.Say(t, "hello")
					assert.Equal(t, "red1", r.View.Host, "%s: the next packet reaches the successor: %+v", name, r)
				}
			}
			gone.reset(t)
			stay.flow(t)
			w.b.MustCLI(t, "unpublish", "blue1", "8090:80")
		}
	})
}

// Needs root and a Docker Engine. Settings that change over a restart of the daemon apply to connections
// that are open, and to both of their directions.
func TestHygieneSettings(t *testing.T) {
	w := newSite(t, lab.Opts{}, lab.DockerOpts{})
	w.serve(t, "web", "bridge", "-p", "8088:80")
	w.idle(t, "peer", "bridge")
	w.Client2.Serve(t, "--udp", "7000")
	web4, _ := w.d.Addrs(t, "web", "bridge")
	peer4, _ := w.d.Addrs(t, "peer", "bridge")
	peer := w.d.NS(t, "peer")
	restart := func(args ...string) *maps.Maps {
		w.b.Stop(t)
		w.b = w.StartBpfnet(t, w.d, args...)
		w.ready(t, "web")
		w.ready(t, "peer")
		return w.maps(t)
	}

	between, out, direct := talks{}, talks{}, talks{}
	between.add(t, "tcp", peer, at(web4, 80))
	between.add(t, "udp", peer, "--network", "udp", at(web4, 80))
	out.add(t, "udp", peer, "--network", "udp", at(lab.Client24, 7000))
	between.flow(t)
	out.flow(t)

	between.stop(t, restart("--default-bridge-no-icc"), "icc_disabled/container")
	out.flow(t)

	restart("--allow-direct-routing")
	between.flow(t)
	out.flow(t)
	direct.add(t, "tcp", w.Client, at(web4, 80))
	direct.flow(t)

	m := restart("--default-bridge-no-masquerade")
	between.flow(t)
	direct.stop(t, m, "direct_access/uplink")
	untranslated := w.Client2.Capture(t, lab.ClientIf, isFrom(peer4))
	out["udp"].Send(t, "hello")
	require.NotEmpty(t, untranslated.Wait(t, 1, 5*time.Second), "by its own address from now on")

	restart("--allow-direct-routing")
	out.flow(t)
	direct.flow(t)
	between.flow(t)
}
