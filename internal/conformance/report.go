// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"fmt"
	"slices"
	"strings"
)

// sources are the report's short names for whom a server saw.
var sources = []struct{ short, name, text string }{
	{"c", "client", "the sender's own address"},
	{"g", "gateway", "the address of the network's gateway"},
	{"h0", "host up0", "the host's address on the first uplink"},
	{"h1", "host up1", "on the second uplink"},
	{"ht", "host tun0", "on the link without Ethernet header"},
	{"lo", "loopback", "a loopback address"},
}

// Report is a run as a document, its last line the summary.
func Report(rows []Row, list []Departure, sum Summary) string {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	p(`# Conformance

Made by "make conformance". The same topology, with the same containers, under Docker Engine 20.10.24 with iptables and
docker-proxy, the same without docker-proxy, and under bpfnet; and the same packets in each. The measure is what at
least one of the first two delivers, as whom the server sees the sender, and with which TTL or hop limit; where Engine
29 does otherwise, or bpfnet departs from both, the departure is expected and has its reason.

- %d cells; the reference delivers %d of them (%d %%).
- %d do what the reference does, %d do what a departure says, %d differ.
`, sum.Cells, sum.Delivered, 100*sum.Delivered/max(sum.Cells, 1), sum.Cells-sum.Explained-sum.Differences, sum.Explained, sum.Differences)
	numbers := departureTable(p, rows, list)
	p(`
## What is asked

| from | |
|---|---|
| remote | a machine beyond a router |
| tun | a machine behind a link without Ethernet header |
| neighbour | a machine on the segment of the first uplink, whose routes to the containers' subnets lead to the host |
| host | a program of the host |
| self | the container that serves |
| same, other | a container of the same network, of another network |

| to | |
|---|---|
| container, unpublished | the container's address: a port that is published, one that is not |
| any, any-second, any-loopback, gateway, own-gateway | a port published without an address: at the address of the first uplink, of the second, 127.0.0.1 or ::1, of the network's gateway, of the gateway of the sender's network |
| one, one-second | a port published at the address of the first uplink: there, and at that of the second |
| loopback, loopback-out | a port published at 127.0.0.2 and ::1: there, and at the address of the first uplink |
| host, host-gateway | a program of the host: at the address of the first uplink, of the gateway |
| to-remote, to-tun, to-neighbour | programs outside |

SCTP is an INIT and its answer, made by hand: neither kernel nor docker-proxy need to know the protocol. Every packet
begins with TTL 64; for TCP, that of the SYN is meant. What is not answered is sent three times, with more time for
each.

Left out:
`)
	for _, r := range reasons {
		p("- %s.", r.text)
	}
	p(`
## Results

Each field is what bpfnet does, IPv4 / IPv6, or both at once where they are alike: whom the server sees, and the TTL
that it sees. – is closed, a blank no question, the number in brackets a departure, **bold** a difference.
`)
	var legend []string
	for _, s := range sources {
		legend = append(legend, fmt.Sprintf("%s: %s", s.short, s.text))
	}
	p("%s.", strings.Join(legend, "; "))
	byCell := map[Cell]Row{}
	for _, r := range rows {
		byCell[r.Cell] = r
	}
	for _, o := range Options {
		optionTable(p, o, byCell, numbers)
	}
	p("\n%s", sum)
	return b.String()
}

// departureTable lists what was expected to depart, with its counts, and returns each one's number.
func departureTable(p func(string, ...any), rows []Row, list []Departure) map[string]int {
	p("## Departures\n\n| | departure | cells | of them: open, closed there | source or TTL only | kind | reason |\n|---|---|---|---|---|---|---|")
	numbers := map[string]int{}
	for i, d := range list {
		numbers[d.Name] = i + 1
		var all, opened, closed, view int
		for _, r := range rows {
			if r.Departure != d.Name || r.Verdict != Explained {
				continue
			}
			all++
			switch {
			case r.Bpfnet.Delivered && !r.DeliveredInReference():
				opened++
			case !r.Bpfnet.Delivered:
				closed++
			default:
				view++
			}
		}
		p("| %d | %s | %d | %d, %d | %d | %s | %s |", i+1, d.Name, all, opened, closed, view, d.Kind, d.Reason)
	}
	return numbers
}

func optionTable(p func(string, ...any), o Option, rows map[Cell]Row, numbers map[string]int) {
	field := func(from, to, proto string) string {
		v4, ok4 := rows[Cell{from, to, proto, "v4", o.Name}]
		v6, ok6 := rows[Cell{from, to, proto, "v6", o.Name}]
		short4, short6 := "", ""
		if ok4 {
			short4 = short(v4, numbers)
		}
		if ok6 {
			short6 = short(v6, numbers)
		}
		switch {
		case !ok4 && !ok6:
			return ""
		case short4 == short6:
			return short4
		}
		return strings.TrimRight(short4+" / "+short6, " ")
	}
	var columns []string
	for _, to := range Tos {
		if slices.ContainsFunc(Froms, func(from string) bool {
			return slices.ContainsFunc(Protos, func(proto string) bool { return field(from, to, proto) != "" })
		}) {
			columns = append(columns, to)
		}
	}
	if len(columns) == 0 {
		return
	}
	p("\n### %s\n\n%s.\n\n| from | | %s |\n|---|---|%s", o.Name, o.Text, strings.Join(columns, " | "), strings.Repeat("---|", len(columns)))
	for _, from := range Froms {
		for _, proto := range Protos {
			var fields []string
			for _, to := range columns {
				fields = append(fields, field(from, to, proto))
			}
			if strings.Join(fields, "") != "" {
				p("| %s | %s | %s |", from, proto, strings.Join(fields, " | "))
			}
		}
	}
}

// short is a row's outcome in a few letters.
func short(r Row, numbers map[string]int) string {
	text := "–"
	if r.Bpfnet.Delivered {
		text = r.Bpfnet.Source
		for _, s := range sources {
			if s.name == r.Bpfnet.Source {
				text = s.short
			}
		}
		text = fmt.Sprintf("%s %d", text, r.Bpfnet.TTL)
	}
	switch {
	case r.Verdict == Differs:
		return "**" + text + "**"
	case r.Departure != "":
		return fmt.Sprintf("%s (%d)", text, numbers[r.Departure])
	}
	return text
}
