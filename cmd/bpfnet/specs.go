// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/docker/go-connections/nat"

	"github.com/bpfnet/bpfnet/api"
)

// Values of the command line that stand for addresses and ports. One that cannot be read is an error
// of status 1, like one that cannot be had.

const publishForm = "[IP:][HOST[-END]:]PORT[-END][/PROTO]"

// parsePublished reads ports as Docker's --publish has them. A range of ports with one as long of host
// ports is that many ports.
func parsePublished(what string, list []string) ([]api.PortSpec, error) {
	var out []api.PortSpec
	for _, s := range list {
		ports, err := parsePort(s)
		if err != nil {
			return nil, fmt.Errorf("%s %q: %w; want %s", what, s, err, publishForm)
		}
		out = append(out, ports...)
	}
	return out, nil
}

// parseExposed reads ports as Docker's --expose has them.
func parseExposed(what string, list []string) ([]api.PortSpec, error) {
	const form = "PORT[-END][/PROTO]"
	var out []api.PortSpec
	for _, s := range list {
		if strings.Contains(s, ":") {
			return nil, fmt.Errorf("%s %q: has no host port; want %s", what, s, form)
		}
		ports, err := parsePort(s)
		if err != nil {
			return nil, fmt.Errorf("%s %q: %w; want %s", what, s, err, form)
		}
		out = append(out, ports...)
	}
	return out, nil
}

func parsePort(s string) ([]api.PortSpec, error) {
	mappings, err := nat.ParsePortSpec(s)
	if err != nil {
		return nil, err
	}
	out := make([]api.PortSpec, 0, len(mappings))
	for _, m := range mappings {
		p := api.PortSpec{Proto: m.Port.Proto()}
		if p.Target, err = portNumber(m.Port.Port()); err != nil {
			return nil, err
		}
		if ip := m.Binding.HostIP; ip != "" {
			if p.Host, err = netip.ParseAddr(ip); err != nil {
				return nil, fmt.Errorf("invalid IP address: %s", ip)
			}
		}
		// Docker's host port 0 is any, like none.
		first, last, err := nat.ParsePortRangeToInt(m.Binding.HostPort)
		if err != nil {
			return nil, err
		}
		if first == 0 && last != 0 {
			return nil, fmt.Errorf("no port is numbered 0")
		}
		p.First, p.Last = uint16(first), uint16(last)
		out = append(out, p)
	}
	return out, nil
}

func portNumber(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("invalid port: %s", s)
	}
	if n == 0 {
		return 0, fmt.Errorf("no port is numbered 0")
	}
	return uint16(n), nil
}

// Families of addresses, where just one will do.
const (
	anyFamily = ""
	ip4Family = "IPv4"
	ip6Family = "IPv6"
)

// parseAddr reads an address. Nothing is the invalid address.
func parseAddr(what, s, family string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	example := map[string]string{
		anyFamily: "an address like 172.30.0.2 or fd00:1::2", ip4Family: "an IPv4 address like 172.30.0.2", ip6Family: "an IPv6 address like fd00:1::2",
	}[family]
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" || family == ip4Family && !a.Is4() || family == ip6Family && (!a.Is6() || a.Is4In6()) {
		return netip.Addr{}, fmt.Errorf("%s %q: want %s", what, s, example)
	}
	return a, nil
}

func parseAddrs(what string, list []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, s := range list {
		a, err := parseAddr(what, s, anyFamily)
		if err != nil {
			return nil, err
		}
		if !a.IsValid() {
			return nil, fmt.Errorf("%s: empty address", what)
		}
		out = append(out, a)
	}
	return out, nil
}

func parsePrefixes(what string, list []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("%s %q: want a subnet like 172.30.0.0/16 or fd00:1::/64", what, s)
		}
		out = append(out, p)
	}
	return out, nil
}

// parsePairs reads KEY=VALUE. With bare, a KEY alone has an empty value. The last of a key counts.
func parsePairs(what string, list []string, bare bool) (map[string]string, error) {
	if len(list) == 0 {
		return nil, nil
	}
	out := make(map[string]string, len(list))
	for _, s := range list {
		key, value, ok := strings.Cut(s, "=")
		if key == "" || !ok && !bare {
			return nil, fmt.Errorf("%s %q: want KEY=VALUE", what, s)
		}
		out[key] = value
	}
	return out, nil
}
