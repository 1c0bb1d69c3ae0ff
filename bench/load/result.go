// SPDX-License-Identifier: Apache-2.0

package load

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strconv"
	"time"
)

// Kinds of clients.
const (
	RR  = "rr"
	CRR = "crr"
)

// Result is what one window gave.
type Result struct {
	Units   uint64  `json:"units"` // exchanges or connections; of udp, datagrams that arrived
	Seconds float64 `json:"seconds"`
	Rate    float64 `json:"rate"`   // units a second
	CPUNs   int64   `json:"cpu_ns"` // that all CPUs of the machine worked meanwhile, whatever at
}

// CPU is the nanoseconds that the machine worked for each unit.
func (r Result) CPU() float64 { return float64(r.CPUNs) / float64(r.Units) }

// take fills in what follows from a window's length and the idle time of all CPUs in it.
func (r *Result) take(took, idle time.Duration) {
	r.Seconds = took.Seconds()
	r.Rate = float64(r.Units) / r.Seconds
	r.CPUNs = max(0, int64(took)*int64(runtime.NumCPU())-int64(idle))
}

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
	Kind   string        // RR, CRR
	To     string        // HOST:PORT of a server
	UDP    bool          // of RR
	Bind   string        // source address; empty: the kernel's choice
	CPU    int           // to run on; negative: any
	Warmup time.Duration // 0: 200 ms
	Window time.Duration // 0: 700 ms
}

// Args are the arguments of bpfnet-bench.
func (c Client) Args() []string {
	args := []string{"worker", c.Kind, "--to", c.To, "--cpu", strconv.Itoa(c.CPU)}
	if c.UDP {
		args = append(args, "--proto", "udp")
	}
	if c.Bind != "" {
		args = append(args, "--bind", c.Bind)
	}
	if c.Warmup > 0 {
		args = append(args, "--warmup", c.Warmup.String())
	}
	if c.Window > 0 {
		args = append(args, "--window", c.Window.String())
	}
	return args
}

// ServerArgs are the arguments of bpfnet-bench for a server of all kinds of clients.
func ServerArgs(addr string, cpu int) []string {
	return []string{"worker", "serve", "--addr", addr, "--cpu", strconv.Itoa(cpu)}
}

// Sysctls are to be set in every namespace that has a client or a server, as [name, value]: room for all
// TIME_WAIT sockets of a minute, and all ports for clients where the kernel is older than 6.3.
var Sysctls = [][2]string{
	{"net.ipv4.tcp_max_tw_buckets", "4000000"},
	{"net.ipv4.ip_local_port_range", "1024 65535"},
}
