// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"

	"github.com/cilium/ebpf/link"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/gopacket/gopacket/pcapgo"
)

// captured is a packet of a pcapng file.
type captured struct {
	gopacket.Packet
	comment, device, of string
}

// between says whether it is from one address to another.
func (c captured) between(from, to fmt.Stringer) error {
	have := "no IP"
	if n := c.NetworkLayer(); n != nil {
		have = fmt.Sprintf("%v > %v", n.NetworkFlow().Src(), n.NetworkFlow().Dst())
	}
	if want := fmt.Sprintf("%v > %v", from, to); have != want {
		return fmt.Errorf("a packet %s (%s): want %s", have, c.comment, want)
	}
	return nil
}

func (c captured) says(pattern string) error {
	if !regexp.MustCompile(pattern).MatchString(c.comment) {
		return fmt.Errorf("comment %q: does not match %q", c.comment, pattern)
	}
	return nil
}

// readCapture reads what is complete of a pcapng file.
func readCapture(file string) (out []captured, err error) {
	raw, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r, err := pcapgo.NewNgReader(bytes.NewReader(raw), pcapgo.NgReaderOptions{WantMixedLinkType: true})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for {
		data, ci, opts, err := r.ReadPacketDataWithOptions()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		in, err := r.Interface(ci.InterfaceIndex)
		if err != nil {
			return nil, err
		}
		p := captured{gopacket.NewPacket(data, in.LinkType, gopacket.Default), "", in.Name, in.Description}
		for _, c := range opts.Comments {
			p.comment += c
		}
		out = append(out, p)
	}
}

// capturing is a "bpfnet capture" that runs.
type capturing struct {
	cmd    *exec.Cmd
	file   string
	stderr bytes.Buffer
}

// capture starts one. It captures when it has begun its file.
func capture(name string, args ...string) (*capturing, error) {
	c := &capturing{file: filepath.Join("/tmp", name+".pcapng")}
	c.cmd = exec.Command("/bpfnet", append([]string{"capture", "-w", c.file}, args...)...)
	c.cmd.Stderr = &c.stderr
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	// The kernel looks at 24 programs for it, which an emulated machine is slow at.
	for range 6 {
		err := eventually(func() error {
			info, err := os.Stat(c.file)
			if err == nil && info.Size() == 0 || errors.Is(err, fs.ErrNotExist) {
				err = fmt.Errorf("capture %v does not begin: %s", args, c.stderr.String())
			}
			return err
		})
		if err == nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("capture %v does not begin within a minute", args)
}

// tracing counts links of programs that look at others.
func tracing() (n int, err error) {
	it := new(link.Iterator)
	defer it.Close()
	for it.Next() {
		if info, err := it.Link.Info(); err == nil && info.Type == link.TracingType {
			n++
		}
	}
	return n, it.Err()
}

// captures: a capture has what the data path sees and decides, by its filters, as pcapng, each packet once; it goes on when
// the daemon is killed and its programs are others; and it leaves nothing behind.
func (o *own) captures() error {
	before, err := tracing()
	if err != nil {
		return err
	}
	web, err := capture("web", "--container", "web")
	if err != nil {
		return err
	}
	drops, err := capture("drops", "--reason", "direct_access", "--port", fmt.Sprint(target), "--count", "1")
	if err != nil {
		return err
	}
	if err := errors.Join(o.rewritten(web), o.droppedIn(drops)); err != nil {
		return err
	}
	if err := drops.cmd.Wait(); err != nil {
		return fmt.Errorf("with --count: %w: %s", err, drops.stderr.String())
	}
	if want := "1 packets captured; 0 more were not read in time\n"; drops.stderr.String() != want {
		return fmt.Errorf("with --count: %q: want %q", drops.stderr.String(), want)
	}

	// Other programs come: those of before are kept for the next daemon by their pins alone.
	kept, err := filepath.Glob(filepath.Join(pins, "programs", "*"))
	if err == nil && len(kept) == 0 {
		err = errors.New("no programs are kept")
	}
	if err != nil {
		return err
	}
	err = o.daemon.Process.Kill()
	_ = o.daemon.Wait()
	for _, path := range kept {
		err = errors.Join(err, os.Remove(path))
	}
	if err = errors.Join(err, o.start()); err != nil {
		return err
	}
	had, err := readCapture(web.file)
	if err != nil {
		return err
	}
	err = eventually(func() error {
		if err := o.world.exchange("tcp", at(families[1].host, ownPort), small, families[1].world); err != nil {
			return err
		}
		now, err := readCapture(web.file)
		if err != nil {
			return err
		}
		for _, p := range now[len(had):] {
			if p.between(families[1].world, families[1].a) == nil {
				return nil
			}
		}
		return errors.New("nothing more is captured after other programs have come")
	})
	if err != nil {
		return err
	}

	if err := errors.Join(web.cmd.Process.Signal(os.Interrupt), web.cmd.Wait()); err != nil {
		return fmt.Errorf("interrupt: %w: %s", err, web.stderr.String())
	}
	return eventually(func() error {
		after, err := tracing()
		if err == nil && after != before {
			err = fmt.Errorf("%d programs look at others, %d did before", after, before)
		}
		return err
	})
}

// rewritten has a connection come to the published port.
func (o *own) rewritten(c *capturing) error {
	f := families[0]
	if err := o.world.exchange("tcp", at(f.host, ownPort), small, f.world); err != nil {
		return err
	}
	return eventually(func() error {
		all, err := readCapture(c.file)
		if err != nil {
			return err
		}
		fins, answers := 0, 0
		var answer captured
		for _, p := range all {
			tcp, ok := p.TransportLayer().(*layers.TCP)
			if !ok {
				continue
			}
			if tcp.FIN {
				fins++
			}
			if tcp.SYN && tcp.ACK && p.between(f.a, f.world) == nil {
				answer = p
				answers++
			}
		}
		if fins < 4 {
			return fmt.Errorf("%d packets, %d of them end the connection: want four, each as it came and as it went", len(all), fins)
		}
		first, second := all[0], all[1]
		if first.device != "up0" || answer.of != "web" || answers != 1 {
			return fmt.Errorf("the first packet is of %q; %d answers, of %q", first.device, answers, answer.of)
		}
		return errors.Join(
			first.between(f.world, f.host), second.between(f.world, f.a),
			first.says(fmt.Sprintf(`^from outside: fast path; %v:\d+ > %v:%d tcp S; rewritten to %v:\d+ > %v:%d \(web\) tcp S$`,
				f.world, f.host, ownPort, f.world, f.a, target)),
			second.says(`^from outside: as rewritten; `),
			answer.says(fmt.Sprintf(`^from container: fast path; .* rewritten to %v:%d > `, f.host, ownPort)),
		)
	})
}

// droppedIn has a datagram of the world's dropped that no port was published for.
func (o *own) droppedIn(c *capturing) error {
	f := families[0]
	all, err := readCapture(c.file)
	if err == nil && len(all) != 0 {
		err = fmt.Errorf("%d packets before any was dropped", len(all))
	}
	if err != nil {
		return err
	}
	if err := o.dropped(o.world, at(f.a, target), "direct_access"); err != nil {
		return err
	}
	return eventually(func() error {
		all, err := readCapture(c.file)
		if err != nil {
			return err
		}
		if len(all) != 1 {
			return fmt.Errorf("%d packets were dropped: want one", len(all))
		}
		return errors.Join(all[0].between(f.world, f.a),
			all[0].says(fmt.Sprintf(`^from outside: dropped: direct_access; %v:\d+ > %v:%d \(web\) udp$`, f.world, f.a, target)))
	})
}
