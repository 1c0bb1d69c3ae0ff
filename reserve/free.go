// SPDX-License-Identifier: Apache-2.0

package reserve

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/policy"
)

// The host ports to choose from where none is asked for, as the Docker Engine's allocator does by
// default: the dynamic ports of RFC 6335 6, without the first.
const (
	firstFree = 49153
	lastFree  = 65535
)

// RangeError says that every port of a range is in use.
type RangeError struct {
	Proto       policy.Proto
	First, Last uint16
}

func (e *RangeError) Error() string {
	if e.First == e.Last {
		return fmt.Sprintf("host port %d/%s: is published already; publish another port", e.First, e.Proto)
	}
	return fmt.Sprintf("host ports %d-%d/%s: all are in use; publish others", e.First, e.Last, e.Proto)
}

// Unwrap returns EADDRINUSE.
func (e *RangeError) Unwrap() error { return unix.EADDRINUSE }

// FreePort holds the lowest port from first to last that can be held on all of hosts at once, and
// for which taken, unless it is nil, is false. With first and last 0 it is any free port.
//
// If there is none the error is a *[RangeError]; if there was but one to choose from and a program
// of the host has it, the *[TakenError] of [Hold]. Other errors of Hold are returned at once.
func FreePort(proto policy.Proto, hosts []netip.Addr, first, last uint16, taken func(uint16) bool) (ports []*Port, port uint16, err error) {
	if first == 0 && last == 0 {
		first, last = firstFree, lastFree
	}
	if first == 0 || first > last {
		return nil, 0, fmt.Errorf("host ports %d-%d/%s: is no range; write the lower one first, from 1 on", first, last, proto)
	}
	take := func(proto policy.Proto, host netip.AddrPort) (*Port, error) { return hold(proto, host, unix.Bind) }
	if first == last {
		take = Hold // which does more to get it, and says who has it
	}
	for n := int(first); n <= int(last); n++ {
		port = uint16(n)
		if taken != nil && taken(port) {
			continue
		}
		ports, err = holdAll(take, proto, hosts, port)
		switch {
		case err == nil:
			return ports, port, nil
		case first == last || !errors.Is(err, unix.EADDRINUSE):
			return nil, 0, err
		}
	}
	return nil, 0, &RangeError{Proto: proto, First: first, Last: last}
}

// holdAll holds a port on all of hosts, or on none.
func holdAll(take func(policy.Proto, netip.AddrPort) (*Port, error), proto policy.Proto, hosts []netip.Addr, port uint16) ([]*Port, error) {
	ports := make([]*Port, 0, len(hosts))
	for _, host := range hosts {
		p, err := take(proto, netip.AddrPortFrom(host.Unmap(), port))
		if err != nil {
			for _, p := range ports {
				err = errors.Join(err, p.Close())
			}
			return nil, err
		}
		ports = append(ports, p)
	}
	return ports, nil
}
