// SPDX-License-Identifier: Apache-2.0

// Package lab builds the hosts that tests run on: network namespaces joined by
// veth pairs, a Docker Engine in one of them, and the daemon under test beside it.
//
//	 client                      host                        client2
//	┌──────┐   192.0.2.0/24    ┌──────┐   198.51.100.0/24   ┌──────┐
//	│ eth0 ├───────────────────┤ up0  │                     │      │ lo: 203.0.113.1
//	│ .2   │  2001:db8:1::/64  │ .1   │                     │      │     2001:db8:3::1
//	└──────┘                   │  up1 ├─────────────────────┤ eth0 │
//	                           │  .1  │  2001:db8:2::/64    │ .2   │
//	                           └──────┘                     └──────┘
//
// Both clients route by default through host, host routes by default to client2,
// whose loopback addresses stand for the internet. None has a route to the machine
// that runs the tests. The host is a hostile one: its FORWARD policy is DROP in both
// families, and its nftables rules look at the connection state, so that connection
// tracking is on. Counters at every netfilter hook tell whether a packet strayed
// there; see [Lab.NFTCounters].
//
// Everything is real: no mocks, no sleeps. What a test makes is named after the test
// process (bl-XXXXXX-N), registered for removal as soon as it exists, and looked for
// by [Main] at the end; whatever is left then fails the process.
//
// All of it needs root and the packages of "scripts/deps.sh test".
package lab
