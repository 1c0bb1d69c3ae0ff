// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"testing"
	"time"
)

// pollInterval is the time between two looks at a condition: short against the
// milliseconds that a process takes to start, long against the cost of a look.
const pollInterval = 10 * time.Millisecond

// Eventually waits until cond holds and fails the test at once when it does not
// within timeout. What names the condition in the failure: "container answers".
// Cond runs on the calling goroutine, so it may use t.
func Eventually(t testing.TB, timeout time.Duration, what string, cond func() bool) {
	t.Helper()
	if !poll(timeout, cond) {
		t.Fatalf("not within %v: %s", timeout, what)
	}
}

// poll reports whether cond came to hold within timeout.
func poll(timeout time.Duration, cond func() bool) bool {
	if cond() {
		return true
	}
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			if cond() {
				return true
			}
		case <-deadline.C:
			return cond()
		}
	}
}
