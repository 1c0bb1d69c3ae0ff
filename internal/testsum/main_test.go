// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const stream = `{"Action":"start","Package":"a"}
{"Action":"run","Package":"a","Test":"TestP"}
{"Action":"output","Package":"a","Test":"TestP","Output":"=== RUN   TestP\n"}
{"Action":"run","Package":"a","Test":"TestP/one"}
{"Action":"output","Package":"a","Test":"TestP/one","Output":"a log\n"}
{"Action":"pass","Package":"a","Test":"TestP/one","Elapsed":1}
{"Action":"pass","Package":"a","Test":"TestP","Elapsed":12}
{"Action":"run","Package":"a","Test":"TestS"}
{"Action":"output","Package":"a","Test":"TestS","Output":"    x_test.go:1: no root\n"}
{"Action":"output","Package":"a","Test":"TestS","Output":"--- SKIP: TestS (0.00s)\n"}
{"Action":"skip","Package":"a","Test":"TestS","Elapsed":0}
{"Action":"output","Package":"a","Output":"PASS\n"}
{"Action":"output","Package":"a","Output":"ok  \ta\t12.0s\n"}
{"Action":"pass","Package":"a","Elapsed":12}
`

func run(t *testing.T, in string) (sums, string, error) {
	t.Helper()
	var out strings.Builder
	s, err := summarise(strings.NewReader(in), &out)
	return s, out.String(), err
}

func TestPassed(t *testing.T) {
	s, out, err := run(t, stream)
	require.NoError(t, err)
	assert.Equal(t, "1 passed, 0 failed, 1 skipped", s.String())
	assert.Equal(t, "passed in 12s: TestP\nok  \ta\t12.0s\nskipped: a TestS: x_test.go:1: no root\n", out)
}

func TestFailed(t *testing.T) {
	s, out, err := run(t, `{"Action":"start","Package":"a"}
{"Action":"run","Package":"a","Test":"TestP"}
{"Action":"run","Package":"a","Test":"TestP/one"}
{"Action":"output","Package":"a","Test":"TestP/one","Output":"why\n"}
{"Action":"fail","Package":"a","Test":"TestP/one"}
{"Action":"run","Package":"a","Test":"TestP/two"}
{"Action":"output","Package":"a","Test":"TestP/two","Output":"fine\n"}
{"Action":"pass","Package":"a","Test":"TestP/two"}
{"Action":"fail","Package":"a","Test":"TestP"}
{"Action":"output","Package":"a","Output":"FAIL\ta\t1s\n"}
{"Action":"fail","Package":"a"}
`)
	require.NoError(t, err)
	assert.Equal(t, "1 passed, 1 failed, 0 skipped", s.String())
	assert.Equal(t, "why\nFAIL\ta\t1s\n", out)
}

func TestFailedOutsideOfTests(t *testing.T) {
	s, out, err := run(t, `{"ImportPath":"a","Action":"build-output","Output":"a.go:1: nonsense\n"}
{"ImportPath":"a","Action":"build-fail"}
{"Action":"start","Package":"a"}
{"Action":"output","Package":"a","Output":"FAIL\ta [build failed]\n"}
{"Action":"fail","Package":"a","FailedBuild":"a"}
{"Action":"start","Package":"b"}
{"Action":"run","Package":"b","Test":"TestX"}
{"Action":"output","Package":"b","Test":"TestX","Output":"panic: oh\n"}
{"Action":"fail","Package":"b"}
go: a word of its own
`)
	require.NoError(t, err)
	assert.Equal(t, "0 passed, 2 failed, 0 skipped", s.String())
	assert.Equal(t, "a.go:1: nonsense\nFAIL\ta [build failed]\npanic: oh\ngo: a word of its own\n", out)
}

func TestStreamThatEndsEarlyIsAFailure(t *testing.T) {
	for cut := range stream {
		if stream[cut] != '\n' || cut == len(stream)-1 {
			continue
		}
		s, _, err := run(t, stream[:cut+1])
		require.ErrorContains(t, err, "in the middle of a")
		assert.Equal(t, 1, s.failed)
	}
}
