// SPDX-License-Identifier: Apache-2.0

// Package loader loads the programs once, attaches them many times, pins maps and links so that both
// outlive the daemon, and takes everything away again. It knows devices only by index: who they are
// is for its caller to say.
package loader

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	stdmaps "maps"
	"math/bits"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/maps"
)

// Paths are where an instance's pins and cgroup programs are.
type Paths struct {
	BPFFS  string // directory below a bpffs mount
	Cgroup string // cgroup2 directory; empty: no sock programs
}

// Classifier attaches programs by clsact filters, for kernels without tcx (before 6.6).
type Classifier interface {
	// AttachFilter replaces our filter on the device; it keeps everybody else's.
	AttachFilter(ifindex int, egress bool, fd int, name string) error
	// DetachFilter removes our filter; a missing one or a missing device is no error.
	DetachFilter(ifindex int, egress bool) error
	// HasFilter reports whether our filter is on the device; a missing device has none.
	HasFilter(ifindex int, egress bool) (bool, error)
}

// Options of Load.
type Options struct {
	Paths
	// Attach is "tcx", "clsact", or empty for tcx where the kernel has it. What a netkit's container sends
	// is seen by a netkit link in any case.
	Attach string
	// Flows is the number of flows that the IPv4 table holds, rounded up to a power of two. 0: what a
	// running instance has, else by memory.
	Flows int
	// Classifier is needed for clsact.
	Classifier Classifier
}

// Loader holds the loaded programs. Close leaves pinned maps, links and filters in the kernel: the
// network runs on.
type Loader struct {
	opts Options
	tcx  bool
	tc   *ebpf.Collection
	sock *ebpf.Collection
	// Those of tc that no device has. They come a moment later.
	sweepers *sweepers
	mu       sync.Mutex
	links    map[string]link.Link
	filters  map[string]Attachment
	lock     *os.File // of the pin directory
	moving   []*moving
	former   []*ebpf.Map     // see Former
	shield   *Shield         // nil: not loaded
	dryMu    sync.Mutex      // of dry; mu is held while programs are attached
	dry      *Dry            // nil: not loaded
	pinned   map[string]bool // maps of tc, by name
	replaced []string
	tooFull  int // flows that do not fit into the table that was asked for
}

// Attachment is one program on one device or cgroup.
type Attachment struct {
	Program string
	Ifindex int    // 0 for a cgroup
	Hook    string // "ingress", "egress", "xdp" or "cgroup"
}

// Programs that go on devices.
const (
	FromContainer = "from_container"
	ToContainer   = "to_container"
	FromBridge    = "from_bridge"
	FromUplink    = "from_uplink"
	FromUplinkL3  = "from_uplink_l3"
	FromHost      = "from_host"
	ToUplink      = "to_uplink"
	ToUplinkL3    = "to_uplink_l3"
)

func isEgress(program string) bool { return strings.HasPrefix(program, "to_") }

func hookOf(program string) string {
	if isEgress(program) {
		return "egress"
	}
	return "ingress"
}

// Load loads the programs, taking over the maps that an earlier instance pinned. Links that are pinned
// keep their old programs until Attach is called for them.
func Load(opts Options) (*Loader, error) {
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("raise the memlock limit: %w", err)
	}
	if err := ensureBPFFS(opts.BPFFS); err != nil {
		return nil, err
	}
	if err := makeDirs(opts.BPFFS); err != nil {
		return nil, err
	}
	lock, err := lockDir(opts.BPFFS)
	if err != nil {
		return nil, err
	}
	tcx, err := chooseAttach(opts.Attach, opts.Classifier)
	if err != nil {
		lock.Close()
		return nil, err
	}
	l := &Loader{lock: lock, opts: opts, tcx: tcx, links: make(map[string]link.Link), filters: make(map[string]Attachment)}

	spec, err := bpf.LoadDatapath()
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("read the data path object: %w", err)
	}
	size, err := l.flowEntries()
	if err != nil {
		l.Close()
		return nil, err
	}
	spec.Maps["flows4"].MaxEntries = size
	spec.Maps["flows6"].MaxEntries = size / 2
	err = l.carry(spec)
	if err == nil { // a start that is refused leaves the settings as they are
		err = l.carryConfig(spec)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	l.pinned = pinnedMaps(spec)
	sweeps := spec.Copy()
	for name, p := range spec.Programs {
		if p.Type == ebpf.Syscall {
			delete(spec.Programs, name)
		} else {
			delete(sweeps.Programs, name)
		}
	}
	datapath := shelf{programsDir(opts.BPFFS), bpf.DatapathDigest()}
	sock := shelf{programsDir(opts.BPFFS), bpf.SockDigest()}
	l.tc, err = l.load(spec, datapath)
	if err != nil {
		l.Close()
		return nil, err
	}
	spec, err = bpf.LoadSock()
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("read the sock object: %w", err)
	}
	if !knowsMPTCP() {
		withoutMPTCP(spec)
	}
	l.shareSizes(spec)
	l.sock, err = l.load(spec, sock)
	if err == nil {
		err = clearBuilds(programsDir(opts.BPFFS), datapath, sock, shelf{object: bpf.StrictDigest()}, shelf{object: shieldObject(ShieldNative)},
			shelf{object: shieldObject(ShieldGeneric)})
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	l.sweepers = loadSweepers(sweeps, l.tc.Maps, datapath)
	return l, nil
}

// shareSizes gives the maps of another object the sizes that the data path's have: it shares them by their pins, and declares
// the flow tables with their nominal size. A pin of another size would be taken for another version's, and replaced.
func (l *Loader) shareSizes(spec *ebpf.CollectionSpec) {
	for name, m := range spec.Maps {
		if have := l.tc.Maps[name]; have != nil {
			m.MaxEntries = have.MaxEntries()
		}
	}
}

// load makes a collection of pinned maps. A pinned map of another shape is of another version: it is
// replaced, and the daemon fills it anew, unless it is one that is carried over.
func (l *Loader) load(spec *ebpf.CollectionSpec, kept shelf) (*ebpf.Collection, error) {
	dir := maps.Dir(l.opts.BPFFS)
	carried := l.replacements(spec)
	for name, m := range spec.Maps {
		if m.Pinning != ebpf.PinByName || carried[name] != nil {
			continue
		}
		path := filepath.Join(dir, name)
		have, err := ebpf.LoadPinnedMap(path, nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open pinned map %s: %w", path, err)
		}
		err = m.Compatible(have)
		have.Close()
		if err != nil {
			if err := os.Remove(path); err != nil {
				return nil, fmt.Errorf("replace pinned map %s of another version: %w", path, err)
			}
			l.replaced = append(l.replaced, name)
		}
	}
	c, err := newCollection(spec, dir, carried, kept)
	if err != nil {
		return nil, explainLoad(err)
	}
	return c, nil
}

// newCollection makes the maps, and then loads programs that are not kept on half of the processors: the verifier takes
// about a second for all of them, and a kernel that does not preempt gives nobody else the processor
// while it looks at one. On all of them, the host's programs would stand still for that second.
func newCollection(spec *ebpf.CollectionSpec, pins string, carried map[string]*ebpf.Map, kept shelf) (*ebpf.Collection, error) {
	c, err := ebpf.NewCollectionWithOptions(part(spec, nil), ebpf.CollectionOptions{
		Maps: ebpf.MapOptions{PinPath: pins}, MapReplacements: carried,
	})
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var group errgroup.Group
	group.SetLimit(max(1, runtime.NumCPU()/2))
	// The longest first, so that none is left over at the end.
	for _, name := range slices.SortedFunc(stdmaps.Keys(spec.Programs), func(a, b string) int {
		return cmp.Or(cmp.Compare(len(spec.Programs[b].Instructions), len(spec.Programs[a].Instructions)), cmp.Compare(a, b))
	}) {
		group.Go(func() error {
			prog, err := loadProgram(spec, name, c.Maps, kept)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			c.Programs[name] = prog
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// part is a copy of spec with other programs.
func part(spec *ebpf.CollectionSpec, programs map[string]*ebpf.ProgramSpec) *ebpf.CollectionSpec {
	p := spec.Copy()
	p.Programs = programs
	return p
}

func loadProgram(spec *ebpf.CollectionSpec, name string, have map[string]*ebpf.Map, kept shelf) (*ebpf.Program, error) {
	if p := kept.take(spec.Programs[name], have, spec.Maps); p != nil {
		return p, nil
	}
	c, err := ebpf.NewCollectionWithOptions(part(spec, map[string]*ebpf.ProgramSpec{name: spec.Programs[name].Copy()}),
		ebpf.CollectionOptions{MapReplacements: have})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := kept.put(name, c.Programs[name]); err != nil {
		return nil, err
	}
	return c.DetachProgram(name), nil
}

// sweepers walk whole maps, which costs the verifier as much time as all other programs, and no packet
// waits for them: they are loaded behind the daemon's back.
type sweepers struct {
	loaded   chan struct{} // closed at the end of it
	programs map[string]*ebpf.Program
	err      error
}

func loadSweepers(spec *ebpf.CollectionSpec, have map[string]*ebpf.Map, kept shelf) *sweepers {
	s := &sweepers{loaded: make(chan struct{}), programs: make(map[string]*ebpf.Program)}
	go func() {
		defer close(s.loaded)
		for name := range spec.Programs {
			prog, err := loadProgram(spec, name, have, kept)
			if err != nil {
				s.err = explainLoad(err)
				return
			}
			s.programs[name] = prog
		}
	}()
	return s
}

func (s *sweepers) close() {
	<-s.loaded
	for _, p := range s.programs {
		p.Close()
	}
}

// flowEntries is the size of the IPv4 table in entries, two a flow. A table whose flows would fill more
// than three quarters of a smaller one stays as it is.
func (l *Loader) flowEntries() (uint32, error) {
	running := uint32(0)
	var held [2]int
	for i, name := range []string{"flows4", "flows6"} {
		have, err := openPin(filepath.Join(maps.Dir(l.opts.BPFFS), name))
		if err != nil {
			return 0, err
		}
		if have == nil {
			continue
		}
		if i == 0 {
			running = have.MaxEntries()
		}
		if l.opts.Flows != 0 {
			held[i], err = maps.Entries(have)
		}
		have.Close()
		if err != nil {
			return 0, err
		}
	}
	flows := l.opts.Flows
	if flows == 0 {
		if running != 0 {
			return running, nil
		}
		flows = flowsByMemory()
	}
	size := 2 * ceilPowerOfTwo(uint32(min(max(flows, 64), 1<<24)))
	if size < running && (held[0] > int(size)*3/4 || held[1] > int(size/2)*3/4) {
		l.tooFull = max(held[0], held[1]) / 2
		return running, nil
	}
	return size, nil
}

// Replaced are the tables that were pinned in another version's shape and are filled anew.
func (l *Loader) Replaced() []string { return l.replaced }

// TooFull is the number of flows because of which the tables were not made as small as was asked for; 0:
// they have the size that was asked for.
func (l *Loader) TooFull() int { return l.tooFull }

// flowsByMemory spends 0.3 % of the memory: 256 k flows at 24 GiB.
func flowsByMemory() int {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 1 << 16
	}
	flows := int(uint64(info.Totalram) * uint64(info.Unit) / (96 << 10))
	up := int(ceilPowerOfTwo(uint32(min(max(flows, 1<<14), 1<<22))))
	if flows < up*3/4 { // the nearer power
		return max(up/2, 1<<14)
	}
	return up
}

func ceilPowerOfTwo(n uint32) uint32 {
	if n <= 1 {
		return 1
	}
	return 1 << bits.Len32(n-1)
}

// Maps are the instance's maps. They are closed with the loader.
func (l *Loader) Maps() *maps.Maps { return maps.Use(l.tc.Maps) }

// AttachName is the way programs are attached: "tcx" or "clsact".
func (l *Loader) AttachName() string {
	if l.tcx {
		return "tcx"
	}
	return "clsact"
}

// Close closes file descriptors. What is pinned stays attached.
func (l *Loader) Close() {
	l.dryMu.Lock()
	if l.dry != nil {
		l.dry.Close()
	}
	l.dryMu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range l.links {
		k.Close()
	}
	l.links = make(map[string]link.Link)
	if l.sweepers != nil {
		l.sweepers.close()
	}
	if l.tc != nil {
		l.tc.Close()
	}
	for _, m := range l.moving {
		m.close()
	}
	l.moving = nil
	l.closeFormer()
	l.lock.Close()
	if l.sock != nil {
		l.sock.Close()
	}
}

func linksDir(bpffs string) string { return filepath.Join(bpffs, "links") }

func pinName(program string, ifindex int) string { return program + "-" + strconv.Itoa(ifindex) }

// isNetkit reports whether the device is the host's end of a netkit pair. What a container sends there is
// seen by a program of the pair itself, whichever way others are attached.
func isNetkit(ifindex int) bool {
	_, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachNetkitPeer})
	return err == nil
}

// Attach puts a program on a device, replacing an older version of it there without a gap. It is
// idempotent. An error that wraps fs.ErrNotExist or unix.ENODEV says that the device is gone.
func (l *Loader) Attach(program string, ifindex int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.attach(program, ifindex)
}

func (l *Loader) attach(program string, ifindex int) error {
	if l.has(program, ifindex) {
		return nil // and no question to the kernel: each round calls this for every device
	}
	name := pinName(program, ifindex)
	prog := l.tc.Programs[program]
	if prog == nil {
		return fmt.Errorf("attach %s: no such program", program)
	}
	netkit := program == FromContainer && isNetkit(ifindex)
	if !l.tcx && !netkit {
		if err := l.opts.Classifier.AttachFilter(ifindex, isEgress(program), prog.FD(), "bpfnet_"+program); err != nil {
			return fmt.Errorf("attach %s to device %d: %w", program, ifindex, err)
		}
		// A directory remembers the filter for cleanup, as a pinned link would: bpffs holds no files.
		path := filepath.Join(linksDir(l.opts.BPFFS), name)
		if k, err := link.LoadPinnedLink(path, nil); err == nil {
			// Left from tcx: the filter has taken over.
			err = k.Unpin()
			k.Close()
			if err != nil {
				return fmt.Errorf("unpin %s: %w", name, err)
			}
		}
		if err := os.MkdirAll(path, 0o700); err != nil {
			return fmt.Errorf("remember %s: %w", name, err)
		}
		l.filters[name] = Attachment{Program: program, Ifindex: ifindex, Hook: hookOf(program)}
		return nil
	}
	attach := ebpf.AttachTCXIngress
	if isEgress(program) {
		attach = ebpf.AttachTCXEgress
	}
	return l.attachLink(name, prog, func() (link.Link, error) {
		if netkit {
			return link.AttachNetkit(link.NetkitOptions{Interface: ifindex, Program: prog, Attach: ebpf.AttachNetkitPeer})
		}
		return link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: attach})
	})
}

// attachLink updates the pinned link of that name, or makes and pins a new one.
func (l *Loader) attachLink(name string, prog *ebpf.Program, attach func() (link.Link, error)) error {
	if _, ok := l.links[name]; ok {
		return nil
	}
	path := filepath.Join(linksDir(l.opts.BPFFS), name)
	stale := false
	if k, err := link.LoadPinnedLink(path, nil); err == nil {
		if err := k.Update(prog); err == nil {
			l.links[name] = k
			return nil
		}
		// Its device or cgroup is gone and the name was taken again.
		k.Close()
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove stale pin: %w", err)
		}
	} else if st, serr := os.Stat(path); serr == nil && st.IsDir() {
		stale = true // a clsact filter of an earlier run: ours goes first, then that
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("open pinned link: %w", err)
	}
	k, err := attach()
	if err != nil {
		return fmt.Errorf("attach %s: %w", name, err)
	}
	if stale {
		a := parsePin(name)
		if err := errors.Join(l.opts.Classifier.DetachFilter(a.Ifindex, isEgress(a.Program)), os.Remove(path)); err != nil {
			k.Close()
			return fmt.Errorf("remove the clsact filter of %s: %w", name, err)
		}
	}
	if err := k.Pin(path); err != nil {
		k.Close()
		return fmt.Errorf("pin %s: %w", name, err)
	}
	l.links[name] = k
	return nil
}

// Attached reports whether this instance has put a program on a device.
func (l *Loader) Attached(program string, ifindex int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.has(program, ifindex)
}

// has looks the name up without making it: rounds ask thousands of times.
func (l *Loader) has(program string, ifindex int) bool {
	var buf [64]byte
	name := strconv.AppendInt(append(append(buf[:0], program...), '-'), int64(ifindex), 10)
	if _, ok := l.links[string(name)]; ok {
		return true
	}
	_, ok := l.filters[string(name)]
	return ok
}

// Detach takes a program off a device; a missing one, or a device that is gone, is no error.
func (l *Loader) Detach(program string, ifindex int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	name := pinName(program, ifindex)
	path := filepath.Join(linksDir(l.opts.BPFFS), name)
	if k, ok := l.links[name]; ok {
		k.Close()
		delete(l.links, name)
	}
	if _, ok := l.filters[name]; ok {
		if err := l.opts.Classifier.DetachFilter(ifindex, isEgress(program)); err != nil {
			return fmt.Errorf("detach %s from device %d: %w", program, ifindex, err)
		}
		delete(l.filters, name)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("detach %s: %w", name, err)
	}
	return nil
}

// AttachCgroup puts the sock programs on the instance's cgroup, unless that is left to TakeOver. It is
// idempotent.
func (l *Loader) AttachCgroup() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.moving) > 0 {
		return nil
	}
	return l.attachCgroup()
}

func (l *Loader) attachCgroup() error {
	if l.opts.Cgroup == "" {
		return nil
	}
	spec, err := bpf.LoadSock()
	if err != nil {
		return fmt.Errorf("read the sock object: %w", err)
	}
	for name, prog := range l.sock.Programs {
		attach := spec.Programs[name].AttachType
		err := l.attachLink(pinName(name, 0), prog, func() (link.Link, error) {
			return link.AttachCgroup(link.CgroupOptions{Path: l.opts.Cgroup, Attach: attach, Program: prog})
		})
		if err != nil {
			return fmt.Errorf("cgroup %s: %w", l.opts.Cgroup, err)
		}
	}
	return nil
}

// Attachments are the programs that this instance has in place.
func (l *Loader) Attachments() []Attachment {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]Attachment, 0, len(l.links)+len(l.filters))
	for name := range l.links {
		out = append(out, parsePin(name))
	}
	for _, a := range l.filters {
		out = append(out, a)
	}
	return out
}

func parsePin(name string) Attachment {
	program, index, _ := strings.Cut(name, "-")
	ifindex, _ := strconv.Atoi(index)
	a := Attachment{Program: program, Ifindex: ifindex, Hook: hookOf(program)}
	if strings.HasPrefix(program, "sock_") || IsStrict(program) {
		a.Hook = "cgroup"
	}
	if isShield(program) {
		a.Hook = "xdp"
	}
	return a
}

// Pinned are the attachments that pins tell of, this instance's and an earlier one's.
func (l *Loader) Pinned() ([]Attachment, error) { return pinned(l.opts.BPFFS) }

func pinned(bpffs string) ([]Attachment, error) {
	entries, err := os.ReadDir(linksDir(bpffs))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list pinned links: %w", err)
	}
	var out []Attachment
	for _, e := range entries {
		out = append(out, parsePin(e.Name()))
	}
	return out, nil
}

// Swept is what an expiry did, in entries of flows4 and flows6.
type Swept struct {
	Live    [2]int
	Deleted [2]int
}

// Expire deletes the flows that timed out and arms the kernel's own timer.
func (l *Loader) Expire() (Swept, error) { return l.sweep("expire") }

// CanSweep reports whether Expire and Purge would run at once: in the moments after Load the kernel still
// looks at them.
func (l *Loader) CanSweep() bool {
	select {
	case <-l.sweepers.loaded:
		return true
	default:
		return false
	}
}

// Purge deletes the flows of endpoints and ports that are gone.
func (l *Loader) Purge() (Swept, error) { return l.sweep("purge") }

// AddToGauge counts entries that were put into flows4 and flows6 by other hands than the data path's.
func (l *Loader) AddToGauge(v4, v6 int) error {
	<-l.sweepers.loaded
	if l.sweepers.err != nil {
		return l.sweepers.err
	}
	added := bpf.DatapathFlowGauge{Entries: [2]int64{int64(v4), int64(v6)}}
	if _, err := l.sweepers.programs["gauge"].Run(&ebpf.RunOptions{Context: added}); err != nil {
		return fmt.Errorf("run gauge: %w", err)
	}
	return nil
}

// MendGauge has the gauge of the flow tables say what these hold, after others than the data path have
// changed them.
func (l *Loader) MendGauge() error {
	m := l.Maps()
	v4, v6, err := m.Flows()
	if err != nil {
		return err
	}
	var held [2]int
	for i, name := range []string{"flows4", "flows6"} {
		if held[i], err = maps.Entries(m.Map(name)); err != nil {
			return fmt.Errorf("count %s: %w", name, err)
		}
	}
	return l.AddToGauge(held[0]-v4, held[1]-v6)
}

func (l *Loader) sweep(program string) (Swept, error) {
	var args bpf.DatapathExpireArgs
	<-l.sweepers.loaded
	if l.sweepers.err != nil {
		return Swept{}, l.sweepers.err
	}
	if _, err := l.sweepers.programs[program].Run(&ebpf.RunOptions{Context: args, ContextOut: &args}); err != nil {
		return Swept{}, fmt.Errorf("run %s: %w", program, err)
	}
	return Swept{
		Live:    [2]int{int(args.Live[0]), int(args.Live[1])},
		Deleted: [2]int{int(args.Deleted[0]), int(args.Deleted[1])},
	}, nil
}
