// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/maps"
)

// shielded is a world whose daemon has a shield, on one of its uplinks.
func shielded(t *testing.T) *world {
	t.Helper()
	w := readable(t)
	snap := sampleSnapshot()
	snap.Shield = &api.Shield{Mode: "native", SynRate: 50, Denied: 2, Devices: []api.ShieldDevice{
		{Device: "eth0"}, {Device: "wg0", Why: "its packets have no Ethernet header"},
	}}
	w.write(snap)
	w.counters.drops = append(w.counters.drops, maps.Drop{Reason: "denied", Hook: "shield", Packets: 12, Bytes: 768})
	for i, prefix := range []string{"203.0.113.0/24", "2001:db8:bad::/48"} {
		w.counters.denied = append(w.counters.denied, maps.Denied{Prefix: netip.MustParsePrefix(prefix), Packets: uint64(12 - 12*i)})
	}
	return w
}

func TestShieldOutput(t *testing.T) {
	for name, args := range map[string][]string{
		"shield.txt":        {"shield"},
		"shield.json":       {"shield", "-o", "json"},
		"status-shield.txt": {"status"},
	} {
		t.Run(name, func(t *testing.T) { golden(t, filepath.Join("testdata", name), shielded(t).must(args...)) })
	}
	assert.Equal(t, "Shield: off; it is on with \"bpfnet daemon --shield\"\n", readable(t).must("shield"))
}

// Who would cut off the terminal that the command is typed in has to say that it is meant. No daemon is asked.
func TestDenyCaller(t *testing.T) {
	w := newWorld(t)
	w.environment("SSH_CONNECTION=198.51.100.77 50000 192.0.2.1 22")
	want := "bpfnet: deny add: prefix 198.51.100.64/26: has 198.51.100.77 in it, from where you are logged in; if that is meant, say --force"
	assert.Equal(t, want, w.fails(1, "deny", "add", "203.0.113.0/24", "198.51.100.64/26"))
	for _, args := range [][]string{{"--force", "198.51.100.64/26"}, {"203.0.113.0/24"}} {
		assert.Contains(t, w.fails(1, append([]string{"deny", "add"}, args...)...), "the daemon is not running")
	}
}

func TestShieldFlags(t *testing.T) {
	w := newWorld(t)
	w.must("daemon", "--docker", "off", "--shield-mode", "generic")
	require.Empty(t, w.daemon.Shield, "a mode is no shield")
	w.must("daemon", "--docker", "off", "--shield", "--shield-syn-rate", "20")
	require.Equal(t, loader.ShieldNative, w.daemon.Shield)
	require.Equal(t, 20, w.daemon.ShieldSynRate)
	w.must("daemon", "--docker", "off", "--shield", "--shield-mode", "generic")
	require.Equal(t, loader.ShieldGeneric, w.daemon.Shield)
}
