// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"fmt"
	"image/color"
	"maps"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// A mode has the same colour and mark in every plot; the colours are told apart by the colour-blind too.
var (
	modeColor = map[string]color.RGBA{
		Host:           {0x99, 0x99, 0x99, 0xff},
		Loopback:       {0x55, 0x55, 0x55, 0xff},
		DockerIPTables: {0xd5, 0x5e, 0x00, 0xff},
		DockerProxy:    {0xe6, 0x9f, 0x00, 0xff},
		ProxyPinned:    {0xf0, 0xe4, 0x42, 0xff},
		NFTables:       {0x00, 0x9e, 0x73, 0xff},
		Bpfnet:         {0x00, 0x72, 0xb2, 0xff},
		Engine:         {0x77, 0x77, 0x77, 0xff},
		Sandboxes:      {0x56, 0xb4, 0xe9, 0xff},
	}
	modeMark = map[string]draw.GlyphDrawer{
		Host:           draw.CrossGlyph{},
		Loopback:       draw.PlusGlyph{},
		DockerIPTables: draw.SquareGlyph{},
		DockerProxy:    draw.PyramidGlyph{},
		ProxyPinned:    draw.TriangleGlyph{},
		NFTables:       draw.RingGlyph{},
		Bpfnet:         draw.CircleGlyph{},
		Engine:         draw.CrossGlyph{},
		Sandboxes:      draw.RingGlyph{},
	}
)

// scaledPlots are the plots over a number. All are of IPv4, or of no family.
var scaledPlots = []struct {
	scenario, metric string
	title, x         string
	log              bool // of the value too
}{
	{"ports", "crr", "Connections per second through one published port", "published ports", false},
	{"networks", "crr", "Connections per second between two containers", "networks", false},
	{"endpoints", "crr", "Connections per second between two containers", "endpoints", false},
	{"flows", "crr", "Connections per second beside live flows", "live flows", false},
	{"run-ports", "start", "Time of docker run with published ports", "published ports", true},
}

// barPlots are the plots of traffic against its limit.
var barPlots = []struct{ metric, title string }{
	{"rr", "Requests per second over a connection"},
	{"crr", "Connections per second"},
	{"stream1", "One TCP stream"},
}

// Plots draws a report: file names and their content. The same report gives the same bytes. What was not
// measured is not drawn.
func Plots(r Report) (map[string][]byte, error) {
	out := make(map[string][]byte)
	for _, s := range scaledPlots {
		p, err := r.scalingPlot(s.scenario, s.metric, s.log)
		if err != nil {
			return nil, fmt.Errorf("plot %s: %w", s.scenario, err)
		}
		if p == nil {
			continue
		}
		p.Title.Text, p.X.Label.Text = s.title, s.x
		if out[s.scenario+".svg"], err = drawSVG(p); err != nil {
			return nil, fmt.Errorf("plot %s: %w", s.scenario, err)
		}
	}
	for _, b := range barPlots {
		p, err := r.barPlot(b.metric)
		if err != nil {
			return nil, fmt.Errorf("plot %s: %w", b.metric, err)
		}
		if p == nil {
			continue
		}
		p.Title.Text = b.title + ", IPv4: share of the limit"
		if out[b.metric+".svg"], err = drawSVG(p); err != nil {
			return nil, fmt.Errorf("plot %s: %w", b.metric, err)
		}
	}
	return out, nil
}

func newPlot() *plot.Plot {
	p := plot.New()
	for _, f := range []*font.Font{&p.Title.TextStyle.Font, &p.X.Label.TextStyle.Font, &p.Y.Label.TextStyle.Font,
		&p.X.Tick.Label.Font, &p.Y.Tick.Label.Font, &p.Legend.TextStyle.Font} {
		f.Variant = "Sans"
	}
	p.Title.Padding = vg.Points(8)
	p.Legend.Top = true
	p.Legend.Padding = vg.Points(2)
	p.Y.Min = 0
	grid := plotter.NewGrid()
	grid.Vertical.Color = nil
	grid.Horizontal.Color = color.Gray{0xdd}
	p.Add(grid)
	return p
}

// linePoints are a line with the extremes of its rounds.
type linePoints struct {
	plotter.XYs
	plotter.YErrors
}

// scalingPlot is nil if no mode was measured at two numbers.
func (r Report) scalingPlot(scenario, metric string, logY bool) (*plot.Plot, error) {
	p := newPlot()
	p.X.Scale = plot.LogScale{}
	p.X.Tick.Marker = plot.TickerFunc(decades)
	unit, top, drawn := "", 0.0, false
	for _, rec := range r.Records {
		if rec.Scenario == scenario && rec.Metric == metric && rec.N > 0 && rec.Family != 6 {
			top = max(top, rec.Median)
			unit = rec.Unit
		}
	}
	div, label := inUnit(unit, top)
	for _, mode := range Modes {
		at := make(map[int]Record)
		for _, rec := range r.Records {
			if rec.Scenario == scenario && rec.Metric == metric && rec.Mode == mode && rec.Family != 6 && rec.N > 0 && rec.At > 0 {
				at[rec.At] = rec
			}
		}
		if len(at) < 2 {
			continue
		}
		drawn = true
		var xy linePoints
		for _, n := range slices.Sorted(maps.Keys(at)) {
			s := at[n].Spread
			xy.XYs = append(xy.XYs, plotter.XY{X: float64(n), Y: s.Median / div})
			xy.YErrors = append(xy.YErrors, struct{ Low, High float64 }{(s.Median - s.Min) / div, (s.Max - s.Median) / div})
		}
		line, marks, err := plotter.NewLinePoints(xy)
		if err != nil {
			return nil, err
		}
		line.Color, marks.Color, marks.Shape = modeColor[mode], modeColor[mode], modeMark[mode]
		line.Width, marks.Radius = vg.Points(1.5), vg.Points(3)
		whiskers, err := plotter.NewYErrorBars(xy)
		if err != nil {
			return nil, err
		}
		whiskers.Color = modeColor[mode]
		p.Add(line, marks, whiskers)
		p.Legend.Add(mode, line, marks)
	}
	if !drawn {
		return nil, nil
	}
	p.Y.Label.Text = label
	if logY {
		p.Y.Scale = plot.LogScale{}
		p.Y.Tick.Marker = plot.TickerFunc(decades)
		p.Y.Min = r.decadeBelow(scenario, metric, div)
		p.Legend.Left = true
		return p, nil
	}
	p.Y.Max *= 1.25 // room for the legend
	return p, nil
}

// decadeBelow is where a logarithmic axis begins: at the power of ten below the smallest value.
func (r Report) decadeBelow(scenario, metric string, div float64) float64 {
	least := 1.0
	for _, rec := range r.Records {
		if rec.Scenario == scenario && rec.Metric == metric && rec.N > 0 {
			for rec.Min/div < least && rec.Min > 0 {
				least /= 10
			}
		}
	}
	return least
}

// decades marks the powers of ten on a logarithmic axis, with plain numbers.
func decades(low, high float64) []plot.Tick {
	var out []plot.Tick
	for v := 1e-9; v <= high*1.001; v *= 10 {
		if v >= low*0.999 {
			out = append(out, plot.Tick{Value: v, Label: fmt.Sprintf("%.3g", v)})
		}
	}
	for i, t := range out {
		switch {
		case t.Value >= 0.999e6:
			out[i].Label = fmt.Sprintf("%.0f M", t.Value/1e6)
		case t.Value >= 0.999e3:
			out[i].Label = fmt.Sprintf("%.0f k", t.Value/1e3)
		}
	}
	return out
}

// barPlot is nil if nothing was measured against a limit.
func (r Report) barPlot(metric string) (*plot.Plot, error) {
	p := newPlot()
	p.Y.Max = 1.2
	var names []string
	share := make(map[string]plotter.Values)
	for _, scenario := range scenarioOrder[:5] { // those of traffic
		limit, ok := r.find(Key{Scenario: scenario, Mode: limitOf[scenario], Family: 4, Metric: metric})
		if !ok {
			continue
		}
		names = append(names, scenario)
		for _, mode := range Modes {
			rec, _ := r.find(Key{Scenario: scenario, Mode: mode, Family: 4, Metric: metric})
			ratio, _ := RatioOf(rec, limit) // nothing measured: no bar
			share[mode] = append(share[mode], ratio.Value)
		}
	}
	if len(names) == 0 {
		return nil, nil
	}
	var drawn []string
	for _, mode := range Modes {
		if mode != Host && mode != Loopback && slices.Max(share[mode]) > 0 {
			drawn = append(drawn, mode)
		}
	}
	width := vg.Points(14)
	for i, mode := range drawn {
		chart, err := plotter.NewBarChart(share[mode], width)
		if err != nil {
			return nil, err
		}
		chart.Color, chart.LineStyle.Width = modeColor[mode], 0
		chart.Offset = width * vg.Length(2*i-len(drawn)+1) / 2
		p.Add(chart)
		p.Legend.Add(mode, chart)
	}
	one := plotter.NewFunction(func(float64) float64 { return 1 })
	one.Color, one.Dashes = modeColor[Loopback], []vg.Length{vg.Points(3), vg.Points(3)}
	p.Add(one)
	p.NominalX(names...)
	p.X.Min, p.X.Max = -0.6, float64(len(names))-0.4
	p.Y.Max = max(p.Y.Max, 1.4)
	p.Y.Label.Text = "÷ limit"
	return p, nil
}

func drawSVG(p *plot.Plot) ([]byte, error) {
	c := vgsvg.New(7*vg.Inch, 3.5*vg.Inch)
	p.Draw(draw.Crop(draw.New(c), vg.Points(6), -vg.Points(12), vg.Points(4), -vg.Points(4)))
	var out bytes.Buffer
	if _, err := c.WriteTo(&out); err != nil {
		return nil, err
	}
	// The font that it was laid out with, and what is as wide where that is missing.
	return bytes.ReplaceAll(out.Bytes(), []byte("font-family:Liberation Sans;"),
		[]byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;")), nil
}
