// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/maps"
)

// located is a readable world for what no command line leads to.
func located(t *testing.T) *world {
	t.Helper()
	w := readable(t)
	w.paths.State, w.paths.BPFFS = w.state(), w.bpffs()
	return w
}

// readings are two of the sample world, four seconds apart: all has doubled, but for one container that began anew.
func readings(t *testing.T) (before, now *Stats) {
	t.Helper()
	w := located(t)
	before, err := w.readStats("")
	require.NoError(t, err)
	now, err = w.readStats("")
	require.NoError(t, err)
	now.Time = now.Time.Add(4 * time.Second)
	now.Forwarded, now.Drops = slices.Clone(now.Forwarded), slices.Clone(now.Drops)
	for i := range now.Forwarded {
		now.Forwarded[i].Packets *= 2
		now.Forwarded[i].Bytes *= 2
	}
	now.Drops[0].Packets += 12
	now.Totals.Dropped.Packets += 12
	for i := range now.Containers {
		addCount(&now.Containers[i].EndpointCount, before.Containers[i].EndpointCount)
	}
	now.Containers[0].RxPackets = 4 // 7 before
	for i := range now.Networks {
		addCount(&now.Networks[i].EndpointCount, before.Networks[i].EndpointCount)
	}
	now.Ports[0].Connections += 8
	now.Ports[1].RxBytes += 4000
	before.Ports = before.Ports[:1] // the other is new
	return before, now
}

func TestRates(t *testing.T) {
	before, now := readings(t)
	r := ratesOf(before, now)
	require.InDelta(t, 4, r.Seconds, 1e-9)
	paths := map[string]Rate{}
	for _, p := range r.Paths {
		paths[p.Path] = p.Rate
	}
	require.Equal(t, map[string]Rate{
		"container": {225, 375_000}, "uplink": {12.5, 10_000}, "lo": {}, "stack": {7.5, 750}, "bridge": {5, 300}, "dropped": {3, 0},
	}, paths)
	require.Equal(t, []DropRate{{now.Drops[0].Reason, now.Drops[0].Hook, Rate{3, 0}}}, r.Drops, "what does not rise is left out")
	require.Equal(t, [3]string{"web", "web", "db"}, [3]string{r.Containers[0].Name, r.Containers[1].Name, r.Containers[2].Name}, "the busiest first")
	require.Equal(t, Rate{1, 2625}, r.Containers[2].Rx, "who counts less than before has begun anew")
	require.Equal(t, "bridge", r.Containers[0].Network)
	require.InDelta(t, 9*1e6/4, r.Containers[0].Tx.Bytes, 1e-6)
	sum := 0.0
	for _, c := range r.Containers {
		sum += c.Tx.Bytes
	}
	for _, n := range r.Networks {
		sum -= n.Tx.Bytes
	}
	require.Zero(t, sum, "networks are the sums of their containers")
	byPort := map[string]TrafficRate{}
	for _, p := range r.Ports {
		byPort[p.Name] = p
	}
	require.InDelta(t, 2, byPort["0.0.0.0:8080->172.17.0.2:80/tcp"].Connections, 1e-9)
	require.InDelta(t, 4800.0/4, byPort["[::]:53->172.17.0.2:53/udp"].Rx.Bytes, 1e-9, "a new port has counted from zero")
	fast, all := r.fast()
	require.Equal(t, [2]float64{237.5, 250}, [2]float64{fast, all})
	forwarded, dropped := r.forwarded()
	require.Equal(t, [2]Rate{{250, 386_050}, {3, 0}}, [2]Rate{forwarded, dropped})

	same := ratesOf(now, now)
	for _, p := range same.Paths {
		require.Zero(t, p.Rate, "%s in no time", p.Path)
	}
}

func TestRatesOutput(t *testing.T) {
	defer func(before *time.Location) { time.Local = before }(time.Local)
	time.Local = time.UTC
	r := ratesOf(readings(t))
	var out strings.Builder
	require.NoError(t, printRates(&out, &r))
	golden(t, "testdata/rates.txt", out.String())
	w := newWorld(t)
	require.NoError(t, w.writeRates(&r, true, false))
	require.NoError(t, w.writeRates(&r, false, false))
	require.Equal(t, out.String()+"\n"+out.String(), w.out.String(), "blocks, where it is no terminal")
	w.out.Reset()
	require.NoError(t, w.writeRates(&r, true, true))
	require.NoError(t, w.writeRates(&r, false, true))
	lines := strings.Split(strings.TrimSpace(w.out.String()), "\n")
	require.Len(t, lines, 2)
	for _, line := range lines {
		var back Rates
		require.NoError(t, json.Unmarshal([]byte(line), &back))
		require.Equal(t, r.Containers, back.Containers)
	}
}

// A screen is written over, no line is longer than it is wide, and what finds no room is told.
func TestRedraw(t *testing.T) {
	text := "one\nlonger than ten\nthree\nfour\nfive\n"
	draw := func(columns, lines int, first bool) string {
		var out strings.Builder
		require.NoError(t, redraw(&out, text, columns, lines, first))
		return out.String()
	}
	require.Equal(t, "\x1b[2J\x1b[Hone\x1b[K\nlonger tha\x1b[K\nthree\x1b[K\nfour\x1b[K\nfive\x1b[K\n\x1b[J", draw(10, 6, true))
	require.Equal(t, "\x1b[Hone\x1b[K\nlonger than ten\x1b[K\nand 3 more lines; a taller terminal shows them\x1b[K\n\x1b[J", draw(80, 4, false))
	text = "größer\n"
	require.Equal(t, "\x1b[Hgrö\x1b[K\n\x1b[J", draw(3, 6, false), "no name is cut within a letter")
	require.Equal(t, "\x1b[Hgrößer\x1b[K\n\x1b[J", draw(6, 6, false))
	require.NotPanics(t, func() { draw(0, 0, false); draw(1, 1, false); draw(1, 2, true) })
}

func TestNumber(t *testing.T) {
	for x, want := range map[float64]string{
		0: "0", 0.04: "0.0", 0.5: "0.5", 7: "7", 12.34: "12.3", 250: "250", 999.4: "999", 999.6: "1.0k", 1000: "1k", 12_345: "12.3k", 1.5e6: "1.5M", 2e13: "20T", 5e16: "50000T",
	} {
		assert.Equal(t, want, number(x), x)
	}
}

func TestWatchBadInput(t *testing.T) {
	for _, c := range []struct {
		status int
		args   []string
		want   string
	}{
		{statusUsage, []string{"stats", "--interval", "5s"}, "--interval: add --watch, which reads more than once"},
		{statusUsage, []string{"stats", "--watch", "--interval", "10ms"}, "--interval 10ms: want 100ms or more"},
		{statusUsage, []string{"stats", "--watch", "--interval", "-1s"}, "--interval -1s: want 100ms or more"},
		{statusUsage, []string{"stats", "--watch", "--interval", "2"}, "invalid argument"},
		{statusError, []string{"stats", "--watch", "wbe"}, `"wbe": no such network or container`},
	} {
		assert.Contains(t, readable(t).fails(c.status, c.args...), c.want)
	}
}

// A container that is restarted is missed for a while, which is told once; then rates go on from the last reading.
func TestWatchGoesOn(t *testing.T) {
	w := located(t)
	ctx, cancel := context.WithCancel(t.Context())
	without := sampleSnapshot()
	without.Endpoints = without.Endpoints[:1]
	readings := 0
	w.OpenCounters = func(string) (counters, error) {
		readings++
		w.Now = func() time.Time { return now.Add(time.Duration(readings) * time.Second) }
		switch readings {
		case 1, 2: // for the next
			w.write(without)
		case 4:
			return nil, assert.AnError
		case 5:
			w.write(sampleSnapshot())
		case 8:
			cancel()
		}
		return w.counters, nil
	}
	require.NoError(t, w.watchStats(ctx, "web", time.Millisecond, true))
	require.Equal(t, "bpfnet: \"web\": no such network or container; the nearest names are db, backend, bridge; trying again\n"+
		"bpfnet: "+assert.AnError.Error()+"; trying again\n"+
		"bpfnet: \"web\": no such network or container; the nearest names are db, backend, bridge; trying again\n", w.errs.String())
	var seconds []float64
	for line := range strings.Lines(w.out.String()) {
		var r Rates
		require.NoError(t, json.Unmarshal([]byte(line), &r))
		require.Len(t, r.Containers, 2)
		seconds = append(seconds, r.Seconds)
	}
	require.GreaterOrEqual(t, len(seconds), 3)
	require.Equal(t, []float64{5, 1, 1}, seconds[:3])
}

// It ends when it is told to, and with an error of the first reading.
func TestWatchEnds(t *testing.T) {
	w := located(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.NoError(t, w.watchStats(ctx, "", time.Hour, false))
	w.counters.drops = []maps.Drop{}
	w.counters.err = assert.AnError
	require.ErrorIs(t, w.watchStats(t.Context(), "", time.Millisecond, false), assert.AnError)
}

// terminal is both ends of a pseudo terminal: what the program writes to, and what has been written.
func terminal(t *testing.T, columns, lines uint16) (tty, screen *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { screen.Close() })
	require.NoError(t, unix.IoctlSetPointerInt(int(screen.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(screen.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { tty.Close() })
	require.NoError(t, unix.IoctlSetWinsize(int(screen.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: lines, Col: columns}))
	return tty, screen
}

// A terminal is written over, in its own size and without colours; one that cannot move its cursor gets blocks.
func TestWatchOnTerminal(t *testing.T) {
	r := ratesOf(readings(t))
	for _, dumb := range []bool{false, true} {
		w := located(t)
		tty, screen := terminal(t, 50, 8)
		w.Stdout = tty
		if dumb {
			w.Environ = func() []string { return []string{"TERM=dumb"} }
		}
		require.NoError(t, w.writeRates(&r, true, false))
		require.NoError(t, w.writeRates(&r, false, false))
		buf := make([]byte, 1<<16)
		got := ""
		for want := map[bool]string{false: "\x1b[J\x1b[H", true: "per second, over 4.0 s\r\n\r\nPATH"}[dumb]; !strings.Contains(got, want); {
			n, err := screen.Read(buf)
			require.NoError(t, err)
			got += string(buf[:n])
		}
		if dumb {
			require.NotContains(t, got, "\x1b")
			continue
		}
		first, _, _ := strings.Cut(got, "\x1b[J\x1b[H")
		lines := strings.Split(first, "\r\n")
		require.Len(t, lines, 8, "what finds room, and the cursor's line")
		require.Contains(t, lines[6], "more lines; a taller terminal shows them")
		for _, l := range lines {
			l = strings.NewReplacer("\x1b[2J", "", "\x1b[H", "", "\x1b[K", "").Replace(l)
			require.NotContains(t, l, "\x1b")
			require.LessOrEqual(t, len(l), 50)
		}
	}
}
