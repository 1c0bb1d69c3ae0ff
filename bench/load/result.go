// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"
)

// Kinds of clients.
const (
	RR      = "rr"
	CRR     = "crr"
	Latency = "latency"
	UDP     = "udp"
	Stream  = "stream" // of iperf3, which must be in PATH; its server is another: see [StreamServerArgs]
)

const defaultWarmup, defaultWindow = 200 * time.Millisecond, 700 * time.Millisecond

// A slice is much shorter than what changes on a machine that is shared, and much longer than caches take to warm.
const defaultSlice, minSlice = 20 * time.Millisecond, time.Millisecond

// Result is what one window gave.
type Result struct {
	Units   uint64  `json:"units"` // exchanges or connections; of udp, datagrams that arrived; of stream, bits
	Seconds float64 `json:"seconds"`
	Rate    float64 `json:"rate"`   // units a second
	CPUNs   int64   `json:"cpu_ns"` // that all CPUs of the machine worked meanwhile, whatever at

	// Of udp.
	Sent     uint64  `json:"sent,omitempty"`
	SendRate float64 `json:"send_rate,omitempty"` // a second
	Loss     float64 `json:"loss,omitempty"`      // of what was sent, 0 to 1

	// Of latency.
	Offered float64      `json:"offered,omitempty"` // exchanges a second; 0: closed loop
	Latency *Percentiles `json:"latency,omitempty"`

	// Of stream.
	Retransmits uint64 `json:"retransmits,omitempty"` // in the whole run
	Congestion  string `json:"congestion,omitempty"`  // algorithm of the sender
}

// Percentiles are times in nanoseconds.
type Percentiles struct {
	P50  int64 `json:"p50"`
	P90  int64 `json:"p90"`
	P99  int64 `json:"p99"`
	P999 int64 `json:"p99.9"`
	Max  int64 `json:"max"`
}

// CPU is the nanoseconds that the machine worked for each unit.
func (r Result) CPU() float64 { return float64(r.CPUNs) / float64(r.Units) }

// take fills in what follows from a window's length and the idle time of all CPUs in it.
func (r *Result) take(took, idle time.Duration) {
	r.Seconds = took.Seconds()
	r.Rate = float64(r.Units) / r.Seconds
	r.CPUNs = max(0, int64(took)*machineCPUs()-int64(idle))
}

// machineCPUs is how many CPUs the machine has, of which the process may use only some.
var machineCPUs = sync.OnceValue(func() int64 {
	b, _ := os.ReadFile("/proc/stat") // idle has read it
	return int64(bytes.Count(b, []byte("\ncpu")))
})

// Parse reads what a client printed.
func Parse(out []byte) (Result, error) {
	var r Result
	if err := json.Unmarshal(out, &r); err != nil {
		return r, fmt.Errorf("result of a client, %q: %w", out, err)
	}
	if r.Units == 0 || r.Seconds <= 0 {
		return r, fmt.Errorf("result of a client, %q: nothing was measured", out)
	}
	return r, nil
}

// Client says what a client is to do, for [Main].
type Client struct {
	Kind   string        // RR, CRR, Latency, UDP, Stream
	To     string        // HOST:PORT of a server
	Proto  string        // of RR and Latency: "tcp", "udp"; empty: tcp
	Bind   string        // source address; empty: the kernel's choice
	Device string        // interface to send from; empty: the kernel's choice
	Size   int           // of UDP: bytes of a datagram; 0: 64
	Rate   float64       // of Latency: exchanges offered a second; 0: closed loop
	Flows  int           // of Stream; 0: one
	CPU    int           // to run on; negative: any
	Warmup time.Duration // 0: 200 ms
	Window time.Duration // 0: 700 ms
	Turns  Turns         // of RR and CRR, where others take theirs meanwhile; Window is in all, and there is no Warmup
	Grace  time.Duration // that a client may take beyond what it was to measure; 0: 2 s
}

// Args are the arguments of bpfnet-bench.
func (c Client) Args() []string {
	args := []string{"worker", c.Kind, "--to", c.To, "--cpu", strconv.Itoa(c.CPU)}
	add := func(flag, value string, given bool) {
		if given {
			args = append(args, flag, value)
		}
	}
	add("--proto", c.Proto, c.Proto != "")
	add("--bind", c.Bind, c.Bind != "")
	add("--device", c.Device, c.Device != "")
	add("--size", strconv.Itoa(c.Size), c.Size != 0)
	add("--rate", strconv.FormatFloat(c.Rate, 'f', -1, 64), c.Rate != 0)
	add("--flows", strconv.Itoa(c.Flows), c.Flows != 0)
	add("--warmup", c.Warmup.String(), c.Warmup != 0)
	add("--window", c.Window.String(), c.Window != 0)
	add("--start", strconv.FormatInt(c.Turns.Start, 10), c.Turns.Of != 0)
	add("--of", strconv.Itoa(c.Turns.Of), c.Turns.Of != 0)
	add("--turn", strconv.Itoa(c.Turns.Turn), c.Turns.Of != 0)
	add("--slice", c.Turns.Slice.String(), c.Turns.Of != 0 && c.Turns.Slice != 0)
	add("--grace", c.Grace.String(), c.Grace != 0)
	return args
}

// ServerArgs are the arguments of bpfnet-bench for a server of all kinds of clients but Stream.
func ServerArgs(addr string, cpu int) []string {
	return []string{"worker", "serve", "--addr", addr, "--cpu", strconv.Itoa(cpu)}
}

// Sysctls are to be set in every namespace that has a client or a server, as [name, value]: room for all
// TIME_WAIT sockets of a minute, and the kernel's own range of ports.
var Sysctls = [][2]string{
	{"net.ipv4.tcp_max_tw_buckets", "4000000"},
	{"net.ipv4.ip_local_port_range", "32768 60999"},
}
