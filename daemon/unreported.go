// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"strings"
	"time"

	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/policy"
)

// A bridge that bears one of the engine's names and that the engine has not told of: its network is just
// being made, or was made while no daemon ran. It is served as a network that nobody may leave or enter,
// until the engine has told of it, or should have and has not.

// unreportedWait is how long after a bridge was seen the engine's full state must have been read to show
// that the network is not its own: it makes the device first.
const unreportedWait = 5 * time.Second

// engineBridge reports whether a device has a name that the engine gives to its bridges.
func engineBridge(name string) bool {
	if name == "docker0" || name == "docker_gwbridge" {
		return true
	}
	id, ok := strings.CutPrefix(name, "br-")
	return ok && len(id) == 12 && strings.Trim(id, "0123456789abcdef") == ""
}

// unansweredWait is how long an engine whose socket is there may be silent before such a bridge is taken for
// somebody else's: other runtimes name theirs alike.
const unansweredWait = time.Minute

// bridgeSeen is a bridge that the engine has not told of.
type bridgeSeen struct {
	at      time.Time // zero: before this daemon was there
	foreign bool      // the engine does not know it
}

// unreported are the networks to serve closed. The caller holds d.round.
func (d *Daemon) unreported(devices policy.Devices, served map[string]bool) []policy.Network {
	if d.docker == nil {
		return nil
	}
	status := d.docker.Status()
	d.mu.Lock()
	defer d.mu.Unlock()
	seen := make(map[int]bridgeSeen)
	var out []policy.Network
	for _, b := range devices.Bridges {
		if served[b.Name] || !engineBridge(b.Name) {
			continue
		}
		s, known := d.strangers[b.Ifindex]
		if !known && d.begun > 1 {
			s.at = time.Now()
			time.AfterFunc(unreportedWait+time.Second, func() { d.docker.Refresh(b.Name) })
			time.AfterFunc(unreportedWait+2*time.Second, d.wake)
		}
		told := d.reported && (s.at.IsZero() || status.Connected && status.LastSync.After(s.at.Add(unreportedWait)))
		since := s.at
		if since.IsZero() {
			since = d.started
		}
		if age := time.Since(since); !told && !s.foreign && !status.Connected && (age > unansweredWait || age > unreportedWait && !d.docker.Exists()) {
			told = true
			d.log.Warn("not closing a bridge any longer: no engine answers for it", "bridge", b.Name)
		}
		s.foreign = s.foreign || told
		seen[b.Ifindex] = s
		if s.foreign {
			continue
		}
		n := policy.Network{
			ID: "unreported/" + b.Name, Name: b.Name, Source: policy.SourceDocker, Bridge: b.Name,
			NoICC: true, NoMasquerade: true, Internal: true, MTU: b.MTU,
		}
		for _, p := range b.Addrs {
			if !p.Addr().IsLinkLocalUnicast() {
				n.Subnets, n.Gateways = append(n.Subnets, p.Masked()), append(n.Gateways, p.Addr())
			}
		}
		out = append(out, n)
		d.bridges[b.Name] = n.Source
	}
	d.strangers = seen
	return out
}

// guardStranger attaches to a bridge, or to a port of one, that the engine will have to tell of: here and
// now, as the next round may be late.
func (d *Daemon) guardStranger(ifindex int, name string, port bool, master int, masterName string) {
	if d.docker == nil {
		return
	}
	bridge, index := name, ifindex
	if port {
		bridge, index = masterName, master
	}
	d.mu.Lock()
	_, served := d.bridges[bridge]
	foreign := d.strangers[index].foreign
	d.mu.Unlock()
	if served || foreign || !engineBridge(bridge) {
		return
	}
	programs := []string{loader.FromBridge}
	if port {
		programs = []string{loader.FromContainer, loader.ToContainer}
	}
	for _, p := range programs {
		if err := d.loader.Attach(p, ifindex); err != nil {
			d.log.Debug("guard a new bridge", "device", name, "err", err)
		}
	}
	d.docker.Refresh(bridge)
}
