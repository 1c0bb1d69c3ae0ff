// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
)

// What no script comes to: the host is too busy, and the accounts contradict each other.
func TestPrintExplanation(t *testing.T) {
	e := api.Explanation{
		From: api.Side{Kind: "container", Name: "web", Network: "blue", Addr: netip.MustParseAddr("172.30.0.2"), Device: "veth1"},
		To:   api.Side{Kind: "outside", Addr: netip.MustParseAddr("203.0.113.1"), Device: "eth0"}, Proto: "tcp",
		Sent: api.Ends{From: "172.30.0.2:40000", To: "203.0.113.1:443"}, Path: "dropped", Reason: "snat_exhausted",
		Policy:   api.Policy{Path: "uplink", Steps: []string{"one", "two"}},
		DataPath: &api.DataPath{Path: "dropped", Reason: "snat_exhausted", Hook: "container", Programs: []string{"from_container"}, ByState: true},
	}
	out := new(bytes.Buffer)
	a := &App{Stdout: out}
	require.NoError(t, a.printExplanation(e))
	assert.Equal(t, `From       web (172.30.0.2) in network blue, by veth1
To         203.0.113.1, outside, by eth0
Packet     tcp 172.30.0.2:40000 > 203.0.113.1:443

Policy     one
           two
Data path  from_container: dropped as snat_exhausted

Verdict    dropped as snat_exhausted, just now: policy would let it go
`, out.String())

	e.Disagree, e.DataPath.ByState = "this and that", false
	out.Reset()
	require.NoError(t, a.printExplanation(e))
	assert.Contains(t, out.String(), "Verdict    dropped as snat_exhausted\n           CONTRADICTION: this and that\n")
	e.Path, e.Received = "uplink", api.Ends{From: "192.0.2.1:5000", To: "203.0.113.1:443"}
	assert.Equal(t, "leaves for 203.0.113.1:443 by eth0 by the fast path, as 192.0.2.1:5000", verdictText(e))
}
