// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
)

// A report is a file of JSON lines: the header first, as {"header":{…}}, then a record a line. Records
// are written at the end of their group, so that a run that was cut short leaves the groups before.

type headerLine struct {
	Header *Header `json:"header"`
}

// Writer writes a report line by line.
type Writer struct{ w io.Writer }

// NewWriter writes the header and returns what takes the records.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	out := &Writer{w: w}
	return out, out.line(headerLine{&h})
}

// Record writes one record.
func (w *Writer) Record(r Record) error { return w.line(r) }

func (w *Writer) line(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	if _, err := w.w.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

// Write writes the whole report.
func (r Report) Write(w io.Writer) error {
	out, err := NewWriter(w, r.Header)
	if err != nil {
		return err
	}
	for _, rec := range r.Records {
		if err := out.Record(rec); err != nil {
			return err
		}
	}
	return nil
}

// ReadFile reads a report from a file. Errors name the file and the line.
func ReadFile(name string) (Report, error) {
	f, err := os.Open(name)
	if err != nil {
		return Report{}, fmt.Errorf("read report: %w", err)
	}
	defer f.Close()
	return Read(f, name)
}

// Read reads a report. It takes nothing that no run writes: an unknown field, a value that contradicts
// another, a second record of one key. name is what errors call it.
func Read(in io.Reader, name string) (Report, error) {
	var r Report
	lines := make(map[Key]int)
	s := bufio.NewScanner(in)
	s.Buffer(nil, 1<<20)
	n := 0
	for s.Scan() {
		n++
		if err := r.take(s.Bytes(), n, lines); err != nil {
			return Report{}, fmt.Errorf("%s:%d: %w", name, n, err)
		}
	}
	if err := s.Err(); err != nil {
		return Report{}, fmt.Errorf("%s:%d: %w", name, n+1, err)
	}
	if n == 0 {
		return Report{}, fmt.Errorf("%s: empty: a report begins with its header, {\"header\":{…}}", name)
	}
	return r, nil
}

func (r *Report) take(line []byte, n int, lines map[Key]int) error {
	if n == 1 {
		var h headerLine
		if err := decodeStrict(line, &h); err != nil {
			return fmt.Errorf("header: %w", err)
		}
		switch {
		case h.Header == nil:
			return errors.New(`no header: the first line must be {"header":{…}}`)
		case h.Header.Started.IsZero():
			return errors.New("header: no time of start")
		}
		r.Header = *h.Header
		return nil
	}
	var rec Record
	if err := decodeStrict(line, &rec); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	if err := rec.check(); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	if first, twice := lines[rec.Key]; twice {
		return fmt.Errorf("record: %s stands in line %d already", rec.Key, first)
	}
	lines[rec.Key] = n
	r.Records = append(r.Records, rec)
	return nil
}

// decodeStrict decodes one JSON object, all of whose fields must be known.
func decodeStrict(line []byte, v any) error {
	if len(bytes.TrimSpace(line)) == 0 {
		return errors.New("empty line")
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return errors.New("the line ends in the middle: was the run cut short?")
		}
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one value in the line")
	}
	return nil
}

// check reports what is wrong with a record that was read.
func (r Record) check() error {
	switch {
	case r.Scenario == "":
		return errors.New("no scenario")
	case r.Metric == "":
		return fmt.Errorf("%s: no metric", r.Scenario)
	case !slices.Contains(Modes, r.Mode):
		return fmt.Errorf("%s %s: unknown mode %q: want one of %s", r.Scenario, r.Metric, r.Mode, strings.Join(Modes, ", "))
	case r.Family != 0 && r.Family != 4 && r.Family != 6:
		return fmt.Errorf("%s: family %d: want 4, 6 or none", r.Key, r.Family)
	case r.At < 0:
		return fmt.Errorf("%s: at %d: must not be negative", r.Key, r.At)
	case r.N != len(r.Samples):
		return fmt.Errorf("%s: n is %d, but there are %d samples", r.Key, r.N, len(r.Samples))
	case r.N == 0 && r.Note == "":
		return fmt.Errorf("%s: neither samples nor a note that says why", r.Key)
	case r.N == 0:
		return nil
	case r.Unit == "":
		return fmt.Errorf("%s: no unit", r.Key)
	}
	for _, v := range r.Samples {
		if v < 0 {
			return fmt.Errorf("%s: sample %g is negative", r.Key, v)
		}
	}
	// What is derived from the samples must be theirs, within what decimal text loses.
	if want := SpreadOf(r.Samples); !want.near(r.Spread) {
		return fmt.Errorf("%s: min, median, max are %g, %g, %g, those of the samples %g, %g, %g", r.Key,
			r.Min, r.Median, r.Max, want.Min, want.Median, want.Max)
	}
	return nil
}

func (s Spread) near(o Spread) bool {
	near := func(a, b float64) bool { return math.Abs(a-b) <= 1e-9*max(math.Abs(a), math.Abs(b)) }
	return near(s.Min, o.Min) && near(s.Median, o.Median) && near(s.Max, o.Max)
}

// find is the record of a key that has samples.
func (r Report) find(k Key) (Record, bool) {
	for _, rec := range r.Records {
		if rec.Key == k && rec.N > 0 {
			return rec, true
		}
	}
	return Record{}, false
}
