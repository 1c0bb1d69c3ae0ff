// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/maps"
)

func TestDecodeHead(t *testing.T) {
	a, b := netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.2.0.3")
	a6, b6 := netip.MustParseAddr("fd01::2"), netip.MustParseAddr("fd02::3")
	macs := packet.MAC(net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2})
	at := netip.AddrPortFrom
	udp := packet.UDP(at(a, 4000), at(b, 53), macs)
	later := append([]byte{}, udp...)
	later[14+6], later[14+7] = 0, 5 // fragment offset
	for _, c := range []struct {
		name string
		raw  []byte
		l3   bool
		want packetHead
	}{
		{"TCP", packet.TCP(at(a, 4000), at(b, 80), macs, packet.Flags("S")), false,
			packetHead{Proto: "tcp", From: a, To: b, FromPort: 4000, ToPort: 80, HasPorts: true, Detail: "S"}},
		{"options", packet.TCP(at(a, 4000), at(b, 80), macs, packet.Flags("SA"), packet.IPOptions(1, 1, 1, 1)), false,
			packetHead{Proto: "tcp", From: a, To: b, FromPort: 4000, ToPort: 80, HasPorts: true, Detail: "S."}},
		{"VLAN", packet.UDP(at(a, 4000), at(b, 53), macs, packet.VLAN(7)), false,
			packetHead{Proto: "udp", From: a, To: b, FromPort: 4000, ToPort: 53, HasPorts: true}},
		{"IPv6", packet.UDP(at(a6, 4000), at(b6, 53), macs), false,
			packetHead{Proto: "udp", From: a6, To: b6, FromPort: 4000, ToPort: 53, HasPorts: true}},
		{"extension header", packet.UDP(at(a6, 4000), at(b6, 53), macs, packet.HopByHop()), false,
			packetHead{Proto: "udp", From: a6, To: b6, FromPort: 4000, ToPort: 53, HasPorts: true}},
		{"no link layer", udp[14:], true, packetHead{Proto: "udp", From: a, To: b, FromPort: 4000, ToPort: 53, HasPorts: true}},
		{"fragment", later, false, packetHead{Proto: "udp", From: a, To: b, Detail: "fragment"}},
		{"ARP", packet.ARP(a, b, false, macs), false, packetHead{Proto: "arp", From: a, To: b}},
		{"cut", udp[:14+20+2], false, packetHead{Proto: "udp", From: a, To: b}},
		{"cut in IP", udp[:14+19], false, packetHead{}},
		{"nothing", nil, false, packetHead{}},
	} {
		assert.Equal(t, c.want, decodeHead(c.raw, !c.l3), c.name)
	}
}

// No bytes upset it.
func FuzzDecodeHead(f *testing.F) {
	a := netip.MustParseAddrPort("10.1.0.2:1")
	f.Add(packet.UDP(a, a, packet.MAC(make(net.HardwareAddr, 6), make(net.HardwareAddr, 6))), true)
	f.Fuzz(func(_ *testing.T, raw []byte, ethernet bool) { decodeHead(raw, ethernet) })
}

func TestDropNames(t *testing.T) {
	snap := &api.Snapshot{
		Networks: []api.Network{{Name: "blue", Bridge: "br-blue"}, {Name: "red", Bridge: "br-red"}},
		Endpoints: []api.Endpoint{
			{Name: "web", Network: "blue", Addresses: []string{"10.1.0.2"}, Link: "veth1", Ifindex: 1 << 20},
			{Name: "db", Network: "red", Addresses: []string{"10.2.0.3"}, Link: "veth2", Ifindex: 1<<20 + 1},
		},
	}
	names := newDropNames(snap)
	macs := packet.MAC(net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2})
	frame := packet.TCP(netip.MustParseAddrPort("10.1.0.2:4000"), netip.MustParseAddrPort("10.2.0.3:80"), macs, packet.Flags("S"))
	e := maps.Event{Time: now, Reason: "isolated", Hook: "container", Ifindex: 1 << 20, Length: len(frame), Head: frame}
	d, wanted := names.event(e, dropFilter{})
	require.True(t, wanted)
	require.Equal(t, DropEvent{
		Time: now, Reason: "isolated", Hook: "container", Direction: "from container", Device: "veth1", Network: "blue",
		From: &Party{netip.MustParseAddr("10.1.0.2"), 4000, "web"}, To: &Party{netip.MustParseAddr("10.2.0.3"), 80, "db"},
		Proto: "tcp", Detail: "S", Length: len(frame),
	}, d)
	for _, c := range []struct {
		filter dropFilter
		wanted bool
	}{
		{dropFilter{container: "web"}, true},
		{dropFilter{container: "db"}, true},
		{dropFilter{container: "other"}, false},
		{dropFilter{network: "red"}, true},
		{dropFilter{network: "green"}, false},
		{dropFilter{reason: "isolated"}, true},
		{dropFilter{reason: "internal"}, false},
		{dropFilter{port: 80}, true},
		{dropFilter{port: 4000}, true},
		{dropFilter{port: 81}, false},
		{dropFilter{container: "web", port: 81}, false},
	} {
		_, wanted := names.event(e, c.filter)
		assert.Equal(t, c.wanted, wanted, "%+v", c.filter)
	}
}

func TestDropsBadInput(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--reason", "isolatd"}, `--reason "isolatd": no such reason; the nearest are isolated`},
		{[]string{"--container", "web"}, "--container: drops are counted by reason only; add -f"},
		{[]string{"-f", "--port", "0"}, "--port 0: want a port from 1 to 65535"},
		{[]string{"extra"}, `unexpected argument "extra"`},
	} {
		status, _, stderr := w.run(append([]string{"drops"}, c.args...)...)
		assert.Equal(t, statusUsage, status, c.args)
		assert.Contains(t, stderr, c.want)
	}
}

// Missed drops are told apart by why, and by reason.
func TestPrintDrop(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, printDrop(&w.App, DropEvent{
		Time: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.Local), Suppressed: map[string]uint64{"isolated": 7}, Lost: map[string]uint64{"transit": 1},
	}))
	require.Equal(t, "03:04:05.000006  isolated           7 more, over the rate\n"+
		"03:04:05.000006  transit            1 more, not read in time\n", w.out.String())
	w.out.Reset()
	require.NoError(t, printDrop(&w.App, DropEvent{
		Time: time.Date(2026, 1, 2, 3, 4, 5, 6000, time.Local), Reason: "isolated", Direction: "from container", Network: "blue", Proto: "tcp",
		Detail: "S", Length: 74, From: &Party{netip.MustParseAddr("10.1.0.2"), 4000, "web"}, To: &Party{Addr: netip.MustParseAddr("fd00::1"), Port: 80},
	}))
	require.Equal(t, "03:04:05.000006  isolated           from container blue         10.1.0.2:4000 (web) > [fd00::1]:80  tcp S 74 bytes\n", w.out.String())
}
