// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

const grafana = "../packaging/grafana/"

// series are the names and labels that queries may use.
func series(t *testing.T) map[string][]string {
	t.Helper()
	out := map[string][]string{"up": nil}
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	foreign, err := reg.Gather()
	require.NoError(t, err)
	for _, f := range foreign {
		out[f.GetName()] = nil
	}
	for _, f := range Families() {
		if f.Type != "histogram" {
			out[f.Name] = f.Labels
			continue
		}
		out[f.Name+"_bucket"] = append([]string{"le"}, f.Labels...)
		out[f.Name+"_sum"], out[f.Name+"_count"] = f.Labels, f.Labels
	}
	return out
}

var (
	quoted   = regexp.MustCompile(`"[^"]*"`)
	window   = regexp.MustCompile(`\[[^]]*\]`)
	grouping = regexp.MustCompile(`\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)`)
	selector = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)?\s*(\{[^}]*\}|\()?`)
	matcher  = regexp.MustCompile(`([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)`)
	words    = []string{"and", "or", "unless", "bool", "offset"}
)

// unknown says which names and labels of a query there are not. PromQL is taken apart as far as that
// needs.
func unknown(expr string, known map[string][]string) (out []string) {
	labels := []string{"job", "instance"}
	expr = window.ReplaceAllString(quoted.ReplaceAllString(expr, `""`), "")
	groups := grouping.FindAllStringSubmatch(expr, -1)
	names := 0
	for _, m := range selector.FindAllStringSubmatch(grouping.ReplaceAllString(expr, ""), -1) {
		name, rest := m[1], m[2]
		if name == "" || rest == "(" || slices.Contains(words, name) { // or a function
			continue
		}
		names++
		own, ok := known[name]
		if !ok {
			out = append(out, name)
			continue
		}
		labels = append(labels, own...)
		for _, l := range matcher.FindAllStringSubmatch(rest, -1) {
			if !slices.Contains(append([]string{"job", "instance"}, own...), l[1]) {
				out = append(out, name+"{"+l[1]+"}")
			}
		}
	}
	for _, g := range groups {
		for l := range strings.SplitSeq(g[1], ",") {
			if !slices.Contains(labels, strings.TrimSpace(l)) {
				out = append(out, g[0])
			}
		}
	}
	if names == 0 {
		out = append(out, "no metric")
	}
	return out
}

func TestUnknown(t *testing.T) {
	known := map[string][]string{"a_total": {"x"}, "b": nil}
	for expr, want := range map[string][]string{
		`sum by (x) (rate(a_total{x=~"c|d",job="e"}[5m])) / b > 0 and time() - b > 5`: nil,
		`rate(a[5m])`:               {"a"},
		`a_total{y="1"}`:            {"a_total{y}"},
		`sum by (z) (a_total)`:      {"by (z)"},
		`topk(10, c{x="1"} or b)`:   {"c"},
		`5`:                         {"no metric"},
		`a_total{x="b{c=\"d\"} e"}`: nil,
	} {
		assert.Equal(t, want, unknown(strings.ReplaceAll(expr, `\"`, `'`), known), expr)
	}
}

type dashboard struct {
	Title      string
	Templating struct {
		List []struct {
			Name  string
			Query any
		}
	}
	Panels []struct {
		ID      int
		Type    string
		Title   string
		GridPos struct{ H, W, X, Y int }
		Targets []struct{ Expr string }
	}
}

// Every query of the dashboard and of the alerts is about metrics and labels that there are, and the
// dashboard shows each family of ours or says here why not.
func TestGrafana(t *testing.T) {
	known := series(t)
	var all []string
	check := func(where, expr string) {
		all = append(all, expr)
		assert.Empty(t, unknown(expr, known), "%s: %s", where, expr)
	}
	raw, err := os.ReadFile(grafana + "bpfnet-dashboard.json")
	require.NoError(t, err)
	var d dashboard
	require.NoError(t, json.Unmarshal(raw, &d))
	ids := make(map[int]bool)
	taken := make(map[string]string)
	for _, p := range d.Panels {
		assert.False(t, ids[p.ID], "panel ID %d twice", p.ID)
		ids[p.ID] = true
		assert.LessOrEqual(t, p.GridPos.X+p.GridPos.W, 24, p.Title)
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				cell := fmt.Sprint(x, y)
				assert.Empty(t, taken[cell], "%s lies on another panel", p.Title)
				taken[cell] = p.Title
			}
		}
		assert.Equal(t, p.Type != "row", len(p.Targets) > 0, "%s: queries", p.Title)
		for _, target := range p.Targets {
			check(p.Title, target.Expr)
		}
	}
	values := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`)
	for _, v := range d.Templating.List {
		if query, ok := v.Query.(map[string]any); ok {
			m := values.FindStringSubmatch(query["query"].(string))
			require.NotNil(t, m, v.Name)
			check(v.Name, "sum by ("+m[2]+") ("+m[1]+")")
		}
	}

	raw, err = os.ReadFile(grafana + "bpfnet-alerts.yaml")
	require.NoError(t, err)
	var rules struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr         string
				Labels, Annotations map[string]string
			}
		}
	}
	require.NoError(t, yaml.Unmarshal(raw, &rules))
	operations, err := os.ReadFile("../docs/operations.md")
	require.NoError(t, err)
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			check(r.Alert, r.Expr)
			assert.Contains(t, []string{"critical", "warning", "info"}, r.Labels["severity"], r.Alert)
			assert.NotEmpty(t, r.Annotations["summary"], r.Alert)
			if strings.Contains(r.Annotations["summary"], "$value | humanizeDuration") {
				assert.Regexp(t, `^time\(\)`, r.Expr, "%s: the left side of `and` is the value", r.Alert)
			}
			assert.Contains(t, string(operations), "| `"+r.Alert+"` |", "docs/operations.md says what to do about an alert")
		}
	}

	text := strings.Join(all, "\n")
	elsewhere := []string{ // in another form on the dashboard, or of use to few
		"bpfnet_forwarded_bytes_total", "bpfnet_dropped_bytes_total", "bpfnet_endpoint_receive_packets_total",
		"bpfnet_endpoint_transmit_packets_total", "bpfnet_endpoint_dropped_bytes_total",
		"bpfnet_published_port_receive_packets_total", "bpfnet_published_port_transmit_packets_total",
		"bpfnet_attached_programs", "bpfnet_source_last_sync_timestamp_seconds", "bpfnet_metrics_folded",
	}
	for _, f := range Families() {
		assert.NotEqual(t, slices.Contains(elsewhere, f.Name), strings.Contains(text, f.Name), "%s: on the dashboard, or in the list of those that are not", f.Name)
	}
}
