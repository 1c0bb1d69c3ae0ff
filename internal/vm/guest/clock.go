// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// clock sets the machine's clock forward by a day and back by two, while flows of both families go through a published
// port and out by masquerading: all of them go on, the daemon does what it is told and says what it has noticed, and
// drops have the time that it is.
func (o *own) clock() (err error) {
	stop := make(chan struct{})
	var work sync.WaitGroup
	var flows []*endless
	defer func() {
		close(stop)
		work.Wait()
		for _, f := range flows {
			if f.err != nil {
				err = errors.Join(err, fmt.Errorf("%s: %w", f.name, f.err))
			}
			f.Close()
		}
	}()
	for _, f := range families {
		for _, proto := range protocols {
			in, err := o.world.ask(proto, at(f.host, ownPort), small)
			if err != nil {
				return err
			}
			flows = append(flows, &endless{conversation: in, proto: proto, name: f.name + " " + proto + " published"})
			out, err := o.far.ask(proto, at(f.world, target), small)
			if err != nil {
				return err
			}
			flows = append(flows, &endless{conversation: out, proto: proto, name: f.name + " " + proto + " masqueraded"})
		}
	}
	for _, f := range flows {
		work.Go(func() { f.err = f.run(stop) })
	}
	// Each has had some answers more.
	goOn := func() error {
		for _, f := range flows {
			before := f.rounds.Load()
			if err := eventually(func() error {
				if f.rounds.Load() < before+3 {
					return fmt.Errorf("%s stands still", f.name)
				}
				return nil
			}); err != nil {
				return err
			}
		}
		return nil
	}
	drops, err := followDrops()
	if err != nil {
		return err
	}
	defer drops.end()
	if err := errors.Join(goOn(), o.droppedNow(drops)); err != nil {
		return fmt.Errorf("before: %w", err)
	}
	set := 0
	for _, by := range []time.Duration{24 * time.Hour, -48 * time.Hour, 24 * time.Hour} {
		if err := setClock(by); err != nil {
			return fmt.Errorf("set the clock: %w", err)
		}
		set++
		if err := errors.Join(goOn(), o.droppedNow(drops)); err != nil {
			return fmt.Errorf("after %v: %w", by, err)
		}
		if by > 0 && set > 1 {
			break // it is as it was
		}
		if err := o.publish(); err != nil {
			return fmt.Errorf("publish after %v: %w", by, err)
		}
		if err := eventually(func() error {
			log, err := os.ReadFile(daemonLog)
			if err == nil && strings.Count(string(log), "the wall clock was set") < set {
				err = errors.New("the daemon has not noticed")
			}
			return err
		}); err != nil {
			return fmt.Errorf("after %v: %w", by, err)
		}
	}
	return goOn()
}

// setClock moves the wall clock.
func setClock(by time.Duration) error {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &now); err != nil {
		return err
	}
	then := unix.NsecToTimespec(now.Nano() + by.Nanoseconds())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &then)
}

// endless is a conversation that does not end by itself.
type endless struct {
	*conversation
	proto, name string
	rounds      atomic.Int64
	err         error // valid when it has ended
}

func (e *endless) run(stop <-chan struct{}) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	seen := e.from
	for {
		select {
		case <-stop:
			return nil
		case <-tick.C:
		}
		err := e.SetDeadline(time.Now().Add(patience))
		if e.proto == "udp" {
			err = errors.Join(err, e.first("udp", small))
		} else {
			err = errors.Join(err, e.echo(small))
		}
		if err == nil && e.from != seen {
			err = fmt.Errorf("it was seen as %s, and is as %s", seen, e.from)
		}
		if err != nil {
			return err
		}
		e.rounds.Add(1)
	}
}

// followed is a "bpfnet drops -f" that runs.
type followed struct {
	cmd   *exec.Cmd
	times chan time.Time // of what it tells
	done  sync.WaitGroup
}

func followDrops() (*followed, error) {
	f := &followed{cmd: exec.Command("/bpfnet", "drops", "-f", "--reason", "direct_access", "-o", "json"), times: make(chan time.Time, 1000)}
	out, err := f.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	f.cmd.Stderr = os.Stderr
	if err := f.cmd.Start(); err != nil {
		return nil, err
	}
	f.done.Go(func() {
		defer close(f.times)
		for lines := json.NewDecoder(out); ; {
			var line struct {
				Time   time.Time
				Reason string
			}
			if lines.Decode(&line) != nil {
				return
			}
			if line.Reason != "" {
				select {
				case f.times <- line.Time:
				default: // nobody asks any more
				}
			}
		}
	})
	return f, nil
}

func (f *followed) end() {
	_ = f.cmd.Process.Kill()
	f.done.Wait()
	_ = f.cmd.Wait()
}

// droppedNow sends what is dropped until that is told of, with the time that it is.
func (o *own) droppedNow(f *followed) error {
	for len(f.times) > 0 {
		<-f.times // of before
	}
	const slack = time.Second
	before := time.Now().Add(-slack)
	return eventually(func() error {
		if err := o.world.send(at(families[0].a, target)); err != nil {
			return err
		}
		select {
		case told, open := <-f.times:
			if !open {
				return errors.New("bpfnet drops -f has ended")
			}
			// Without the readings of the other clock, by which nothing has changed.
			if now := time.Now(); told.Before(before.Round(0)) || told.After(now.Round(0).Add(slack)) {
				return fmt.Errorf("a drop is told of at %v, between %v and %v", told, before, now)
			}
			return nil
		case <-time.After(100 * time.Millisecond):
			return errors.New("no drop is told of")
		}
	})
}
