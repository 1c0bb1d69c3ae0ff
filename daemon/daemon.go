// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sync/errgroup"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/docker"
	"github.com/bpfnet/bpfnet/embedded"
	"github.com/bpfnet/bpfnet/loader"
	bpfmaps "github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/metrics"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/relay"
	"github.com/bpfnet/bpfnet/store"
)

const (
	// resyncEvery is how often maps, devices and sysctls are read back, whatever was announced.
	resyncEvery = time.Minute
	// settle is how long news is collected before the tables are compiled: one `docker run` makes
	// a handful of events. Where rounds have more to do it is as long as one of them, up to maxSettle.
	settle    = 2 * time.Millisecond
	maxSettle = 8 * time.Millisecond
	// showAfter is how long readers and the store wait for what the maps hold, so that it is told of once
	// and not while a container waits to be READY; nobody waits who asked for it.
	showAfter = 30 * time.Millisecond
	// showWithin is how long they wait for what makes no difference to packets, such as the reason why an
	// endpoint is not READY.
	showWithin = 100 * time.Millisecond
	// sourceWait is how long readiness waits for the engine's first full state.
	sourceWait = 5 * time.Second
	// reservationWait is how long an engine's bare reservation socket is kept from the world.
	reservationWait = 10 * time.Second
	// maxExpireEvery is how often flows are aged at least; the kernel's own timer steps in after a
	// minute without.
	maxExpireEvery = 10 * time.Second
	loIfindex      = 1
)

// SandboxDir holds the sandboxes' files, below the state directory.
const SandboxDir = "sandboxes"

// Daemon is one running instance.
type Daemon struct {
	api.Embedded // is own
	cfg          Config
	log          *slog.Logger
	started      time.Time
	clock        moment // of the last look; for the reconciler alone

	store    *store.Store
	listener net.Listener
	devices  *netdev.Devices
	loader   *loader.Loader
	writer   *bpfmaps.Writer
	docker   *docker.Source // nil: off
	own      *embedded.Manager
	relay    *relay.Keeper
	timeouts map[string]time.Duration
	rounds   *metrics.Rounds
	metrics  *metrics.Collector
	cookie   uint64
	seed     uint32

	kick    chan struct{} // news: a round soon
	urgent  chan struct{} // somebody waits: a round now
	retimed chan struct{} // timeouts have changed
	over    chan struct{} // closed when no round will begin any more

	denying sync.Mutex // held to change the deny list, before mu

	mu       sync.Mutex               // of what follows: handed to the reconciler by others
	engine   policy.State             // Docker's
	reported bool                     // the engine has reported its full state
	bridges  map[string]policy.Source // of the served ones, by name
	guarded  map[int]bool             // links that are about to become bridge ports
	denied   []netip.Prefix           // the deny list; in order, and never changed in place
	// Bridges that should be the engine's, by index, of which it has not told.
	strangers map[int]bridgeSeen
	resync    bool
	renew     bool
	// When the relay made room for the engine, and in which round.
	yielded   time.Time
	yieldedIn uint64
	begun     uint64        // rounds, by number
	ended     uint64        // the last round that has ended
	failed    error         // its
	waiting   int           // in Flush
	news      chan struct{} // closed with it
	missing   error         // why some device of the last round is without its programs
	// What the engine's port hook announced, and what leads somewhere as of the last round.
	announced map[string]announced
	published map[policy.PortKey]policy.PortRow
	closed    map[policy.PortKey]policy.PortRow // ports of routed networks, which the host does not have

	round    sync.Mutex // of what follows: one round after another
	slots    policy.Slots
	tables   policy.Tables
	applied  policy.Tables // the last that the maps have taken whole
	inputs   *inputs       // what these were made of; nil: to be made again
	attached map[int]bool
	moved    bool         // flow tables have been carried over
	ownPins  bool         // no pin is left but of what the loader knows
	adopted  map[int]bool // bridges whose flows netfilter has no more, by index
	seen     policy.Devices
	uplinks  []string // as last reported
	strict   *strict  // nil: off
	shield   *shield  // nil: off
	changes  []netdev.Change
	relayed  map[policy.PortKey]bool   // what the relay holds
	unheld   map[policy.PortKey]string // what it does not, and why
	changed  bool                      // the maps hold what the snapshot does not tell of
	waited   time.Duration             // by the last round, for the kernel: whoever moves a device holds everybody up
	known    policy.State              // of the last round, with what was added by hand
	owed     bool                      // the last round has left the snapshot to be written later
	told     policy.State              // Docker's, as of the last round
	unstored bool                      // the store is to have it
	problem  string                    // of the last round, so that it is logged once
	wrong    map[policy.Problem]bool   // of settings, as of the last round
	sockets  string                    // what last kept sockets from being ended, likewise
	snapshot *api.Snapshot
	host     *hostSettings // as last read; nil: never
	seats    map[seat]policy.MAC

	// Of verifyLoop alone: programs of others that run before ours, as of the last look, and what last kept pins from
	// being made, so that it is logged once.
	ahead    map[string]bool
	unpinned string

	// writing is held to write the snapshot. Whoever holds round may wait for it, and not the other way round.
	writing sync.Mutex
}

// Run runs the daemon until ctx ends. The network runs on afterwards. An error before it serves means
// that nothing was changed.
func Run(ctx context.Context, cfg Config) error {
	d, err := open(cfg)
	if err != nil {
		return err
	}
	defer d.close()
	return d.run(ctx)
}

// open checks everything that can be wrong before anything is changed.
func open(cfg Config) (_ *Daemon, err error) {
	d := &Daemon{
		cfg: cfg, log: cfg.Logger, started: time.Now(), kick: make(chan struct{}, 1), urgent: make(chan struct{}, 1), retimed: make(chan struct{}, 1),
		bridges: make(map[string]policy.Source), guarded: make(map[int]bool), attached: make(map[int]bool), adopted: make(map[int]bool), announced: make(map[string]announced),
		news: make(chan struct{}), over: make(chan struct{}), rounds: metrics.NewRounds(),
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	if d.timeouts, err = cfg.timeouts(); err != nil {
		return nil, err
	}
	if cfg.Docker != "off" {
		d.docker, err = docker.New(docker.Options{
			Host: cfg.Docker, Logger: d.log,
			DefaultBridge: docker.DefaultBridgeSettings{
				NoMasquerade: cfg.DefaultBridgeNoMasquerade, NoICC: cfg.DefaultBridgeNoICC,
				HostBinding: cfg.DefaultBridgeIP,
			},
		})
		if err != nil {
			return nil, err
		}
	}
	if d.devices, err = netdev.Open(netdev.Options{Uplinks: cfg.Uplinks, LinkType: cfg.LinkType}); err != nil {
		return nil, err
	}
	if d.cookie, err = netdev.NetnsCookie(); err != nil {
		return nil, fmt.Errorf("read the namespace's cookie: %w (needs Linux 5.14 or later)", err)
	}
	if d.store, err = store.Open(cfg.State); err != nil {
		return nil, err
	}
	// Before the maps are touched: another daemon may serve them, with a state of its own.
	if d.listener, err = api.Listen(cfg.Socket, cfg.SocketGroup); err != nil {
		return nil, err
	}
	if err := d.remember(); err != nil {
		return nil, err
	}
	var relayed func(policy.PortKey) bool
	if cfg.Relay != RelayNone {
		relayed = func(key policy.PortKey) bool { return d.relay.Has(key) }
	}
	d.own, err = embedded.New(embedded.Options{
		Store: d.store, Devices: d.devices, Log: d.log,
		Dir: filepath.Join(cfg.State, SandboxDir), Cgroup: cfg.Cgroup, DefaultSubnets: cfg.DefaultSubnets,
		Foreign: d.foreign, Guard: d.guard, Apply: d.Flush, Ready: d.ready, Show: d.show,
		Relayed: relayed,
	})
	if err != nil {
		return nil, err
	}
	d.Embedded = d.own
	d.loader, err = loader.Load(loader.Options{
		Paths: loader.Paths{BPFFS: cfg.BPFFS, Cgroup: cfg.Cgroup}, Attach: cfg.Attach, Flows: cfg.Flows,
		Classifier: netdev.Clsact{},
	})
	if err != nil {
		return nil, err
	}
	if tables := d.loader.Replaced(); len(tables) > 0 {
		d.log.Info("tables of another version are filled anew", "tables", tables)
	}
	if n := d.loader.TooFull(); n > 0 {
		d.log.Warn("the flow tables stay as large as they are: they hold too many flows", "asked", cfg.Flows, "flows", n)
	}
	if d.writer, err = bpfmaps.NewWriter(d.loader.Maps()); err != nil {
		return nil, err
	}
	d.writer.Bury, d.writer.Former = d.bury, d.loader.Former()
	d.metrics = metrics.New(d.metricsOptions())
	if d.seed = d.writer.HashSeed(); d.seed == 0 {
		d.seed = rand.Uint32()
	}
	d.relay = relay.NewKeeper(relay.KeeperOptions{
		Dir: cfg.State, Cgroup: cfg.Cgroup, Version: cfg.Version, Log: d.log,
		Held: d.own.Held, Lost: d.relayLost,
	})
	d.relayed = d.relay.Served() // published without a gap
	return d, errors.Join(d.openStrict(), d.openShield())
}

// remember takes up what an earlier run left in the store.
func (d *Daemon) remember() error {
	slots, err := d.store.Slots()
	if err != nil {
		return err
	}
	d.slots = slots
	if d.docker != nil {
		if d.engine, _, err = d.store.State(policy.SourceDocker); err != nil {
			return err
		}
		d.sitDown(d.engine.Endpoints)
		d.engine = d.withoutRelay(d.engine)
		d.told = d.engine
	}
	if d.denied, err = d.store.Denied(); err != nil {
		return err
	}
	saved, err := d.store.Sysctls()
	if err != nil {
		return err
	}
	for _, c := range saved {
		d.changes = append(d.changes, netdev.Change(c))
	}
	return nil
}

func (d *Daemon) close() {
	if d.own != nil {
		d.own.Close()
	}
	if d.relay != nil {
		d.relay.Close()
	}
	if d.strict != nil {
		d.strict.close()
	}
	if d.shield != nil {
		d.shield.programs.Close()
	}
	if d.loader != nil {
		d.loader.Close()
	}
	if d.devices != nil {
		d.devices.Close()
	}
	if d.listener != nil {
		d.listener.Close()
	}
	if d.store != nil {
		if err := d.store.Close(); err != nil {
			d.log.Error("close the store", "err", err)
		}
	}
}

func (d *Daemon) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	events, err := d.devices.Watch(ctx)
	if err != nil {
		return err
	}
	// Links that an earlier run pinned guard their devices already.
	pinned, err := d.loader.Pinned()
	if err != nil {
		return err
	}
	for _, a := range pinned {
		switch a.Program {
		case loader.FromContainer:
			d.attached[a.Ifindex] = true
		case loader.FromBridge:
			d.adopted[a.Ifindex] = true
		}
	}
	// Bridges and links first: what they carry is in the first round's tables.
	if err := d.own.Restore(ctx); err != nil {
		return err
	}
	// Before the first round these programs see an empty config and do nothing.
	if err := d.loader.AttachCgroup(); err != nil {
		return err
	}
	if err := d.reconcile(); err != nil {
		return fmt.Errorf("first round: %w", err)
	}
	server := api.NewServer(d)
	server.Metrics = metrics.Handler(d.metrics)
	group.Go(func() error { return server.Run(ctx, d.listener) })
	if d.cfg.Changes != nil {
		group.Go(func() error { return d.takeChanges(ctx) })
	}
	if d.cfg.MetricsListen.IsValid() {
		group.Go(func() error {
			metrics.Serve(ctx, d.cfg.MetricsListen, server.Metrics, d.log)
			return nil
		})
	}
	group.Go(func() error { return d.own.Run(ctx) })
	group.Go(func() error { return d.watch(ctx, events) })
	group.Go(func() error { return d.reconcileLoop(ctx) })
	group.Go(func() error { return d.verifyLoop(ctx) })
	group.Go(func() error { return d.expireLoop(ctx) })
	if d.docker != nil {
		group.Go(func() error { return d.docker.Run(ctx, d.update) })
	}
	group.Go(func() error { return d.announce(ctx) })
	return group.Wait()
}

// incompleteRetry is how soon a device that refused a program is tried again while others wait for it.
const incompleteRetry = time.Second

// complete waits until every bridge, port and uplink that there is carries its programs. Whoever starts
// after READY relies on that.
func (d *Daemon) complete(ctx context.Context) {
	for told := ""; ; {
		// A round that failed otherwise is logged, and is no reason to hold the Engine up.
		_ = d.Flush(ctx)
		d.mu.Lock()
		missing := d.missing
		d.mu.Unlock()
		if missing == nil || ctx.Err() != nil {
			return
		}
		if text := missing.Error(); text != told {
			told = text
			d.log.Error("not ready: devices are without their programs", "err", missing)
			_, _ = systemd.SdNotify(false, "STATUS=not ready: "+strings.ReplaceAll(text, "\n", "; "))
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(incompleteRetry):
		}
	}
}

// announce tells systemd and the user when the daemon serves: without an engine when its own default
// network is there, else when the engine's first state is in the maps. An engine without a socket is
// not waited for.
func (d *Daemon) announce(ctx context.Context) error {
	if d.docker == nil {
		if err := d.own.Default(ctx); err != nil && ctx.Err() == nil {
			d.log.Error("make the default network", "err", err)
		}
	} else if d.docker.Exists() {
		timer := time.NewTimer(sourceWait)
		defer timer.Stop()
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			d.log.Warn("serving without the engine's state for now", "docker", d.docker.Status().LastError)
		case <-d.docker.Ready():
		}
	}
	if d.complete(ctx); ctx.Err() != nil {
		return nil
	}
	d.mu.Lock()
	snap := d.snapshot
	d.mu.Unlock()
	if d.cfg.Banner != nil {
		writeBanner(d.cfg.Banner, d.cfg.Version, d.cfg.Docker, snap)
	}
	if _, err := systemd.SdNotify(false, systemd.SdNotifyReady+"\nSTATUS="); err != nil {
		d.log.Warn("notify systemd", "err", err)
	}
	return nil
}

// update takes a source's full state.
func (d *Daemon) update(s policy.State) {
	d.mu.Lock()
	d.engine, d.reported = d.withoutRelay(s), true
	d.mu.Unlock()
	signal(d.urgent) // it has settled already: see docker.debounce
}

func (d *Daemon) wake() { signal(d.kick) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// watch turns the kernel's news into work. A new port of a served bridge is guarded here and now:
// everything else can wait for the next round.
func (d *Daemon) watch(ctx context.Context, events <-chan netdev.Event) error {
	for ev := range events {
		d.mu.Lock()
		source, served := d.bridges[ev.MasterName]
		switch ev.Kind {
		case netdev.Resync:
			d.resync = true
			d.log.Warn("the kernel had more news about devices than could be read: all are looked at anew")
		case netdev.RouteChanged:
			d.renew = true
		}
		d.mu.Unlock()
		switch ev.Kind {
		case netdev.NeighChanged:
			continue // next hops are the kernel's to resolve
		case netdev.LinkChanged:
			if !ev.Gone {
				d.guardStranger(ev.Ifindex, ev.Name, false, 0, "")
			}
		case netdev.PortChanged:
			if source == policy.SourceDocker && !ev.Gone {
				d.relayYields(ev.MasterName)
			}
			if !served && !ev.Gone {
				d.guardStranger(ev.Ifindex, ev.Name, true, ev.Master, ev.MasterName)
			}
			if source == policy.SourceDocker && d.docker != nil {
				d.docker.Refresh(ev.MasterName) // its answer comes while the kernel attaches
			}
			if served && !ev.Gone {
				for _, program := range []string{loader.FromContainer, loader.ToContainer} {
					if err := d.loader.Attach(program, ev.Ifindex); err != nil {
						d.log.Debug("guard a new port", "device", ev.Name, "err", err)
					}
				}
			}
		}
		d.wake()
	}
	if ctx.Err() == nil {
		return errors.New("the kernel's news about devices ended")
	}
	return nil
}

func (d *Daemon) reconcileLoop(ctx context.Context) error {
	defer close(d.over)
	// Beside the rounds: with a thousand endpoints it takes longer than one of them.
	due := make(chan struct{}, 1)
	var shower sync.WaitGroup
	shower.Go(func() {
		for last := ""; ; {
			_, more := <-due
			if err := d.showOwed(); err == nil {
				last = ""
			} else if text := err.Error(); text != last {
				d.log.Error("write the snapshot; it goes on after the next round", "err", err)
				last = text
			}
			if !more {
				return
			}
		}
	})
	defer shower.Wait()
	defer close(due)
	tick := time.NewTicker(resyncEvery)
	defer tick.Stop()
	look := time.NewTicker(verifyEvery)
	defer look.Stop()
	d.clock = d.moment()
	show := time.NewTimer(time.Hour)
	defer show.Stop()
	var showAt time.Time // zero: not at all; later news does not put it off
	for took := time.Duration(0); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-show.C:
			showAt = time.Time{}
			signal(due)
			continue
		case <-look.C:
			if !d.clockSet(d.moment()) {
				continue
			}
			d.mu.Lock()
			d.resync = true
			d.mu.Unlock()
		case <-tick.C:
			d.mu.Lock()
			d.resync = true
			d.mu.Unlock()
		case <-d.urgent:
		case <-d.kick:
			timer := time.NewTimer(min(max(took, settle), maxSettle))
			select {
			case <-ctx.Done():
				timer.Stop()
				return nil
			case <-d.urgent:
				timer.Stop()
			case <-timer.C:
			}
		}
		began := time.Now()
		err := d.reconcile()
		took = time.Since(began) - d.waited
		if wait, owes := d.owes(); owes {
			if at := time.Now().Add(wait); showAt.IsZero() || at.Before(showAt) {
				show.Reset(wait)
				showAt = at
			}
		}
		if text := fmt.Sprint(err); err != nil && text != d.problem {
			d.log.Error("reconcile; it goes on with the next round", "err", err)
			d.problem = text
		} else if err == nil {
			d.problem = ""
		}
		if err != nil {
			d.mu.Lock()
			d.resync = true
			d.mu.Unlock()
		}
	}
}

// expireLoop ages the flows: as often as the shortest timeout needs, and at least every ten seconds. A
// table that is nearly empty can wait three times as long: walking it costs the same.
func (d *Daemon) expireLoop(ctx context.Context) error {
	every := d.expireEvery()
	// Once at the start: what an earlier run took out of the maps and did not live to purge. Then what has
	// timed out, which arms the kernel's timer.
	if err := d.purge(); err != nil {
		return err
	}
	if err := d.expire(); err != nil {
		return err
	}
	if d.moved {
		if err := d.loader.MendGauge(); err != nil {
			return err
		}
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	m := d.loader.Maps()
	for skipped := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-d.retimed:
			every = d.expireEvery()
			tick.Reset(every)
		case <-tick.C:
			v4, v6, err := m.Flows()
			if err == nil && every == maxExpireEvery && skipped < 2 && v4+v6 < int(m.Map("flows4").MaxEntries()/64) {
				skipped++
				continue
			}
			skipped = 0
			if err := d.expire(); err != nil {
				return err
			}
		}
	}
}

func (d *Daemon) expireEvery() time.Duration {
	d.round.Lock()
	defer d.round.Unlock()
	every := maxExpireEvery
	for _, t := range d.timeouts {
		every = min(every, max(t/2, time.Second))
	}
	return every
}

// takeChanges takes up settings that change while the daemon runs, with the next round.
func (d *Daemon) takeChanges(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case l := <-d.cfg.Changes:
			timeouts, err := Config{Timeouts: l.Timeouts}.timeouts()
			if err != nil {
				d.log.Error("change of settings not taken", "err", err)
				continue
			}
			d.round.Lock()
			d.timeouts, d.cfg.AllowDirectRouting = timeouts, l.AllowDirectRouting
			d.cfg.AcceptMark, d.cfg.AcceptMask = l.AcceptMark, l.AcceptMask
			d.cfg.EndpointFlows = l.EndpointFlows
			d.round.Unlock()
			d.metrics.SetLimit(l.MetricsLimit)
			signal(d.retimed)
			signal(d.urgent)
		}
	}
}

// reconcile brings devices and maps to what the sources say. Level-triggered and idempotent.
func (d *Daemon) reconcile() (err error) {
	d.round.Lock()
	defer d.round.Unlock()
	began := time.Now()
	defer func() { d.rounds.Reconciled(began, time.Since(began), err) }()
	d.mu.Lock()
	engine, state := d.state()
	reported, resync, renew := d.reported || d.docker == nil, d.resync, d.renew
	d.resync, d.renew = false, false
	served := make(map[string]bool)
	clear(d.bridges)
	for _, n := range state.Networks {
		served[n.Bridge] = true
		d.bridges[n.Bridge] = n.Source
	}
	d.begun++
	round := d.begun
	d.mu.Unlock()
	// What a device refused is no failure of a verb about others: whether its own are served, it asks.
	var errs, ofDevices []error
	defer func() {
		if err != nil && renew {
			d.mu.Lock()
			d.renew = true
			d.mu.Unlock()
		}
		d.endRound(round, err)
		err = errors.Join(append(ofDevices, err)...)
	}()
	if resync {
		d.inputs = nil
		errs = append(errs, d.writer.Resync())
		d.devices.Forget()
	}
	// Before the look at the devices: what is attached after it, to a device that this round does not
	// know, is for the next round to judge.
	pinned := d.loader.Attachments()
	if resync || !d.ownPins {
		if pinned, err = d.loader.Pinned(); err != nil {
			errs = append(errs, err)
		}
	}
	settled := func(ifindex int) bool { // who is served keeps its MAC; if not, the next resync finds out
		_, is := d.applied.Links[ifindex]
		return is && !resync
	}
	asked := time.Now()
	devices, err := d.devices.Snapshot(served, settled)
	d.waited = time.Since(asked)
	if err != nil {
		return err
	}
	engine, state = d.latest(engine, state)
	// What the store does not tell is no reason to take away what is served.
	byHand, err := d.byHand(devices, state)
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	pairs, err := d.store.Allowed()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	state.Endpoints = slices.Concat(state.Endpoints, byHand)
	known := state
	if closed := d.unreported(devices, served); len(closed) > 0 {
		state.Networks = slices.Concat(state.Networks, closed)
		for _, n := range closed {
			served[n.Bridge] = true
		}
		if devices, err = d.devices.Snapshot(served, settled); err != nil {
			return err
		}
	}
	d.seen = devices
	d.reportUplinks(devices.Uplinks)
	d.settleGuards(devices)
	settings, err := d.settings(devices)
	errs = append(errs, err)
	if err != nil && d.host == nil {
		return errors.Join(errs...)
	}
	in := policy.Intents{
		State: state, Devices: devices, Attached: d.attached, Relayed: d.relayed, Unrelayed: d.unheld, DirectRouting: d.cfg.AllowDirectRouting,
	}
	for _, p := range pairs {
		in.Allowed = append(in.Allowed, [2]string{p.A, p.B})
	}

	// First the maps, as far as the guards stand; then the guards; then what they make possible.
	fresh := d.newcomers(devices, known.Networks)
	d.guardedAlready(devices)
	in.Attached = without(d.attached, fresh)
	if err = d.apply(in, settings); err == nil {
		err = d.takeOver()
	}
	errs = append(errs, err)
	if err != nil && d.loader.Moving() {
		// The programs that are attached go on with their own tables, rather than with none of their flows.
		return errors.Join(errs...)
	}
	changed, err := d.attach(devices, served, pinned, reported)
	ofDevices = append(ofDevices, err)
	in.Attached = d.attached
	if changed || len(fresh) > 0 {
		var adopted bpfmaps.Adopted
		if len(fresh) > 0 {
			d.inputs = nil // the flows are to be judged by new tables, whatever these say
			// A flow that is lost is no reason to serve nobody.
			if adopted, err = d.adopt(in, fresh); err != nil {
				d.log.Error("take over flows from netfilter", "err", err)
			}
		}
		errs = append(errs, d.apply(in, settings), d.count(adopted))
	}
	if renew { // tables that are the same have renewed nothing
		errs = append(errs, d.writer.Renew())
	}
	d.relayResumes(round, devices)
	// What the relay holds is published; what it cannot get may be another program's.
	relayed, err := d.relayPorts(resync)
	ofDevices = append(ofDevices, err)
	if relayed {
		in.Relayed, in.Unrelayed = d.relayed, d.unheld
		errs = append(errs, d.apply(in, settings))
	}
	errs = append(errs, d.announceMoves(state, devices))
	d.report()
	if d.strict != nil {
		errs = append(errs, d.strict.apply(d.tables, devices))
	}
	if d.shield != nil {
		d.mu.Lock()
		denied := d.denied
		d.mu.Unlock()
		changed, err := d.shield.apply(devices.Uplinks, denied, resync)
		d.changed = d.changed || changed
		errs = append(errs, err)
	}
	if d.ownPins && errors.Join(errs...) == nil {
		d.writer.Former = nil
		errs = append(errs, d.loader.ForgetFormer())
	}
	d.known, d.owed = known, true
	if !engine.Equal(d.told) {
		d.told, d.unstored = engine, true
	}
	d.mu.Lock()
	d.published, d.closed = d.applied.Ports, d.applied.Closed
	now := d.waiting > 0 || d.snapshot == nil
	d.mu.Unlock()
	if now {
		errs = append(errs, d.writeSnapshot(known))
	}
	return errors.Join(errs...)
}

// showOwed writes the snapshot that the last round has left, if no other has been written since, and what
// the next start begins with while the engine has not spoken. Rounds go on meanwhile.
func (d *Daemon) showOwed() error {
	d.round.Lock()
	told, unstored, owed := d.told, d.unstored, d.owed
	d.unstored = false
	var s *api.Snapshot
	var err error
	if owed {
		s, err = d.makeSnapshot(d.known)
	}
	d.writing.Lock()
	d.round.Unlock()
	if s != nil {
		err = api.WriteSnapshot(d.cfg.State, s)
	}
	serr := error(nil)
	if unstored {
		serr = d.store.SetState(policy.SourceDocker, told)
	}
	d.writing.Unlock()
	if err != nil || serr != nil {
		d.round.Lock()
		d.owed, d.unstored = d.owed || err != nil, d.unstored || serr != nil
		d.round.Unlock()
	}
	return errors.Join(err, serr)
}

// owes reports whether something is still to be shown, and how long that can wait.
func (d *Daemon) owes() (wait time.Duration, owes bool) {
	d.round.Lock()
	defer d.round.Unlock()
	if d.changed {
		return showAfter, true
	}
	return showWithin, d.owed || d.unstored
}

// report logs what is wrong with the settings, each once as long as it is.
func (d *Daemon) report() {
	now := make(map[policy.Problem]bool, len(d.tables.Problems))
	for _, p := range d.tables.Problems {
		now[p] = true
		if !d.wrong[p] {
			d.log.Warn("setting not served as asked for", "network", p.Network, "setting", p.Setting, "problem", p.Text, "instead", p.Instead)
		}
	}
	d.wrong = now
}

// latest is what has been told since the round began: the look at the devices may have waited for the
// engine, which holds the kernel's lock on them. Only endpoints and ports may differ: the devices were
// looked at for the networks of before.
func (d *Daemon) latest(engine, state policy.State) (policy.State, policy.State) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e, s := d.state(); policy.SameNetworks(s.Networks, state.Networks) {
		return e, s
	}
	return engine, state
}

// state is the engine's, and that with our own. The caller holds d.mu.
func (d *Daemon) state() (engine, all policy.State) {
	a, b := d.withAnnounced(d.engine), d.own.State()
	return a, policy.State{
		Networks:  slices.Concat(a.Networks, b.Networks),
		Endpoints: slices.Concat(a.Endpoints, b.Endpoints),
		Ports:     slices.Concat(a.Ports, b.Ports),
		Openings:  slices.Concat(a.Openings, b.Openings),
		Problems:  slices.Concat(a.Problems, b.Problems),
	}
}

// inputs are all that tables and maps come from.
type inputs struct {
	policy.Intents
	bpfmaps.Settings
}

func (in *inputs) equal(o *inputs) bool {
	return in.Intents.Equal(o.Intents) && reflect.DeepEqual(in.Settings, o.Settings)
}

// apply compiles and writes, unless that would be the same once more: most rounds find nothing new. Slots
// are remembered before they are used, so that a crash in between cannot have two things share one.
func (d *Daemon) apply(in policy.Intents, settings bpfmaps.Settings) error {
	in.Attached = maps.Clone(in.Attached)
	now := &inputs{in, settings}
	if d.inputs != nil && now.equal(d.inputs) {
		return nil
	}
	d.inputs = nil
	tables, slots := policy.Compile(in, d.slots)
	d.tables = tables
	same := slotsEqual(slots, d.slots)
	if !same {
		d.changed = true
		if err := d.store.SetSlots(slots); err != nil {
			return err
		}
	}
	res, err := d.writer.Apply(tables, settings)
	d.changed = d.changed || res.Changed > 0
	if err != nil {
		return err
	}
	d.slots, d.applied = slots, tables
	if same { // else a slot that has become free may be given away now
		d.inputs = now
	}
	return nil
}

func slotsEqual(a, b policy.Slots) bool {
	return mapsEqual(a.Networks, b.Networks) && mapsEqual(a.Endpoints, b.Endpoints) && mapsEqual(a.Ports, b.Ports)
}

// guardedAlready adds the links to d.attached that were guarded when the kernel told of them.
func (d *Daemon) guardedAlready(devices policy.Devices) {
	for _, l := range devices.Links {
		if !d.attached[l.Ifindex] && d.loader.Attached(loader.FromContainer, l.Ifindex) && d.loader.Attached(loader.ToContainer, l.Ifindex) {
			d.attached[l.Ifindex] = true
		}
	}
}

// attach puts programs where they belong and takes those of pinned from where they do not. It reports
// whether a container's interface was newly guarded, or is no longer.
func (d *Daemon) attach(devices policy.Devices, served map[string]bool, pinned []loader.Attachment, reported bool) (bool, error) {
	type place struct {
		program string
		ifindex int
	}
	want := make(map[place]bool, 2*len(devices.Links)+len(devices.Bridges)+2*len(devices.Uplinks)+1)
	want[place{loader.FromHost, loIfindex}] = true
	for _, b := range devices.Bridges {
		if served[b.Name] {
			want[place{loader.FromBridge, b.Ifindex}] = true
		}
	}
	for _, l := range devices.Links {
		want[place{loader.FromContainer, l.Ifindex}] = true
		want[place{loader.ToContainer, l.Ifindex}] = true
	}
	d.mu.Lock()
	for ifindex := range d.guarded {
		want[place{loader.FromContainer, ifindex}] = true
		want[place{loader.ToContainer, ifindex}] = true
	}
	d.mu.Unlock()
	for _, u := range devices.Uplinks {
		if u.Ethernet {
			want[place{loader.FromUplink, u.Ifindex}] = true
			want[place{loader.ToUplink, u.Ifindex}] = true
		} else {
			want[place{loader.FromUplinkL3, u.Ifindex}] = true
			want[place{loader.ToUplinkL3, u.Ifindex}] = true
		}
	}
	var errs []error
	failed := make(map[int]bool)
	for p := range want {
		if err := d.loader.Attach(p.program, p.ifindex); err != nil {
			failed[p.ifindex] = true
			if !goneDevice(err) {
				errs = append(errs, err)
			}
		}
	}
	attached, changed := make(map[int]bool, len(devices.Links)), false
	for _, l := range devices.Links {
		attached[l.Ifindex] = !failed[l.Ifindex]
		changed = changed || attached[l.Ifindex] != d.attached[l.Ifindex]
	}
	d.mu.Lock()
	d.missing = errors.Join(errs...)
	d.mu.Unlock()
	d.attached = attached

	// Before the engine has spoken once, its networks are only remembered: nothing is taken down.
	for _, a := range pinned {
		if a.Hook == "cgroup" || a.Hook == "xdp" || want[place{a.Program, a.Ifindex}] || (!reported && deviceExists(a.Ifindex)) {
			continue
		}
		errs = append(errs, d.loader.Detach(a.Program, a.Ifindex))
	}
	err := errors.Join(errs...)
	d.ownPins = reported && err == nil
	return changed, err
}

// hostSettings are those that the host's sysctls say.
type hostSettings struct {
	dropTransit4, dropTransit6 bool
	snat                       []bpfmaps.PortRange
	reserved                   map[uint16]struct{}
}

// settings are the daemon's own and the host's. Where these cannot be read, they are what they were, if they
// have ever been read, beside the error.
func (d *Daemon) settings(devices policy.Devices) (bpfmaps.Settings, error) {
	s := bpfmaps.Settings{
		NetnsCookie: d.cookie, HashSeed: d.seed,
		ReservationWait: toTicks(reservationWait), Timeouts: tickTimeouts(d.timeouts),
		EndpointFlows: d.cfg.EndpointFlows,
	}
	s.DirectRouting, s.AcceptMark, s.AcceptMask = d.cfg.AllowDirectRouting, d.cfg.AcceptMark, d.cfg.AcceptMask
	host, err := d.readHost(devices)
	if err == nil {
		d.host = &host
	} else if d.host == nil {
		return s, err
	}
	s.DropTransit4, s.DropTransit6 = d.host.dropTransit4, d.host.dropTransit6
	s.SNAT, s.Reserved = d.host.snat, d.host.reserved
	return s, err
}

// readHost reads the host's settings; forwarding is switched on here.
func (d *Daemon) readHost(devices policy.Devices) (hostSettings, error) {
	var s hostSettings
	var names []string
	for _, u := range devices.Uplinks {
		names = append(names, u.Name)
	}
	local, err := netdev.LocalPortRange()
	if err != nil {
		return s, err
	}
	reserved, err := netdev.ReservedPorts()
	if err != nil {
		return s, err
	}
	// Before forwarding, which is on for containers alone: nothing may fail between that and the round that guards it.
	ports := planMasquerade(local, reserved)
	if ports.reserve != nil && !covers(reserved, *ports.reserve) {
		change, err := netdev.SetReservedPorts(mergeRanges(reserved, *ports.reserve))
		if err != nil {
			return s, err
		}
		if change.Path != "" {
			d.changes = netdev.Merge(d.changes, []netdev.Change{change})
			if err := d.saveChanges(); err != nil {
				return s, err
			}
		}
	}
	before := len(d.changes)
	plan, err := netdev.PlanForwarding(netdev.ReadSysctl, names, d.changes)
	if err != nil {
		return s, err
	}
	if len(plan) > 0 {
		made, err := netdev.Apply(plan)
		earlier := d.changes
		d.changes = netdev.Merge(earlier, made)
		if err := errors.Join(err, d.saveChanges()); err != nil {
			// The next start would take what is not remembered for the host's own, and route for everybody.
			d.changes = earlier
			return s, errors.Join(fmt.Errorf("turn forwarding on: %w", err), netdev.Restore(made))
		}
		d.log.Info("changed sysctls", "count", len(d.changes)-before)
	}
	for _, c := range d.changes {
		if c.Side || d.cfg.IPForwardNoDrop {
			continue
		}
		switch c.Path {
		case "net/ipv4/ip_forward":
			s.dropTransit4 = true
		case "net/ipv6/conf/all/forwarding":
			s.dropTransit6 = true
		}
	}
	s.snat, s.reserved = ports.ranges, ports.reserved
	return s, nil
}

func (d *Daemon) saveChanges() error {
	var out []store.Change
	for _, c := range d.changes {
		out = append(out, store.Change(c))
	}
	return d.store.SetSysctls(out)
}

// errStopping is for those who wait for a round that will not come.
var errStopping = errors.New("the daemon is stopping")

// Flush waits until a round that began after the call has ended, and fails if that did not bring the
// maps about, or if the daemon stops.
func (d *Daemon) Flush(ctx context.Context) error {
	d.mu.Lock()
	after := d.begun
	d.waiting++
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		d.waiting--
		d.mu.Unlock()
	}()
	signal(d.urgent)
	for {
		d.mu.Lock()
		ended, failed, news := d.ended, d.failed, d.news
		d.mu.Unlock()
		if ended > after {
			return failed
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-d.over:
			return errStopping
		case <-news:
		}
	}
}

// endRound tells those who wait in Flush.
func (d *Daemon) endRound(round uint64, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended, d.failed = round, err
	close(d.news)
	d.news = make(chan struct{})
}

// Status says who serves.
func (d *Daemon) Status(context.Context) (api.Status, error) {
	return api.Status{Version: d.cfg.Version, PID: os.Getpid(), Started: d.started}, nil
}
