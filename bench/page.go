// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"cmp"
	_ "embed" // the page's text
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
	"time"
)

//go:embed page.tmpl
var pageText string

// Files are what is made of a full result below docs: the page, its plots, the whole table and the
// result itself, by their names there. The same report gives the same bytes.
func Files(r Report) (map[string][]byte, error) {
	plots, err := Plots(r)
	if err != nil {
		return nil, err
	}
	out := make(map[string][]byte)
	for name, b := range plots {
		out["performance/"+name] = b
	}
	var result, table bytes.Buffer
	if err := r.Write(&result); err != nil {
		return nil, err
	}
	if err := WriteTable(&table, r); err != nil {
		return nil, err
	}
	out["performance/full.jsonl"], out["performance/table.txt"] = result.Bytes(), table.Bytes()
	page, err := r.page(plots)
	if err != nil {
		return nil, fmt.Errorf("page: %w", err)
	}
	out["performance.md"] = page
	return out, nil
}

// WriteFiles writes [Files] below dir. Plots of an earlier result that this one has not go.
func WriteFiles(r Report, dir string) error {
	files, err := Files(r)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, "performance"), 0o755); err != nil {
		return fmt.Errorf("write page: %w", err)
	}
	old, err := filepath.Glob(filepath.Join(dir, "performance", "*.svg"))
	if err != nil {
		return fmt.Errorf("write page: %w", err)
	}
	for _, path := range old {
		if files["performance/"+filepath.Base(path)] == nil {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("write page: %w", err)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := os.WriteFile(filepath.Join(dir, name), files[name], 0o644); err != nil {
			return fmt.Errorf("write page: %w", err)
		}
	}
	return nil
}

func (r Report) page(plots map[string][]byte) ([]byte, error) {
	shown := make(map[string]bool)
	t, err := template.New("page").Funcs(template.FuncMap{
		"table": func(scenario string) string {
			shown[scenario] = true
			return r.markdown(scenario)
		},
		"plot": func(name, what string) string {
			if plots[name+".svg"] == nil {
				return ""
			}
			return fmt.Sprintf("\n![%s](performance/%s.svg)\n", what, name)
		},
		"reach": func() string { return markdownReach(Reach(r)) },
		"others": func() string {
			var out strings.Builder
			for _, s := range r.Scenarios() {
				if !shown[s] {
					fmt.Fprintf(&out, "\n## %s\n\n%s", s, r.markdown(s))
				}
			}
			return out.String()
		},
		"peers": func() string {
			var out []string
			for _, name := range slices.Sorted(maps.Keys(r.Header.Peers)) {
				out = append(out, name+" "+r.Header.Peers[name])
			}
			return cmp.Or(strings.Join(out, ", "), "none")
		},
		"later": r.later,
		"date":  func() string { return r.Header.Started.UTC().Format(time.DateOnly) },
		"least": func() int { return r.leastRounds() },
	}).Parse(pageText)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := t.Execute(&out, r); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// later are the scenarios that were measured in other runs, and when.
func (r Report) later() string {
	var out []string
	for _, scenario := range r.Scenarios() {
		for _, rec := range r.Records {
			if rec.Scenario == scenario && rec.Run != nil {
				out = append(out, fmt.Sprintf("%s on %s, by %s", scenario, rec.Run.Started.UTC().Format(time.DateOnly), rec.Run.Version))
				break
			}
		}
	}
	return strings.Join(out, "; ")
}

// leastRounds is the smallest number of rounds of a group.
func (r Report) leastRounds() int {
	least := r.Header.Rounds
	for _, rec := range r.Records {
		if rec.N > 0 {
			least = min(least, rec.N)
		}
	}
	return least
}

func markdownReach(lines []Reached) string {
	var out strings.Builder
	out.WriteString("| | iptables, first measured | target | bpfnet | reached |\n|---|---|---|---|---|\n")
	for _, l := range lines {
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s |\n", l.What, cmp.Or(l.Today, "–"), l.Target, cmp.Or(l.Value, "–"), l.verdict())
	}
	return out.String()
}

// markdown is a scenario's table: a line a metric, a column a mode.
func (r Report) markdown(scenario string) string {
	lines := r.cells(scenario)
	if len(lines) == 0 {
		return "Not measured in this result.\n"
	}
	var modes []string
	families, scaled, served := false, false, false
	for _, line := range lines {
		families = families || line[0].Family != 0
		scaled = scaled || line[0].At > 0
		for _, rec := range line {
			if !slices.Contains(modes, rec.Mode) {
				modes = append(modes, rec.Mode)
			}
			served = served || rec.Mode == Bpfnet && rec.N > 0
		}
	}
	slices.SortFunc(modes, func(a, b string) int { return cmp.Compare(slices.Index(Modes, a), slices.Index(Modes, b)) })
	var bases []string // what bpfnet is compared with
	for _, base := range []string{DockerIPTables, DockerProxy, ProxyPinned, limitOf[scenario]} {
		if base == DockerProxy && scenario != "host-published" && scenario != "run-ports" {
			continue // where the proxy carries nothing, it is no other mode than the one before
		}
		if served && slices.Contains(modes, base) {
			bases = append(bases, base)
		}
	}

	var out strings.Builder
	row := func(cells []string) { fmt.Fprintf(&out, "| %s |\n", strings.Join(cells, " | ")) }
	head := []string{"metric"}
	if families {
		head = append(head, "")
	}
	if scaled {
		head = append(head, "at")
	}
	head = append(head, "unit")
	head = append(head, modes...)
	for _, base := range bases {
		head = append(head, "bpfnet ÷ "+base)
	}
	row(head)
	out.WriteString(strings.Repeat("|---", len(head)) + "|\n")
	for _, line := range lines {
		cells := []string{line[0].Metric}
		if families {
			cells = append(cells, familyName(line[0].Family))
		}
		if scaled {
			cells = append(cells, fmt.Sprint(line[0].At))
		}
		unit, top := "", 0.0
		for _, rec := range line {
			top = max(top, rec.Median)
			unit = cmp.Or(unit, rec.Unit)
		}
		by, name := inUnit(unit, top)
		cells = append(cells, name)
		var ours Record
		for _, mode := range modes {
			text := "–"
			for _, rec := range line {
				if rec.Mode != mode || rec.N == 0 {
					continue
				}
				text = rec.Spread.over(by)
				if rec.CPU != nil {
					text += "<br>CPU " + rec.cpu()
				}
				if mode == Bpfnet {
					ours = rec
				}
			}
			cells = append(cells, text)
		}
		for _, base := range bases {
			text := "–"
			for _, rec := range line {
				if rec.Mode != base {
					continue
				}
				if ratio, ok := RatioOf(ours, rec); ok {
					text = ratio.String()
				}
			}
			cells = append(cells, text)
		}
		row(cells)
	}
	out.WriteString(notes(lines))
	return out.String()
}

// notes are the notes of records, each once, with the modes that it is about.
func notes(lines [][]Record) string {
	var texts []string
	modes := make(map[string][]string)
	for _, line := range lines {
		for _, rec := range line {
			if rec.Note == "" {
				continue
			}
			if modes[rec.Note] == nil {
				texts = append(texts, rec.Note)
			}
			what := rec.Mode
			if rec.N == 0 {
				what = fmt.Sprintf("%s (%s, %s)", rec.Mode, rec.Metric, familyName(rec.Family))
			}
			if !slices.Contains(modes[rec.Note], what) {
				modes[rec.Note] = append(modes[rec.Note], what)
			}
		}
	}
	if len(texts) == 0 {
		return ""
	}
	var out strings.Builder
	out.WriteString("\n")
	for _, text := range texts {
		fmt.Fprintf(&out, "- %s: %s\n", strings.Join(modes[text], ", "), text)
	}
	return out.String()
}
