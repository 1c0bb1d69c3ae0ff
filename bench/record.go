// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"slices"
	"time"
)

// The modes. A mode is who forwards, and the limits that nobody who forwards can beat.
const (
	Host           = "host"                // limit: the server is a process of the host
	Loopback       = "loopback"            // limit: client and server in one container
	Engine         = "engine"              // limit of control: a real Engine that forwards nothing, iptables and proxy off
	DockerIPTables = "docker-iptables"     // a real Engine, iptables on, userland proxy off
	DockerProxy    = "docker-proxy"        // a real Engine with its default settings
	ProxyPinned    = "docker-proxy-pinned" // the same, its proxies on the CPU of both ends
	NFTables       = "nftables"            // the rules of Engine 29's nftables backend, loaded by nft
	Bpfnet         = "bpfnet"              // a real Engine, iptables and proxy off, and bpfnet
	Sandboxes      = "sandboxes"           // bpfnet's own, without an Engine
	XDPDrop        = "xdp-drop"            // limit of dropping: an XDP program that drops whatever comes
	RawDrop        = "iptables-raw"        // a rule that drops in table raw of iptables
	NetdevDrop     = "nft-netdev"          // a rule that drops at the device, by nftables
)

// Modes are all of them, limits first, in the order of reports.
var Modes = []string{Host, Loopback, Engine, DockerIPTables, DockerProxy, ProxyPinned, NFTables, Bpfnet, Sandboxes, XDPDrop, RawDrop, NetdevDrop}

// Key names what is measured. No two records of one run have the same.
type Key struct {
	Scenario string `json:"scenario"`         // what is done, such as "container-container"
	Mode     string `json:"mode"`             // one of Modes
	Family   int    `json:"family,omitempty"` // 4 or 6; 0: neither
	Metric   string `json:"metric"`           // such as "rr"
	At       int    `json:"at,omitempty"`     // where something is scaled: how many there are
}

// Sample is what one window gave.
type Sample struct {
	Value float64
	// CPU is the time that all CPUs worked, in nanoseconds per unit of work. 0: not measured.
	CPU float64
	// More are the values of the probe's other outputs, in their order.
	More []float64
}

// Spread is a set of samples in short.
type Spread struct {
	Min    float64 `json:"min"`
	Median float64 `json:"median"`
	Max    float64 `json:"max"`
}

// SpreadOf is the spread of at least one value. The median of an even number is the mean of the middle two.
func SpreadOf(values []float64) Spread {
	v := slices.Sorted(slices.Values(values))
	mid := len(v) / 2
	s := Spread{Min: v[0], Median: v[mid], Max: v[len(v)-1]}
	if len(v)%2 == 0 {
		s.Median = (v[mid-1] + v[mid]) / 2
	}
	return s
}

// Record is the result of one probe: a line of the report.
type Record struct {
	Key
	Group string `json:"group"` // what it was interleaved with
	Unit  string `json:"unit"`
	N     int    `json:"n"`
	Spread
	CPU     *Spread   `json:"cpu_ns,omitempty"` // per unit of work
	Samples []float64 `json:"samples"`          // in the order in which they were taken
	Note    string    `json:"note,omitempty"`   // how it departs from what its key says
	// Of a group that was put in from another run, see [Report.Merge]: that run.
	Run *Origin `json:"run,omitempty"`
}

// Origin is the run that a record is of.
type Origin struct {
	Started time.Time `json:"started"`
	Version string    `json:"version"` // of bpfnet
}

// Header is the first line of a report.
type Header struct {
	Started time.Time         `json:"started"`
	Version string            `json:"version"` // of bpfnet
	Kernel  string            `json:"kernel"`
	CPU     string            `json:"cpu"`
	CPUs    int               `json:"cpus"`
	Pinning string            `json:"pinning"`
	Rounds  int               `json:"rounds"`
	Quick   bool              `json:"quick,omitempty"`
	Peers   map[string]string `json:"peers"` // versions of the programs measured against
}

// Report is a whole run.
type Report struct {
	Header  Header
	Records []Record
}
