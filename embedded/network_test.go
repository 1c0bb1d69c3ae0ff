// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/ipam"
	"github.com/bpfnet/bpfnet/policy"
)

// bridgeAddrs are the addresses of a bridge, link-local ones apart.
func bridgeAddrs(t *testing.T, name string) []string {
	t.Helper()
	l, err := netlink.LinkByName(name)
	require.NoError(t, err)
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	require.NoError(t, err)
	var out []string
	for _, a := range addrs {
		if !a.IP.IsLinkLocalUnicast() {
			out = append(out, a.IPNet.String())
		}
	}
	return out
}

// Needs root: a network is in the state, in the store and in the kernel, and all of it goes with it.
func TestCreateNetwork(t *testing.T) {
	w := newWorld(t)
	empty := w.look()
	c := w.network(api.NetworkSpec{
		Name: "n1", Driver: "bridge", Subnets: []netip.Prefix{prefix("172.19.0.0/16"), prefix("fd00:19::/64")},
		Gateways: []netip.Addr{addr("172.19.0.254")}, Ranges: []netip.Prefix{prefix("172.19.4.0/24")}, Internal: true,
		Options: map[string]string{
			policy.OptBridge: "br-mine", policy.OptICC: "false", policy.OptMasquerade: "false", policy.OptHostBinding: "127.0.0.1", policy.OptMTU: "1400",
		},
		Labels: map[string]string{"a": "b"},
	})
	assert.Len(t, c.ID, 64)
	assert.Equal(t, policy.Network{
		ID: c.ID, Name: "n1", Source: policy.SourceStore, Bridge: "br-mine",
		Subnets:  []netip.Prefix{prefix("172.19.0.0/16"), prefix("fd00:19::/64")},
		Gateways: []netip.Addr{addr("172.19.0.254"), addr("fd00:19::1")},
		NoICC:    true, NoMasquerade: true, Internal: true, HostBinding: addr("127.0.0.1"), MTU: 1400,
	}, w.State().Networks[0])
	assert.Equal(t, w.State(), w.applied)
	assert.ElementsMatch(t, []string{"172.19.0.254/16", "fd00:19::1/64"}, bridgeAddrs(t, "br-mine"))
	v := w.View().Networks[c.ID]
	assert.Equal(t, []netip.Prefix{prefix("172.19.4.0/24")}, v.Ranges)
	assert.Equal(t, map[string]string{"a": "b"}, v.Labels)
	assert.False(t, v.Created.IsZero())

	w.restart()
	assert.Len(t, w.State().Networks, 1)
	gone, err := w.RemoveNetwork(t.Context(), api.Named{Name: c.ID[:5]})
	require.NoError(t, err)
	assert.Equal(t, c, gone)
	w.same(empty, "after the network is gone")
	assert.Empty(t, w.applied.Networks)
}

// Needs root: subnets come from the pools, past what others use.
func TestSubnetsFromPools(t *testing.T) {
	w := newWorld(t)
	w.foreign.Networks = []policy.Network{{ID: "d1", Name: "bridge", Subnets: []netip.Prefix{prefix("172.17.0.0/16")}}}
	addRoute(t, "172.18.5.0/24")
	w.network(api.NetworkSpec{Name: "n1"})
	w.network(api.NetworkSpec{Name: "n2", IPv6: true})
	require.NoError(t, w.Default(t.Context()))
	subnets := make(map[string][]netip.Prefix)
	for _, n := range w.State().Networks {
		subnets[n.Name] = n.Subnets
	}
	assert.Equal(t, []netip.Prefix{prefix("172.19.0.0/16")}, subnets["n1"])
	require.Len(t, subnets["n2"], 2)
	assert.Equal(t, prefix("172.20.0.0/16"), subnets["n2"][0])
	assert.True(t, prefix("fd00::/8").Contains(subnets["n2"][1].Addr()))
	assert.Equal(t, prefix("172.21.0.0/16"), subnets[DefaultNetwork][0])
	assert.Len(t, subnets[DefaultNetwork], 2, "an IPv6 one is generated")
	assert.Equal(t, []string{defaultBridge}, ownLinks(t, w.opts.Devices)[:1])

	require.NoError(t, w.Default(t.Context()), "once more")
	assert.Len(t, w.State().Networks, 3)
}

// addRoute gives the host a route, by a device that is there for it.
func addRoute(t *testing.T, to string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "up0"
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "up1"}
	require.NoError(t, netlink.LinkAdd(veth))
	t.Cleanup(func() { assert.NoError(t, netlink.LinkDel(veth)) })
	setUp(t, "up0")
	dst, err := netlink.ParseIPNet(to)
	require.NoError(t, err)
	require.NoError(t, netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Attrs().Index, Dst: dst, Scope: netlink.SCOPE_LINK}))
}

// Needs root: what is refused, in which words, and that it changes nothing.
func TestCreateNetworkRefused(t *testing.T) {
	w := newWorld(t)
	w.foreign.Networks = []policy.Network{{ID: "d1", Name: "bridge", Subnets: []netip.Prefix{prefix("172.17.0.0/16")}}}
	addRoute(t, "10.9.0.0/16")
	w.network(api.NetworkSpec{Name: "n1", Subnets: []netip.Prefix{prefix("172.19.0.0/16")}, Options: map[string]string{policy.OptBridge: "br-n1"}})
	for _, c := range []struct {
		spec api.NetworkSpec
		text string
	}{
		{api.NetworkSpec{Name: "n1"}, `network "n1": bpfnet has one of that name; choose another`},
		{api.NetworkSpec{Name: "bridge"}, `network "bridge": Docker has one of that name; choose another`},
		{api.NetworkSpec{Name: "host"}, `network "host": the name has a meaning of its own; choose another`},
		{api.NetworkSpec{Name: "container:x"}, `network "container:x": the name has a meaning of its own; choose another`},
		{api.NetworkSpec{Name: "a b"}, `network "a b": is no name; use two or more of a-z, A-Z, 0-9, _, . and -, a letter or digit first`},
		{api.NetworkSpec{Name: "bpfnet"}, `network "bpfnet": is the default network, which is made when it is first used; its subnet is said with bpfnet daemon --default-subnet`},
		{api.NetworkSpec{Name: "n2", Driver: "overlay"}, `driver "overlay": not served; use bridge`},
		{api.NetworkSpec{Name: "n2", Subnets: []netip.Prefix{prefix("172.19.4.0/24")}},
			`network "n2": subnet 172.19.4.0/24: overlaps 172.19.0.0/16 of network "n1"; choose another with --subnet`},
		{api.NetworkSpec{Name: "n2", Subnets: []netip.Prefix{prefix("172.16.0.0/15")}},
			`network "n2": subnet 172.16.0.0/15: overlaps 172.17.0.0/16 of Docker's network "bridge"; choose another with --subnet`},
		{api.NetworkSpec{Name: "n2", Subnets: []netip.Prefix{prefix("10.9.8.0/24")}},
			`network "n2": subnet 10.9.8.0/24: overlaps 10.9.0.0/16 of the host's route by up0; choose another with --subnet`},
		{api.NetworkSpec{Name: "n2", Subnets: []netip.Prefix{prefix("10.1.0.1/16")}},
			`network "n2": subnet 10.1.0.1/16: has host bits set; write 10.1.0.0/16`},
		{api.NetworkSpec{Name: "n2", Subnets: []netip.Prefix{prefix("10.1.0.0/16"), prefix("10.2.0.0/16")}},
			`network "n2": subnet 10.2.0.0/16: a second one of its family, behind 10.1.0.0/16; give one`},
		{api.NetworkSpec{Name: "n2", Subnets: []netip.Prefix{prefix("10.1.0.0/16")}, Gateways: []netip.Addr{addr("10.2.0.1")}},
			`network "n2": gateway 10.2.0.1: outside of subnet 10.1.0.0/16; choose an address in it`},
		{api.NetworkSpec{Name: "n2", Gateways: []netip.Addr{addr("10.2.0.1")}},
			`network "n2": gateway 10.2.0.1: has no subnet to be in; give that too, with --subnet`},
		{api.NetworkSpec{Name: "n2", Ranges: []netip.Prefix{prefix("10.2.0.0/24")}},
			`network "n2": ip-range 10.2.0.0/24: has no subnet to be part of; give that too, with --subnet`},
		{api.NetworkSpec{Name: "n2", Subnets: []netip.Prefix{prefix("10.1.0.0/16")}, Ranges: []netip.Prefix{prefix("10.2.0.0/24")}},
			`network "n2": ip-range 10.2.0.0/24: outside of subnet 10.1.0.0/16; choose a part of it`},
		{api.NetworkSpec{Name: "n2", Options: map[string]string{"mtu": "1400"}},
			`network "n2": option "mtu": not known; there are com.docker.network.bridge.name, com.docker.network.bridge.enable_icc, com.docker.network.bridge.enable_ip_masquerade, com.docker.network.bridge.host_binding_ipv4, com.docker.network.bridge.gateway_mode_ipv4, com.docker.network.bridge.gateway_mode_ipv6, com.docker.network.bridge.trusted_host_interfaces, com.docker.network.host_ipv4, com.docker.network.host_ipv6, com.docker.network.driver.mtu`},
		{api.NetworkSpec{Name: "n2", Options: map[string]string{policy.OptICC: "maybe"}},
			`network "n2": option com.docker.network.bridge.enable_icc: "maybe" is neither true nor false`},
		{api.NetworkSpec{Name: "n2", Options: map[string]string{policy.OptMTU: "9"}},
			`network "n2": option com.docker.network.driver.mtu: "9" is no MTU; use a number from 68 to 65535`},
		{api.NetworkSpec{Name: "n2", Options: map[string]string{policy.OptHostBinding: "nonsense"}},
			`network "n2": option com.docker.network.bridge.host_binding_ipv4: "nonsense" is no address`},
		{api.NetworkSpec{Name: "n2", Options: map[string]string{policy.OptMode4: "rooted"}},
			`network "n2": option com.docker.network.bridge.gateway_mode_ipv4: "rooted" is no gateway mode; use one of nat, nat-unprotected, routed, isolated`},
		{api.NetworkSpec{Name: "n2", Options: map[string]string{policy.OptMode6: "isolated"}},
			`network "n2": option com.docker.network.bridge.gateway_mode_ipv6: isolated is for networks made with --internal`},
		{api.NetworkSpec{Name: "n2", Options: map[string]string{policy.OptBridge: "br-n1"}},
			`bridge br-n1: is that of network "n1"; choose another name`},
		{api.NetworkSpec{Name: "n2", Options: map[string]string{policy.OptBridge: "up0"}},
			`network "n2": bridge up0: a device of that name exists and is no bridge but a veth; choose another name`},
	} {
		w.refuses(c.text, func() error {
			_, err := w.CreateNetwork(t.Context(), c.spec)
			return err
		})
	}
	w.opts.Pools = []ipam.Pool{{Base: prefix("172.17.0.0/16"), Bits: 16}}
	w.restart()
	w.refuses(`network "n2": the address pools are used up; choose a subnet with --subnet, or remove a network`, func() error {
		_, err := w.CreateNetwork(t.Context(), api.NetworkSpec{Name: "n2"})
		return err
	})
	w.set(func() { w.applyErr = assert.AnError })
	w.refuses(`network "n2": the data path does not follow: `+assert.AnError.Error()+`; network "n2": is removed, but not all of it: `+assert.AnError.Error(), func() error {
		_, err := w.CreateNetwork(t.Context(), api.NetworkSpec{Name: "n2", Subnets: []netip.Prefix{prefix("10.1.0.0/16")}})
		return err
	})
	w.set(func() { w.applyErr = nil })
}

// Needs root: a network goes when nobody is in it, and the default one comes back.
func TestRemoveNetwork(t *testing.T) {
	w := newWorld(t)
	w.foreign.Networks = []policy.Network{{ID: "d1", Name: "theirs"}}
	w.network(api.NetworkSpec{Name: "n1"})
	remove := func(name string) func() error {
		return func() error {
			_, err := w.RemoveNetwork(t.Context(), api.Named{Name: name})
			return err
		}
	}
	spec := w.spec("web")
	spec.Networks = []api.Attach{{Network: "bpfnet/n1"}}
	web := w.run(spec)
	spec.Name = "db"
	db := w.run(spec)
	spec.Name = "later"
	w.create(spec)
	w.refuses(`network "n1": in use by db, web; disconnect or remove them first`, remove("n1"))
	w.refuses(`network "n2": no such network; the nearest names are n1`, remove("n2"))
	w.refuses(`network "theirs": is a network of Docker; use "docker network rm theirs"`, remove("theirs"))
	w.refuses(`network "docker/n1": is a network of Docker; use "docker network rm n1"`, remove("docker/n1"))
	web.finish(0)
	db.finish(0)
	require.NoError(t, remove("bpfnet/n1")())
	assert.Empty(t, ownLinks(t, w.opts.Devices))
	own, err := w.opts.Store.Own()
	require.NoError(t, err)
	assert.Empty(t, own.Networks)
	assert.Empty(t, own.Releases, "go with their network")

	// What refers to it says so, and can be helped.
	id := w.status("later").Networks[0]
	w.refuses(`sandbox "later": its network `+id+` has been removed; take it out: bpfnet network disconnect `+id+` later`, func() error {
		_, err := w.try("later")
		return err
	})
	_, err = w.Disconnect(t.Context(), api.Connection{Sandbox: "later", Attach: api.Attach{Network: id}})
	require.NoError(t, err)
	_, err = w.Connect(t.Context(), api.Connection{Sandbox: "later", Attach: api.Attach{Network: DefaultNetwork}})
	require.NoError(t, err)
	w.launch("later").finish(0)
	require.NoError(t, remove(DefaultNetwork)())
	w.run(w.spec("again")).finish(0)
	assert.Len(t, w.State().Networks, 1)
}
