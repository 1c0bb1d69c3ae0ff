// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"maps"
	"reflect"
	"slices"
)

// Equal reports whether Compile would make the same of both. Lists of other orders are not equal. What there
// may be thousands of is compared field by field: reflection takes fifty times as long.
func (in Intents) Equal(o Intents) bool {
	return in.DirectRouting == o.DirectRouting && in.State.Equal(o.State) && in.Devices.Equal(o.Devices) &&
		slices.Equal(in.Allowed, o.Allowed) && maps.Equal(in.Attached, o.Attached) &&
		maps.Equal(in.Relayed, o.Relayed) && maps.Equal(in.Unrelayed, o.Unrelayed)
}

// Equal reports whether both states tell the same, in the same order.
func (s State) Equal(o State) bool {
	return slices.Equal(s.Ports, o.Ports) && slices.EqualFunc(s.Endpoints, o.Endpoints, Endpoint.Equal) &&
		slices.Equal(s.Openings, o.Openings) && slices.Equal(s.Problems, o.Problems) && SameNetworks(s.Networks, o.Networks)
}

// SameNetworks reports whether both lists hold the same networks, in the same order.
func SameNetworks(a, b []Network) bool {
	return slices.EqualFunc(a, b, func(a, b Network) bool { return reflect.DeepEqual(a, b) })
}

// Equal reports whether both devices are the same, in the same order.
func (d Devices) Equal(o Devices) bool {
	return slices.Equal(d.Links, o.Links) && slices.Equal(d.HostAddrs, o.HostAddrs) &&
		slices.EqualFunc(d.Bridges, o.Bridges, func(a, b Bridge) bool { return reflect.DeepEqual(a, b) }) &&
		slices.EqualFunc(d.Uplinks, o.Uplinks, func(a, b Uplink) bool { return reflect.DeepEqual(a, b) })
}

// Equal reports whether both endpoints are the same in every field.
func (e Endpoint) Equal(o Endpoint) bool {
	return e.ID == o.ID && e.NetworkID == o.NetworkID && e.SandboxID == o.SandboxID && e.Name == o.Name &&
		e.Source == o.Source && e.MAC == o.MAC && slices.Equal(e.Addrs, o.Addrs) && slices.Equal(e.Allowed, o.Allowed)
}
