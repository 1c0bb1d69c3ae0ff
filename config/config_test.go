// SPDX-License-Identifier: Apache-2.0

package config

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var keys = []Key{{"docker", Text}, {"flows", Number}, {"strict", Switch}, {"uplink", List}, {"timeout", Pairs}}

func near(string, []string) []string { return []string{"flows", "docker"} }

func TestParse(t *testing.T) {
	got, err := Parse("f", []byte(`# a comment
docker: off
flows: 1000

strict: true
uplink: [eth0, wg0]
timeout:
  udp: 5m
  icmp: 30s
`), keys, near)
	require.NoError(t, err)
	assert.Equal(t, map[string]Value{
		"docker": {[]string{"off"}, 2}, "flows": {[]string{"1000"}, 3}, "strict": {[]string{"true"}, 5},
		"uplink": {[]string{"eth0", "wg0"}, 6}, "timeout": {[]string{"udp=5m", "icmp=30s"}, 7},
	}, got)
	got, err = Parse("f", []byte("uplink: eth0\n"), keys, near)
	require.NoError(t, err)
	assert.Equal(t, []string{"eth0"}, got["uplink"].Words)
	for _, empty := range []string{"", "# nothing\n", "---\n", "~"} {
		got, err = Parse("f", []byte(empty), keys, near)
		require.NoError(t, err, empty)
		assert.Empty(t, got)
	}
}

func TestParseErrors(t *testing.T) {
	for text, want := range map[string]string{
		"docker: off\nflow: 5\n":           "f:2: flow: no such key; the nearest are flows, docker",
		"flows: many":                      `f:1: flows: want a whole number, have "many"`,
		"flows: 1.5":                       `f:1: flows: want a whole number, have "1.5"`,
		"flows: [1]":                       "f:1: flows: want a whole number, have a list",
		"flows:":                           "f:1: flows: want a whole number, have nothing",
		"strict: yes":                      `f:1: strict: want true or false, have "yes"`,
		"uplink: {a: b}":                   "f:1: uplink: want a list, have pairs of name and value",
		"uplink: [a, [b]]":                 "f:1: uplink: in a list, want texts, have a list",
		"timeout: 5m":                      `f:1: timeout: want pairs of name and value, have "5m"`,
		"timeout: {udp: [1]}":              "f:1: timeout: behind udp, want a text, have a list",
		"docker: {a: b}":                   "f:1: docker: want a text, have pairs of name and value",
		"flows: 1\n\nflows: 2":             "f:3: flows: a second time; the first is in line 1",
		"timeout: {udp: 5m,\n udp: 6m}":    "f:1: timeout: udp a second time; the first is in line 1",
		"flows: 1\n---\nflows: 2":          "f:2: a second YAML document; put all keys into the first",
		"flows: 1\n---\n[":                 "f:3: no YAML: did not find expected node content",
		"- a":                              "f:1: want lines of KEY: VALUE",
		"docker: off\n\tflows: 1":          "f:2: no YAML: found a tab character that violates indentation",
		"flow: 5\nstrict: 1\ndocker: unix": "f:1: flow: no such key; the nearest are flows, docker\nf:2: strict: want true or false, have \"1\"",
	} {
		_, err := Parse("f", []byte(text), keys, near)
		assert.EqualError(t, err, want, text)
	}
}

// What is right is returned beside what is wrong.
func TestParseGoesOn(t *testing.T) {
	got, err := Parse("f", []byte("flow: 5\ndocker: off\n"), keys, near)
	var e *Error
	require.ErrorAs(t, err, &e)
	assert.Equal(t, 1, e.Line)
	assert.Equal(t, []string{"off"}, got["docker"].Words)
}

func TestVariables(t *testing.T) {
	assert.Equal(t, "BPFNET_LOG_LEVEL", Variable("log-level"))
	words, err := ParseVariable(List, "eth0, wg0")
	require.NoError(t, err)
	assert.Equal(t, []string{"eth0", "wg0"}, words)
	_, err = ParseVariable(Number, "x")
	require.EqualError(t, err, `want a whole number, have "x"`)
	_, err = ParseVariable(Pairs, "udp=5m,icmp")
	require.EqualError(t, err, `want NAME=VALUE, have "icmp"`)
}

// Nothing that a file holds stops the reader otherwise than by an error.
func FuzzParse(f *testing.F) {
	f.Add([]byte("docker: off\nuplink: [a, &b c, *b]\ntimeout: {udp: 5m}\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		got, err := Parse("f", raw, keys, near)
		for name, v := range got {
			if len(v.Words) == 0 && name != "uplink" && name != "timeout" {
				t.Errorf("%s has no value (%v)", name, err)
			}
		}
	})
}
