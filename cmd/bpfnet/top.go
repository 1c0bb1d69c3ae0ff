// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func (a *App) topCommand() *cobra.Command {
	var interval time.Duration
	cmd := &cobra.Command{
		Use:   "top",
		Short: "Watch containers, ports and networks by their traffic",
		Long: `Watch the traffic of containers, published ports and networks, the busiest first,
on the whole screen. Keys choose what is shown, sort, filter and pause; the last
line names them. RX is into a container, TX out of it; all rates are per second.
Without a terminal it is "bpfnet stats --watch". Works with the daemon down.`,
		Args: exactArgs(),
	}
	cmd.Flags().DurationVar(&interval, "interval", time.Second, "the `time` between two readings")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkInterval(interval); err != nil {
			return err
		}
		if !a.onTerminal() {
			return a.watchStats(cmd.Context(), "", interval, false)
		}
		first, err := a.readStats("")
		if err != nil {
			return err
		}
		return a.runTop(cmd.Context(), newTop(first, func() (*Stats, error) { return a.readStats("") }, interval))
	}
	return cmd
}

// onTerminal says whether keys can be read and a screen be written.
func (a *App) onTerminal() bool {
	_, _, ok := a.screen()
	if !ok || a.Std[0] == nil {
		return false
	}
	_, err := unix.IoctlGetTermios(int(a.Std[0].Fd()), unix.TCGETS)
	return err == nil
}

func (a *App) runTop(ctx context.Context, m topModel) error {
	// Signals end the context: one handler is enough.
	p := tea.NewProgram(m, tea.WithContext(ctx), tea.WithInput(a.Std[0]), tea.WithOutput(a.Stdout), tea.WithEnvironment(a.Environ()),
		tea.WithoutSignalHandler())
	if _, err := p.Run(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("show the screen: %w", err)
	}
	return nil
}

// What top can list.
const (
	topContainers = iota
	topPorts
	topNetworks
	topViews
)

var topTitles = [topViews]string{"Containers", "Ports", "Networks"}

// topOrders are the columns that rows can be sorted by, in the order in which a key goes through them.
var topOrders = []struct {
	name string
	less func(a, b *TrafficRate) int
}{
	{"bytes", func(a, b *TrafficRate) int { return cmp.Compare(b.bytes(), a.bytes()) }},
	{"packets", func(a, b *TrafficRate) int { return cmp.Compare(b.packets(), a.packets()) }},
	{"rx", func(a, b *TrafficRate) int { return cmp.Compare(b.Rx.Bytes, a.Rx.Bytes) }},
	{"tx", func(a, b *TrafficRate) int { return cmp.Compare(b.Tx.Bytes, a.Tx.Bytes) }},
	{"dropped", func(a, b *TrafficRate) int {
		return cmp.Compare(b.Dropped.Packets+b.NotReady, a.Dropped.Packets+a.NotReady)
	}},
	{"connections", func(a, b *TrafficRate) int { return cmp.Compare(b.Connections, a.Connections) }},
	{"name", func(*TrafficRate, *TrafficRate) int { return 0 }},
}

// topModel is the state of the screen. It reads counters by read alone.
type topModel struct {
	read     func() (*Stats, error)
	interval time.Duration

	width, height int
	view, order   int
	offset        int // rows above the screen
	filter        string
	typing        bool // keys go to the filter
	paused        bool

	last    *Stats
	rates   Rates     // of the last two readings
	shown   Rates     // the same, but for a pause
	history []float64 // bytes forwarded a second, the newest last
	err     error     // of the last reading
}

func newTop(first *Stats, read func() (*Stats, error), interval time.Duration) topModel {
	return topModel{read: read, interval: interval, last: first}
}

// topReading is what a reading of the counters came to.
type topReading struct {
	stats *Stats
	err   error
}

func (m topModel) wait() tea.Cmd {
	return tea.Tick(m.interval, func(time.Time) tea.Msg {
		s, err := m.read()
		return topReading{s, err}
	})
}

// Init waits for the second reading.
func (m topModel) Init() tea.Cmd { return m.wait() }

// Update takes up a reading, a key, or the screen's new size.
func (m topModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
		return m.settled(), nil
	case topReading:
		m.err = msg.err
		if msg.err == nil {
			m.rates = ratesOf(m.last, msg.stats)
			m.last = msg.stats
			all, _ := m.rates.forwarded()
			m.history = append(m.history, all.Bytes)
			m.history = m.history[max(0, len(m.history)-m.minute()):]
			if !m.paused {
				m.shown = m.rates
			}
		}
		return m.settled(), m.wait()
	case tea.KeyPressMsg:
		return m.key(msg)
	}
	return m, nil
}

// minute is how many readings there are in one.
func (m topModel) minute() int { return max(1, int(time.Minute/m.interval)) }

func (m topModel) key(msg tea.KeyPressMsg) (tea.Model, tea.Cmd) {
	key := msg.String()
	if key == "ctrl+c" {
		return m, tea.Quit
	}
	if m.typing {
		switch key {
		case "enter":
			m.typing = false
		case "esc":
			m.typing, m.filter = false, ""
		case "backspace":
			_, size := utf8.DecodeLastRuneInString(m.filter)
			m.filter = m.filter[:len(m.filter)-size]
		default:
			m.filter += msg.Text
		}
		return m.settled(), nil
	}
	page := max(1, m.room())
	switch key {
	case "q":
		return m, tea.Quit
	case "tab", "right":
		m.view, m.offset = (m.view+1)%topViews, 0
	case "shift+tab", "left":
		m.view, m.offset = (m.view+topViews-1)%topViews, 0
	case "1", "2", "3":
		m.view, m.offset = int(key[0]-'1'), 0
	case "s":
		m.order = (m.order + 1) % len(topOrders)
	case "/":
		m.typing = true
	case "esc":
		m.filter = ""
	case "p", "space":
		m.paused = !m.paused
		m.shown = m.rates
	case "up", "k":
		m.offset--
	case "down", "j":
		m.offset++
	case "pgup":
		m.offset -= page
	case "pgdown":
		m.offset += page
	case "home":
		m.offset = 0
	case "end":
		m.offset = len(m.rows())
	}
	return m.settled(), nil
}

// settled keeps the rows on the screen.
func (m topModel) settled() topModel {
	m.offset = max(0, min(m.offset, len(m.rows())-m.room()))
	return m
}

// The least of a screen, and the lines that are not rows.
const (
	topWidth, topHeight = 40, 10
	topFrame            = 7
)

// room is how many rows there is room for.
func (m topModel) room() int { return max(0, m.height-topFrame) }

func (m topModel) list() []TrafficRate {
	return [topViews][]TrafficRate{m.shown.Containers, m.shown.Ports, m.shown.Networks}[m.view]
}

// rows are those that pass the filter, sorted.
func (m topModel) rows() []TrafficRate {
	var out []TrafficRate
	word := strings.ToLower(m.filter)
	for _, t := range m.list() {
		if strings.Contains(strings.ToLower(t.Name+" "+t.Container+" "+t.Network), word) {
			out = append(out, t)
		}
	}
	slices.SortStableFunc(out, func(a, b TrafficRate) int {
		return cmp.Or(topOrders[m.order].less(&a, &b), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Network, b.Network))
	})
	return out
}

var (
	topBold  = lipgloss.NewStyle().Bold(true)
	topHere  = lipgloss.NewStyle().Reverse(true)
	topFaint = lipgloss.NewStyle().Faint(true)
	topRed   = lipgloss.NewStyle().Foreground(lipgloss.Color("1"))
)

// View draws the screen.
func (m topModel) View() tea.View {
	v := tea.NewView(m.content())
	v.AltScreen = true
	v.WindowTitle = "bpfnet top"
	return v
}

func (m topModel) content() string {
	if m.width == 0 { // not known yet
		return ""
	}
	if m.width < topWidth || m.height < topHeight {
		return fmt.Sprintf("%s\n%s", cut(fmt.Sprintf("terminal too small: %dx%d", m.width, m.height), m.width),
			cut(fmt.Sprintf("want %dx%d; q quits", topWidth, topHeight), m.width))
	}
	rows := m.rows()
	lines := []string{m.titleLine(), m.totalLine(), m.historyLine(), "", m.tabLine(len(rows))}
	header, cells := m.cells(rows[m.offset:min(len(rows), m.offset+m.room())])
	table := alignRows(append([][]string{header}, cells...), m.width)
	lines = append(lines, topBold.Render(table[0]))
	lines = append(lines, table[1:]...)
	for len(lines) < m.height-1 {
		lines = append(lines, "")
	}
	return strings.Join(append(lines, m.lastLine()), "\n")
}

func (m topModel) titleLine() string {
	state := "every " + m.interval.String()
	switch {
	case m.paused:
		state = "PAUSED"
	case m.shown.Time.IsZero():
		state = "reading"
	}
	text := "bpfnet top   " + state
	if !m.shown.Time.IsZero() {
		text += "   " + m.shown.Time.Local().Format(time.TimeOnly)
	}
	return topBold.Render(cut(text, m.width))
}

func (m topModel) totalLine() string {
	all, dropped := m.shown.forwarded()
	fast, packets := m.shown.fast()
	text := fmt.Sprintf("forwarded %s packets, %sB", number(all.Packets), number(all.Bytes))
	if packets > 0 {
		text += fmt.Sprintf("   fast path %.1f %%", 100*fast/packets)
	}
	text += fmt.Sprintf("   dropped %s", number(dropped.Packets))
	if len(m.shown.Drops) > 0 {
		text += fmt.Sprintf(" (%s %s)", m.shown.Drops[0].Reason, number(m.shown.Drops[0].Packets))
	}
	return cut(text, m.width)
}

func (m topModel) historyLine() string {
	const title = "last minute "
	room := m.width - len(title) - len(" 999.9MB")
	return title + sparkline(m.history, m.minute(), min(60, room)) + " " + number(slices.Max(append([]float64{0}, m.history...))) + "B"
}

// levels are eighths of a line.
var levels = []rune(" ▁▂▃▄▅▆▇█")

// sparkline draws the values, the newest at the right end, in so many cells that stand for total values together. A cell shows
// the largest of its values, the largest of all is full, and what is not zero is seen.
func sparkline(values []float64, total, cells int) string {
	cells = max(1, min(cells, total))
	highest := slices.Max(append([]float64{0}, values...))
	var out strings.Builder
	for i := range cells {
		// From the newest backwards, so that cells that nothing is known of yet are on the left.
		first, last := len(values)-(total-i*total/cells), len(values)-(total-(i+1)*total/cells)
		level := 0
		if part := values[max(0, first):max(0, last)]; len(part) > 0 && highest > 0 {
			if top := slices.Max(part); top > 0 {
				level = max(1, int(top/highest*float64(len(levels)-1)+0.5))
			}
		}
		out.WriteRune(levels[level])
	}
	return out.String()
}

func (m topModel) tabLine(shown int) string {
	var plain int
	var out strings.Builder
	for i, title := range topTitles {
		text := " " + title + " "
		plain += len(text) + 1
		if i == m.view {
			text = topHere.Render(text)
		}
		out.WriteString(text + " ")
	}
	info := "  by " + topOrders[m.order].name
	if m.filter != "" || m.typing {
		info += "   /" + m.filter
		if m.typing {
			info += "_"
		}
		info += fmt.Sprintf("   %d of %d", shown, len(m.list()))
	}
	return out.String() + cut(info, max(0, m.width-plain))
}

// cells are the header and the rows of the view.
func (m topModel) cells(rows []TrafficRate) (header []string, out [][]string) {
	switch m.view {
	case topPorts:
		header = []string{"PORT", "CONTAINER", "CONNECTIONS", "RX", "TX", "NOT READY"}
	case topNetworks:
		header = []string{"NETWORK", "RX", "TX", "TX DROPPED"}
	default:
		header = []string{"CONTAINER", "NETWORK", "RX", "TX", "TX DROPPED"}
	}
	for _, t := range rows {
		switch m.view {
		case topPorts:
			out = append(out, []string{t.Name, t.Container, number(t.Connections), t.Rx.String(), t.Tx.String(), number(t.NotReady)})
		case topNetworks:
			out = append(out, []string{t.Name, t.Rx.String(), t.Tx.String(), t.Dropped.String()})
		default:
			out = append(out, []string{t.Name, t.Network, t.Rx.String(), t.Tx.String(), t.Dropped.String()})
		}
	}
	return header, out
}

func (m topModel) lastLine() string {
	switch {
	case m.err != nil:
		return topRed.Render(cut(oneLine(m.err.Error()), m.width))
	case m.typing:
		return topFaint.Render(cut("type a part of a name   enter keep   esc clear", m.width))
	}
	return topFaint.Render(cut("tab view   s sort   / filter   p pause   up down scroll   q quit", m.width))
}

// alignRows puts cells below each other, in lines of that width at most.
func alignRows(rows [][]string, width int) []string {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	var out []string
	for _, row := range rows {
		var line strings.Builder
		for i, cell := range row {
			if i > 0 {
				line.WriteString("   ")
			}
			fmt.Fprintf(&line, "%-*s", widths[i], cell)
		}
		out = append(out, cut(strings.TrimRight(line.String(), " "), width))
	}
	return out
}

// cut leaves no more than width runes.
func cut(s string, width int) string {
	runes := []rune(s)
	return string(runes[:min(len(runes), max(0, width))])
}
