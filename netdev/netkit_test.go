// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Needs root. What a kernel lacks is found by trying: asked for by name netkit is refused with one line, else
// it is left alone.
func TestNetkitMissing(t *testing.T) {
	if ProbeNetkit() == nil {
		t.Skip("this kernel has netkit")
	}
	host := newSandbox(t)
	require.NoError(t, inNetNS(host, func() error {
		_, err := Open(Options{LinkType: LinkNetkit})
		require.ErrorContains(t, err, "link type netkit: the kernel makes no netkit pairs")
		require.ErrorContains(t, err, "use auto or veth")
		d, err := Open(Options{LinkType: LinkAuto})
		if err != nil {
			return err
		}
		defer d.Close()
		ns, v := newSandbox(t), vethSpec(1)
		_, err = d.CreateVeth(ns, v)
		require.NoError(t, err)
		l, err := mustLink(d.handle, v.Host)
		require.NoError(t, err)
		require.Equal(t, LinkVeth, l.kind)
		return nil
	}))
}

// Needs root, and a kernel with netkit. Nothing that the sandbox sends gets out before a program of the
// pair sees it, and nothing after that has gone.
func TestNetkitClosed(t *testing.T) {
	if err := ProbeNetkit(); err != nil {
		t.Skip(err)
	}
	host := newSandbox(t)
	require.NoError(t, inNetNS(host, func() error {
		d, err := Open(Options{LinkType: LinkAuto})
		if err != nil {
			return err
		}
		defer d.Close()
		_, err = d.EnsureBridge(BridgeSpec{Name: "bpb-0", Addrs: prefixes("10.9.0.1/24")})
		require.NoError(t, err)
		ns, v := newSandbox(t), vethSpec(1, "10.9.0.2/24")
		ifindex, err := d.CreateVeth(ns, v)
		require.NoError(t, err)
		require.NoError(t, d.PlugIn(ns, v, "bpb-0"))
		l, err := mustLink(d.handle, v.Host)
		require.NoError(t, err)
		require.Equal(t, LinkNetkit, l.kind)
		require.Equal(t, v.MAC[:], []byte(attrsIn(t, ns, v.Name).HardwareAddr))

		received := func() uint64 {
			l, err := d.handle.LinkByIndex(ifindex)
			require.NoError(t, err)
			return l.Attrs().Statistics.RxPackets
		}
		send := func() {
			require.NoError(t, inNetNS(ns, func() error { return broadcast() }))
		}
		send()
		require.Zero(t, received(), "no program yet")

		prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ebpf.SchedCLS, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
		})
		require.NoError(t, err)
		defer prog.Close()
		k, err := link.AttachNetkit(link.NetkitOptions{Interface: ifindex, Program: prog, Attach: ebpf.AttachNetkitPeer})
		require.NoError(t, err)
		send()
		let := received()
		require.NotZero(t, let, "a program that lets everything pass")
		require.NoError(t, k.Close())
		send()
		require.Equal(t, let, received(), "the program has gone")
		return nil
	}))
}

// broadcast sends one on the link of 10.9.0.0/24, for which nobody need be asked first.
func broadcast() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1); err != nil {
		return err
	}
	return unix.Sendto(fd, []byte("?"), 0, &unix.SockaddrInet4{Port: 9, Addr: [4]byte{10, 9, 0, 255}})
}
