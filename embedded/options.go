// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Options of networks, by Docker's names.
const (
	optBridge      = "com.docker.network.bridge.name"
	optICC         = "com.docker.network.bridge.enable_icc"
	optMasquerade  = "com.docker.network.bridge.enable_ip_masquerade"
	optHostBinding = "com.docker.network.bridge.host_binding_ipv4"
	optMTU         = "com.docker.network.driver.mtu"
)

var knownOptions = []string{optBridge, optICC, optMasquerade, optHostBinding, optMTU}

// options are a network's, read.
type options struct {
	noICC        bool
	noMasquerade bool
	hostBinding  netip.Addr // invalid: all
	mtu          int        // bytes; 0: the kernel's default
}

// parseOptions refuses what it does not know: a wrong word would open what was to be closed.
func parseOptions(given map[string]string) (o options, err error) {
	for _, key := range slices.Sorted(maps.Keys(given)) {
		value := given[key]
		switch key {
		case optBridge:
			// netdev checks it.
		case optICC:
			o.noICC, err = isFalse(key, value)
		case optMasquerade:
			o.noMasquerade, err = isFalse(key, value)
		case optHostBinding:
			a, perr := netip.ParseAddr(value)
			if perr != nil || !a.Is4() {
				return o, fmt.Errorf("option %s: %q is no IPv4 address", key, value)
			}
			if !a.IsUnspecified() {
				o.hostBinding = a
			}
		case optMTU:
			if o.mtu, err = strconv.Atoi(value); err != nil || o.mtu < 68 || o.mtu > 65535 {
				err = fmt.Errorf("option %s: %q is no MTU; use a number from 68 to 65535", key, value)
			}
		default:
			err = fmt.Errorf("option %q: not known; there are %s", key, strings.Join(knownOptions, ", "))
		}
		if err != nil {
			return o, err
		}
	}
	return o, nil
}

func isFalse(key, value string) (bool, error) {
	b, err := strconv.ParseBool(value)
	if err != nil {
		return false, fmt.Errorf("option %s: %q is neither true nor false", key, value)
	}
	return !b, nil
}
