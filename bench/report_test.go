// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bytes"
	"encoding/xml"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the golden files instead of comparing with them")

// golden compares text with a file of testdata, or writes it.
func golden(t *testing.T, name, have string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(have), 0o644))
		return
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err, "write it: go test ./bench -update")
	assert.Equal(t, string(want), have, "%s is stale: go test ./bench -update", path)
}

// builder makes up reports.
type builder struct{ Report }

func invented() *builder {
	return &builder{Report{Header: Header{
		Started: time.Date(2026, 11, 3, 4, 5, 6, 0, time.UTC),
		Version: "v0-invented", Kernel: "6.18.0", CPU: "Invented CPU", CPUs: 2, Pinning: "both ends on CPU 1", Rounds: 3,
		Peers: map[string]string{"docker": "20.10.24", "nft": "1.0.6"},
	}}}
}

// add appends a record; the group is that of the scenario, so that all its records are interleaved.
func (b *builder) add(k Key, unit string, samples ...float64) *builder {
	r := Record{Key: k, Group: k.Scenario, Unit: unit, N: len(samples), Samples: samples}
	if len(samples) > 0 {
		r.Spread = SpreadOf(samples)
	} else {
		r.Note = "not served by this mode"
	}
	b.Records = append(b.Records, r)
	return b
}

func (b *builder) cpu(ns float64) *builder {
	b.Records[len(b.Records)-1].CPU = &Spread{Min: ns, Median: ns, Max: ns}
	return b
}

// inventedTraffic is a report of three traffic lines and one that is scaled.
func inventedTraffic() *builder {
	cc := func(mode, metric string) Key { return reachKey("container-container", mode, 4, metric, 0) }
	b := invented()
	b.add(cc(Loopback, "rr"), "1/s", 100e3, 200e3, 150e3).cpu(6500)
	b.add(cc(DockerIPTables, "rr"), "1/s", 60e3, 120e3, 90e3).cpu(11000)
	b.add(cc(Bpfnet, "rr"), "1/s", 92e3, 180e3, 144e3).cpu(7250)
	b.add(cc(NFTables, "rr"), "")
	b.add(cc(Loopback, "latency-p99"), "ns", 10e3, 10e3, 10e3)
	b.add(cc(DockerIPTables, "latency-p99"), "ns", 40e3, 40e3, 40e3)
	b.add(cc(Bpfnet, "latency-p99"), "ns", 20e3, 20e3, 20e3)
	b.add(cc(Loopback, "udp-loss"), "ratio", 0, 0, 0)
	b.add(cc(Bpfnet, "udp-loss"), "ratio", 0, 0.002, 0.001)
	b.add(cc(Loopback, "stream1"), "bit/s", 20e9, 22e9, 21e9).cpu(0.045)
	b.add(cc(Bpfnet, "stream1"), "bit/s", 18e9, 19.8e9, 18.9e9)
	for _, at := range []int{10000, 1} {
		b.add(reachKey("ports", Bpfnet, 4, "crr", at), "1/s", 30e3, 31e3, 32e3)
		b.add(reachKey("ports", DockerIPTables, 4, "crr", at), "1/s", 20e3/float64(at), 21e3/float64(at), 22e3/float64(at))
	}
	return b
}

func TestReportRoundTrip(t *testing.T) {
	want := inventedTraffic().Report
	var text bytes.Buffer
	require.NoError(t, want.Write(&text))
	assert.Equal(t, len(want.Records)+1, strings.Count(text.String(), "\n"), "a line each")
	have, err := Read(&text, "report.jsonl")
	require.NoError(t, err)
	assert.Equal(t, want, have)
}

func TestBrokenReportIsNamed(t *testing.T) {
	const head = `{"header":{"started":"2026-11-03T04:05:06Z","version":"v","kernel":"k","cpu":"c","cpus":2,"pinning":"p","rounds":1,"peers":null}}` + "\n"
	const good = `{"scenario":"egress","mode":"bpfnet","family":4,"metric":"rr","group":"g","unit":"1/s","n":1,"min":5,"median":5,"max":5,"samples":[5]}` + "\n"
	_, err := Read(strings.NewReader(head+good), "r.jsonl")
	require.NoError(t, err)
	for _, tt := range []struct{ name, text, want string }{
		{"empty", "", `r.jsonl: empty: a report begins with its header`},
		{"no header", good, `r.jsonl:1: header: unknown field "scenario"`},
		{"other object", "{}\n", `r.jsonl:1: no header: the first line must be {"header":{…}}`},
		{"no time", `{"header":{"version":"v"}}`, `r.jsonl:1: header: no time of start`},
		{"header twice", head + head, `r.jsonl:2: record: unknown field "header"`},
		{"text", head + "fast\n", `r.jsonl:2: record: invalid character 's' in literal false`},
		{"cut short", head + good[:60], `r.jsonl:2: record: the line ends in the middle: was the run cut short?`},
		{"empty line", head + "\n" + good, `r.jsonl:2: record: empty line`},
		{"two values", head + strings.TrimSpace(good) + good, `r.jsonl:2: record: more than one value in the line`},
		{"unknown field", head + strings.Replace(good, `"n"`, `"number"`, 1), `r.jsonl:2: record: unknown field "number"`},
		{"wrong type", head + strings.Replace(good, `"n":1`, `"n":"1"`, 1), `r.jsonl:2: record: cannot unmarshal string into Go struct field`},
		{"mode", head + strings.Replace(good, `"bpfnet"`, `"bpfnt"`, 1), `r.jsonl:2: record: egress rr: unknown mode "bpfnt": want one of host, loopback,`},
		{"family", head + strings.Replace(good, `"family":4`, `"family":5`, 1), `family 5: want 4, 6 or none`},
		{"no scenario", head + strings.Replace(good, `"egress"`, `""`, 1), `r.jsonl:2: record: no scenario`},
		{"no metric", head + strings.Replace(good, `"rr"`, `""`, 1), `r.jsonl:2: record: egress: no metric`},
		{"no unit", head + strings.Replace(good, `"1/s"`, `""`, 1), `egress v4 rr, bpfnet: no unit`},
		{"number", head + strings.Replace(good, `"n":1`, `"n":2`, 1), `n is 2, but there are 1 samples`},
		{"no reason", head + strings.NewReplacer(`"n":1`, `"n":0`, `[5]`, `[]`).Replace(good), `neither samples nor a note that says why`},
		{"negative", head + strings.ReplaceAll(good, `5`, `-5`), `sample -5 is negative`},
		{"median", head + strings.Replace(good, `"median":5`, `"median":6`, 1), `min, median, max are 5, 6, 5, those of the samples 5, 5, 5`},
		{"twice", head + good + good, `r.jsonl:3: record: egress v4 rr, bpfnet stands in line 2 already`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Read(strings.NewReader(tt.text), "r.jsonl")
			assert.ErrorContains(t, err, tt.want)
		})
	}
}

func TestRatioOf(t *testing.T) {
	rec := func(unit string, samples ...float64) Record {
		return invented().add(reachKey("egress", Bpfnet, 4, "m", 0), unit, samples...).Records[0]
	}
	for _, tt := range []struct {
		name string
		a, b Record
		want Ratio
		ok   bool
	}{
		// Rounds of a machine that changes its speed: the pairs agree better than the extremes.
		{"rate", rec("1/s", 90, 180, 45), rec("1/s", 100, 200, 50), Ratio{0.9, 0.9, 0.9, true}, true},
		{"time", rec("s", 2, 4, 1), rec("s", 4, 8, 2), Ratio{2, 2, 2, true}, true},
		{"nanoseconds", rec("ns", 300), rec("ns", 100), Ratio{1 / 3., 1 / 3., 1 / 3., true}, true},
		{"bytes", rec("bytes", 50), rec("bytes", 100), Ratio{2, 2, 2, true}, true},
		{"not paired", rec("1/s", 80, 90, 100), rec("1/s", 100, 200), Ratio{0.6, 0.4, 1, false}, true},
		{"shares", rec("ratio", 0.1), rec("ratio", 0.2), Ratio{}, false},
		{"zero", rec("1/s", 1), rec("1/s", 0), Ratio{}, false},
		{"units", rec("1/s", 1), rec("bit/s", 1), Ratio{}, false},
		{"not served", rec(""), rec("1/s", 1), Ratio{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			have, ok := RatioOf(tt.a, tt.b)
			assert.Equal(t, tt.ok, ok)
			assert.InDeltaSlice(t, []float64{tt.want.Value, tt.want.Min, tt.want.Max}, []float64{have.Value, have.Min, have.Max}, 1e-9)
			assert.Equal(t, tt.want.Paired, have.Paired)
		})
	}
}

func TestWithUnit(t *testing.T) {
	for _, tt := range []struct {
		unit  string
		value float64
		want  string
	}{
		{"1/s", 126400, "126 k/s"}, {"1/s", 27400, "27.4 k/s"}, {"1/s", 5.35, "5.35 /s"}, {"1/s", 0, "0 /s"}, {"ns", 1437, "1.44 µs"},
		{"bit/s", 17.04e9, "17.0 Gbit/s"}, {"s", 69.7, "69.7 s"}, {"s", 0.0021, "2.10 ms"}, {"s", 12e-6, "12.0 µs"},
		{"ns", 7250, "7.25 µs"}, {"ns", 0.045, "0.045 ns"}, {"bytes", 96, "96.0 bytes"}, {"bytes", 9999, "9999 bytes"},
		{"bytes", 12 << 10, "12.0 KiB"}, {"bytes", 41 << 20, "41.0 MiB"}, {"ratio", 0.002, "0.200 %"}, {"cows", 3, "3.00 cows"},
	} {
		assert.Equal(t, tt.want, withUnit(tt.unit, tt.value))
	}
}

func TestWriteTable(t *testing.T) {
	var out bytes.Buffer
	require.NoError(t, WriteTable(&out, inventedTraffic().Report))
	golden(t, "table.txt", out.String())
}

// reachReport has every line of the Reach table; the values of some are set by the caller.
func reachReport(set map[Key]float64) Report {
	b := invented()
	full := func(k Key, unit string, v float64) {
		if other, ok := set[k]; ok {
			v = other
		}
		b.add(k, unit, v*0.99, v, v*1.01)
	}
	for _, family := range []int{4, 6} {
		for _, s := range []string{"container-container", "published", "egress", "host-published"} {
			for _, metric := range []string{"rr", "crr"} {
				limit := limitOf[s]
				if s == "host-published" {
					limit = DockerProxy
				}
				full(reachKey(s, limit, family, metric, 0), "1/s", 1000)
				v := 950.
				if s == "host-published" {
					v = 21000
				}
				full(reachKey(s, Bpfnet, family, metric, 0), "1/s", v)
			}
		}
		full(reachKey("container-container", Loopback, family, "stream1", 0), "bit/s", 10e9)
		full(reachKey("container-container", Bpfnet, family, "stream1", 0), "bit/s", 9.6e9)
	}
	full(reachKey("ports", Bpfnet, 4, "crr", 1), "1/s", 1000)
	full(reachKey("ports", Bpfnet, 4, "crr", 10000), "1/s", 990)
	full(reachKey("flows", Bpfnet, 4, "crr", 1000), "1/s", 1000)
	full(reachKey("flows", Bpfnet, 4, "crr", 500000), "1/s", 920)
	full(reachKey(Restart, Bpfnet, 0, "p99-quiet", 1000), "ns", 10e3)
	full(reachKey(Restart, Bpfnet, 0, "p99", 1000), "ns", 15e3)
	full(reachKey(Drop, RawDrop, 4, "drops", 0), "1/s", 900)
	full(reachKey(Drop, NetdevDrop, 4, "drops", 0), "1/s", 1000)
	full(reachKey(Drop, Bpfnet, 4, "drops", 0), "1/s", 1600)
	full(reachKey(Flood, DockerIPTables, 4, "crr", floodRate), "1/s", 100)
	full(reachKey(Flood, Bpfnet, 4, "crr", floodRate), "1/s", 400)
	full(reachKey(Flood, Bpfnet, 4, "crr-quiet", 0), "1/s", 1000)
	full(reachKey(Watched, Bpfnet, 4, "rr", 0), "1/s", 1000)
	full(reachKey(Watched, Bpfnet, 4, "rr", len(watchers)+1), "1/s", 980)
	for _, target := range reachTargets {
		if target.by.Mode == "" {
			full(target.of, target.unit, target.want*0.9)
		}
		if target.or != nil {
			full(target.by, "1/s", 1000)
			full(target.of, "1/s", 985)
			full(target.or.of, target.or.unit, 35)
		}
	}
	return b.Report
}

func TestReach(t *testing.T) {
	line := func(lines []Reached, what string) Reached {
		for _, l := range lines {
			if l.What == what {
				return l
			}
		}
		t.Fatalf("no line %q", what)
		return Reached{}
	}
	all := Reach(reachReport(nil))
	rows := make(map[int]bool)
	for _, l := range all {
		rows[l.Row] = true
		assert.True(t, l.Measured, l.What)
		assert.True(t, l.Met, "%s: %s", l.What, l.Value)
	}
	assert.Len(t, rows, 14)

	published := reachKey("published", Bpfnet, 4, "crr", 0)
	published6 := reachKey("egress", Bpfnet, 6, "rr", 0)
	target := func(what string) reachTarget {
		return reachTargets[slices.IndexFunc(reachTargets, func(t reachTarget) bool { return t.what == what })]
	}
	hostOnly := target("host-only rr, bpfnet attached ÷ detached")
	missed := Reach(reachReport(map[Key]float64{published: 899, published6: 902, hostOnly.of: 979,
		target("docker run with 1 000 published ports").of: 1.001, target("latency p99 while the daemon restarts ÷ quiet").of: 21e3}))
	for _, l := range missed {
		switch l.What {
		case "remote → published crr ÷ host", "container → outside rr ÷ host → outside, IPv6 ÷ IPv4", "docker run with 1 000 published ports",
			"latency p99 while the daemon restarts ÷ quiet":
			assert.False(t, l.Met, "%s: %s", l.What, l.Value)
		default:
			assert.True(t, l.Met, "%s: %s", l.What, l.Value)
		}
	}
	assert.Equal(t, "0.899 (0.899–0.899)", line(missed, "remote → published crr ÷ host").Value, "samples of one round are paired")
	assert.Equal(t, "0.979 (0.979–0.979); 35.0 (34.6–35.4) ns", line(missed, hostOnly.what).Value, "either will do")
	slow := Reach(reachReport(map[Key]float64{hostOnly.of: 979, hostOnly.or.of: 41}))
	assert.False(t, line(slow, hostOnly.what).Met)

	none := Reach(invented().Report)
	require.Len(t, none, len(all))
	for _, l := range none {
		assert.Equal(t, "not measured in this run", l.verdict(), l.What)
		assert.False(t, l.Met)
	}
}

func TestWriteReach(t *testing.T) {
	quick := inventedTraffic()
	quick.Header.Started = quick.Header.Started.AddDate(0, 0, 5)
	full := reachReport(map[Key]float64{reachKey("flows", Bpfnet, 4, "crr", 500000): 800})
	full.Records = slices.DeleteFunc(full.Records, func(r Record) bool { return r.Scenario == "host-only" }) // an old result
	var out bytes.Buffer
	require.NoError(t, WriteReach(&out, Quote(Reach(quick.Report), full)))
	golden(t, "reach.txt", out.String())
}

func TestCompare(t *testing.T) {
	a := reachReport(nil)
	agree := func(b Report) (string, bool) {
		var out bytes.Buffer
		ok, err := Compare(a, b).Write(&out)
		require.NoError(t, err)
		return out.String(), ok
	}
	text, ok := agree(a)
	assert.True(t, ok, text)

	// Another speed of the machine, and noise that the rounds of either run show.
	noisy := reachReport(nil)
	for i := range noisy.Records {
		r := &noisy.Records[i]
		if r.Unit == "1/s" {
			for j := range r.Samples {
				r.Samples[j] *= 0.7
			}
			if r.Mode == Bpfnet {
				r.Samples[0] *= 0.9
				r.Samples[1] *= 0.96
				r.Samples[2] *= 1.02
			}
			r.Spread = SpreadOf(r.Samples)
		}
	}
	text, ok = agree(noisy)
	assert.True(t, ok, text)
	// A ratio that has moved by less than what is not asked.
	text, ok = agree(reachReport(map[Key]float64{reachKey("published", Bpfnet, 4, "rr", 0): 930}))
	assert.True(t, ok, text)

	text, ok = agree(reachReport(map[Key]float64{reachKey("published", Bpfnet, 4, "rr", 0): 900}))
	assert.False(t, ok, text)
	assert.Regexp(t, `remote → published rr ÷ host +0\.950 \(0\.950–0\.950\) +0\.900`, text)
	assert.Contains(t, text, "The runs do not agree")

	// What is beside the Reach table may differ once in a while, not throughout.
	b := inventedTraffic()
	other := inventedTraffic()
	r := &other.Records[6] // latency of bpfnet
	r.Samples = []float64{40e3, 40e3, 40e3}
	r.Spread = SpreadOf(r.Samples)
	differ, ok := Compare(b.Report, other.Report).Differing()
	assert.Len(t, differ, 2, "to the limit and to iptables")
	assert.False(t, ok)
}

func TestPlotsAreTheSameTwice(t *testing.T) {
	r := inventedTraffic().Report
	first, err := Plots(r)
	require.NoError(t, err)
	names := slices.Sorted(maps.Keys(first))
	assert.Equal(t, []string{"ports.svg", "rr.svg", "stream1.svg"}, names, "what was measured, and nothing else")
	second, err := Plots(r)
	require.NoError(t, err)
	for _, name := range names {
		assert.Equal(t, string(first[name]), string(second[name]))
		assert.Less(t, len(first[name]), 50_000, name)
		assert.NoError(t, xml.Unmarshal(first[name], new(struct{})), name)
		assert.Contains(t, string(first[name]), ">bpfnet</text>", name)
	}
	none, err := Plots(invented().Report)
	require.NoError(t, err)
	assert.Empty(t, none)
	moved := inventedTraffic()
	for i := range moved.Records[2].Samples {
		moved.Records[2].Samples[i] *= 0.9
	}
	third, err := Plots(moved.Report)
	require.NoError(t, err)
	assert.NotEqual(t, first["rr.svg"], third["rr.svg"])
}

func TestPage(t *testing.T) {
	b := inventedTraffic()
	b.add(Key{Scenario: "something-new", Mode: Bpfnet, Metric: "size"}, "bytes", 64)
	files, err := Files(b.Report)
	require.NoError(t, err)
	// The text is in page.tmpl; what is put into it is held here.
	tables := markdownReach(Reach(b.Report)) + "\n" + b.markdown("container-container") + "\n" + b.markdown("ports")
	golden(t, "tables.md", tables)
	page := string(files["performance.md"])
	for part := range strings.SplitSeq(tables, "\n\n") {
		assert.Contains(t, page, strings.TrimSpace(part))
	}
	assert.Contains(t, page, "\n## something-new\n\n| metric | unit | bpfnet |\n")
	assert.Contains(t, page, "Not measured in this result.")
	assert.Contains(t, page, "](performance/ports.svg)")
	assert.NotContains(t, page, "](performance/flows.svg)")
	assert.Contains(t, page, "| compared with | docker 20.10.24, nft 1.0.6 |")
	for _, scenario := range append(slices.Clone(scenarioOrder), "something-new") {
		assert.True(t, strings.Contains(pageText, `{{table "`+scenario+`"}}`) != (scenario == "something-new"), scenario)
	}

	// Written, read and written again: the result that is committed makes the page.
	dir := t.TempDir()
	stale := filepath.Join(dir, "performance", "flows.svg")
	require.NoError(t, os.MkdirAll(filepath.Dir(stale), 0o755))
	require.NoError(t, os.WriteFile(stale, nil, 0o644))
	require.NoError(t, WriteFiles(b.Report, dir))
	assert.NoFileExists(t, stale)
	again, err := ReadFile(filepath.Join(dir, "performance/full.jsonl"))
	require.NoError(t, err)
	same, err := Files(again)
	require.NoError(t, err)
	for name, want := range files {
		have, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		assert.Equal(t, string(want), string(have), name)
		assert.Equal(t, string(want), string(same[name]), name)
	}
}

// What was measured again takes the place of its group, and says of which run it is.
func TestMerge(t *testing.T) {
	full := reachReport(nil)
	again := inventedTraffic().Report
	again.Header.Started, again.Header.Version = full.Header.Started.AddDate(0, 0, 1), "v1-invented"
	again.Records = slices.DeleteFunc(again.Records, func(r Record) bool { return r.Scenario != "ports" })
	merged, err := full.Merge(again)
	require.NoError(t, err)
	rec, ok := merged.find(reachKey("ports", Bpfnet, 4, "crr", 1))
	require.True(t, ok)
	assert.Equal(t, 31e3, rec.Median)
	assert.Equal(t, &Origin{again.Header.Started, "v1-invented"}, rec.Run)
	rec, ok = merged.find(reachKey("egress", Bpfnet, 4, "rr", 0))
	require.True(t, ok)
	assert.Nil(t, rec.Run)
	assert.Equal(t, "ports on 2026-11-04, by v1-invented", merged.later())
	var text bytes.Buffer
	require.NoError(t, merged.Write(&text))
	_, err = Read(&text, "merged")
	require.NoError(t, err)

	part := again
	part.Records = part.Records[:1]
	_, err = full.Merge(part)
	assert.ErrorContains(t, err, "ports v4 at 1 crr, bpfnet is not in the later run")
	for _, other := range []func(h *Header){
		func(h *Header) { h.Kernel = "6.1.0" }, func(h *Header) { h.Quick = true }, func(h *Header) { h.Rounds = 1 },
	} {
		b := again
		other(&b.Header)
		_, err = full.Merge(b)
		assert.ErrorContains(t, err, "differs")
	}
}

func TestReadme(t *testing.T) {
	r := inventedTraffic().Report
	golden(t, "readme.md", r.Readme())
	text := "# name\n\nWhat it is.\n\n## First command\n\nmake\n"
	first, err := r.InReadme(text)
	require.NoError(t, err)
	assert.Equal(t, "# name\n\nWhat it is.\n\n"+r.Readme()+"## First command\n\nmake\n", first)
	second, err := r.InReadme(first)
	require.NoError(t, err)
	assert.Equal(t, first, second)
	other, err := reachReport(nil).InReadme(first)
	require.NoError(t, err)
	assert.NotEqual(t, first, other)
	assert.True(t, strings.HasSuffix(other, "\n\n## First command\n\nmake\n"))
	_, err = r.InReadme("# other\n")
	assert.ErrorContains(t, err, "no place")
}
