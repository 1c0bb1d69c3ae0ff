// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
)

// Outcome is what became of a cell's probe.
type Outcome struct {
	// Delivered: the server has seen the probe, and its answer has come back.
	Delivered bool `json:"delivered"`
	// Source is whom the server saw, by name: client, gateway, "host up0" and so on. Only if delivered.
	Source string `json:"source,omitempty"`
	// TTL is the time to live or hop limit with which the probe reached the server. All begin with 64.
	TTL int `json:"ttl,omitempty"`
	// Note tells how it was not delivered: refused, silent. It is not compared.
	Note string `json:"note,omitempty"`
}

func (o Outcome) String() string {
	if !o.Delivered {
		return "closed (" + o.Note + ")"
	}
	return fmt.Sprintf("%s, TTL %d", o.Source, o.TTL)
}

// same reports whether two outcomes agree in all that is compared.
func (o Outcome) same(p Outcome) bool {
	if !o.Delivered || !p.Delivered {
		return o.Delivered == p.Delivered
	}
	return o.Source == p.Source && o.TTL == p.TTL
}

// Row is one cell with its three outcomes, and what they mean.
type Row struct {
	Cell
	Proxy   Outcome `json:"proxy"`    // iptables and docker-proxy
	NoProxy Outcome `json:"no_proxy"` // iptables alone
	Bpfnet  Outcome `json:"bpfnet"`

	Verdict   Verdict `json:"verdict"`
	Departure string  `json:"departure,omitempty"` // by name
}

// Verdict is the result of comparing one row.
type Verdict string

// The verdicts.
const (
	Agrees    Verdict = "agrees"    // bpfnet does what one of the reference's modes does
	Explained Verdict = "explained" // it does something else, and a departure says exactly that
	Differs   Verdict = "differs"
)

// DeliveredInReference reports whether one of the reference's modes delivers: where the two differ,
// the measure is the union of what works.
func (r Row) DeliveredInReference() bool { return r.Proxy.Delivered || r.NoProxy.Delivered }

// agrees reports whether bpfnet does what the reference does, in one of its modes.
func (r Row) agrees() bool {
	if !r.DeliveredInReference() {
		return !r.Bpfnet.Delivered
	}
	return r.Proxy.Delivered && r.Proxy.same(r.Bpfnet) || r.NoProxy.Delivered && r.NoProxy.same(r.Bpfnet)
}

// Departure is a set of cells in which bpfnet is expected to do something else than Engine 20.10.
type Departure struct {
	Name   string    `json:"name"`
	Cells  []Pattern `json:"cells"` // any of them
	Expect Expect    `json:"expect"`
	Kind   string    `json:"kind"`
	Reason string    `json:"reason"`
}

// Matches reports whether a cell is one of the departure's.
func (d Departure) Matches(c Cell) bool {
	return slices.ContainsFunc(d.Cells, func(p Pattern) bool { return p.Matches(c) })
}

// Pattern matches cells: a field that is empty matches all.
type Pattern struct {
	From   []string `json:"from,omitempty"`
	To     []string `json:"to,omitempty"`
	Proto  []string `json:"proto,omitempty"`
	Family []string `json:"family,omitempty"`
	Option []string `json:"option,omitempty"`
}

// Matches reports whether a cell is one of the pattern's.
func (p Pattern) Matches(c Cell) bool {
	has := func(list []string, v string) bool { return len(list) == 0 || slices.Contains(list, v) }
	return has(p.From, c.From) && has(p.To, c.To) && has(p.Proto, c.Proto) && has(p.Family, c.Family) && has(p.Option, c.Option)
}

// check finds values that no cell has.
func (p Pattern) check() error {
	var options []string
	for _, o := range Options {
		options = append(options, o.Name)
	}
	for _, field := range []struct {
		name        string
		given, know []string
	}{
		{"from", p.From, Froms}, {"to", p.To, Tos}, {"proto", p.Proto, Protos},
		{"family", p.Family, Families}, {"option", p.Option, options},
	} {
		for _, v := range field.given {
			if !slices.Contains(field.know, v) {
				return fmt.Errorf("%s %q: use one of %q", field.name, v, field.know)
			}
		}
	}
	return nil
}

// Expect is what bpfnet does there.
type Expect struct {
	Delivered bool `json:"delivered"`
	// Source and TTL are compared where they are given; a TTL that is not given is free only where the
	// source is not one that the reference shows.
	Source string `json:"source,omitempty"`
	TTL    int    `json:"ttl,omitempty"`
}

func (e Expect) met(o Outcome) bool {
	if e.Delivered != o.Delivered {
		return false
	}
	return !e.Delivered || (e.Source == "" || e.Source == o.Source) && (e.TTL == 0 || e.TTL == o.TTL)
}

// kinds of reasons for a departure.
var kinds = regexp.MustCompile(`^(Engine 29 behaves so|client address kept|on purpose|bug moby#[0-9]+)$`)

//go:embed departures.json
var departures []byte

// Departures reads the expected departures that come with the program.
func Departures() ([]Departure, error) { return ParseDepartures(departures) }

// ParseDepartures reads and checks a list of departures. Unknown fields and values, departures that match
// no cell, and two that match one, are errors.
func ParseDepartures(text []byte) ([]Departure, error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	var list []Departure
	if err := dec.Decode(&list); err != nil {
		return nil, fmt.Errorf("departures: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("departures: more follows the list")
	}
	names := map[string]bool{}
	for _, d := range list {
		switch {
		case d.Name == "" || d.Reason == "":
			return nil, fmt.Errorf("departure %q: name and reason are needed", d.Name)
		case names[d.Name]:
			return nil, fmt.Errorf("departure %q: there are two of that name", d.Name)
		case !kinds.MatchString(d.Kind):
			return nil, fmt.Errorf("departure %q: kind %q: use one of %v", d.Name, d.Kind, kinds)
		case !d.Expect.Delivered && (d.Expect.Source != "" || d.Expect.TTL != 0):
			return nil, fmt.Errorf("departure %q: expects a source or TTL of what is not delivered", d.Name)
		}
		names[d.Name] = true
		for _, p := range d.Cells {
			if err := p.check(); err != nil {
				return nil, fmt.Errorf("departure %q: %w", d.Name, err)
			}
		}
	}
	cells := Cells()
	for _, c := range cells {
		if _, err := find(list, c); err != nil {
			return nil, err
		}
	}
	for _, d := range list {
		for i, p := range d.Cells {
			if !slices.ContainsFunc(cells, p.Matches) {
				return nil, fmt.Errorf("departure %q: pattern %d matches no cell", d.Name, i+1)
			}
		}
	}
	return list, nil
}

// find returns the departure that is about a cell, or nil.
func find(list []Departure, c Cell) (*Departure, error) {
	var found *Departure
	for i, d := range list {
		if !d.Matches(c) {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("departures %q and %q: both match %s", found.Name, d.Name, c)
		}
		found = &list[i]
	}
	return found, nil
}

// Summary counts the verdicts of a run.
type Summary struct {
	Cells, Explained, Differences int
	// Delivered is how many cells the reference delivers.
	Delivered int
	// Unused are departures, by name, that no cell of the run has shown.
	Unused []string
}

func (s Summary) String() string {
	return fmt.Sprintf("conformance: %d cells, %d explained, %d differences", s.Cells, s.Explained, s.Differences)
}

// Compare sets the verdict of each row. A cell that a departure matches must do what the departure
// says, also if the reference were to do the same.
func Compare(rows []Row, list []Departure) (Summary, error) {
	sum := Summary{Cells: len(rows)}
	used := map[string]bool{}
	for i := range rows {
		r := &rows[i]
		d, err := find(list, r.Cell)
		if err != nil {
			return sum, err
		}
		if r.DeliveredInReference() {
			sum.Delivered++
		}
		r.Departure = ""
		switch {
		case d == nil && r.agrees(), d != nil && d.Expect.met(r.Bpfnet) && r.agrees():
			r.Verdict = Agrees
		case d != nil && d.Expect.met(r.Bpfnet) && !r.wrongTTL(d.Expect):
			r.Verdict, r.Departure = Explained, d.Name
			used[d.Name] = true
			sum.Explained++
		default:
			r.Verdict = Differs
			if d != nil {
				r.Departure = d.Name
			}
			sum.Differences++
		}
	}
	for _, d := range list {
		if !used[d.Name] {
			sum.Unused = append(sum.Unused, d.Name)
		}
	}
	return sum, nil
}

// wrongTTL reports whether the packet took another number of hops than in the mode of the reference that
// shows the same source. Where the source is another, so is the path.
func (r Row) wrongTTL(e Expect) bool {
	if e.TTL != 0 || !r.Bpfnet.Delivered {
		return false
	}
	found := false
	for _, ref := range []Outcome{r.Proxy, r.NoProxy} {
		if ref.Delivered && ref.Source == r.Bpfnet.Source {
			if ref.TTL == r.Bpfnet.TTL {
				return false
			}
			found = true
		}
	}
	return found
}
