// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Options of bridge networks, by Docker's names.
const (
	OptBridge      = "com.docker.network.bridge.name"
	OptICC         = "com.docker.network.bridge.enable_icc"
	OptMasquerade  = "com.docker.network.bridge.enable_ip_masquerade"
	OptHostBinding = "com.docker.network.bridge.host_binding_ipv4"
	OptMode4       = "com.docker.network.bridge.gateway_mode_ipv4"
	OptMode6       = "com.docker.network.bridge.gateway_mode_ipv6"
	OptTrusted     = "com.docker.network.bridge.trusted_host_interfaces"
	OptSource4     = "com.docker.network.host_ipv4"
	OptSource6     = "com.docker.network.host_ipv6"
	OptMTU         = "com.docker.network.driver.mtu"
)

// KnownOptions are the options that ParseOptions reads.
var KnownOptions = []string{
	OptBridge, OptICC, OptMasquerade, OptHostBinding, OptMode4, OptMode6, OptTrusted, OptSource4, OptSource6, OptMTU,
}

// GatewayMode is how a network's containers are reached from beyond it, for one family.
type GatewayMode uint8

// The gateway modes, from Docker's table. All but the first are explained there by what they add or take.
const (
	// ModeNAT: by published ports on the host's addresses only.
	ModeNAT GatewayMode = iota
	// ModeNATUnprotected: as ModeNAT, and every port by the container's own address.
	ModeNATUnprotected
	// ModeRouted: published ports and ICMP by the container's own address; no address is translated.
	ModeRouted
	// ModeIsolated: not even by the host. For internal networks.
	ModeIsolated
)

var modeNames = []string{"nat", "nat-unprotected", "routed", "isolated"}

// String returns Docker's name.
func (m GatewayMode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("mode-%d", uint8(m))
}

// Options are a network's, read.
type Options struct {
	NoICC        bool
	NoMasquerade bool
	HostBinding  netip.Addr // invalid: all
	Mode4, Mode6 GatewayMode
	Source4      netip.Addr // to masquerade with; invalid: the route's
	Source6      netip.Addr
	Trusted      []string // devices
	MTU          int      // bytes; 0: the kernel's default
}

// Problem is something in the settings that cannot be served as it was asked for.
type Problem struct {
	Network string // by its qualified name; empty where it is about no single one
	Setting string // a label, an option or a port, by its name
	Text    string // what is wrong
	Instead string // what is done
}

// CompareProblems orders them by what they are about.
func CompareProblems(a, b Problem) int {
	return cmp.Or(strings.Compare(a.Network, b.Network), strings.Compare(a.Setting, b.Setting),
		strings.Compare(a.Text, b.Text), strings.Compare(a.Instead, b.Instead))
}

// wrong notes a problem of a setting.
type wrong func(setting, text, instead string)

// ParseOptions reads the options of a network by what Docker Engine 29 makes of them; keys that it does
// not know are left alone. What cannot be served is a problem each, and the options returned are never
// more open than asked for.
func ParseOptions(given map[string]string, internal bool) (o Options, problems []Problem) {
	wrong := func(key, text, instead string) {
		problems = append(problems, Problem{Setting: key, Text: text, Instead: instead})
	}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		value := given[key]
		if value == "" {
			continue // Docker's default
		}
		switch key {
		case OptICC:
			icc, err := strconv.ParseBool(value)
			if err != nil {
				wrong(key, strconv.Quote(value)+" is neither true nor false", "containers are kept apart")
			}
			o.NoICC = !icc
		case OptMasquerade:
			masquerade, err := strconv.ParseBool(value)
			if err != nil {
				wrong(key, strconv.Quote(value)+" is neither true nor false", "taken as true")
			}
			o.NoMasquerade = err == nil && !masquerade
		case OptHostBinding:
			a, err := netip.ParseAddr(value)
			if a = a.Unmap(); err != nil || a.Zone() != "" {
				wrong(key, strconv.Quote(value)+" is no address", "ports without one are published on loopback")
				o.HostBinding = netip.AddrFrom4([4]byte{127, 0, 0, 1})
			} else if a != netip.IPv4Unspecified() {
				o.HostBinding = a
			}
		case OptMode4:
			o.Mode4 = parseMode(key, value, internal, wrong)
		case OptMode6:
			o.Mode6 = parseMode(key, value, internal, wrong)
		case OptTrusted:
			for name := range strings.SplitSeq(value, ":") {
				if name = strings.TrimSpace(name); name != "" && !slices.Contains(o.Trusted, name) {
					o.Trusted = append(o.Trusted, name)
				}
			}
		case OptSource4:
			o.Source4 = parseSource(key, value, true, wrong)
		case OptSource6:
			o.Source6 = parseSource(key, value, false, wrong)
		case OptMTU:
			mtu, err := strconv.Atoi(value)
			if err != nil || mtu < 68 || mtu > 65535 {
				wrong(key, strconv.Quote(value)+" is no MTU; use a number from 68 to 65535", "the kernel's default is used")
				mtu = 0
			}
			o.MTU = mtu
		}
	}
	for _, s := range []struct {
		key  string
		addr netip.Addr
		mode GatewayMode
	}{{OptSource4, o.Source4, o.Mode4}, {OptSource6, o.Source6, o.Mode6}} {
		switch {
		case !s.addr.IsValid():
		case internal:
			wrong(s.key, "an internal network leads nowhere", "without effect")
		case s.mode == ModeRouted:
			wrong(s.key, "a routed network is not masqueraded", "without effect")
		case o.NoMasquerade:
			wrong(s.key, "masquerading is off ("+OptMasquerade+")", "without effect")
		}
	}
	if internal && len(o.Trusted) > 0 {
		wrong(OptTrusted, "an internal network is closed to all", "without effect")
	}
	return o, problems
}

func parseMode(key, value string, internal bool, wrong wrong) GatewayMode {
	i := slices.Index(modeNames, value)
	switch mode := GatewayMode(max(i, 0)); {
	case i < 0:
		wrong(key, strconv.Quote(value)+" is no gateway mode; use one of "+strings.Join(modeNames, ", "), "taken as nat")
		return ModeNAT
	case mode == ModeIsolated && !internal:
		wrong(key, "isolated is for networks made with --internal", "this one is closed as if it were")
		return mode
	case internal && (mode == ModeRouted || mode == ModeNATUnprotected):
		wrong(key, value+" contradicts --internal", "internal wins: nothing from outside is let in")
		return ModeNAT
	default:
		return mode
	}
}

func parseSource(key, value string, is4 bool, wrong wrong) netip.Addr {
	a, err := netip.ParseAddr(value)
	if err != nil || a.Is4() != is4 || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.Zone() != "" || a.Is4In6() {
		family := map[bool]string{true: "IPv4", false: "IPv6"}[is4]
		wrong(key, fmt.Sprintf("%q is no %s address of a host", value, family), "the route's own is used")
		return netip.Addr{}
	}
	return a
}
