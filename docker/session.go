// SPDX-License-Identifier: Apache-2.0

package docker

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"

	"github.com/bpfnet/bpfnet/policy"
)

const (
	// debounce joins the hints of one burst: a container's events come within milliseconds, and
	// its process starts some 40 ms after the first at the earliest.
	debounce = 3 * time.Millisecond
	// maxReads bounds the concurrent requests of one kind.
	maxReads = 16
)

// refreshDelays are when a network is read after a hint from the kernel: the Engine stores an
// endpoint some milliseconds after it has made the device, more when it is busy.
//
// A hint begins them anew, so that few of them come about where there are many hints.
var refreshDelays = []time.Duration{
	0, 2 * time.Millisecond, 5 * time.Millisecond, 9 * time.Millisecond, 14 * time.Millisecond, 20 * time.Millisecond,
	30 * time.Millisecond, 50 * time.Millisecond, 80 * time.Millisecond, 150 * time.Millisecond, 500 * time.Millisecond,
}

// session is one connection to the Engine and what was read through it. All fields but seq,
// results and the semaphores belong to the goroutine of Source.session; reads run in
// goroutines of their own and hand their results to it as functions.
type session struct {
	src *Source
	cli *client.Client
	log func(msg string, args ...any)

	root string        // DockerRootDir
	seq  atomic.Uint64 // orders reads by their start

	complete bool // a full read has been applied
	fresh    bool // an answer has come that the state is not made of yet
	networks map[string]netRecord
	runs     map[string]runRecord
	wishes   map[string]wish

	ctx     context.Context
	results chan func()
	reads   sync.WaitGroup
	netSem  chan struct{}
	ctrSem  chan struct{}
	busy    map[string]bool // reads under way, by kind and ID
	again   map[string]func()

	hintNo uint64            // of the kernel's last hint
	hints  map[string]uint64 // the last, by the network that is read for it

	fullBusy bool
	fullErr  error
}

type netRecord struct {
	seq     uint64
	inspect *network.Inspect // nil: gone
}

type runRecord struct {
	seq uint64
	run *run // nil: not running
}

// session connects, follows the Engine until the connection ends, and reports whether it got
// as far as a full state.
func (s *Source) session(ctx context.Context, update func(policy.State)) (connected bool, err error) {
	if err := s.probe(ctx); err != nil {
		return false, err
	}
	cli, err := client.New(client.WithHost(s.opts.Host))
	if err != nil {
		return false, fmt.Errorf("docker socket %s: %w", s.socket, err)
	}
	defer cli.Close()

	ctx, cancel := context.WithCancel(ctx)
	x := &session{
		src: s, cli: cli, log: s.log.Debug, ctx: ctx,
		networks: make(map[string]netRecord),
		runs:     make(map[string]runRecord),
		wishes:   make(map[string]wish),
		results:  make(chan func()),
		netSem:   make(chan struct{}, maxReads),
		ctrSem:   make(chan struct{}, maxReads),
		busy:     make(map[string]bool),
		again:    make(map[string]func()),
		hints:    make(map[string]uint64),
	}
	defer x.reads.Wait()
	defer cancel()

	rctx, rcancel := context.WithTimeout(ctx, requestTimeout)
	info, err := cli.Info(rctx, client.InfoOptions{})
	rcancel()
	if err != nil {
		return false, fmt.Errorf("docker socket %s: read info: %w", s.socket, err)
	}
	x.root = info.Info.DockerRootDir

	// Events first, so that nothing falls between the full read and the first event.
	evs := cli.Events(ctx, client.EventsListOptions{Filters: eventFilters()})
	s.setStatus(func(st *Status) { st.Version = info.Info.ServerVersion })
	x.readAll()

	var (
		resync  = time.NewTicker(s.opts.Resync)
		timer   = time.NewTimer(time.Hour)
		pending = make(map[string]func())
		last    policy.State
		emitted bool
	)
	defer resync.Stop()
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return x.complete, nil
		case err := <-evs.Err:
			if err == nil {
				err = errors.New("stream closed")
			}
			return x.complete, fmt.Errorf("docker socket %s: follow events: %w", s.socket, err)
		case m := <-evs.Messages:
			if len(pending) == 0 {
				timer.Reset(debounce)
			}
			x.hint(m, pending)
			if len(pending) == 0 {
				timer.Stop()
			}
		case <-timer.C:
			for _, read := range pending {
				read()
			}
			clear(pending)
		case name := <-s.refresh:
			x.refreshed(name)
		case <-resync.C:
			x.readAll()
		case apply := <-x.results:
			apply()
		}
		// Results that are there already are one change.
		for more := true; more; {
			select {
			case apply := <-x.results:
				apply()
			default:
				more = false
			}
		}
		if x.fullErr != nil {
			return x.complete, x.fullErr
		}
		if !x.fresh || !x.complete {
			continue
		}
		x.fresh = false
		st := x.state()
		if emitted && st.Equal(last) {
			continue
		}
		last = st
		if !emitted {
			emitted = true
			s.log.Info("docker state read", "version", info.Info.ServerVersion,
				"networks", len(st.Networks), "endpoints", len(st.Endpoints), "ports", len(st.Ports))
		}
		update(st)
		s.readyOnce.Do(func() { close(s.ready) })
	}
}

// eventFilters keeps exec and health events, of which busy hosts have many, out of the stream.
func eventFilters() client.Filters {
	return make(client.Filters).
		Add("type", string(events.NetworkEventType), string(events.ContainerEventType)).
		Add("event",
			string(events.ActionCreate), string(events.ActionConnect), string(events.ActionDisconnect),
			string(events.ActionDestroy), string(events.ActionRemove), string(events.ActionUpdate),
			string(events.ActionStart), string(events.ActionRestart), string(events.ActionDie),
			string(events.ActionStop), string(events.ActionPause), string(events.ActionUnPause),
			string(events.ActionRename))
}

// hint notes what an event makes worth reading again.
func (x *session) hint(m events.Message, pending map[string]func()) {
	net := func(id string) { pending["n"+id] = func() { x.readNetwork(id) } }
	ctr := func(id string) { pending["c"+id] = func() { x.readContainer(id) } }
	id := m.Actor.ID
	switch m.Type {
	case events.NetworkEventType:
		switch m.Actor.Attributes["type"] {
		case "host", "null", "overlay":
			return
		}
		net(id)
		// The ports of a running container can move with its gateway. One that is starting is
		// not asked for: it answers when it has started, and then there is an event.
		if c := m.Actor.Attributes["container"]; c != "" && x.runs[c].run != nil {
			ctr(c)
		}
	case events.ContainerEventType:
		switch m.Action {
		case events.ActionStart, events.ActionRestart, events.ActionUnPause, events.ActionUpdate:
			ctr(id)
		case events.ActionDie, events.ActionStop, events.ActionDestroy, events.ActionRename:
			for nid, n := range x.networks {
				if n.inspect != nil {
					if _, in := n.inspect.Containers[id]; in {
						net(nid)
					}
				}
			}
		}
	}
}

// refreshed starts the reads that follow a hint from the kernel. A bridge that is not known may
// be of a network made a moment ago.
func (x *session) refreshed(name string) {
	for id, n := range x.networks {
		if n.inspect == nil || n.inspect.Driver != "bridge" ||
			(name != id && name != n.inspect.Name && name != bridgeName(*n.inspect)) {
			continue
		}
		x.hintNo++
		x.hints[id] = x.hintNo
		x.refresh(id, x.hintNo, 0)
		return
	}
	x.readAll()
}

// refresh reads a network now and goes on with the later delays, unless another hint has come.
func (x *session) refresh(id string, hint uint64, i int) {
	if x.hints[id] != hint {
		return
	}
	x.readNetwork(id)
	if i++; i < len(refreshDelays) {
		x.after(refreshDelays[i]-refreshDelays[i-1], func() { x.refresh(id, hint, i) })
	} else {
		delete(x.hints, id)
	}
}

// after runs f on the session's goroutine.
func (x *session) after(d time.Duration, f func()) {
	if d == 0 {
		f()
		return
	}
	x.reads.Go(func() {
		select {
		case <-x.ctx.Done():
		case <-time.After(d):
			x.deliver(f)
		}
	})
}

// deliver hands a result to the session's goroutine.
func (x *session) deliver(apply func()) {
	select {
	case x.results <- apply:
	case <-x.ctx.Done():
	}
}

// once runs a read that is not under way yet; if it is, it is run again afterwards, as the
// answer on its way may be older than the hint.
func (x *session) once(key string, sem chan struct{}, read func(ctx context.Context, seq uint64) (apply func())) {
	if x.busy[key] {
		x.again[key] = func() { x.once(key, sem, read) }
		return
	}
	x.busy[key] = true
	x.reads.Go(func() {
		select {
		case sem <- struct{}{}:
		case <-x.ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(x.ctx, requestTimeout)
		apply := read(ctx, x.seq.Add(1))
		cancel()
		<-sem
		x.deliver(func() {
			delete(x.busy, key)
			apply()
			if f := x.again[key]; f != nil {
				delete(x.again, key)
				f()
			}
		})
	})
}

// retry reads everything again soon: something could not be read.
func (x *session) retry(what, id string, err error) {
	x.log("docker object not read", "what", what, "id", id, "error", err)
	x.after(time.Second, x.readAll)
}

func (x *session) readNetwork(id string) {
	x.once("n"+id, x.netSem, func(ctx context.Context, seq uint64) func() {
		res, err := x.cli.NetworkInspect(ctx, id, client.NetworkInspectOptions{})
		switch {
		case errdefs.IsNotFound(err):
			return func() { x.setNetwork(id, netRecord{seq, nil}) }
		case err != nil:
			return func() { x.retry("network", id, err) }
		}
		return func() { x.setNetwork(res.Network.ID, netRecord{seq, &res.Network}) }
	})
}

func (x *session) readContainer(id string) {
	x.once("c"+id, x.ctrSem, func(ctx context.Context, seq uint64) func() {
		res, err := x.cli.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
		switch {
		case errdefs.IsNotFound(err):
			return func() { x.setRun(id, runRecord{seq, nil}) }
		case err != nil:
			return func() { x.retry("container", id, err) }
		}
		rec := runRecord{seq: seq}
		c := res.Container
		if c.State != nil && c.State.Running && !c.State.Restarting && c.NetworkSettings != nil {
			rec.run = &run{actualBindings(c.NetworkSettings.Ports), runEndpoints(c.NetworkSettings.Networks)}
		}
		return func() { x.setRun(c.ID, rec) }
	})
}

// setNetwork and setRun keep the answer of the read that started last. One that says the same again, as most of
// those after a hint from the kernel do, makes no new state.
func (x *session) setNetwork(id string, rec netRecord) {
	if have, known := x.networks[id]; rec.seq > have.seq {
		x.networks[id] = rec
		x.fresh = x.fresh || !known || !reflect.DeepEqual(have.inspect, rec.inspect)
	}
}

func (x *session) setRun(id string, rec runRecord) {
	if have, known := x.runs[id]; rec.seq > have.seq {
		x.runs[id] = rec
		x.fresh = x.fresh || !known || !reflect.DeepEqual(have.run, rec.run)
	}
}

// readAll starts a full read, unless one is under way: then what it misses was announced by an
// event or is found the next time.
func (x *session) readAll() {
	if x.fullBusy {
		return
	}
	x.fullBusy = true
	x.reads.Go(func() {
		ctx, cancel := context.WithTimeout(x.ctx, requestTimeout)
		defer cancel()
		apply, err := x.full(ctx)
		x.deliver(func() {
			x.fullBusy = false
			if err != nil {
				x.fullErr = fmt.Errorf("docker socket %s: read state: %w", x.src.socket, err)
				return
			}
			apply()
			x.complete, x.fresh = true, true
			x.src.setStatus(func(st *Status) {
				st.Connected, st.LastError, st.LastSync = true, "", time.Now()
			})
		})
	})
}

// full reads all networks and all running containers. The list of containers is a snapshot
// that the Engine keeps without locks: it cannot block, and holds ports from the start on.
func (x *session) full(ctx context.Context) (apply func(), err error) {
	start := x.seq.Add(1)
	list, err := x.cli.NetworkList(ctx, client.NetworkListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list networks: %w", err)
	}
	type answer struct {
		id  string
		rec netRecord
		err error
	}
	answers := make(chan answer)
	n := 0
	for _, item := range list.Items {
		if !givesGateway(network.Inspect{Network: item.Network}) {
			continue
		}
		n++
		go func() {
			x.netSem <- struct{}{}
			defer func() { <-x.netSem }()
			seq := x.seq.Add(1)
			res, err := x.cli.NetworkInspect(ctx, item.ID, client.NetworkInspectOptions{})
			rec := netRecord{seq: seq}
			if err == nil {
				rec.inspect = &res.Network
			} else if errdefs.IsNotFound(err) {
				err = nil
			}
			answers <- answer{item.ID, rec, err}
		}()
	}
	networks := make(map[string]netRecord, n)
	for range n {
		a := <-answers
		if a.err != nil {
			err = fmt.Errorf("inspect network %s: %w", a.id, a.err)
		}
		networks[a.id] = a.rec
	}
	if err != nil {
		return nil, err
	}

	seq := x.seq.Add(1)
	ctrs, err := x.cli.ContainerList(ctx, client.ContainerListOptions{})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	runs := make(map[string]*run, len(ctrs.Items))
	for _, c := range ctrs.Items {
		if (c.State == container.StateRunning || c.State == container.StatePaused) && c.NetworkSettings != nil {
			runs[c.ID] = &run{summaryBindings(c.Ports), runEndpoints(c.NetworkSettings.Networks)}
		}
	}
	return func() {
		for id, rec := range networks {
			x.setNetwork(id, rec)
		}
		for id, rec := range x.networks {
			if _, listed := networks[id]; !listed && rec.seq < start || rec.inspect == nil {
				delete(x.networks, id)
			}
		}
		for id, r := range runs {
			x.setRun(id, runRecord{seq, r})
		}
		for id, rec := range x.runs {
			if runs[id] == nil && rec.seq < seq || rec.run == nil {
				delete(x.runs, id)
			}
		}
	}, nil
}

// state builds the state of what was read. It reads the wishes of containers that it has not
// met before, and forgets those that have no endpoint any more: they may come back changed.
func (x *session) state() policy.State {
	var networks []network.Inspect
	wishes := make(map[string]wish)
	for _, n := range x.networks {
		if n.inspect == nil {
			continue
		}
		networks = append(networks, *n.inspect)
		if n.inspect.Driver != "bridge" {
			continue
		}
		for id := range n.inspect.Containers {
			if _, done := wishes[id]; done || isBare(id) {
				continue
			}
			w, known := x.wishes[id]
			if !known {
				var err error
				if w, err = readWish(x.root, id); err != nil {
					x.log("container configuration not read", "id", id, "error", err)
				}
			}
			wishes[id] = w
		}
	}
	x.wishes = wishes
	runs := make(map[string]run, len(x.runs))
	for id, r := range x.runs {
		if r.run != nil {
			runs[id] = *r.run
		}
	}
	return buildState(networks, wishes, runs, x.src.opts.DefaultBridge)
}

// isBare reports whether the key stands for an endpoint that has not joined a sandbox.
func isBare(key string) bool { return len(key) > 3 && key[:3] == "ep-" }
