// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

const (
	readmeHeading = "## How fast\n"
	readmeBefore  = "## First command\n" // where the section goes that is not there
)

// readmeLines are the lines of the README's table: what the values of modes are divided by.
var readmeLines = []struct{ what, scenario, base string }{
	{"container → container, of what two processes in one namespace reach", "container-container", Loopback},
	{"client → published port, of what a server on the host reaches", "published", Host},
	{"container → outside, of what a client on the host reaches", "egress", Host},
	{"host → its own published port, of what docker-proxy reaches", "host-published", DockerProxy},
}

// Readme is the README's section on this result.
func (r Report) Readme() string {
	var out strings.Builder
	out.WriteString(readmeHeading)
	fmt.Fprintf(&out, `
Measured by `+"`make bench`"+` on %s (%s, Linux %s, both ends on one CPU):
medians over IPv4, as shares of what is possible without forwarding, or of docker-proxy. The rest, and what these numbers do
not say, is in [docs/performance.md](docs/performance.md).

| | requests: bpfnet | Docker's iptables | connections: bpfnet | Docker's iptables | one stream: bpfnet | Docker's iptables |
|---|---|---|---|---|---|---|
`, r.Header.Started.UTC().Format(time.DateOnly), r.Header.CPU, r.Header.Kernel)
	for _, line := range readmeLines {
		fmt.Fprintf(&out, "| %s", line.what)
		for _, metric := range []string{"rr", "crr", "stream1"} {
			for _, mode := range []string{Bpfnet, DockerIPTables} {
				fmt.Fprintf(&out, " | %s", r.share(line.scenario, mode, line.base, metric))
			}
		}
		out.WriteString(" |\n")
	}
	out.WriteString("\n")
	value := func(scenario, mode, metric string, at int) string {
		family := 4
		if scenario == RunPorts {
			family = 0
		}
		rec, ok := r.find(reachKey(scenario, mode, family, metric, at))
		if !ok {
			return "–"
		}
		return withUnit(rec.Unit, rec.Median)
	}
	fmt.Fprintf(&out, `New connections to one published port beside 10 000 others: %s by bpfnet (%s alone), %s by iptables (%s
alone). `+"`docker run`"+` with 1 000 published ports: %s with bpfnet, %s with iptables, %s with Docker's default settings.

`,
		value("ports", Bpfnet, "crr", 10000), value("ports", Bpfnet, "crr", 1),
		value("ports", DockerIPTables, "crr", 10000), value("ports", DockerIPTables, "crr", 1),
		value(RunPorts, Bpfnet, "start", 1000), value(RunPorts, DockerIPTables, "start", 1000), value(RunPorts, DockerProxy, "start", 1000))
	return out.String()
}

// share is the median of a mode as a share of another's.
func (r Report) share(scenario, mode, base, metric string) string {
	of, ok := r.find(reachKey(scenario, mode, 4, metric, 0))
	by, also := r.find(reachKey(scenario, base, 4, metric, 0))
	if !ok || !also {
		return "–"
	}
	ratio, ok := RatioOf(of, by)
	if !ok {
		return "–"
	}
	return digits(ratio.Value)
}

// InReadme puts the section into a README, in place of the one that is there.
func (r Report) InReadme(text string) (string, error) {
	if before, rest, there := strings.Cut(text, readmeHeading); there {
		next := strings.Index(rest, "\n## ") + 1
		if next == 0 {
			next = len(rest)
		}
		return before + r.Readme() + rest[next:], nil
	}
	before, after, there := strings.Cut(text, readmeBefore)
	if !there {
		return "", errors.New("no place for how fast it is: neither " + strings.TrimSpace(readmeHeading) + " nor " + strings.TrimSpace(readmeBefore))
	}
	return before + r.Readme() + readmeBefore + after, nil
}
