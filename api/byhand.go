// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"net/netip"
)

const (
	pathAllowEndpoint    = "/v1/endpoint/allow"    // POST ByHand: Result
	pathDisallowEndpoint = "/v1/endpoint/disallow" // POST Named: Result
)

// ByHand is an endpoint that no engine made: a port of a network's bridge.
type ByHand struct {
	Device string       `json:"device"` // the host's side
	Addrs  []netip.Addr `json:"addrs"`  // at most one a family
	MAC    string       `json:"mac,omitempty"`
}

// AllowEndpoint serves a device that somebody made a port of a network's bridge.
func (c *Client) AllowEndpoint(ctx context.Context, e ByHand) (Result, error) {
	return call[Result](ctx, c, pathAllowEndpoint, e)
}

// DisallowEndpoint takes AllowEndpoint back.
func (c *Client) DisallowEndpoint(ctx context.Context, n Named) (Result, error) {
	return call[Result](ctx, c, pathDisallowEndpoint, n)
}
