// SPDX-License-Identifier: Apache-2.0

// Package api holds what the daemon and its readers exchange: the snapshot file, which gives names
// to the slots of the pinned maps and is readable with the daemon down, and the JSON requests over
// the daemon's unix socket.
package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// SnapshotName is the snapshot's file name below the state directory.
const SnapshotName = "snapshot.json"

// Snapshot is what the daemon last wrote into the maps, by name. It is replaced atomically.
type Snapshot struct {
	Version string    `json:"version"` // of the daemon
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Written time.Time `json:"written"`
	Attach  string    `json:"attach"`            // "tcx" or "clsact"
	Uplinks []string  `json:"uplinks,omitempty"` // that the daemon was told to take; none: those that it finds

	Networks    []Network    `json:"networks"`
	Sandboxes   []Sandbox    `json:"sandboxes"` // bpfnet's own, running or not
	Endpoints   []Endpoint   `json:"endpoints"`
	Ports       []Port       `json:"ports"`
	Allowed     []Pair       `json:"allowed"`
	Problems    []Problem    `json:"problems,omitempty"` // of settings
	Shield      *Shield      `json:"shield,omitempty"`   // nil: off
	Attachments []Attachment `json:"attachments"`
	Sources     []Source     `json:"sources"`
}

// Network is a served network.
type Network struct {
	Slot     uint16   `json:"slot"`
	ID       string   `json:"id"`
	Name     string   `json:"name"`
	Source   string   `json:"source"`
	Bridge   string   `json:"bridge"`
	Subnets  []string `json:"subnets"`
	Internal bool     `json:"internal,omitempty"`
	NoICC    bool     `json:"no_icc,omitempty"`

	Gateways []netip.Addr `json:"gateways,omitempty"`
	// Of bpfnet's own networks only.
	Created time.Time         `json:"created,omitzero"`
	Ranges  []netip.Prefix    `json:"ranges,omitempty"`
	Options map[string]string `json:"options,omitempty"`
	Labels  map[string]string `json:"labels,omitempty"`
}

// Sandbox is a sandbox of bpfnet's own.
type Sandbox struct {
	ID         string    `json:"id"`
	Name       string    `json:"name"`
	Mode       string    `json:"mode,omitempty"` // as in SandboxSpec
	Join       string    `json:"join,omitempty"` // the ID of the other sandbox
	Status     string    `json:"status"`
	Command    []string  `json:"command"`
	Created    time.Time `json:"created"`
	Started    time.Time `json:"started,omitzero"`
	Ended      time.Time `json:"ended,omitzero"`
	PID        int       `json:"pid,omitempty"`
	StartTime  uint64    `json:"start_time,omitempty"` // of that process, ticks since boot: proc(5), stat
	ExitCode   *int      `json:"exit_code,omitempty"`  // nil: unknown
	Why        string    `json:"why,omitempty"`        // it ended otherwise than by itself
	Hostname   string    `json:"hostname,omitempty"`
	AutoRemove bool      `json:"auto_remove,omitempty"`
	Dir        string    `json:"dir"`    // of its files: hosts, resolv.conf, log
	Cgroup     string    `json:"cgroup"` // of its processes
	Networks   []string  `json:"networks,omitempty"`
}

// Endpoint is one interface of a container.
type Endpoint struct {
	Slot      uint16   `json:"slot"`
	ID        string   `json:"id"`
	Name      string   `json:"name"` // the container's
	SandboxID string   `json:"sandbox_id"`
	Source    string   `json:"source"`
	Network   string   `json:"network"` // its name
	NetworkID string   `json:"network_id"`
	Aliases   []string `json:"aliases,omitempty"`
	Addresses []string `json:"addresses"`
	MAC       string   `json:"mac"`
	Link      string   `json:"link"` // of the host side
	Ifindex   int      `json:"ifindex"`
	Ready     bool     `json:"ready"`
	Why       string   `json:"why,omitempty"` // it is not
}

// Port is a published port.
type Port struct {
	Slot      uint16 `json:"slot"`
	Proto     string `json:"proto"`
	Host      string `json:"host"`   // address:port
	Target    string `json:"target"` // address:port in the container
	Endpoint  string `json:"endpoint"`
	Container string `json:"container"`
	SandboxID string `json:"sandbox_id"`
	Network   string `json:"network"`
}

// Pair names two networks that may talk.
type Pair struct {
	A string `json:"a"`
	B string `json:"b"`
}

// Problem is a setting that cannot be served as it was asked for.
type Problem struct {
	Network string `json:"network"` // by its qualified name; empty: none of them alone
	Setting string `json:"setting"`
	Problem string `json:"problem"`
	Instead string `json:"instead"` // what is done
}

// Attachment is one program on one device or cgroup.
type Attachment struct {
	Program string `json:"program"`
	Device  string `json:"device"`
	Hook    string `json:"hook"` // "ingress", "egress", "xdp" or "cgroup"
}

// Source is a source of state and how it is.
type Source struct {
	Name      string    `json:"name"`
	Connected bool      `json:"connected"`
	Detail    string    `json:"detail,omitempty"` // version, or what is wrong
	LastSync  time.Time `json:"last_sync,omitzero"`
}

// ErrNoSnapshot says that no daemon has written below the state directory.
var ErrNoSnapshot = errors.New("no snapshot")

// ReadSnapshot reads the snapshot below the state directory; ErrNoSnapshot where there is none.
func ReadSnapshot(stateDir string) (*Snapshot, error) {
	path := filepath.Join(stateDir, SnapshotName)
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read snapshot %s: %w", path, ErrNoSnapshot)
	}
	if err != nil {
		return nil, fmt.Errorf("read snapshot: %w", err)
	}
	var s Snapshot
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("read snapshot %s: %w", path, err)
	}
	return &s, nil
}

// WriteSnapshot replaces the snapshot below the state directory.
func WriteSnapshot(stateDir string, s *Snapshot) error {
	raw, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	path := filepath.Join(stateDir, SnapshotName)
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(raw, '\n'), 0o644); errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("write snapshot: %w: free space there and try again", err)
	} else if err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write snapshot: %w", err)
	}
	return nil
}
