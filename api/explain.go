// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"net/netip"
)

const pathExplain = "/v1/explain" // POST Question: Explanation

// Question is about the first packet of a connection that nobody has to make.
type Question struct {
	// From and To are names of containers, CONTAINER:NETWORK where one has several, addresses, or "host".
	From string `json:"from"`
	To   string `json:"to"`
	// Proto is "tcp", "udp", "sctp" or "icmp". Optional: tcp to a port, an echo request without.
	Proto string `json:"proto,omitempty"`
	Port  uint16 `json:"port,omitempty"` // that is dialled
	// Source is the address that a container claims to send from. Optional: its own.
	Source netip.Addr `json:"source,omitzero"`
}

// Explanation is what becomes of that packet, and why.
type Explanation struct {
	From  Side   `json:"from"`
	To    Side   `json:"to"`
	Proto string `json:"proto"`
	// Path is "dropped", "container" and "uplink" (the fast path), "stack", "bridge" and "host" (the kernel's own), or "socket":
	// the host's socket itself is sent to the container.
	Path   string `json:"path"`
	Reason string `json:"reason,omitempty"` // of a drop, by the name of its counter
	Port   *Port  `json:"port,omitempty"`   // the published one that it goes by
	// Sent and Received are the packet's ends before and after translation, an echo's without port numbers.
	Sent     Ends   `json:"sent"`
	Received Ends   `json:"received"`
	Policy   Policy `json:"policy"`
	// DataPath is what the programs do. Nil: they were not asked; Why says why.
	DataPath *DataPath `json:"data_path,omitempty"`
	Why      string    `json:"why,omitempty"`
	// Disagree says in what the two contradict each other; empty: in nothing.
	Disagree string `json:"disagree,omitempty"`
}

// Side is one end of a question.
type Side struct {
	Kind    string     `json:"kind"` // "container", "host", "outside", or "nobody": an address of a network that no container has
	Name    string     `json:"name,omitempty"`
	Network string     `json:"network,omitempty"`
	Addr    netip.Addr `json:"addr"`
	Device  string     `json:"device,omitempty"` // of the host, by which it is reached
}

// Ends are those of a packet.
type Ends struct {
	From string `json:"from"` // address, with a port where there is one
	To   string `json:"to"`
}

// Policy is what the tables say that the daemon has compiled.
type Policy struct {
	Path   string   `json:"path"`
	Reason string   `json:"reason,omitempty"`
	Steps  []string `json:"steps"`
}

// DataPath is what the programs say that are on the devices, run on the live maps.
type DataPath struct {
	Path     string   `json:"path"`
	Reason   string   `json:"reason,omitempty"`
	Hook     string   `json:"hook,omitempty"`
	Programs []string `json:"programs"` // that the packet passes, in order
	// ByState: it is dropped for what the host is busy with just now, not for what anybody has set.
	ByState bool `json:"by_state,omitempty"`
}

// Explain says what becomes of the first packet of a connection. It fails with UnknownError.
func (c *Client) Explain(ctx context.Context, q Question) (Explanation, error) {
	return call[Explanation](ctx, c, pathExplain, q)
}
