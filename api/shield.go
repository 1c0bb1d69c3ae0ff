// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"net/http"
	"net/netip"
)

const (
	pathDeny   = "/v1/shield/deny"   // POST DenySpec: DenyResult
	pathUndeny = "/v1/shield/undeny" // POST DenySpec: DenyResult
	pathDenied = "/v1/shield/denied" // GET: DenyList
)

// DenySpec names prefixes to put on the deny list or to take off it.
type DenySpec struct {
	Prefixes []netip.Prefix `json:"prefixes"`
	Force    bool           `json:"force,omitempty"` // also what would cut the host off
}

// DenyResult is what became of them.
type DenyResult struct {
	Changed int  `json:"changed"` // the others were so already
	Shield  bool `json:"shield"`  // false: there is none, and nothing is kept out
}

// DenyList is what the shield keeps out.
type DenyList struct {
	Prefixes []netip.Prefix `json:"prefixes"`
	Shield   bool           `json:"shield"` // false: there is none, and nothing is kept out
}

// Shield is the shield in the snapshot.
type Shield struct {
	Mode    string         `json:"mode"`     // "native" or "generic"
	SynRate int            `json:"syn_rate"` // connections a second and source; 0: any number
	Denied  int            `json:"denied"`   // prefixes
	Devices []ShieldDevice `json:"devices"`  // all uplinks
}

// ShieldDevice is an uplink.
type ShieldDevice struct {
	Device string `json:"device"`
	Why    string `json:"why,omitempty"` // the shield is not on it
}

// Deny puts prefixes on the deny list.
func (c *Client) Deny(ctx context.Context, s DenySpec) (DenyResult, error) {
	return call[DenyResult](ctx, c, pathDeny, s)
}

// Undeny takes prefixes off the deny list.
func (c *Client) Undeny(ctx context.Context, s DenySpec) (DenyResult, error) {
	return call[DenyResult](ctx, c, pathUndeny, s)
}

// Denied asks for the deny list.
func (c *Client) Denied(ctx context.Context) (DenyList, error) {
	var l DenyList
	err := c.do(ctx, http.MethodGet, pathDenied, nil, &l)
	return l, err
}
