// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/perf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/maps"
)

// MaxCapture is how many bytes of a packet can be captured: a record of the kernel's ring has 16 bits for its length.
const MaxCapture = math.MaxUint16 - 1024

// What the rings take, bytes: of one processor at the most, and of all.
const (
	captureRing  = 4 << 20
	captureRings = 64 << 20
)

// deviceProgramNames are what a capture looks at, by number.
var deviceProgramNames = []string{FromContainer, ToContainer, FromBridge, FromUplink, FromUplinkL3, FromHost, ToUplink, ToUplinkL3}

// CaptureFilter says which packets are captured: those that meet all of it. The zero value: all, up to 256 bytes of each.
type CaptureFilter struct {
	ByParty bool   // only packets of a party that SetParties names
	Port    uint16 // only packets from or to it; 0: any
	Reason  string // only packets dropped for it; empty: any
	Bytes   int    // of a packet, at most MaxCapture
}

// Party is one end of packets: an address, or the host's device of a container.
type Party struct {
	Addrs   []netip.Addr
	Ifindex int // 0: none
}

// Captured is a packet's way through one program.
type Captured struct {
	Time    time.Time
	Program string
	Ifindex int // of the device at whose hook it was
	// Verdict is what the program returned: TC_ACT_SHOT (2), TC_ACT_REDIRECT (7), or the packet goes on with the stack.
	Verdict int
	Reason  string // why it was dropped; empty: it was not
	// The packet as it came and as it went, from the link layer, or the network layer where there is none; cut
	// off. The lengths are those of the whole packet.
	Before, After             []byte
	BeforeLength, AfterLength int
}

// Capture looks at the programs of a running instance. It is for one goroutine; Close may be called by any.
type Capture struct {
	dir     string // of pinned programs
	filter  CaptureFilter
	spec    *ebpf.CollectionSpec
	shared  *ebpf.Collection
	r       *perf.Reader
	watched map[ebpf.ProgramID][]link.Link
	next    time.Time // when to look for new programs
	parties map[[16]byte]bool
	links   map[uint32]bool
	lost    atomic.Uint64
	mu      sync.Mutex // of watched and closed
	closed  bool
}

// NewCapture begins to capture at the programs that are pinned below bpffs. Its error is maps.ErrNotLoaded where there are none.
func NewCapture(bpffs string, f CaptureFilter) (*Capture, error) {
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("raise the memlock limit: %w", err)
	}
	spec, err := bpf.LoadCapture()
	if err != nil {
		return nil, fmt.Errorf("read the capture object: %w", err)
	}
	reason := 0
	if f.Reason != "" {
		if reason = slices.Index(maps.Reasons(), f.Reason); reason <= 0 {
			return nil, fmt.Errorf("reason %q: no such reason", f.Reason)
		}
	}
	for name, value := range map[string]any{
		"capture_bytes": uint32(f.Bytes), "capture_by_party": f.ByParty, "capture_reason": uint8(reason),
		"capture_port": f.Port<<8 | f.Port>>8, // network byte order
	} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("set %s: %w", name, err)
		}
	}
	c := &Capture{
		dir: programsDir(bpffs), filter: f, spec: spec, watched: make(map[ebpf.ProgramID][]link.Link),
		parties: make(map[[16]byte]bool), links: make(map[uint32]bool),
	}
	shared := part(spec, nil)
	delete(shared.Maps, ".rodata")
	shared.Variables = nil
	if c.shared, err = ebpf.NewCollection(shared); err != nil {
		return nil, fmt.Errorf("make the capture's maps: %w", err)
	}
	if c.r, err = perf.NewReader(c.shared.Maps["capture_events"], min(captureRing, captureRings/runtime.NumCPU())); err != nil {
		c.shared.Close()
		return nil, fmt.Errorf("read the capture's ring: %w", err)
	}
	if err := c.follow(); err != nil {
		c.Close()
		return nil, err
	}
	if len(c.watched) == 0 {
		c.Close()
		return nil, fmt.Errorf("capture below %s: %w", bpffs, maps.ErrNotLoaded)
	}
	c.next = time.Now().Add(time.Second)
	return c, nil
}

// SetParties says whose packets are captured, where the filter is ByParty.
func (c *Capture) SetParties(list []Party) error {
	parties, links := make(map[[16]byte]bool), make(map[uint32]bool)
	for _, p := range list {
		for _, addr := range p.Addrs {
			parties[addr.As16()] = true
		}
		if p.Ifindex != 0 {
			links[uint32(p.Ifindex)] = true
		}
	}
	err := errors.Join(replaceSet(c.shared.Maps["capture_parties"], c.parties, parties),
		replaceSet(c.shared.Maps["capture_links"], c.links, links))
	if err != nil {
		return fmt.Errorf("say whose packets are captured: %w", err)
	}
	c.parties, c.links = parties, links
	return nil
}

func replaceSet[K comparable](m *ebpf.Map, have, want map[K]bool) error {
	for k := range want {
		if !have[k] {
			if err := m.Put(k, uint8(1)); err != nil {
				return err
			}
		}
	}
	for k := range have {
		if !want[k] {
			if err := m.Delete(k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return err
			}
		}
	}
	return nil
}

// follow looks at programs that have come: those of another version of the daemon, after an upgrade. The old ones are looked
// at too: devices have them until the upgrade is over.
func (c *Capture) follow() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return os.ErrClosed
	}
	entries, err := os.ReadDir(c.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list pinned programs: %w", err)
	}
	for _, e := range entries {
		name, _, _ := strings.Cut(e.Name(), "-")
		number := slices.Index(deviceProgramNames, name)
		if number < 0 {
			continue
		}
		target, err := ebpf.LoadPinnedProgram(c.dir+"/"+e.Name(), nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue // replaced just now
		}
		if err != nil {
			return fmt.Errorf("open pinned program %s: %w", e.Name(), err)
		}
		err = c.watch(target, name, uint8(number))
		target.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// watch attaches to one program, unless that was done.
func (c *Capture) watch(target *ebpf.Program, name string, number uint8) error {
	info, err := target.Info()
	if err != nil {
		return fmt.Errorf("ask for program %s: %w", name, err)
	}
	id, ok := info.ID()
	if !ok {
		return fmt.Errorf("ask for program %s: the kernel does not tell its ID", name)
	}
	if c.watched[id] != nil {
		return nil
	}
	spec := c.spec.Copy()
	if err := spec.Variables["capture_program"].Set(number); err != nil {
		return fmt.Errorf("set capture_program: %w", err)
	}
	for program, function := range map[string]string{"capture_enter": name, "capture_drop": "drop", "capture_leave": name} {
		spec.Programs[program].AttachTarget = target
		spec.Programs[program].AttachTo = function
	}
	have := make(map[string]*ebpf.Map)
	for m := range c.shared.Maps {
		have[m] = c.shared.Maps[m]
	}
	loaded, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: have})
	if err != nil {
		return noTracing(name, err)
	}
	defer loaded.Close()
	var links []link.Link
	// What tells comes last: by then the others have noted what it tells.
	for _, program := range []string{"capture_enter", "capture_drop", "capture_leave"} {
		k, err := link.AttachTracing(link.TracingOptions{Program: loaded.Programs[program]})
		if err != nil {
			for _, k := range links {
				k.Close()
			}
			return noTracing(name, err)
		}
		links = append(links, k)
	}
	c.watched[id] = links
	return nil
}

// noTracing says why programs cannot be looked at. It hides a refusal of the kernel's, lest it read as one of the user's rights.
func noTracing(program string, err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) {
		return fmt.Errorf("capture at %s: the kernel does not let programs be looked at: want one with CONFIG_BPF_EVENTS, and CAP_PERFMON or root: %v", program, err)
	}
	return fmt.Errorf("capture at %s: %w", program, err)
}

// Next waits until the deadline for the next packet. Its error is os.ErrDeadlineExceeded then, and os.ErrClosed after Close.
// Packets of one processor come in order; those of others may come later or sooner.
func (c *Capture) Next(deadline time.Time) (Captured, error) {
	for {
		now := time.Now()
		if !now.Before(c.next) {
			if err := c.follow(); err != nil {
				return Captured{}, err
			}
			c.next = now.Add(time.Second)
		}
		end := deadline
		if c.next.Before(end) {
			end = c.next
		}
		c.r.SetDeadline(end)
		record, err := c.r.Read()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && time.Now().Before(deadline):
			continue
		case errors.Is(err, perf.ErrClosed):
			return Captured{}, os.ErrClosed
		case err != nil:
			return Captured{}, err
		case record.LostSamples != 0:
			c.lost.Add(record.LostSamples)
			continue
		}
		return c.decode(record.RawSample)
	}
}

func (c *Capture) decode(raw []byte) (Captured, error) {
	var p bpf.CapturePass
	n, err := binary.Decode(raw, binary.NativeEndian, &p)
	if err != nil {
		return Captured{}, fmt.Errorf("read a captured packet of %d bytes: %w", len(raw), err)
	}
	if int(p.Program) >= len(deviceProgramNames) {
		return Captured{}, fmt.Errorf("read a captured packet: no program has number %d", p.Program)
	}
	out := Captured{
		Time: maps.WallTime(p.Time), Program: deviceProgramNames[p.Program], Ifindex: int(p.Ifindex), Verdict: int(p.Verdict),
		BeforeLength: int(p.Before), AfterLength: int(p.After),
	}
	if names := maps.Reasons(); p.Reason != 0 && int(p.Reason) < len(names) {
		out.Reason = names[p.Reason]
	}
	// The kernel fills a record up to eight bytes.
	out.After = raw[n:min(len(raw), n+min(int(p.After), c.filter.Bytes))]
	head := p.Head[:min(int(p.Captured), len(p.Head))]
	out.Before = slices.Clone(head)
	// The data path changes headers only: what is behind them came as it went. Where less is known of how it came, the
	// headers may be among the rest.
	if len(head) == len(p.Head) && p.Before == p.After && len(out.After) > len(head) {
		out.Before = append(out.Before, out.After[len(head):]...)
	}
	out.Before = out.Before[:min(len(out.Before), c.filter.Bytes)]
	return out, nil
}

// Lost is how many packets were not read in time.
func (c *Capture) Lost() uint64 { return c.lost.Load() }

// Close takes everything off the programs. More than the first do nothing.
func (c *Capture) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	var errs []error
	for _, links := range c.watched {
		for _, k := range links {
			errs = append(errs, k.Close())
		}
	}
	errs = append(errs, c.r.Close())
	c.shared.Close()
	return errors.Join(errs...)
}
