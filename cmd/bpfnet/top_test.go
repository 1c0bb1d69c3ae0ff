// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// screened is a model with the sample world's rates, on a screen of that size.
func screened(t *testing.T, width, height int) topModel {
	t.Helper()
	before, now := readings(t)
	m := newTop(before, nil, time.Second)
	m = sent(t, m, tea.WindowSizeMsg{Width: width, Height: height}, topReading{stats: now})
	return m
}

// sent is the model after messages.
func sent(t *testing.T, m topModel, messages ...tea.Msg) topModel {
	t.Helper()
	for _, msg := range messages {
		next, _ := m.Update(msg)
		m = next.(topModel)
	}
	return m
}

// press is a key by its name, or by what it types.
func press(key string) tea.KeyPressMsg {
	for code, name := range map[rune]string{
		tea.KeyTab: "tab", tea.KeyEnter: "enter", tea.KeyEscape: "esc", tea.KeyBackspace: "backspace", tea.KeyUp: "up", tea.KeyDown: "down",
		tea.KeyPgUp: "pgup", tea.KeyPgDown: "pgdown", tea.KeyHome: "home", tea.KeyEnd: "end",
	} {
		if name == key {
			return tea.KeyPressMsg{Code: code}
		}
	}
	r, _ := utf8.DecodeRuneInString(key)
	return tea.KeyPressMsg{Code: r, Text: key}
}

func typed(t *testing.T, m topModel, keys ...string) topModel {
	t.Helper()
	for _, k := range keys {
		m = sent(t, m, press(k))
	}
	return m
}

// lines are those of the screen without its styles. They fill it, and no more.
func lines(t *testing.T, m topModel) []string {
	t.Helper()
	all := strings.Split(ansi.Strip(m.View().Content), "\n")
	if m.width >= topWidth && m.height >= topHeight {
		require.Len(t, all, m.height)
	}
	for _, l := range all {
		require.LessOrEqual(t, utf8.RuneCountInString(l), m.width, "%q", l)
	}
	return all
}

// names are the first words of the rows.
func names(t *testing.T, m topModel) (out []string) {
	t.Helper()
	for _, l := range lines(t, m)[6 : m.height-1] {
		if f := strings.Fields(l); len(f) > 0 {
			out = append(out, f[0])
		}
	}
	return out
}

func TestTopView(t *testing.T) {
	defer func(before *time.Location) { time.Local = before }(time.Local)
	time.Local = time.UTC
	m := screened(t, 100, 14)
	golden(t, "testdata/top-containers.txt", strings.Join(lines(t, m), "\n"))
	golden(t, "testdata/top-ports.txt", strings.Join(lines(t, typed(t, m, "tab")), "\n"))
	golden(t, "testdata/top-networks.txt", strings.Join(lines(t, typed(t, m, "tab", "tab")), "\n"))
	require.True(t, m.View().AltScreen)
}

// Any size is drawn, down to none, and says so where it is too small.
func TestTopSizes(t *testing.T) {
	m := screened(t, 100, 14)
	for width := range 130 {
		for _, height := range []int{0, 1, 2, 9, 10, 11, 40} {
			m = sent(t, m, tea.WindowSizeMsg{Width: width, Height: height})
			text := strings.Join(lines(t, m), "\n")
			if width > 30 && width < topWidth || width >= topWidth && height < topHeight {
				require.Contains(t, text, fmt.Sprintf("terminal too small: %dx%d", width, height))
			}
		}
	}
}

func TestTopKeys(t *testing.T) {
	m := screened(t, 100, 14)
	require.Equal(t, []string{"web", "web", "db"}, names(t, m))
	require.Equal(t, []string{"backend", "bridge"}, names(t, typed(t, m, "3", "s", "s", "s", "s", "s", "s")), "by name")
	require.Equal(t, []string{"0.0.0.0:8080->172.17.0.2:80/tcp", "[::]:53->172.17.0.2:53/udp"}, names(t, typed(t, m, "2", "s", "s", "s", "s", "s")), "by connections")
	require.Equal(t, typed(t, m, "tab", "tab", "tab").view, m.view)

	f := typed(t, m, "/", "D", "b", "q")
	require.Empty(t, names(t, f))
	require.Contains(t, lines(t, f)[4], "/Dbq_   0 of 3")
	f = typed(t, f, "backspace")
	require.Equal(t, []string{"db"}, names(t, f))
	f = typed(t, f, "enter", "s")
	require.Equal(t, []string{"db"}, names(t, f), "it stays; keys are commands again")
	require.Len(t, names(t, typed(t, f, "esc")), 3)
	require.Len(t, names(t, typed(t, m, "/", "backspace", "backspace", "x", "esc")), 3)

	for _, quit := range []tea.KeyPressMsg{press("q"), {Code: 'c', Mod: tea.ModCtrl}} {
		_, cmd := m.Update(quit)
		require.NotNil(t, cmd)
		require.Equal(t, tea.QuitMsg{}, cmd())
	}
	_, cmd := typed(t, m, "/").Update(press("q"))
	require.Nil(t, cmd, "it is a part of the filter")
}

// A pause keeps what is shown, not what is remembered.
func TestTopPause(t *testing.T) {
	before, now := readings(t)
	m := sent(t, newTop(before, nil, time.Second), tea.WindowSizeMsg{Width: 100, Height: 14}, topReading{stats: now})
	shown := m.shown
	m = typed(t, m, "p")
	require.Contains(t, lines(t, m)[0], "PAUSED")
	later := *now
	later.Time = now.Time.Add(time.Second)
	m = sent(t, m, topReading{stats: &later})
	require.Equal(t, shown, m.shown)
	require.Len(t, m.history, 2)
	m = typed(t, m, "p")
	require.NotEqual(t, shown, m.shown)
	require.NotContains(t, lines(t, m)[0], "PAUSED")
}

// An error of a reading is told, and the next reading is waited for.
func TestTopError(t *testing.T) {
	m := screened(t, 100, 14)
	next, cmd := m.Update(topReading{err: errors.New("nothing is loaded\nat all")})
	require.NotNil(t, cmd)
	m = next.(topModel)
	require.Equal(t, "nothing is loaded; at all", lines(t, m)[13])
	require.Len(t, names(t, m), 3, "what was read last stays")
	_, now := readings(t)
	require.Contains(t, lines(t, sent(t, m, topReading{stats: now}))[13], "q quit")
}

// More rows than there is room for are scrolled through, and a larger screen shows more.
func TestTopScroll(t *testing.T) {
	before, now := readings(t)
	for i := range 50 {
		c := now.Containers[2]
		c.Name = fmt.Sprintf("c%02d", i)
		before.Containers = append(before.Containers, c)
		now.Containers = append(now.Containers, c)
	}
	m := sent(t, newTop(before, nil, time.Second), tea.WindowSizeMsg{Width: 100, Height: 17}, topReading{stats: now})
	m = typed(t, m, "/", "c", "enter", "s", "s", "s", "s", "s", "s")
	all := len(m.rows())
	require.GreaterOrEqual(t, all, 50)
	first := names(t, m)
	require.Len(t, first, 10)
	down := typed(t, m, "down", "down")
	require.Equal(t, first[2:], names(t, down)[:8])
	require.Equal(t, first, names(t, typed(t, down, "up", "up", "up")))
	require.Equal(t, all-10, typed(t, m, "end").offset)
	require.Equal(t, first, names(t, typed(t, m, "pgdown", "pgdown", "home")))
	require.Equal(t, 10, typed(t, m, "pgdown", "pgdown", "pgup").offset)
	bottom := sent(t, typed(t, m, "end"), tea.WindowSizeMsg{Width: 100, Height: 27})
	require.Len(t, names(t, bottom), 20)
	require.Len(t, names(t, sent(t, bottom, tea.WindowSizeMsg{Width: 100, Height: 200})), all)
}

func TestSparkline(t *testing.T) {
	for _, c := range []struct {
		values       []float64
		total, cells int
		want         string
	}{
		{nil, 4, 4, "    "},
		{[]float64{0, 0}, 4, 4, "    "},
		{[]float64{8, 4, 1, 0}, 4, 4, "█▄▁ "},
		{[]float64{8}, 4, 4, "   █"},
		{[]float64{1, 1e9}, 4, 4, "  ▁█"},
		{[]float64{1, 8, 0, 0}, 4, 2, "█ "},
		{[]float64{5}, 1, 60, "█"},
		{[]float64{5}, 60, 0, "█"},
	} {
		assert.Equal(t, c.want, sparkline(c.values, c.total, c.cells), "%v", c)
	}
	history := make([]float64, 60)
	for i := range history {
		history[i] = float64(i)
	}
	line := []rune(sparkline(history, 60, 25))
	require.Len(t, line, 25)
	require.Equal(t, '█', line[24])
	require.IsIncreasing(t, []int{strings.IndexRune(string(levels), line[1]), strings.IndexRune(string(levels), line[12]), strings.IndexRune(string(levels), line[24])})
}

func TestTopBadInput(t *testing.T) {
	assert.Contains(t, readable(t).fails(statusUsage, "top", "--interval", "1ms"), "--interval 1ms: want 100ms or more")
	assert.Contains(t, readable(t).fails(statusUsage, "top", "web"), `unexpected argument "web"`)
}

// The whole program on a terminal: keys do what the last line says, the size is followed, and the terminal is left as it was.
func TestTopOnTerminal(t *testing.T) {
	w := located(t)
	tty, screen := terminal(t, 100, 24)
	w.Stdout, w.Std[0] = tty, tty
	w.Environ = func() []string { return []string{"TERM=xterm-256color", "NO_COLOR=1"} }
	ended := make(chan int, 1)
	go func() { ended <- w.Run(t.Context(), append(w.flags(), "top", "--interval", "100ms")) }()
	all := ""
	buf := make([]byte, 1<<16)
	until := func(text string) {
		t.Helper()
		got := ""
		for !strings.Contains(got, text) {
			n, err := screen.Read(buf)
			require.NoError(t, err)
			got += string(buf[:n])
		}
		all += got
	}
	press := func(keys string) {
		t.Helper()
		_, err := screen.WriteString(keys)
		require.NoError(t, err)
	}
	until("CONTAINER")
	press("2")
	until("CONNECTIONS")
	press("/")
	until("enter keep")
	press("\x1b")
	until("q quit")
	press("p")
	until("PAUSED")
	require.NoError(t, unix.IoctlSetWinsize(int(screen.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 5, Col: 30}))
	require.NoError(t, unix.Kill(os.Getpid(), unix.SIGWINCH)) // it is no controlling terminal
	until("too small")
	press("q")
	until("\x1b[?1049l")
	require.Zero(t, <-ended, w.errs.String())
	require.Contains(t, all, "\x1b[?1049h", "a screen of its own")
	require.NotRegexp(t, `\x1b\[([0-9;]*;)?[34][0-7][;m]`, all, "no colours")
}
