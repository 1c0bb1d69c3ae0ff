// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// dropLine is what the test reads of a line of "bpfnet drops -f -o json".
type dropLine struct {
	Time      time.Time
	Reason    string
	Direction string
	Network   string
	From, To  struct {
		Addr      string
		Port      int
		Container string
	}
	Proto, Detail string
	Suppressed    map[string]uint64
}

func dropLines(t *testing.T, p *lab.Process) (out []dropLine) {
	t.Helper()
	text := p.Stdout()
	for line := range strings.Lines(text[:strings.LastIndexByte(text, '\n')+1]) {
		var d dropLine
		require.NoError(t, json.Unmarshal([]byte(line), &d), line)
		out = append(out, d)
	}
	return out
}

// Needs root. Whoever asks sees each drop with names, by filters, from real packets; a flood is summed up; nothing is
// written once nobody asks, however the asking ended, and no daemon is needed.
func TestDropsFollow(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue")
	w.sandbox(t, "db", "red")
	from, _ := w.b.Addrs(t, "web", "blue")
	to, _ := w.b.Addrs(t, "db", "red")
	web := w.b.NS(t, "web")
	w.b.Stop(t)

	all := w.b.StartCLI(t, "drops", "-f", "-o", "json")
	other := w.b.StartCLI(t, "drops", "-f", "--reason", "internal")
	port := w.b.StartCLI(t, "drops", "-f", "--port", "81", "--container", "web", "--network", "red")
	m := w.maps(t)
	listeners := func() (n int) {
		var until [4]uint64
		require.NoError(t, m.Map("listeners").Lookup(uint32(0), &until))
		for _, u := range until {
			if u != 0 {
				n++
			}
		}
		return n
	}
	lab.Eventually(t, 10*time.Second, "three listen", func() bool { return listeners() == 3 })
	begin := time.Now()
	for _, p := range []int{80, 81} {
		_, err := web.Get("--network", "tcp", "--timeout", noAnswer.String(), fmt.Sprintf("%v:%d", to, p))
		require.Error(t, err)
	}
	port.WaitOutput(t, "isolated")
	lab.Eventually(t, 10*time.Second, "both are told", func() bool { return len(dropLines(t, all)) >= 2 })
	for i, d := range dropLines(t, all)[:2] {
		assert.WithinDuration(t, begin, d.Time, 5*time.Second)
		assert.Equal(t, "isolated", d.Reason)
		assert.Equal(t, "from container", d.Direction)
		assert.Equal(t, "blue", d.Network)
		assert.Equal(t, [2]string{from.String(), to.String()}, [2]string{d.From.Addr, d.To.Addr})
		assert.Equal(t, [2]string{"web", "db"}, [2]string{d.From.Container, d.To.Container})
		assert.Equal(t, 80+i, d.To.Port)
		assert.Equal(t, [2]string{"tcp", "S"}, [2]string{d.Proto, d.Detail})
	}
	assert.Len(t, strings.Split(strings.TrimSpace(port.Stdout()), "\n"), 1, "one port: %s", port.Stdout())
	assert.Contains(t, port.Stdout(), fmt.Sprintf("(web) > %v:81 (db)  tcp S ", to))
	assert.Empty(t, other.Stdout())

	before := len(dropLines(t, all))
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, _ = web.Run(ctx, "ping", "-c", "2000", "-l", "2000", "-W", "1", to.String()) // none is answered
	lab.Eventually(t, 10*time.Second, "the flood is told in part, and the rest counted", func() bool {
		var toldOf int
		var rest uint64
		for _, d := range dropLines(t, all)[before:] {
			if d.Reason == "isolated" {
				toldOf++
			}
			rest += d.Suppressed["isolated"]
		}
		return rest > 500 && uint64(toldOf)+rest == 2000
	})

	require.NoError(t, all.Signal(os.Interrupt))
	require.NoError(t, all.Wait(10*time.Second), "an interrupt is no error")
	port.Kill()
	assert.Equal(t, 2, listeners(), "one has said goodbye, the other was killed")
	again := w.b.StartCLI(t, "drops", "-f")
	lab.Eventually(t, 10*time.Second, "a new one listens", func() bool { return listeners() == 3 })
	_, err := web.Get("--network", "udp", "--timeout", noAnswer.String(), fmt.Sprintf("%v:80", to))
	require.Error(t, err)
	again.WaitOutput(t, "isolated")

	_, err = w.b.CLI("drops", "-f", "--container", "wbe")
	assert.ErrorContains(t, err, `container "wbe": no such container; the nearest names are `)
	_, err = w.b.CLI("drops", "-f", "--network", "bleu")
	assert.ErrorContains(t, err, `network "bleu": no such network; the nearest names are `)
	assert.Contains(t, w.b.MustCLI(t, "drops", "--reason", "isolated"), "isolated")
}

// Needs root. Who follows drops is told when cleanup has taken the data path away, also where a new one stands in its place.
func TestDropsFollowCleanup(t *testing.T) {
	w := newOwnSite(t)
	w.b.MustCLI(t, "network", "rm", "blue", "red")
	early, late := w.b.StartCLI(t, "drops", "-f"), w.b.StartCLI(t, "drops", "-f")
	m := w.maps(t)
	lab.Eventually(t, 10*time.Second, "both listen", func() bool {
		var until [4]uint64
		require.NoError(t, m.Map("listeners").Lookup(uint32(0), &until))
		return until[0] != 0 && until[1] != 0
	})
	require.NoError(t, late.Signal(syscall.SIGSTOP))
	w.b.Stop(t)
	w.b.MustCLI(t, "cleanup")
	const line = "bpfnet: drops: the data path has been taken away (bpfnet cleanup): nothing is dropped by it any more; ask again once a daemon runs\n"
	require.Error(t, early.Wait(10*time.Second))
	assert.Equal(t, line, early.Stderr())
	w.b.Start(t)
	require.NoError(t, late.Signal(syscall.SIGCONT))
	require.Error(t, late.Wait(10*time.Second))
	assert.Equal(t, line, late.Stderr())
}
