// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPlanForwarding(t *testing.T) {
	base := map[string]string{
		"net/ipv4/ip_forward":             "0",
		"net/ipv6/conf/all/forwarding":    "0",
		"net/ipv6/conf/eth0/accept_ra":    "1",
		"net/ipv6/conf/eth1/accept_ra":    "0",
		"net/ipv6/conf/eth0.10/accept_ra": "1",
		"net/ipv4/conf/lo/route_localnet": "0",
		"net/ipv4/conf/lo/accept_local":   "0",
	}
	uplinks := []string{"eth0", "eth1", "eth0.10", "wg0"}
	v6 := []Change{{Path: "net/ipv6/conf/all/forwarding", Old: "0", New: "1"}}
	for _, c := range []struct {
		name    string
		set     map[string]string // "-" removes
		earlier []Change
		want    []Setting
	}{
		{"fresh host", nil, nil, []Setting{
			{"net/ipv6/conf/eth0/accept_ra", "2"},
			{"net/ipv6/conf/eth0.10/accept_ra", "2"},
			{"net/ipv4/ip_forward", "1"},
			{"net/ipv6/conf/all/forwarding", "1"},
			{"net/ipv4/conf/lo/route_localnet", "1"},
			{"net/ipv4/conf/lo/accept_local", "1"},
		}},
		{"a router keeps its choice about advertisements", map[string]string{
			"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1",
		}, nil, []Setting{{"net/ipv4/conf/lo/route_localnet", "1"}, {"net/ipv4/conf/lo/accept_local", "1"}}},
		{"an uplink that came after our switch", map[string]string{
			"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1", "net/ipv6/conf/eth0/accept_ra": "2",
			"net/ipv4/conf/lo/route_localnet": "1", "net/ipv4/conf/lo/accept_local": "1",
		}, v6, []Setting{{"net/ipv6/conf/eth0.10/accept_ra", "2"}}},
		{"no IPv6", map[string]string{
			"net/ipv6/conf/all/forwarding": "-", "net/ipv6/conf/eth0/accept_ra": "-",
			"net/ipv6/conf/eth1/accept_ra": "-", "net/ipv6/conf/eth0.10/accept_ra": "-",
		}, nil, []Setting{
			{"net/ipv4/ip_forward", "1"}, {"net/ipv4/conf/lo/route_localnet", "1"}, {"net/ipv4/conf/lo/accept_local", "1"},
		}},
		{"br_netfilter", map[string]string{
			"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1",
			"net/ipv4/conf/lo/route_localnet": "1", "net/ipv4/conf/lo/accept_local": "1",
			"net/bridge/bridge-nf-call-iptables": "1", "net/bridge/bridge-nf-call-ip6tables": "0",
			"net/bridge/bridge-nf-call-arptables": "1",
		}, nil, []Setting{
			{"net/bridge/bridge-nf-call-iptables", "0"},
			{"net/bridge/bridge-nf-call-arptables", "0"},
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := PlanForwarding(func(path string) (string, error) {
				if v, ok := c.set[path]; ok && v != "-" {
					return v, nil
				} else if v, inBase := base[path]; inBase && !ok {
					return v, nil
				}
				return "", fs.ErrNotExist
			}, uplinks, c.earlier)
			require.NoError(t, err)
			require.Equal(t, c.want, got)
		})
	}
	_, err := PlanForwarding(func(string) (string, error) { return "", errors.New("broken") }, nil, nil)
	require.EqualError(t, err, "broken")
}

func TestMerge(t *testing.T) {
	first := []Change{{Path: "a", Old: "0", New: "1"}, {Path: "b", Old: "x", New: "y"}, {Path: "d", Old: "1", New: "1", Side: true}}
	got := Merge(first, []Change{
		{Path: "a", Old: "5", New: "2"}, // someone set 5 in between: the first value counts
		{Path: "b", Old: "y", New: "x"}, // back where it was
		{Path: "c", Old: "1", New: "0"},
	})
	require.Equal(t, []Change{{Path: "a", Old: "0", New: "2"}, {Path: "d", Old: "1", New: "1", Side: true}, {Path: "c", Old: "1", New: "0"}}, got)
	require.Equal(t, "1", first[0].New, "arguments stay as they are")
	require.Empty(t, Merge(nil, nil))
}

func TestParseRanges(t *testing.T) {
	for s, want := range map[string][]PortRange{
		"":               nil,
		"80":             {{80, 80}},
		"80,8000-8010,9": {{80, 80}, {8000, 8010}, {9, 9}},
	} {
		got, err := parseRanges(s)
		require.NoError(t, err)
		require.Equal(t, want, got)
		require.Equal(t, s, formatRanges(got))
	}
	for _, s := range []string{"a", "1-", "9-8", "65536", "-1"} {
		_, err := parseRanges(s)
		require.Error(t, err, s)
	}
	require.Equal(t, 11, PortRange{8000, 8010}.Len())
}
