// SPDX-License-Identifier: Apache-2.0

package api

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// The requests, HTTP over the daemon's unix socket. Bodies and answers are JSON; what fails answers
// with a failure and a status that is not 2xx.
const (
	pathStatus   = "/v1/status"           // GET: Status
	pathMetrics  = "/metrics"             // GET, for Prometheus
	pathAllow    = "/v1/network/allow"    // POST Pair: Result
	pathDisallow = "/v1/network/disallow" // POST Pair: Result
	pathAnnounce = "/v1/port/announce"    // POST PortBinding: Result

	// The verbs of Embedded, by their last word: POST.
	pathNetwork = "/v1/network/"
	pathSandbox = "/v1/sandbox/"
	pathPort    = "/v1/port/"
)

// Status is what only a running daemon can say; the rest is in the snapshot.
type Status struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
}

// Result of a verb.
type Result struct {
	Changed bool `json:"changed"` // false: it was so already
}

// PortBinding is a published port as the engine's port hook knows it.
type PortBinding struct {
	Proto     string         `json:"proto"` // "tcp", "udp" or "sctp"
	Host      netip.AddrPort `json:"host"`
	Container netip.AddrPort `json:"container"`
}

// UnknownError says that there is nothing of that name.
type UnknownError struct {
	What    string   `json:"what"` // "network" or "sandbox"
	Name    string   `json:"name"`
	Nearest []string `json:"nearest,omitempty"` // names that there are
}

func (e *UnknownError) Error() string {
	if len(e.Nearest) == 0 {
		return fmt.Sprintf("%s %q: no such %[1]s; no %[1]s is known yet", e.What, e.Name)
	}
	return fmt.Sprintf("%s %q: no such %[1]s; the nearest names are %[3]s", e.What, e.Name, strings.Join(e.Nearest, ", "))
}

// ErrNotRunning says that no daemon listens on the socket.
var ErrNotRunning = errors.New("the daemon is not running")

// ErrInUse says that another daemon listens on the socket.
var ErrInUse = errors.New("another daemon listens there")

// failure is the answer to a request that failed.
type failure struct {
	Error   string        `json:"error"`
	Unknown *UnknownError `json:"unknown,omitempty"`
}
