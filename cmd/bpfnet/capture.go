// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/loader"
	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
)

// capture is where packets come from as the data path sees them.
type capture interface {
	SetParties([]loader.Party) error
	Next(deadline time.Time) (loader.Captured, error)
	Lost() uint64
	Close() error
}

func openCapture(bpffs string, f loader.CaptureFilter) (capture, error) {
	c, err := loader.NewCapture(bpffs, f)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// captureHooks are the hooks of the programs that a capture looks at.
var captureHooks = map[string]string{
	loader.FromContainer: "container", loader.ToContainer: "to_container", loader.FromBridge: "bridge", loader.FromHost: "host",
	loader.FromUplink: "uplink", loader.FromUplinkL3: "uplink", loader.ToUplink: "to_uplink", loader.ToUplinkL3: "to_uplink",
}

type captureOptions struct {
	dropFilter
	file     string
	bytes    int
	count    int
	duration time.Duration
}

func (a *App) captureCommand() *cobra.Command {
	var o captureOptions
	cmd := &cobra.Command{
		Use:   "capture",
		Short: "Write packets as the data path sees them to a pcapng file",
		Long: `Write packets as the data path sees them, with what it decides, to a pcapng file
that Wireshark and tshark read. A packet on the fast path is on no bridge, so that
tcpdump does not see it there. Each has its verdict as a comment: "fast path",
"left to the host or the bridge", "let in" and "let out" of what these send on, or
"dropped" with the reason; one that was rewritten follows as it went on. Ends with an interrupt, after --count packets or after --duration;
nothing stays behind in the data path. Of a container, also packets that are only
rewritten to its address are captured; --port knows no ports behind extension headers
of IPv6, nor in later fragments and ICMP errors. What the shield and strict mode drop
is not there: see "bpfnet shield" and "bpfnet drops -f". Works with the daemon down.`,
		Example: `  bpfnet capture --container web -w web.pcapng
  bpfnet capture --reason isolated --duration 10s -w isolated.pcapng
  bpfnet capture --port 8080 | tshark -r - -T fields -e frame.comment`,
		Args: exactArgs(),
	}
	cmd.Flags().StringVarP(&o.file, "write", "w", "-", "`file` to write; -: standard output, which must not be a terminal")
	cmd.Flags().StringVar(&o.container, "container", "", "only packets from or to this container")
	cmd.Flags().StringVar(&o.network, "network", "", "only packets from or to containers in this network")
	cmd.Flags().StringVar(&o.reason, "reason", "", "only packets that are dropped for this reason")
	cmd.Flags().Uint16Var(&o.port, "port", 0, "only packets from or to this port of TCP, UDP or SCTP")
	cmd.Flags().IntVar(&o.bytes, "bytes", 256, "`bytes` of a packet, from 64 on; more are cut off")
	cmd.Flags().IntVar(&o.count, "count", 0, "end after so many `packets`; 0: do not")
	cmd.Flags().DurationVar(&o.duration, "duration", 0, "end after this `time`; 0: do not")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkPort(cmd.Flags(), o.port); err != nil {
			return err
		}
		if err := o.check(); err != nil {
			return err
		}
		return a.capture(cmd.Context(), o)
	}
	return cmd
}

func (o *captureOptions) check() error {
	switch {
	case o.reason != "" && !slices.Contains(bpfmaps.ReasonNames(), o.reason):
		return usagef("--reason %q: no such reason; the nearest are %s", o.reason,
			strings.Join(netdev.Nearest(o.reason, bpfmaps.ReasonNames()), ", "))
	case o.bytes < 64 || o.bytes > loader.MaxCapture:
		return usagef("--bytes %d: not between 64 and %d", o.bytes, loader.MaxCapture)
	case o.count < 0:
		return usagef("--count %d: less than nothing", o.count)
	case o.duration < 0:
		return usagef("--duration %v: less than nothing", o.duration)
	case o.file == "":
		return usagef("--write: empty path")
	}
	return nil
}

// parties are whose packets are captured.
func (o *captureOptions) parties(s *api.Snapshot) []loader.Party {
	var out []loader.Party
	for _, e := range s.Endpoints {
		if o.container != "" && e.Name != o.container || o.network != "" && e.Network != o.network {
			continue
		}
		p := loader.Party{Ifindex: e.Ifindex}
		for _, text := range e.Addresses {
			if addr, err := netip.ParseAddr(text); err == nil {
				p.Addrs = append(p.Addrs, addr)
			}
		}
		out = append(out, p)
	}
	return out
}

// open makes the file to write to. What is in it is for its owner only.
func (o *captureOptions) open(a *App) (io.Writer, func() error, error) {
	if o.file != "-" {
		f, err := os.OpenFile(o.file, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return nil, nil, fmt.Errorf("--write: %w", err)
		}
		// One that was there may have been open to others. Not so a pipe, nor a device.
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			err = f.Chmod(0o600)
			if err != nil {
				f.Close()
				return nil, nil, fmt.Errorf("--write: %w", err)
			}
		}
		return f, f.Close, nil
	}
	if f, ok := a.Stdout.(*os.File); ok {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			return nil, nil, usagef("packets do not go to a terminal; write a file with -w FILE, or pipe them: bpfnet capture | tshark -r -")
		}
	}
	return a.Stdout, func() error { return nil }, nil
}

// capture writes packets until the context ends, which is no error.
func (a *App) capture(ctx context.Context, o captureOptions) (err error) {
	snap, err := a.readSnapshot()
	if err != nil {
		return err
	}
	if err := o.dropFilter.check(snap); err != nil {
		return err
	}
	byParty := o.container != "" || o.network != ""
	c, err := a.OpenCapture(a.paths.BPFFS, loader.CaptureFilter{ByParty: byParty, Port: o.port, Reason: o.reason, Bytes: o.bytes})
	if err != nil {
		return cannotRead(err)
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if o.duration != 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.duration)
		defer cancel()
	}
	// Also while nobody reads what is written: packets are to pay no longer than somebody wants them.
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if byParty {
		if err := c.SetParties(o.parties(snap)); err != nil && ctx.Err() == nil {
			return err
		}
	}
	out, done, err := o.open(a)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	w, err := newCaptureWriter(out, a.Version, o.bytes)
	if err != nil {
		return err
	}
	w.names = newDropNames(snap)
	written, read := 0, time.Now()
	for ctx.Err() == nil && (o.count == 0 || written < o.count) {
		p, err := c.Next(time.Now().Add(200 * time.Millisecond))
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if err := w.w.Flush(); err != nil {
				return fmt.Errorf("write packets: %w", err)
			}
		case errors.Is(err, os.ErrClosed) && ctx.Err() != nil:
		case err != nil:
			return fmt.Errorf("read packets: %w", err)
		default:
			if err := w.write(p); err != nil {
				return fmt.Errorf("write packets: %w", err)
			}
			written++
		}
		if time.Since(read) < time.Second {
			continue
		}
		read = time.Now()
		// Names come and go; where they cannot be read just now, the old ones serve.
		if snap, err := a.readSnapshot(); err == nil {
			w.names = newDropNames(snap)
			if byParty {
				if err := c.SetParties(o.parties(snap)); err != nil && ctx.Err() == nil {
					return err
				}
			}
		}
	}
	if err := w.w.Flush(); err != nil {
		return fmt.Errorf("write packets: %w", err)
	}
	_, err = fmt.Fprintf(a.Stderr, "%d packets captured; %d more were not read in time\n", written, c.Lost())
	return err
}

// captureWriter writes pcapng.
type captureWriter struct {
	w       *pcapgo.NgWriter
	names   *dropNames
	bytes   int
	devices map[captureDevice]int
}

// captureDevice is an interface of the file: a device, or one and the same with another kind of packets.
type captureDevice struct {
	ifindex int
	kind    layers.LinkType
}

func newCaptureWriter(out io.Writer, version string, most int) (*captureWriter, error) {
	// The format wants one interface from the beginning, and a reader at the end of a pipe wants a beginning.
	w, err := pcapgo.NewNgWriterInterface(out, pcapgo.NgInterface{
		Name: "bpfnet", Description: "the data path", LinkType: layers.LinkTypeEthernet, SnapLength: uint32(most),
	},
		pcapgo.NgWriterOptions{SectionInfo: pcapgo.NgSectionInfo{OS: runtime.GOOS, Application: "bpfnet " + version}})
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		return nil, fmt.Errorf("write packets: %w", err)
	}
	return &captureWriter{w: w, bytes: most, devices: make(map[captureDevice]int)}, nil
}

// write writes a packet as it came, and as it went on where that is different.
func (c *captureWriter) write(p loader.Captured) error {
	ethernet := p.Program != loader.FromUplinkL3 && p.Program != loader.ToUplinkL3
	hook := captureHooks[p.Program]
	before := c.describe(p.Before, ethernet)
	verdict := directions[hook] + ": "
	switch {
	case p.Reason != "":
		verdict += "dropped: " + p.Reason
	case p.Verdict == tcActShot:
		verdict += "dropped"
	case p.Verdict == tcActRedirect:
		verdict += "fast path"
	case hook == "to_container":
		verdict += "let in"
	case hook == "to_uplink":
		verdict += "let out"
	default:
		verdict += "left to the host or the bridge"
	}
	direction := pcapgo.NgEpbFlagDirectionInbound
	if strings.HasPrefix(hook, "to_") {
		direction = pcapgo.NgEpbFlagDirectionOutbound
	}
	rewritten := p.Reason == "" && !bytes.HasPrefix(p.After, p.Before[:min(len(p.Before), len(p.After))])
	words := []string{verdict, before}
	// A frame for another link layer has its header in front.
	ethernetAfter := ethernet || p.AfterLength == p.BeforeLength+14
	after := ""
	if rewritten {
		after = c.describe(p.After, ethernetAfter)
		if after != before {
			words = append(words, "rewritten to "+after)
		}
	}
	flags := &pcapgo.NgEpbFlags{Direction: direction}
	if err := c.packet(p, p.Before, p.BeforeLength, ethernet, pcapgo.NgPacketOptions{Comments: []string{strings.Join(words, "; ")}, Flags: flags}); err != nil {
		return err
	}
	if !rewritten || after == before {
		return nil
	}
	return c.packet(p, p.After, p.AfterLength, ethernetAfter,
		pcapgo.NgPacketOptions{Comments: []string{directions[hook] + ": as rewritten; " + after}, Flags: flags})
}

// What a program returns (linux/pkt_cls.h).
const (
	tcActShot     = 2
	tcActRedirect = 7
)

func (c *captureWriter) packet(p loader.Captured, data []byte, length int, ethernet bool, o pcapgo.NgPacketOptions) error {
	device, err := c.device(p.Ifindex, ethernet)
	if err != nil {
		return err
	}
	return c.w.WritePacketWithOptions(gopacket.CaptureInfo{
		Timestamp: p.Time, CaptureLength: len(data), Length: max(length, len(data)), InterfaceIndex: device,
	}, data, o)
}

// device is the number of a device in the file.
func (c *captureWriter) device(ifindex int, ethernet bool) (int, error) {
	kind := layers.LinkTypeEthernet
	if !ethernet {
		kind = layers.LinkTypeRaw
	}
	key := captureDevice{ifindex, kind}
	if id, known := c.devices[key]; known {
		return id, nil
	}
	at := c.names.byLink[ifindex]
	name := cmp.Or(at.Link, c.names.deviceName(ifindex), fmt.Sprintf("device %d", ifindex))
	id, err := c.w.AddInterface(pcapgo.NgInterface{
		Name: name, Description: cmp.Or(at.Name, c.names.bridge[name]), LinkType: kind, SnapLength: uint32(c.bytes),
	})
	if err == nil {
		c.devices[key] = id
	}
	return id, err
}

// describe says whose a packet is: from whom to whom, and its protocol.
func (c *captureWriter) describe(raw []byte, ethernet bool) string {
	head := decodeHead(raw, ethernet)
	party := func(addr netip.Addr, port uint16) string {
		return (&Party{Addr: addr, Port: port, Container: c.names.byAddr[addr].Name}).String()
	}
	words := []string{party(head.From, head.FromPort) + " > " + party(head.To, head.ToPort), head.Proto, head.Detail}
	return strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), " ")
}
