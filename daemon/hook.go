// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
)

const (
	// hookLife is how long a port that the engine's hook announced stands by itself: by then the
	// engine's own state has it, or the container's start has failed.
	hookLife = time.Minute
	// hookWait is how long an announcement waits for its container to be known: the engine waits
	// 16 s for the hook.
	hookWait = 10 * time.Second
)

// announced is a published port that the engine is about to start a container with.
type announced struct {
	port  policy.Port
	until time.Time
}

// Announce takes a port from the engine's port hook, before the container's process starts. It
// returns when the port leads to the container.
func (d *Daemon) Announce(ctx context.Context, p api.PortBinding) error {
	proto, err := policy.ParseProto(p.Proto)
	if err != nil {
		return err
	}
	if !p.Host.IsValid() || !p.Container.IsValid() || p.Host.Port() == 0 || p.Container.Port() == 0 {
		return fmt.Errorf("publish %s to %s: want addresses with ports", p.Host, p.Container)
	}
	ctx, cancel := context.WithTimeout(ctx, hookWait)
	defer cancel()
	key := policy.PortKey{Proto: proto, Host: netip.AddrPortFrom(p.Host.Addr().Unmap(), p.Host.Port())}
	for {
		if e, ok := d.endpointWith(p.Container.Addr().Unmap()); ok {
			port := policy.Port{Proto: proto, Host: key.Host, EndpointID: e.ID, Target: p.Container.Port()}
			d.mu.Lock()
			for _, port := range d.narrow(port) {
				d.announced[port.ID()] = announced{port, time.Now().Add(hookLife)}
			}
			d.mu.Unlock()
		}
		// A round that failed elsewhere may have brought the port about all the same.
		if err := d.Flush(ctx); errors.Is(err, errStopping) {
			return err
		} else if ctx.Err() != nil {
			return fmt.Errorf("publish %s: no container with the address %s is known after %s", key.Host, p.Container.Addr(), hookWait)
		}
		d.mu.Lock()
		_, done := d.published[key]
		_, closed := d.closed[key]
		d.mu.Unlock()
		if done || closed {
			return nil
		}
		if d.docker != nil {
			d.docker.Refresh(d.bridgeFor(p.Container.Addr()))
		}
	}
}

// narrow gives a port of the engine's default network the default host address of our own. The hook does
// not tell whether all addresses were asked for; the engine's own state does, a moment later. The caller
// holds d.mu.
func (d *Daemon) narrow(p policy.Port) []policy.Port {
	if d.cfg.DefaultBridgeIP.IsValid() {
		for _, e := range d.engine.Endpoints {
			for _, n := range d.engine.Networks {
				if e.ID == p.EndpointID && n.ID == e.NetworkID && n.Name == "bridge" {
					return p.Narrow(d.cfg.DefaultBridgeIP)
				}
			}
		}
	}
	return []policy.Port{p}
}

func (d *Daemon) endpointWith(a netip.Addr) (policy.Endpoint, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, e := range d.engine.Endpoints {
		for _, have := range e.Addrs {
			if have.Unmap() == a {
				return e, true
			}
		}
	}
	return policy.Endpoint{}, false
}

// bridgeFor is the bridge of the network that the address belongs to.
func (d *Daemon) bridgeFor(a netip.Addr) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, n := range d.engine.Networks {
		for _, s := range n.Subnets {
			if s.Contains(a.Unmap()) {
				return n.Bridge
			}
		}
	}
	return ""
}

// withAnnounced adds what the hook announced to the engine's state. The caller holds d.mu.
func (d *Daemon) withAnnounced(s policy.State) policy.State {
	if len(d.announced) == 0 {
		return s
	}
	have := make(map[string]bool, len(s.Ports))
	for _, p := range s.Ports {
		have[p.ID()] = true
	}
	ports := s.Ports[:len(s.Ports):len(s.Ports)]
	for id, a := range d.announced {
		switch {
		case time.Now().After(a.until):
			delete(d.announced, id)
		case !have[id]:
			ports = append(ports, a.port)
		}
	}
	s.Ports = ports
	return s
}
