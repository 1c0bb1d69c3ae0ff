// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"math"
	"strings"
)

// limitOf says which mode nobody who forwards can beat, by scenario.
var limitOf = map[string]string{
	"container-container": Loopback,
	"hairpin":             Loopback,
	"published":           Host,
	"egress":              Host,
	"host-published":      Host,
	"run-ports":           Engine,
	"churn":               Engine,
	"host-only":           Host,
}

// lowerIsBetter says so of times and sizes; of rates, more is better.
func lowerIsBetter(unit string) bool { return unit == "s" || unit == "ns" || unit == "bytes" }

// Ratio compares two records: above 1 the first is better.
type Ratio struct {
	Value    float64 // the median of the rounds' ratios, or that of the medians
	Min, Max float64 // over the rounds, or over what the extremes allow
	// Paired says that the ratios are those within a round: the two were measured beside each other.
	Paired bool
}

// divide divides the values of a by those of b.
func divide(a, b Record) (Ratio, bool) {
	if a.N == 0 || b.N == 0 || a.Unit != b.Unit || a.Median <= 0 || b.Min <= 0 {
		return Ratio{}, false
	}
	r := Ratio{Value: a.Median / b.Median}
	if a.Group == b.Group && a.N == b.N {
		r.Paired = true
		rounds := make([]float64, len(a.Samples))
		for i := range a.Samples {
			rounds[i] = a.Samples[i] / b.Samples[i]
		}
		s := SpreadOf(rounds)
		r.Value, r.Min, r.Max = s.Median, s.Min, s.Max
		return r, true
	}
	r.Min, r.Max = a.Min/b.Max, a.Max/b.Min
	return r, true
}

// RatioOf compares a with b. It is false where there is nothing to divide: different units, zeros, and
// what is a share itself (loss).
func RatioOf(a, b Record) (Ratio, bool) {
	if a.Unit == "ratio" {
		return Ratio{}, false
	}
	if lowerIsBetter(a.Unit) {
		a, b = b, a
	}
	return divide(a, b)
}

// over divides one ratio by another.
func (r Ratio) over(o Ratio) Ratio {
	return Ratio{Value: r.Value / o.Value, Min: r.Min / o.Max, Max: r.Max / o.Min}
}

// String is a ratio with its spread: "0.912 (0.907–0.921)".
func (r Ratio) String() string {
	return fmt.Sprintf("%s (%s–%s)", digits(r.Value), digits(r.Min), digits(r.Max))
}

// over writes median, minimum and maximum divided by a number: "126 (121–129)".
func (s Spread) over(by float64) string {
	return fmt.Sprintf("%s (%s–%s)", significant(s.Median/by), significant(s.Min/by), significant(s.Max/by))
}

// significant writes a value with three significant digits.
func significant(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v >= 0.9995 && v < 1.9995:
		return fmt.Sprintf("%.2f", v)
	}
	return digits(v)
}

// digits writes a ratio with three significant digits, or three decimals, so that those around 1 stand in
// line.
func digits(v float64) string {
	switch a := math.Abs(v); {
	case a >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case a >= 9.995:
		return fmt.Sprintf("%.1f", v)
	case a >= 1.9995:
		return fmt.Sprintf("%.2f", v)
	case a >= 0.0995 || a == 0:
		return fmt.Sprintf("%.3f", v)
	}
	return fmt.Sprintf("%.2g", v)
}

type unitStep struct {
	from, by float64 // values not below from are divided by by
	name     string
}

var unitSteps = map[string][]unitStep{
	"1/s":   {{1e6, 1e6, "M/s"}, {1e3, 1e3, "k/s"}, {0, 1, "/s"}},
	"bit/s": {{1e9, 1e9, "Gbit/s"}, {1e6, 1e6, "Mbit/s"}, {1e3, 1e3, "kbit/s"}, {0, 1, "bit/s"}},
	"s":     {{1, 1, "s"}, {1e-3, 1e-3, "ms"}, {0, 1e-6, "µs"}},
	"ns":    {{1e9, 1e9, "s"}, {1e6, 1e6, "ms"}, {1e3, 1e3, "µs"}, {0, 1, "ns"}},
	"bytes": {{1 << 30, 1 << 30, "GiB"}, {1 << 20, 1 << 20, "MiB"}, {10 << 10, 1 << 10, "KiB"}, {0, 1, "bytes"}},
	"ratio": {{0, 0.01, "%"}},
}

// inUnit is what a value of a unit is divided by to be written, and what the result is called.
func inUnit(unit string, v float64) (float64, string) {
	for _, s := range unitSteps[unit] {
		if v >= s.from {
			return s.by, s.name
		}
	}
	return 1, unit
}

// withUnit writes one value with its unit: "126 k/s".
func withUnit(unit string, v float64) string {
	by, name := inUnit(unit, v)
	return significant(v/by) + " " + name
}

// in writes median, minimum and maximum in the unit of the median: "126 (121–129) k/s".
func (s Spread) in(unit string) string {
	by, name := inUnit(unit, s.Median)
	return strings.TrimSpace(fmt.Sprintf("%s %s", s.over(by), name))
}
