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
	pathAllow    = "/v1/network/allow"    // POST Pair: Result
	pathDisallow = "/v1/network/disallow" // POST Pair: Result
	pathPublish  = "/v1/port/publish"     // POST PortBinding: Result
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

// UnknownNetworkError says that there is no network of that name.
type UnknownNetworkError struct {
	Name    string   `json:"name"`
	Nearest []string `json:"nearest,omitempty"` // names that there are
}

func (e *UnknownNetworkError) Error() string {
	if len(e.Nearest) == 0 {
		return fmt.Sprintf("network %q: no such network; no network is known yet", e.Name)
	}
	return fmt.Sprintf("network %q: no such network; the nearest names are %s", e.Name, strings.Join(e.Nearest, ", "))
}

// ErrNotRunning says that no daemon listens on the socket.
var ErrNotRunning = errors.New("the daemon is not running")

// ErrInUse says that another daemon listens on the socket.
var ErrInUse = errors.New("another daemon listens there")

// failure is the answer to a request that failed.
type failure struct {
	Error          string               `json:"error"`
	UnknownNetwork *UnknownNetworkError `json:"unknown_network,omitempty"`
}
