// SPDX-License-Identifier: Apache-2.0

// Package embedded is the engine that bpfnet brings: it does the verbs of api.Embedded on networks and
// sandboxes of bpfnet's own. It puts together the store (what there is), ipam (addresses), netdev
// (devices), reserve (host ports) and sandbox (files, processes), and tells the result as a policy.State.
// Of the data path it knows only what it may ask for: Guard, Apply, Ready.
//
// Order. A verb checks everything, makes devices and sockets, writes the store once, which is the moment
// that counts, changes the model in memory, and has the data path follow. What fails takes the earlier
// steps back. A removal goes the other way round: store and model first, then the data path, then the
// devices, so that nothing is served whose address could be another's. An end between any two steps
// leaves devices that the store does not know, which Restore removes, or records without devices, which
// it buries.
//
// Locking. Each sandbox has a lock (box.verb) that its verbs hold from begin to end, kernel and data path
// included; no verb holds two of them. Manager.mu guards the model and is held for moments only, never
// over a system call that can wait, and never while a function of Options is called: the daemon asks for
// State under a lock of its own. What a verb has chosen but not yet made (names, addresses, host ports)
// is claimed in the model at once, so that verbs in parallel cannot choose the same. Three more locks
// keep those apart that choose or write the same thing over system calls: making (networks), porting
// (host ports), hosting (hosts files); storing keeps writes in order. The order of locks is box.verb,
// then making, porting or hosting, then storing, then mu.
package embedded

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/bpfnet/bpfnet/ipam"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/store"
)

// DefaultNetwork is the network of sandboxes that ask for none. It is made when it is first needed.
const DefaultNetwork = "bpfnet"

// cgroupDir holds the sandboxes' cgroups, below Options.Cgroup.
const cgroupDir = "bpfnet"

// rest is how long an address that was given back is not given again.
const rest = time.Minute

// Options of New. All but those marked so are needed.
type Options struct {
	Store   *store.Store
	Devices *netdev.Devices
	Dir     string // of the sandboxes' files, one directory each
	Cgroup  string // root of the cgroups; those of the sandboxes are below bpfnet in it
	// Pools are where subnets come from. Optional: Docker's.
	Pools []ipam.Pool
	// DefaultSubnets are the default network's. Optional: an IPv4 one from the pools, a generated IPv6 one.
	DefaultSubnets []netip.Prefix

	// Foreign is what the other engines hold: names, subnets and ports that are not to be used again.
	Foreign func() policy.State
	// Guard puts the data path's programs on the host's end of a link before it can send.
	Guard func(ifindex int) error
	// Apply returns when the data path does what State says.
	Apply func(ctx context.Context) error
	// Ready says, after Apply, whether the data path serves an endpoint, and if not, why.
	Ready func(endpointID string) (bool, string)
	// Relayed says whether the relay holds a port's socket. Optional: there is no relay, and a sandbox
	// with IPv4 only is published on no IPv6 address unless it is asked for.
	Relayed func(policy.PortKey) bool
	// Show has readers see View after a change that the data path does not care about. Optional: Apply.
	Show func(ctx context.Context) error
	// Log is for what happens without anybody asking. Optional.
	Log *slog.Logger
}

// Manager holds the model. It is safe for concurrent use.
type Manager struct {
	o    Options
	host nsID // the network namespace that bpfnet serves

	making  sync.Mutex
	porting sync.Mutex
	hosting sync.Mutex
	storing sync.Mutex
	owed    []store.Batch // under storing: what could not be written about ends

	deaths  chan death
	closed  chan struct{} // ends those who would send deaths
	watches sync.WaitGroup
	// lingering are the deletions of devices that nobody waits for.
	lingering sync.WaitGroup

	mu       sync.Mutex
	networks map[string]*network // by ID
	boxes    map[string]*box     // by ID
	claims   map[*port]*box      // host ports that are held, or about to be
	state    *policy.State       // nil: to be made again
}

// network is one of the model. Its record does not change.
type network struct {
	store.Network
	options   policy.Options
	leases    []*ipam.Leases // one a subnet
	resting   map[netip.Addr]time.Time
	endpoints map[string]*endpoint // by ID, also those that are being made
	leaving   bool                 // nothing new may refer to it
	gone      bool                 // from the store
}

// box is a sandbox of the model.
type box struct {
	id   string
	verb sync.Mutex

	// Under Manager.mu. Slices of rec are replaced, never changed.
	rec       store.Sandbox
	made      bool // in the store
	removed   bool
	joining   []*network  // not in rec yet
	endpoints []*endpoint // in use
	ports     []*port     // in use
	// Of the current run, from the grant on.
	ended    chan struct{} // closed at its end; nil: it does not run
	starting bool          // the process is not known yet
	runner   *process
	main     *process // nil though it runs: it ended before it could be watched
}

// endpoint is an interface of a sandbox.
type endpoint struct {
	store.Endpoint
	net  *network
	live bool // in the store; under Manager.mu
	// rested are those of its addresses that were at rest when it got them, and since when: so they are
	// again if it was never used.
	rested map[netip.Addr]time.Time
}

// New reads the store. It changes nothing; Restore does.
func New(o Options) (*Manager, error) {
	own, err := o.Store.Own()
	if err != nil {
		return nil, err
	}
	if o.Pools == nil {
		o.Pools = ipam.DefaultPools()
	}
	if o.Show == nil {
		o.Show = o.Apply
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	m := &Manager{
		o: o, deaths: make(chan death), closed: make(chan struct{}),
		networks: make(map[string]*network), boxes: make(map[string]*box), claims: make(map[*port]*box),
	}
	if m.host, err = readNS("/proc/thread-self/ns/net"); err != nil {
		return nil, err
	}
	if err := m.load(own); err != nil {
		return nil, err
	}
	return m, nil
}

// restored is a stored time as one of the running process, which the wall clock does not move; one that is yet to come, by
// a clock that was set back since, is now.
func restored(at, now time.Time) time.Time { return now.Add(-max(now.Sub(at), 0)) }

// load makes the model of what the store has.
func (m *Manager) load(own store.Own) error {
	for _, r := range own.Networks {
		n, err := newNetwork(r)
		if err != nil {
			return fmt.Errorf("network %q: %w", r.Name, err)
		}
		m.networks[r.ID] = n
	}
	for _, r := range own.Sandboxes {
		m.boxes[r.ID] = &box{id: r.ID, rec: r, made: true}
	}
	now := time.Now()
	for _, r := range own.Releases {
		if n := m.networks[r.NetworkID]; n != nil {
			n.rest(r.Addr, restored(r.At, now))
		}
	}
	for _, r := range own.Endpoints {
		n, b := m.networks[r.NetworkID], m.boxes[r.SandboxID]
		if n == nil || b == nil {
			continue // Restore removes what is left of it
		}
		e := &endpoint{Endpoint: r, net: n, live: true}
		for _, a := range r.Addrs {
			if err := n.take(a); err != nil {
				m.o.Log.Error("take a sandbox's address again", "sandbox", b.rec.Name, "err", err)
			}
		}
		n.endpoints[r.ID] = e
		b.endpoints = append(b.endpoints, e)
	}
	for _, b := range m.boxes {
		slices.SortFunc(b.endpoints, byDevice)
	}
	return nil
}

// Close lets host ports and processes go. Sandboxes run on.
func (m *Manager) Close() {
	close(m.closed)
	m.mu.Lock()
	for _, b := range m.boxes {
		b.runner.close()
		b.main.close()
		b.runner, b.main = nil, nil
	}
	for p := range m.claims {
		p.release()
		delete(m.claims, p)
	}
	m.mu.Unlock()
	m.watches.Wait()
	m.lingering.Wait()
}

// networkName is the network's, or the beginning of the ID of one that is gone. The caller holds m.mu.
func (m *Manager) networkName(id string) string {
	if n := m.networks[id]; n != nil && !n.gone {
		return n.Name
	}
	return short(id)
}

func (m *Manager) dir(b *box) string { return filepath.Join(m.o.Dir, b.id) }

func (m *Manager) cgroup(b *box) string { return filepath.Join(m.o.Cgroup, cgroupDir, b.id) }

// write is the moment that counts: what is in the batch is as it says when write returns, or nothing is.
func (m *Manager) write(b store.Batch) error {
	m.storing.Lock()
	defer m.storing.Unlock()
	for len(m.owed) > 0 {
		if err := m.o.Store.Write(m.owed[0]); err != nil {
			return err
		}
		m.owed = m.owed[1:]
	}
	return m.o.Store.Write(b)
}

// record is write for what has happened anyway: if the store does not take it now, it is written before
// anything else is. Until then a start of the daemon would find out by itself.
func (m *Manager) record(b store.Batch) {
	if err := m.write(b); err != nil {
		m.o.Log.Error("write the store; it is tried again with the next change", "err", err)
		m.storing.Lock()
		m.owed = append(m.owed, b)
		m.storing.Unlock()
	}
}

// show has readers see what has changed. That they do not is not the verb's failure.
func (m *Manager) show(ctx context.Context) {
	if err := m.o.Show(ctx); err != nil {
		m.o.Log.Warn("show a change to readers; the next round does", "err", err)
	}
}

// undo is how the steps of a verb are taken back, last first.
type undo []func()

func (u *undo) add(f func()) { *u = append(*u, f) }

func (u undo) run() {
	for _, f := range slices.Backward(u) {
		f()
	}
}

// joined is errors.Join on one line.
type joined []error

func (j joined) Error() string {
	texts := make([]string, 0, len(j))
	for _, err := range j {
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

func (j joined) Unwrap() []error { return j }

// join returns nil if all of the errors are.
func join(errs ...error) error {
	var j joined
	for _, err := range errs {
		// What was said before is not said again: often undoing fails as doing did.
		if err != nil && (len(j) == 0 || !strings.Contains(j.Error(), err.Error())) {
			j = append(j, err)
		}
	}
	if len(j) == 0 {
		return nil
	}
	return j
}

func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand
	return hex.EncodeToString(b[:])
}

// short is an ID as people see it.
func short(id string) string { return id[:min(12, len(id))] }

// nsID names a namespace as long as it lives: namespaces(7).
type nsID struct{ dev, ino uint64 }

func readNS(path string) (nsID, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return nsID{}, fmt.Errorf("read namespace %s: %w", path, err)
	}
	return nsID{st.Dev, st.Ino}, nil
}

// errStarting is for verbs that come between a grant and its process.
var errStarting = errors.New("is being started; try again in a moment")
