// SPDX-License-Identifier: Apache-2.0

package store

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/bpfnet/bpfnet/policy"
)

// Network is a network that bpfnet itself made.
type Network struct {
	ID       string            `json:"id"`
	Name     string            `json:"name"`
	Created  time.Time         `json:"created"`
	Bridge   string            `json:"bridge"`  // device name
	Subnets  []Subnet          `json:"subnets"` // at most one a family
	Internal bool              `json:"internal,omitempty"`
	Options  map[string]string `json:"options,omitempty"` // as given, Docker's names
	Labels   map[string]string `json:"labels,omitempty"`
}

// Subnet is the addresses of a network, of one family.
type Subnet struct {
	Prefix  netip.Prefix `json:"prefix"`
	Gateway netip.Addr   `json:"gateway"`         // the bridge's own address
	Range   netip.Prefix `json:"range,omitzero"`  // the part to allocate from; invalid: all
	Given   bool         `json:"given,omitempty"` // by who made the network: only then addresses can be asked for
}

// Sandbox is a sandbox that bpfnet itself made: what was asked for, and how it is.
type Sandbox struct {
	ID         string       `json:"id"`
	Name       string       `json:"name"`
	Hostname   string       `json:"hostname,omitempty"` // empty: the host's
	Mode       string       `json:"mode,omitempty"`     // "", "host", "none" or "container"
	JoinID     string       `json:"join_id,omitempty"`  // of the sandbox whose namespace it shares
	Networks   []Attach     `json:"networks,omitempty"` // that it is in whenever it runs
	Publish    []PortWish   `json:"publish,omitempty"`
	DNS        []netip.Addr `json:"dns,omitempty"`
	AutoRemove bool         `json:"auto_remove,omitempty"`
	Command    []string     `json:"command"`
	Dir        string       `json:"dir"`
	Env        []string     `json:"env"`
	Created    time.Time    `json:"created"`

	Status   string    `json:"status"` // "created", "running" or "exited"
	Started  time.Time `json:"started,omitzero"`
	Ended    time.Time `json:"ended,omitzero"`
	Main     Process   `json:"main,omitzero"` // the sandbox's process, while it runs
	Runner   Process   `json:"runner,omitzero"`
	ExitCode *int      `json:"exit_code,omitempty"` // nil: unknown
	Why      string    `json:"why,omitempty"`       // it ended otherwise than by itself
	// Published are the ports as allocated, while it runs.
	Published []Published `json:"published,omitempty"`
}

// Process names a process for good: IDs are used again.
type Process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // ticks since boot: proc(5), stat
	BootID    string `json:"boot_id"`    // /proc/sys/kernel/random/boot_id
}

// Attach is a sandbox's wish to be in a network.
type Attach struct {
	NetworkID string     `json:"network_id"`
	IP4       netip.Addr `json:"ip4,omitzero"` // invalid: any
	IP6       netip.Addr `json:"ip6,omitzero"`
	Aliases   []string   `json:"aliases,omitempty"`
}

// PortWish is a port as it was asked for.
type PortWish struct {
	Proto  policy.Proto `json:"proto"`
	Host   netip.Addr   `json:"host,omitzero"` // invalid: the network's default one, else all
	First  uint16       `json:"first,omitempty"`
	Last   uint16       `json:"last,omitempty"` // both 0: any host port
	Target uint16       `json:"target"`
}

// Published is a port as it was allocated.
type Published struct {
	Proto  policy.Proto   `json:"proto"`
	Host   netip.AddrPort `json:"host"`
	Target uint16         `json:"target"`
}

// Endpoint is an interface of a running sandbox of bpfnet's own.
type Endpoint struct {
	ID        string       `json:"id"`
	NetworkID string       `json:"network_id"`
	SandboxID string       `json:"sandbox_id"`
	Addrs     []netip.Addr `json:"addrs"` // at most one a family
	MAC       policy.MAC   `json:"mac"`
	Link      string       `json:"link"` // device name of the host side
	Name      string       `json:"name"` // device name in the sandbox: eth0
	Aliases   []string     `json:"aliases,omitempty"`
}

// Release is an address that was given back, and must rest before it is given again.
type Release struct {
	NetworkID string     `json:"network_id"`
	Addr      netip.Addr `json:"addr"`
	At        time.Time  `json:"at"`
}

// Own is all that bpfnet itself made, each list in order of its IDs; releases by network, then address.
type Own struct {
	Networks  []Network
	Sandboxes []Sandbox
	Endpoints []Endpoint
	Releases  []Release
}

// Batch is one transaction: all of it is done, or nothing. Records are replaced by ID, releases by
// network and address; to delete what is missing is no error. Deletions come first.
type Batch struct {
	Networks  []Network
	Sandboxes []Sandbox
	Endpoints []Endpoint
	Releases  []Release

	DeleteNetworks  []string // IDs
	DeleteSandboxes []string
	DeleteEndpoints []string
	DeleteReleases  []Release // At is ignored
}

// The buckets of what is bpfnet's own, one a kind. Keys are IDs; of a release, its network and address.
const (
	kindNetworks  = "networks"
	kindSandboxes = "sandboxes"
	kindEndpoints = "endpoints"
	kindReleases  = "releases"
)

func (r Release) key() string { return r.NetworkID + "/" + r.Addr.String() }

func makeOwn(tx *bbolt.Tx) error {
	for _, kind := range []string{kindNetworks, kindSandboxes, kindEndpoints, kindReleases} {
		if _, err := tx.CreateBucket([]byte(kind)); err != nil {
			return fmt.Errorf("%s: %w", kind, err)
		}
	}
	return nil
}

// Own returns everything, as one transaction left it.
func (s *Store) Own() (Own, error) {
	var own Own
	err := s.viewTx(func(tx *bbolt.Tx) (err error) {
		if own.Networks, err = load[Network](tx, kindNetworks); err != nil {
			return err
		}
		if own.Sandboxes, err = load[Sandbox](tx, kindSandboxes); err != nil {
			return err
		}
		if own.Endpoints, err = load[Endpoint](tx, kindEndpoints); err != nil {
			return err
		}
		own.Releases, err = load[Release](tx, kindReleases)
		return err
	})
	if err != nil {
		return Own{}, err
	}
	slices.SortFunc(own.Releases, func(a, b Release) int {
		return cmp.Or(cmp.Compare(a.NetworkID, b.NetworkID), a.Addr.Compare(b.Addr))
	})
	return own, nil
}

// load returns the records of a kind, in order of their keys.
func load[T any](tx *bbolt.Tx, kind string) ([]T, error) {
	b, err := kindBucket(tx, kind)
	if err != nil {
		return nil, err
	}
	var records []T
	err = b.ForEach(func(key, sealed []byte) error {
		var r T
		if err := decode(sealed, &r); err != nil {
			return damaged(tx.DB().Path(), fmt.Sprintf("%s %s: %v", kind, key, err))
		}
		records = append(records, r)
		return nil
	})
	return records, err
}

// Write does all of the batch. It is on the disk when Write returns.
func (s *Store) Write(b Batch) error {
	var releases []string
	for _, r := range b.DeleteReleases {
		releases = append(releases, r.key())
	}
	return s.updateTx(func(tx *bbolt.Tx) error {
		err := save(tx, kindNetworks, b.DeleteNetworks, b.Networks, func(n Network) string { return n.ID })
		if err != nil {
			return err
		}
		err = save(tx, kindSandboxes, b.DeleteSandboxes, b.Sandboxes, func(x Sandbox) string { return x.ID })
		if err != nil {
			return err
		}
		err = save(tx, kindEndpoints, b.DeleteEndpoints, b.Endpoints, func(e Endpoint) string { return e.ID })
		if err != nil {
			return err
		}
		return save(tx, kindReleases, releases, b.Releases, Release.key)
	})
}

// save deletes the records of a kind that have the keys given, then puts others.
func save[T any](tx *bbolt.Tx, kind string, gone []string, records []T, key func(T) string) error {
	b, err := kindBucket(tx, kind)
	if err != nil {
		return err
	}
	for _, k := range gone {
		if err := b.Delete([]byte(k)); err != nil {
			return fmt.Errorf("%s %q: %w", kind, k, err)
		}
	}
	for _, r := range records {
		if err := put(b, key(r), r); err != nil {
			return fmt.Errorf("%s %q: %w", kind, key(r), err)
		}
	}
	return nil
}

func kindBucket(tx *bbolt.Tx, kind string) (*bbolt.Bucket, error) {
	b := tx.Bucket([]byte(kind))
	if b == nil {
		return nil, damaged(tx.DB().Path(), "it has no "+kind)
	}
	return b, nil
}
