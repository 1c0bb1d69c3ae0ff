// SPDX-License-Identifier: Apache-2.0

// Package daemon runs bpfnet: sources of state, the reconciler that fills the maps, links, expiry and
// the api server, as tasks under one errgroup. Packets never wait for it.
package daemon

import (
	"io"
	"log/slog"
	"net/netip"
	"time"
)

// Paths are where an instance lives; several live beside each other with different ones.
type Paths struct {
	State  string // directory of the store and the snapshot
	Socket string // unix socket of the api
	BPFFS  string // directory below a bpffs mount, for pins
	Cgroup string // cgroup2 directory where the sock programs attach
}

// What Config.Relay can be.
const (
	RelayOwn  = "own"  // of bpfnet's own networks
	RelayAll  = "all"  // the Engine's too, where its userland proxy is off
	RelayNone = "none" // nobody's
)

// Config is a daemon's configuration. Everything but Paths has a usable zero value.
type Config struct {
	Paths

	Docker  string   // "unix:///run/docker.sock", or "off"
	Uplinks []string // device names; empty: found by itself
	Attach  string   // "", "tcx" or "clsact"; empty: tcx where the kernel has it

	// LinkType is the kind of pairs that join bpfnet's own sandboxes to their networks: netdev.LinkAuto,
	// LinkVeth or LinkNetkit. Optional: netdev.LinkVeth.
	LinkType string

	// Flows is the number of flows that the tables hold, rounded up to a power of two; 0: by memory.
	Flows int
	// EndpointFlows is the number of flows that one endpoint may have: opened by it, or to it from beyond
	// the containers. 0: any.
	EndpointFlows int
	// Timeouts overrides idle times by name: see TimeoutNames.
	Timeouts map[string]time.Duration
	// IPForwardNoDrop lets transit between foreign devices pass where bpfnet turned forwarding on.
	IPForwardNoDrop bool
	// DefaultBridgeNoMasquerade and DefaultBridgeNoICC are the settings of Docker's network
	// "bridge", whose own labels say nothing while iptables is off.
	DefaultBridgeNoMasquerade bool
	DefaultBridgeNoICC        bool
	// DefaultBridgeIP is the host address of that network's ports that are published without one.
	// Optional: any.
	DefaultBridgeIP netip.Addr

	// AllowDirectRouting has containers' published ports dialled by the containers' own addresses.
	AllowDirectRouting bool
	// AcceptMark lets packets with this mark, as far as AcceptMask goes, reach every port of every
	// container. Optional: a mask of 0 accepts none.
	AcceptMark, AcceptMask uint32

	// StrictCgroup is the cgroup2 directory that the engine's containers run below, where the programs
	// of strict mode go. Empty: no strict mode.
	StrictCgroup string

	// Shield is how the shield runs on uplinks: loader.ShieldNative or loader.ShieldGeneric. Empty: there is
	// none.
	Shield string
	// ShieldSynRate is how many connections a second one source may open to published ports. 0: any number.
	ShieldSynRate int

	// DefaultSubnets are those of bpfnet's own default network, at most one a family; none: an IPv4
	// one of the pools, and a generated IPv6 one.
	DefaultSubnets []netip.Prefix

	// Relay says whose containers with IPv4 only the relay publishes on IPv6 addresses. Optional: RelayOwn.
	Relay string

	// SocketGroup may ask beside root, by name or number. Optional: root's.
	SocketGroup string

	// MetricsListen is where metrics are served besides the socket. Optional: nowhere.
	MetricsListen netip.AddrPort
	// MetricsLimit is how many containers, and how many ports, have metrics of their own. 0: metrics.DefaultLimit.
	MetricsLimit int

	// Changes are taken up while the daemon runs. Optional.
	Changes <-chan Live

	Version string
	Logger  *slog.Logger
	// Banner is written once when the daemon serves: what it attached to and what to type next.
	// Optional.
	Banner io.Writer
}

// Live are the settings that can change while the daemon runs.
type Live struct {
	Timeouts               map[string]time.Duration
	AllowDirectRouting     bool
	AcceptMark, AcceptMask uint32
	EndpointFlows          int
	MetricsLimit           int
}

// Live returns those of c.
func (c Config) Live() Live {
	return Live{
		Timeouts: c.Timeouts, AllowDirectRouting: c.AllowDirectRouting,
		AcceptMark: c.AcceptMark, AcceptMask: c.AcceptMask, EndpointFlows: c.EndpointFlows, MetricsLimit: c.MetricsLimit,
	}
}

// CheckTimeouts says what is wrong with Timeouts.
func (c Config) CheckTimeouts() error {
	_, err := c.timeouts()
	return err
}
