// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/loader"
)

// What is written of a packet says what became of it, in the words of its hook, and reads as it was.
func TestCaptureComments(t *testing.T) {
	client, host, web := netip.MustParseAddrPort("192.0.2.2:4000"), netip.MustParseAddrPort("192.0.2.1:8080"), netip.MustParseAddrPort("172.30.0.2:80")
	macs := packet.MAC(net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2})
	came, went := packet.TCP(client, host, macs, packet.Flags("S")), packet.TCP(client, web, macs, packet.Flags("S"))
	names := newDropNames(&api.Snapshot{Endpoints: []api.Endpoint{{Name: "web", Link: "veth1", Ifindex: 7, Addresses: []string{"172.30.0.2"}}}})
	names.device[2] = "eth0"
	const redirect, unspec, shot = tcActRedirect, -1, tcActShot
	for _, c := range []struct {
		name string
		p    loader.Captured
		want []string
	}{
		{"rewritten", loader.Captured{Program: loader.FromUplink, Ifindex: 2, Verdict: redirect, Before: came, After: went}, []string{
			"from outside: fast path; 192.0.2.2:4000 > 192.0.2.1:8080 tcp S; rewritten to 192.0.2.2:4000 > 172.30.0.2:80 (web) tcp S",
			"from outside: as rewritten; 192.0.2.2:4000 > 172.30.0.2:80 (web) tcp S",
		}},
		{"as it came", loader.Captured{Program: loader.FromContainer, Ifindex: 7, Verdict: unspec, Before: came, After: came},
			[]string{"from container: left to the host or the bridge; 192.0.2.2:4000 > 192.0.2.1:8080 tcp S"}},
		{"in", loader.Captured{Program: loader.ToContainer, Ifindex: 7, Verdict: unspec, Before: went, After: went},
			[]string{"to container: let in; 192.0.2.2:4000 > 172.30.0.2:80 (web) tcp S"}},
		{"out", loader.Captured{Program: loader.ToUplink, Ifindex: 2, Verdict: unspec, Before: came, After: came},
			[]string{"to outside: let out; 192.0.2.2:4000 > 192.0.2.1:8080 tcp S"}},
		{"dropped", loader.Captured{Program: loader.FromContainer, Ifindex: 7, Verdict: shot, Reason: "isolated", Before: came, After: came},
			[]string{"from container: dropped: isolated; 192.0.2.2:4000 > 192.0.2.1:8080 tcp S"}},
		{"no link layer", loader.Captured{Program: loader.FromUplinkL3, Ifindex: 2, Verdict: redirect, Before: came[14:], After: went}, []string{
			"from outside: fast path; 192.0.2.2:4000 > 192.0.2.1:8080 tcp S; rewritten to 192.0.2.2:4000 > 172.30.0.2:80 (web) tcp S",
			"from outside: as rewritten; 192.0.2.2:4000 > 172.30.0.2:80 (web) tcp S",
		}},
		{"nothing of it", loader.Captured{Program: loader.FromBridge, Ifindex: 9, Verdict: unspec}, []string{"from bridge: left to the host or the bridge; ? > ?"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out bytes.Buffer
			w, err := newCaptureWriter(&out, "test", 256)
			require.NoError(t, err)
			w.names = names
			c.p.Time, c.p.BeforeLength, c.p.AfterLength = time.Unix(1000, 42), len(c.p.Before), len(c.p.After)
			require.NoError(t, w.write(c.p))
			require.NoError(t, w.w.Flush())
			r, err := pcapgo.NewNgReader(&out, pcapgo.NgReaderOptions{WantMixedLinkType: true})
			require.NoError(t, err)
			for i, want := range c.want {
				data, ci, opts, err := r.ReadPacketDataWithOptions()
				require.NoError(t, err)
				assert.Equal(t, []string{want}, opts.Comments)
				assert.True(t, c.p.Time.Equal(ci.Timestamp), ci.Timestamp)
				assert.Equal(t, append([]byte{}, [][]byte{c.p.Before, c.p.After}[i]...), data)
				in, err := r.Interface(ci.InterfaceIndex)
				require.NoError(t, err)
				kind := layers.LinkTypeEthernet
				if c.p.Program == loader.FromUplinkL3 && i == 0 {
					kind = layers.LinkTypeRaw
				}
				assert.Equal(t, kind, in.LinkType)
			}
			_, _, err = r.ReadPacketData()
			assert.ErrorIs(t, err, io.EOF)
		})
	}
}

// A file of packets is for nobody else, also where it was there and open to all.
func TestCaptureFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.pcapng")
	require.NoError(t, os.WriteFile(path, []byte("what was there"), 0o644))
	o := captureOptions{file: path}
	_, done, err := o.open(&App{})
	require.NoError(t, err)
	require.NoError(t, done())
	info, err := os.Stat(path)
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o600), info.Mode())
	assert.Zero(t, info.Size())
	o.file = filepath.Join(t.TempDir(), "none", "x.pcapng")
	_, _, err = o.open(&App{})
	assert.ErrorContains(t, err, "--write: open ")
}

// What is written can be read by tshark: verdict, interface, time to the nanosecond, direction, link layer, addresses.
func TestCaptureTshark(t *testing.T) {
	tshark, err := exec.LookPath("tshark")
	require.NoError(t, err, "scripts/deps.sh test")
	client, host, web := netip.MustParseAddrPort("192.0.2.2:4000"), netip.MustParseAddrPort("192.0.2.1:8080"), netip.MustParseAddrPort("172.30.0.2:80")
	macs := packet.MAC(net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2})
	came, went := packet.TCP(client, host, macs, packet.Flags("S")), packet.TCP(client, web, macs, packet.Flags("S"))
	back := packet.UDP(web, client, macs, packet.Payload(bytes.Repeat([]byte("x"), 400)))
	at := time.Unix(1_800_000_000, 123_456_789)
	path := filepath.Join(t.TempDir(), "x.pcapng")
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	w, err := newCaptureWriter(f, "test", 256)
	require.NoError(t, err)
	w.names = newDropNames(&api.Snapshot{Endpoints: []api.Endpoint{{Name: "web", Link: "veth1", Ifindex: 7, Addresses: []string{"172.30.0.2"}}}})
	w.names.device[2], w.names.device[3] = "eth0", "wg0"
	for i, p := range []loader.Captured{
		{Program: loader.FromUplink, Ifindex: 2, Verdict: tcActRedirect, Before: came, After: went},
		{Program: loader.FromContainer, Ifindex: 7, Verdict: tcActShot, Reason: "isolated", Before: back[:256], BeforeLength: len(back)},
		{Program: loader.ToContainer, Ifindex: 7, Verdict: -1, Before: went, After: went},
		{Program: loader.FromUplinkL3, Ifindex: 3, Verdict: -1, Before: came[14:], After: came[14:]},
	} {
		p.Time = at.Add(time.Duration(i))
		p.BeforeLength, p.AfterLength = max(p.BeforeLength, len(p.Before)), len(p.After)
		require.NoError(t, w.write(p))
	}
	require.NoError(t, w.w.Flush())

	args := []string{"-n", "-r", path, "-T", "fields", "-E", "separator=|"}
	for _, field := range []string{
		"frame.interface_name", "frame.interface_description", "frame.time_epoch", "frame.packet_flags_direction",
		"frame.len", "frame.cap_len", "frame.protocols", "ip.src", "ip.dst", "frame.comment",
	} {
		args = append(args, "-e", field)
	}
	cmd := exec.Command(tshark, args...)
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	require.NoError(t, err, errs.String())
	const in, outbound = "0x00000001", "0x00000002"
	row := func(cells ...string) string { return strings.Join(cells, "|") }
	assert.Equal(t, []string{
		row("eth0", "", "1800000000.123456789", in, "60", "60", "eth:ethertype:ip:tcp", "192.0.2.2", "192.0.2.1",
			"from outside: fast path; 192.0.2.2:4000 > 192.0.2.1:8080 tcp S; rewritten to 192.0.2.2:4000 > 172.30.0.2:80 (web) tcp S"),
		row("eth0", "", "1800000000.123456789", in, "60", "60", "eth:ethertype:ip:tcp", "192.0.2.2", "172.30.0.2",
			"from outside: as rewritten; 192.0.2.2:4000 > 172.30.0.2:80 (web) tcp S"),
		row("veth1", "web", "1800000000.123456790", in, "442", "256", "eth:ethertype:ip:udp:data", "172.30.0.2", "192.0.2.2",
			"from container: dropped: isolated; 172.30.0.2:80 (web) > 192.0.2.2:4000 udp"),
		row("veth1", "web", "1800000000.123456791", outbound, "60", "60", "eth:ethertype:ip:tcp", "192.0.2.2", "172.30.0.2",
			"to container: let in; 192.0.2.2:4000 > 172.30.0.2:80 (web) tcp S"),
		row("wg0", "", "1800000000.123456792", in, "46", "46", "raw:ip:tcp", "192.0.2.2", "192.0.2.1",
			"from outside: left to the host or the bridge; 192.0.2.2:4000 > 192.0.2.1:8080 tcp S"),
	}, strings.Split(strings.TrimRight(string(out), "\n"), "\n"))
}
