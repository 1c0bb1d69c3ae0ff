// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/policy"
)

func mapsEqual[K, V comparable](a, b map[K]V) bool { return maps.Equal(a, b) }

func deviceExists(ifindex int) bool {
	_, err := net.InterfaceByIndex(ifindex)
	return err == nil
}

// goneDevice says that an error is a device's sudden end: the next round will not name it.
func goneDevice(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) || errors.Is(err, fs.ErrNotExist)
}

// writeSnapshot tells readers what the maps' slots stand for. The caller holds d.round.
func (d *Daemon) writeSnapshot(state policy.State) error {
	s, err := d.makeSnapshot(state)
	if err != nil {
		return err
	}
	d.writing.Lock()
	defer d.writing.Unlock()
	if err := api.WriteSnapshot(d.cfg.State, s); err != nil {
		d.owed = true
		return err
	}
	return nil
}

// makeSnapshot makes what is to be written next. The caller holds d.round.
func (d *Daemon) makeSnapshot(state policy.State) (*api.Snapshot, error) {
	s := &api.Snapshot{
		Version: d.cfg.Version, PID: os.Getpid(), Started: d.started, Written: time.Now(),
		Attach: d.loader.AttachName(), Uplinks: d.cfg.Uplinks,
	}
	own := d.own.View()
	s.Sandboxes = own.Sandboxes
	networks := make(map[string]policy.Network)
	for _, n := range state.Networks {
		networks[n.ID] = n
		row := api.Network{
			Slot: d.slots.Networks[n.ID], ID: n.ID, Name: n.Name, Source: string(n.Source), Bridge: n.Bridge,
			Internal: n.Internal, NoICC: n.NoICC, Gateways: n.Gateways,
		}
		if extra, ok := own.Networks[n.ID]; ok {
			row.Created, row.Ranges, row.Options, row.Labels = extra.Created, extra.Ranges, extra.Options, extra.Labels
		}
		for _, p := range n.Subnets {
			row.Subnets = append(row.Subnets, p.String())
		}
		s.Networks = append(s.Networks, row)
	}
	links := make(map[int]policy.Link)
	for _, l := range d.seen.Links {
		links[l.Ifindex] = l
	}
	endpoints := make(map[uint16]policy.Endpoint)
	for _, e := range state.Endpoints {
		slot := d.slots.Endpoints[e.ID]
		endpoints[slot] = e
		row := api.Endpoint{
			Slot: slot, ID: e.ID, Name: e.Name, SandboxID: e.SandboxID, MAC: e.MAC.String(),
			Source: string(e.Source), Network: networks[e.NetworkID].Name, NetworkID: e.NetworkID,
			Aliases: own.Aliases[e.ID], Why: d.tables.Waiting[e.ID],
		}
		for _, a := range e.Addrs {
			row.Addresses = append(row.Addresses, a.String())
		}
		if r, ok := d.tables.Endpoints[slot]; ok {
			row.Ready, row.Ifindex, row.Link = true, r.Ifindex, links[r.Ifindex].Name
		}
		s.Endpoints = append(s.Endpoints, row)
	}
	for _, key := range d.tables.SortedPorts() {
		r := d.tables.Ports[key]
		e := endpoints[r.Endpoint]
		s.Ports = append(s.Ports, api.Port{
			Slot: r.Slot, Proto: key.Proto.String(), Host: key.Host.String(), Target: r.Target.String(),
			Endpoint: e.ID, Container: e.Name, SandboxID: e.SandboxID,
			Network: networks[e.NetworkID].Name,
		})
	}
	pairs, err := d.store.Allowed()
	if err != nil {
		return nil, err
	}
	for _, p := range pairs {
		s.Allowed = append(s.Allowed, api.Pair{A: shortName(p.A, state.Networks), B: shortName(p.B, state.Networks)})
	}
	for _, p := range d.tables.Problems {
		s.Problems = append(s.Problems, api.Problem{Network: p.Network, Setting: p.Setting, Problem: p.Text, Instead: p.Instead})
	}
	s.Attachments = d.attachments()
	if d.shield != nil {
		s.Shield = d.shield.show()
	}
	s.Sources = d.sources(s.Written)
	slices.SortFunc(s.Networks, func(a, b api.Network) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(s.Endpoints, func(a, b api.Endpoint) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Network, b.Network))
	})
	d.changed, d.owed = false, false
	d.mu.Lock()
	d.snapshot = s
	d.mu.Unlock()
	return s, nil
}

func (d *Daemon) sources(looked time.Time) (out []api.Source) {
	if d.docker != nil {
		st := d.docker.Status()
		detail := st.Version
		if !st.Connected {
			detail = st.LastError
		}
		out = append(out, api.Source{Name: "docker", Connected: st.Connected, Detail: detail, LastSync: st.LastSync})
	}
	return append(out, api.Source{Name: "netlink", Connected: true, LastSync: looked})
}

// deviceNames are the devices' names by index, as of the last round.
func (d *Daemon) deviceNames() map[int]string {
	names := map[int]string{loIfindex: "lo"}
	for _, l := range d.seen.Links {
		names[l.Ifindex] = l.Name
	}
	for _, u := range d.seen.Uplinks {
		names[u.Ifindex] = u.Name
	}
	for _, b := range d.seen.Bridges {
		names[b.Ifindex] = b.Name
	}
	return names
}

// placeOf is the name of the device, or the directory of the cgroup, that a program is on.
func (d *Daemon) placeOf(a loader.Attachment, names map[int]string) string {
	switch {
	case a.Hook != "cgroup":
		return names[a.Ifindex]
	case loader.IsStrict(a.Program):
		return d.cfg.StrictCgroup
	}
	return d.cfg.Cgroup
}

func (d *Daemon) attachments() []api.Attachment {
	names := d.deviceNames()
	var out []api.Attachment
	for _, a := range d.loader.Attachments() {
		out = append(out, api.Attachment{Program: a.Program, Device: d.placeOf(a, names), Hook: a.Hook})
	}
	slices.SortFunc(out, func(a, b api.Attachment) int {
		return cmp.Or(strings.Compare(a.Device, b.Device), strings.Compare(a.Program, b.Program))
	})
	return out
}

// writeBanner says what the daemon attached to and what to type next.
func writeBanner(w io.Writer, version, engine string, s *api.Snapshot) {
	var uplinks, bridges []string
	for _, a := range s.Attachments {
		switch a.Program {
		case loader.FromUplink, loader.FromUplinkL3:
			uplinks = append(uplinks, a.Device)
		case loader.FromBridge:
			bridges = append(bridges, a.Device)
		}
	}
	fmt.Fprintf(w, "bpfnet %s serves: uplinks %s; bridges %s; by %s\n", version, list(uplinks), list(bridges), s.Attach)
	docker := false
	for _, src := range s.Sources {
		if src.Name != "docker" {
			continue
		}
		if docker = src.Connected; docker {
			fmt.Fprintf(w, "Docker Engine %s at %s: %d networks, %d endpoints, %d published ports\n",
				src.Detail, engine, len(s.Networks), len(s.Endpoints), len(s.Ports))
		} else {
			fmt.Fprintf(w, "Docker Engine: %s; it is served as soon as it answers\n", src.Detail)
		}
	}
	next := "bpfnet status; bpfnet stats; "
	if docker {
		next += "docker run -d -p 8080:80 nginx"
	} else {
		next += "bpfnet run -d -p 8080:8000 python3 -m http.server"
	}
	fmt.Fprintln(w, "Next, in another terminal:", next)
	fmt.Fprintln(w, "Stopping the daemon leaves the network running; bpfnet cleanup takes everything away.")
}

// listed is how many names a line of the banner has room for.
const listed = 8

func list(names []string) string {
	switch {
	case len(names) == 0:
		return "none"
	case len(names) > listed:
		return fmt.Sprintf("%s and %d more", strings.Join(names[:listed], ", "), len(names)-listed)
	}
	return strings.Join(names, ", ")
}
