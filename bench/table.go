// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// scenarioOrder is the order of reports; one that is not named here comes last.
var scenarioOrder = []string{
	"container-container", "published", "egress", "host-published", "hairpin",
	"ports", "networks", "endpoints", "flows",
	"run-ports", "ready", "churn", "reconcile", "restart", "syn-flood", "drop",
	"host-only", "watched", "memory",
}

// Scenarios are those that the report has records of, in the order of reports.
func (r Report) Scenarios() []string {
	var out []string
	for _, rec := range r.Records {
		if !slices.Contains(out, rec.Scenario) {
			out = append(out, rec.Scenario)
		}
	}
	place := func(s string) int {
		if i := slices.Index(scenarioOrder, s); i >= 0 {
			return i
		}
		return len(scenarioOrder)
	}
	slices.SortStableFunc(out, func(a, b string) int { return cmp.Compare(place(a), place(b)) })
	return out
}

// cells are the records of a scenario: lines of one metric, family and number, each with its modes in
// the order of Modes.
func (r Report) cells(scenario string) [][]Record {
	var lines []Key
	byLine := make(map[Key][]Record)
	for _, rec := range r.Records {
		if rec.Scenario != scenario {
			continue
		}
		line := rec.Key
		line.Mode = ""
		if byLine[line] == nil {
			lines = append(lines, line)
		}
		byLine[line] = append(byLine[line], rec)
	}
	// Metrics stand as the run made them; families of a metric together, numbers rising.
	var metrics []string
	for _, l := range lines {
		if !slices.Contains(metrics, l.Metric) {
			metrics = append(metrics, l.Metric)
		}
	}
	slices.SortStableFunc(lines, func(a, b Key) int {
		return cmp.Or(cmp.Compare(slices.Index(metrics, a.Metric), slices.Index(metrics, b.Metric)),
			cmp.Compare(a.Family, b.Family), cmp.Compare(a.At, b.At))
	})
	out := make([][]Record, len(lines))
	for i, l := range lines {
		recs := byLine[l]
		slices.SortStableFunc(recs, func(a, b Record) int {
			return cmp.Compare(slices.Index(Modes, a.Mode), slices.Index(Modes, b.Mode))
		})
		out[i] = recs
	}
	return out
}

// least is the smallest number at which a scaled metric was measured in the mode of rec.
func (r Report) least(rec Record) (Record, bool) {
	out, found := rec, false
	for _, other := range r.Records {
		k := other.Key
		k.At = rec.At
		if k == rec.Key && other.N > 0 && other.At > 0 && (other.At < out.At || !found) {
			out, found = other, true
		}
	}
	return out, found && out.At < rec.At
}

func familyName(f int) string {
	if f == 0 {
		return "–"
	}
	return fmt.Sprintf("IPv%d", f)
}

func (rec Record) cpu() string {
	if rec.CPU == nil {
		return "–"
	}
	return withUnit("ns", rec.CPU.Median)
}

// ratioTo is a record's ratio to that of another mode in the same line, for a table.
func (rec Record) ratioTo(mode string, line []Record) string {
	for _, other := range line {
		if other.Mode != mode {
			continue
		}
		if r, ok := RatioOf(rec, other); ok {
			return digits(r.Value)
		}
	}
	return "–"
}

const ratioNote = `The ratios are medians of those within a round. Above 1 the mode of the line is the better one, whatever the metric: of rates
its own value is divided by the other's, of times and sizes the other's by its own. CPU is the time that all CPUs
worked for one unit of work (a transaction, a datagram, a bit).`

// WriteTable writes every record of a report, each with its ratios to the Engine's iptables rules and to
// the limit, and where something is scaled to itself at the smallest number.
func WriteTable(w io.Writer, r Report) error {
	fmt.Fprintln(w, ratioNote)
	for _, scenario := range r.Scenarios() {
		lines := r.cells(scenario)
		limit, limited := limitOf[scenario]
		scaled := slices.ContainsFunc(lines, func(l []Record) bool { return l[0].At > 0 })
		fmt.Fprintf(w, "\n%s\n", scenario)
		tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		row := func(cells ...string) { fmt.Fprintf(tab, "  %s\n", strings.Join(cells, "\t")) }
		head := []string{"metric", "family"}
		if scaled {
			head = append(head, "at")
		}
		head = append(head, "mode", "median (min–max)", "n", "CPU", "÷ "+DockerIPTables)
		if limited {
			head = append(head, "÷ "+limit)
		}
		if scaled {
			head = append(head, "÷ itself at least")
		}
		row(head...)
		for _, line := range lines {
			for _, rec := range line {
				cells := []string{rec.Metric, familyName(rec.Family)}
				if scaled {
					cells = append(cells, fmt.Sprint(rec.At))
				}
				value := "not measured"
				if rec.N > 0 {
					value = rec.Spread.in(rec.Unit)
				}
				cells = append(cells, rec.Mode, value, fmt.Sprint(rec.N), rec.cpu(), rec.ratioTo(DockerIPTables, line))
				if limited {
					cells = append(cells, rec.ratioTo(limit, line))
				}
				if scaled {
					growth := "–"
					if first, ok := r.least(rec); ok {
						if ratio, ok := RatioOf(rec, first); ok {
							growth = digits(ratio.Value)
						}
					}
					cells = append(cells, growth)
				}
				if rec.Note != "" {
					cells = append(cells, rec.Note)
				}
				row(cells...)
			}
		}
		if err := tab.Flush(); err != nil {
			return err
		}
	}
	return nil
}
