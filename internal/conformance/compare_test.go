// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	closed  = Outcome{Note: "silent"}
	client  = Outcome{Delivered: true, Source: "client", TTL: 63}
	client4 = Outcome{Delivered: true, Source: "client", TTL: 64}
	gateway = Outcome{Delivered: true, Source: "gateway", TTL: 64}

	cell    = Cell{Other, Any, "tcp", "v4", "default"}
	pattern = []Pattern{{From: []string{Other}}}
)

func TestCompare(t *testing.T) {
	open := &Departure{Cells: pattern, Expect: Expect{Delivered: true, Source: "client"}}
	shut := &Departure{Cells: pattern, Expect: Expect{}}
	counted := &Departure{Cells: pattern, Expect: Expect{Delivered: true, Source: "client", TTL: 64}}
	elsewhere := &Departure{Cells: []Pattern{{From: []string{Self}}}, Expect: Expect{}}
	for name, c := range map[string]struct {
		proxy, none, bpfnet Outcome
		departure           *Departure
		want                Verdict
	}{
		"all alike":                               {client, client, client, nil, Agrees},
		"all closed, however":                     {closed, Outcome{Note: "refused"}, closed, nil, Agrees},
		"as docker-proxy":                         {gateway, closed, gateway, nil, Agrees},
		"as without docker-proxy":                 {gateway, client, client, nil, Agrees},
		"open, closed in both":                    {closed, closed, client, nil, Differs},
		"closed, open in one":                     {closed, client, closed, nil, Differs},
		"another source":                          {gateway, closed, client, nil, Differs},
		"another TTL":                             {client4, client4, client, nil, Differs},
		"a departure about others":                {gateway, closed, client, elsewhere, Differs},
		"another source, as expected":             {gateway, closed, client, open, Explained},
		"open, as expected":                       {closed, closed, client, open, Explained},
		"closed, as expected":                     {client, client, closed, shut, Explained},
		"the reference does what is expected too": {client, client, client, open, Agrees},
		"closed, against what is expected":        {gateway, closed, closed, open, Differs},
		"open, against what is expected":          {client, client, client, shut, Differs},
		"the departure does not occur":            {gateway, closed, gateway, open, Differs},
		"the source kept, but another TTL":        {client4, closed, client, open, Differs},
		"the source of one, the TTL of none":      {gateway, client4, client, open, Differs},
		"not the TTL that is expected":            {gateway, closed, client, counted, Differs},
		"the TTL that is expected":                {gateway, client, client4, counted, Explained},
	} {
		t.Run(name, func(t *testing.T) {
			rows := []Row{{Cell: cell, Proxy: c.proxy, NoProxy: c.none, Bpfnet: c.bpfnet}}
			var list []Departure
			if c.departure != nil {
				c.departure.Name = "it"
				list = append(list, *c.departure)
			}
			sum, err := Compare(rows, list)
			require.NoError(t, err)
			assert.Equal(t, c.want, rows[0].Verdict)
			assert.Equal(t, c.want == Explained, sum.Explained == 1)
			assert.Equal(t, c.want == Differs, sum.Differences == 1)
			assert.Equal(t, c.departure != nil && c.want != Explained, len(sum.Unused) == 1)
			assert.Equal(t, c.proxy.Delivered || c.none.Delivered, sum.Delivered == 1)
		})
	}
}

func TestDepartures(t *testing.T) {
	list, err := Departures()
	require.NoError(t, err)
	require.NotEmpty(t, list)
	const good = `{"name": "a", "cells": [{"from": ["other"]}], "expect": {"delivered": true}, "kind": "on purpose", "reason": "r"}`
	_, err = ParseDepartures([]byte("[" + good + "]"))
	require.NoError(t, err)
	for bad, want := range map[string]string{
		"[" + good + "," + good + "]":                                      `"a": there are two of that name`,
		"[" + good + "," + strings.Replace(good, `"a"`, `"b"`, 1) + "]":    `"a" and "b": both match`,
		"[" + good + "] []":                                                "more follows",
		"[" + strings.Replace(good, `"reason"`, `"because"`, 1) + "]":      "because",
		"[" + strings.Replace(good, `on purpose`, `it is so`, 1) + "]":     `kind "it is so"`,
		"[" + strings.Replace(good, `"other"`, `"mars"`, 1) + "]":          `from "mars"`,
		"[" + strings.Replace(good, `"a"`, `""`, 1) + "]":                  "name and reason",
		"[" + strings.Replace(good, `true`, `false, "ttl": 64`, 1) + "]":   "not delivered",
		"[" + strings.Replace(good, `]}`, `], "to": ["to-tun"]}`, 1) + "]": "matches no cell",
	} {
		_, err := ParseDepartures([]byte(bad))
		assert.ErrorContains(t, err, want, bad)
	}
}

func TestReport(t *testing.T) {
	rows := []Row{
		{Cell: cell, Proxy: gateway, Bpfnet: client},
		{Cell: Cell{Other, Any, "tcp", "v6", "default"}, Bpfnet: closed},
		{Cell: Cell{Remote, Any, "udp", "v4", "default"}, Proxy: client, Bpfnet: gateway},
	}
	list := []Departure{{
		Name: "kept", Cells: []Pattern{{From: []string{Other}, Family: []string{"v4"}}}, Kind: "client address kept", Reason: "Why.",
		Expect: Expect{Delivered: true, Source: "client"},
	}}
	sum, err := Compare(rows, list)
	require.NoError(t, err)
	text := Report(rows, list, sum)
	for _, want := range []string{
		"\n| other | tcp | c 63 (1) / – |\n", "\n| remote | udp | **g 64** / |\n", "| 1 | kept | 1 | 0, 0 | 1 | client address kept | Why. |\n",
		"\nconformance: 3 cells, 1 explained, 1 differences\n", "3 cells; the reference delivers 2 of them (66 %)",
	} {
		assert.Contains(t, text, want)
	}
	assert.True(t, strings.HasSuffix(text, sum.String()+"\n"))
}
