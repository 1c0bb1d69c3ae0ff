// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Probe is one attempt to reach an address by a protocol.
type Probe struct {
	ID    string         `json:"id"`
	Proto string         `json:"proto"` // tcp, udp, icmp, sctp
	To    netip.AddrPort `json:"to"`    // the port means nothing for icmp
}

// ProbeResult is what has become of a probe.
type ProbeResult struct {
	ID    string   `json:"id"`
	State string   `json:"state"` // answered, refused, silent; error: it could not be sent
	Tags  []string `json:"tags"`  // one for each try; the last is that of the answer
	Tries int      `json:"tries"`
	Error string   `json:"error,omitempty"`
}

// Answered reports whether an answer has come back.
func (r ProbeResult) Answered() bool { return r.State == "answered" }

// Sighting is what a witness has seen of a probe.
type Sighting struct {
	Tag   string     `json:"tag"`
	Proto string     `json:"proto"`
	Src   netip.Addr `json:"src"`
	Dst   netip.Addr `json:"dst"` // that was reached
	TTL   int        `json:"ttl"` // of the packet, hop limit for IPv6; TCP: of the SYN
}

// Probe runs "labtool probe" in the namespace: all probes at the same time. Those that
// nobody answers take three seconds.
func (n *NS) Probe(probes []Probe) ([]ProbeResult, error) {
	if len(probes) == 0 {
		return nil, nil
	}
	orders, err := json.Marshal(probes)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := n.Command(ctx, n.lab.Tool, "probe")
	cmd.Stdin = bytes.NewReader(orders)
	out, err := run(cmd)
	if err != nil {
		return nil, fmt.Errorf("in %s: %w", n.Name, err)
	}
	var results []ProbeResult
	if err := json.Unmarshal([]byte(out), &results); err != nil {
		return nil, fmt.Errorf("in %s: labtool probe: %w: %s", n.Name, err, out)
	}
	return results, nil
}

// Witness is a "labtool witness" that runs.
type Witness struct{ *Process }

// Witness starts "labtool witness" in the namespace and waits until it listens.
func (n *NS) Witness(t testing.TB, args ...string) *Witness {
	t.Helper()
	return &Witness{n.startServer(t, "witness", args)}
}

// Sightings are the probes that it has seen so far, by their tags.
func (w *Witness) Sightings() (map[string]Sighting, error) {
	seen := map[string]Sighting{}
	for line := range strings.Lines(w.Stdout()) {
		if !strings.HasPrefix(line, "{") || !strings.HasSuffix(line, "\n") { // "ready", or half a line
			continue
		}
		var s Sighting
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			return nil, fmt.Errorf("labtool witness: %w: %s", err, line)
		}
		seen[s.Tag] = s
	}
	return seen, nil
}
