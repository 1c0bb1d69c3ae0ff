// SPDX-License-Identifier: Apache-2.0

package policy

import (
	"fmt"
	"net/netip"
	"testing"
)

// crowd is 10 networks with 100 containers on each of them, a published port for each container.
func crowd() Intents {
	in := Intents{Attached: make(map[int]bool)}
	for n := range 10 {
		id := fmt.Sprintf("network-%064d", n)
		in.State.Networks = append(in.State.Networks, Network{
			ID: id, Name: fmt.Sprintf("n%d", n), Source: SourceDocker, Bridge: fmt.Sprintf("br-%d", n),
			Subnets:  []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 50, byte(n), 0}), 24)},
			Gateways: []netip.Addr{netip.AddrFrom4([4]byte{10, 50, byte(n), 1})},
		})
		in.Devices.Bridges = append(in.Devices.Bridges, Bridge{Ifindex: 10 + n, Name: fmt.Sprintf("br-%d", n), MTU: 1500, Up: true})
		for c := range 100 {
			e := Endpoint{
				ID: fmt.Sprintf("endpoint-%055d", 7919*(100*n+c)%1000), NetworkID: id, SandboxID: fmt.Sprintf("container-%054d", c),
				Name: fmt.Sprintf("c%d", c), Source: SourceDocker, MAC: MAC{2, 0x42, 10, 50, byte(n), byte(c)},
				Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 50, byte(n), byte(c + 2)})},
			}
			ifindex := 100 + 100*n + c
			in.State.Endpoints = append(in.State.Endpoints, e)
			in.Devices.Links = append(in.Devices.Links, Link{Ifindex: ifindex, Name: fmt.Sprintf("veth%d", ifindex), Bridge: fmt.Sprintf("br-%d", n), PeerMAC: e.MAC})
			in.Attached[ifindex] = true
			if n == 0 {
				in.State.Ports = append(in.State.Ports, Port{
					Proto: TCP, Host: netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(8000+c)), EndpointID: e.ID, Target: 80,
				})
			}
		}
	}
	return in
}

// A round compiles so much when one of a thousand endpoints has come or gone.
func BenchmarkCompile(b *testing.B) {
	in := crowd()
	_, slots := Compile(in, Slots{})
	b.ReportAllocs()
	for b.Loop() {
		Compile(in, slots)
	}
}

// A round compares so much to find that there is nothing new.
func BenchmarkIntentsEqual(b *testing.B) {
	x, y := crowd(), crowd()
	for b.Loop() {
		if !x.Equal(y) {
			b.Fatal("not equal")
		}
	}
}
