// SPDX-License-Identifier: Apache-2.0

package load

import (
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// This binary is its own worker.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		os.Exit(Main(os.Args[2:]))
	}
	lab.Main(m)
}

const window = 100 * time.Millisecond

// host is a namespace with nothing but lo, set up for workers. Needs root.
func host(t *testing.T) *lab.NS {
	lab.NeedRoot(t)
	ns := lab.New(t, lab.Opts{}).Host
	for _, s := range Sysctls {
		ns.Sysctl(t, s[0], s[1])
	}
	return ns
}

func startServer(t *testing.T, ns *lab.NS, addr string, flags ...string) *lab.Process {
	p := ns.Start(t, os.Args[0], append(ServerArgs(addr, 0), flags...)...)
	p.WaitOutput(t, "ready")
	return p
}

func run(t *testing.T, ns *lab.NS, c Client) (Result, error) {
	if c.Window == 0 {
		c.Warmup, c.Window = 20*time.Millisecond, window
	}
	out, err := ns.Run(t.Context(), os.Args[0], c.Args()...)
	if err != nil {
		return Result{}, err
	}
	return Parse([]byte(out))
}

func mustRun(t *testing.T, ns *lab.NS, c Client) Result {
	t.Helper()
	r, err := run(t, ns, c)
	require.NoError(t, err)
	assert.InEpsilon(t, float64(r.Units)/r.Seconds, r.Rate, 1e-6)
	assert.Greater(t, r.CPU(), 0.0)
	return r
}

func TestKinds(t *testing.T) {
	ns := host(t)
	for _, at := range []string{"127.0.0.1:7000", "[::1]:7000"} {
		server := startServer(t, ns, at)
		for _, c := range []Client{
			{Kind: RR}, {Kind: RR, Proto: "udp"}, {Kind: CRR}, {Kind: UDP}, {Kind: UDP, Size: 1}, {Kind: UDP, Size: maxDatagram},
			{Kind: Latency}, {Kind: Latency, Proto: "udp"}, {Kind: Latency, Rate: 500},
			{Kind: RR, Bind: netip.MustParseAddrPort(at).Addr().String(), Device: "lo"},
		} {
			c.To = at
			t.Run(strings.Join(c.Args()[1:], " "), func(t *testing.T) {
				r := mustRun(t, ns, c)
				if c.Kind == UDP {
					assert.LessOrEqual(t, r.Units, r.Sent)
					assert.InDelta(t, 1-float64(r.Units)/float64(r.Sent), r.Loss, 1e-9)
				}
				if c.Kind == Latency {
					l := r.Latency
					require.NotNil(t, l)
					assert.IsNonDecreasing(t, []int64{1, l.P50, l.P90, l.P99, l.P999, l.Max})
					if c.Rate > 0 { // never more than was due
						assert.LessOrEqual(t, float64(r.Units), c.Rate*window.Seconds())
					}
				}
			})
		}
		require.NoError(t, server.Signal(syscall.SIGTERM))
		require.NoError(t, server.Wait(5*time.Second), "SIGTERM is how a server ends")
	}
}

// A server serves several connections at once, whichever comes first.
func TestConnectionsAtOnce(t *testing.T) {
	ns := host(t)
	const at = "127.0.0.1:7000"
	startServer(t, ns, at)
	// One that says nothing is in the way of new ones for a while only.
	var silent net.Conn
	require.NoError(t, ns.Do(func() (err error) {
		silent, err = net.Dial("tcp", at)
		return err
	}))
	defer silent.Close()
	first := make(chan error)
	go func() {
		_, err := run(t, ns, Client{Kind: RR, To: at, Window: time.Second})
		first <- err
	}()
	mustRun(t, ns, Client{Kind: RR, To: at, Window: 500 * time.Millisecond})
	mustRun(t, ns, Client{Kind: CRR, To: at, Window: 500 * time.Millisecond})
	assert.NoError(t, <-first)
}

// What slows a path down shows in what is measured over it.
func TestSlowPathShows(t *testing.T) {
	ns := host(t)
	const quick, slow, delay = "127.0.0.1:7000", "127.0.0.1:7001", time.Millisecond
	startServer(t, ns, quick)
	startServer(t, ns, slow, "--delay", delay.String())
	for _, kind := range []string{RR, CRR} {
		q, s := mustRun(t, ns, Client{Kind: kind, To: quick}), mustRun(t, ns, Client{Kind: kind, To: slow})
		assert.Greater(t, q.Rate, s.Rate, kind)
		assert.Less(t, s.Rate, 1/delay.Seconds(), kind)
	}
	s := mustRun(t, ns, Client{Kind: Latency, To: slow})
	assert.GreaterOrEqual(t, s.Latency.P50, delay.Nanoseconds()*999/1000) // of three digits
	assert.Less(t, mustRun(t, ns, Client{Kind: Latency, To: quick}).Latency.P50, s.Latency.P50)

	// Twice as much is offered as the path takes: it lags ever more, by half the window in the end.
	s = mustRun(t, ns, Client{Kind: Latency, To: slow, Rate: 2 / delay.Seconds()})
	assert.Greater(t, s.Latency.P50, (window / 5).Nanoseconds())
}

// Windows of connections that follow each other use far more connections than there are ports.
func TestConnectionsDoNotRunOut(t *testing.T) {
	ns := host(t)
	const at = "127.0.0.1:7000"
	startServer(t, ns, at)
	// As many ports as one window needs at most, so that the test need not last long.
	ns.Sysctl(t, "net.ipv4.ip_local_reserved_ports", "1024-39999,42000-65535")
	var all uint64
	for range 5 {
		all += mustRun(t, ns, Client{Kind: CRR, To: at, Warmup: time.Millisecond, Window: 500 * time.Millisecond}).Units
	}
	assert.Greater(t, all, uint64(2*2000), "no port was used twice: the test did not show anything")
	resets := ns.MustRun(t, "awk", "/^Tcp:/ && $15 ~ /[0-9]/ { print $15 }", "/proc/net/snmp")
	assert.Equal(t, "0", resets, "segments with RST")
}

func TestErrors(t *testing.T) {
	ns := host(t)
	startServer(t, ns, "127.0.0.1:7000", "--proto", "tcp")
	ns.MustRun(t, "ip", "route", "add", "blackhole", "198.18.0.1")
	for _, kind := range []string{RR, CRR, Latency, Stream} {
		_, err := run(t, ns, Client{Kind: kind, To: "127.0.0.1:7999"})
		require.Error(t, err, kind)
		assert.Contains(t, err.Error(), "127.0.0.1:7999", kind)
		assert.Contains(t, strings.ToLower(err.Error()), "connection refused", kind)
	}
	_, err := run(t, ns, Client{Kind: UDP, To: "127.0.0.1:7000"})
	assert.ErrorContains(t, err, "127.0.0.1:7000: connection refused")
	_, err = run(t, ns, Client{Kind: RR, To: "198.18.0.1:80"})
	assert.ErrorContains(t, err, "connect to 198.18.0.1:80: invalid argument") // that is what a black hole says

	for args, want := range map[string]string{
		"":                                   "usage:",
		"walk":                               `no command "walk"`,
		"rr":                                 "--to:",
		"rr --to x:1":                        "--to:",
		"rr --to 127.0.0.1:1 more":           `unexpected argument "more"`,
		"rr --to 127.0.0.1:1 --bind ::1":     "different families",
		"rr --to 127.0.0.1:1 --window 0s":    "want a window",
		"rr --to 127.0.0.1:1 --cpu 4000":     "pin to CPU 4000",
		"crr --to 127.0.0.1:1 --proto udp":   "crr does not have that",
		"udp --to 127.0.0.1:1 --size 9000":   "--size 9000",
		"latency --to 127.0.0.1:1 --rate -1": "--rate -1",
		"stream --to 127.0.0.1:1 --flows 0":  "--flows 0",
		"serve --addr 7000":                  "--addr:",
		"serve --addr 127.0.0.1:7000":        "listen at 127.0.0.1:7000: address already in use",
		"serve --addr 127.0.0.1:1 --proto x": `--proto "x"`,
	} {
		_, err := ns.Run(t.Context(), os.Args[0], append([]string{"worker"}, strings.Fields(args)...)...)
		assert.ErrorContains(t, err, want, args)
	}
}

// A server that stops to answer does not keep a client for ever.
func TestSilence(t *testing.T) {
	ns := host(t)
	var listeners []net.Listener
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	require.NoError(t, ns.Do(func() error {
		l, err := net.Listen("tcp", "127.0.0.1:7000") // connects, and nobody accepts
		listeners = append(listeners, l)
		return err
	}))
	_, err := run(t, ns, Client{Kind: RR, To: "127.0.0.1:7000"})
	assert.ErrorContains(t, err, "127.0.0.1:7000 stopped to answer")
}

func TestStream(t *testing.T) {
	ns := host(t)
	at := netip.MustParseAddrPort("127.0.0.1:7000")
	p := ns.Start(t, "iperf3", StreamServerArgs(at)...)
	p.WaitOutput(t, "Server listening")
	for _, flows := range []int{0, 4} {
		r := mustRun(t, ns, Client{Kind: Stream, To: at.String(), Flows: flows, Warmup: 200 * time.Millisecond, Window: 700 * time.Millisecond})
		assert.InDelta(t, 0.8, r.Seconds, 0.3)
		assert.NotEmpty(t, r.Congestion)
	}
}

func TestParseIperf3(t *testing.T) {
	interval := func(start float64, bytes int) string {
		b, _ := json.Marshal(map[string]any{"sum": map[string]any{"start": start, "seconds": 0.1, "bytes": bytes}})
		return string(b)
	}
	out := `{"intervals":[` + interval(0, 1000) + "," + interval(0.1003, 1000) + "," + interval(0.1997, 3000) + "," + interval(0.3, 3000) +
		`],"end":{"sum_sent":{"bytes":8000,"retransmits":7},"sum_received":{"bytes":4000},"sender_tcp_congestion":"reno"}}`
	r, whole, err := ParseIperf3([]byte(out), 200*time.Millisecond)
	require.NoError(t, err)
	assert.InDelta(t, 0.75, whole, 1e-9)
	assert.Equal(t, uint64(8*6000/2), r.Units)
	assert.InDelta(t, 8*6000/2/0.2, r.Rate, 1e-6)
	assert.Equal(t, uint64(7), r.Retransmits)
	assert.Equal(t, "reno", r.Congestion)

	for out, want := range map[string]string{
		"":                                    "result of iperf3",
		`{"error":"unable to connect"}`:       "iperf3: unable to connect",
		`{"intervals":[],"end":{}}`:           "no bytes arrived",
		`{"intervals":"` + "x" + `","end":1}`: "result of iperf3",
	} {
		_, _, err := ParseIperf3([]byte(out), 0)
		assert.ErrorContains(t, err, want)
	}
}

func TestParse(t *testing.T) {
	for out, want := range map[string]string{
		"":              "result of a client",
		"{}":            "nothing was measured",
		`{"units":"x"}`: "result of a client",
	} {
		_, err := Parse([]byte(out))
		assert.ErrorContains(t, err, want)
	}
	r, err := Parse([]byte(`{"units":10,"seconds":2,"rate":5,"cpu_ns":2000}`))
	require.NoError(t, err)
	assert.Equal(t, 200.0, r.CPU())
}

func TestPercentiles(t *testing.T) {
	h := newHistogram()
	for i := range int64(10_000) {
		require.NoError(t, h.RecordValue((i+1)*1000)) // 1 µs to 10 ms
	}
	p := percentiles(h)
	for _, c := range []struct {
		want, got int64
	}{{5e6, p.P50}, {9e6, p.P90}, {99e5, p.P99}, {999e4, p.P999}, {1e7, p.Max}} {
		assert.InEpsilon(t, c.want, c.got, 0.001) // three digits
	}
}

// What is due in a stall and never sent has waited all the same.
func TestMissed(t *testing.T) {
	h := newHistogram()
	const ms = int64(time.Millisecond)
	require.NoError(t, missed(0, 10*ms, 12*ms, 4, 1000, h)) // due at 4 to 9 ms
	assert.Equal(t, int64(6), h.TotalCount())
	assert.InEpsilon(t, 3*ms, h.Min(), 0.001)
	assert.InEpsilon(t, 8*ms, h.Max(), 0.001)
	require.NoError(t, missed(0, 10*ms, 12*ms, 4, 0, h))
	assert.Equal(t, int64(6), h.TotalCount(), "nothing is due in a closed loop")
}

// CPU time is that of all CPUs.
func TestBusy(t *testing.T) {
	before, err := idle()
	require.NoError(t, err)
	start := now()
	until := start + int64(200*time.Millisecond)
	var all sync.WaitGroup
	for range runtime.NumCPU() {
		all.Go(func() {
			for now() < until {
			}
		})
	}
	all.Wait()
	after, err := idle()
	require.NoError(t, err)
	var r Result
	r.take(time.Duration(now()-start), after-before)
	assert.Greater(t, r.CPUNs, int64(runtime.NumCPU())*(100*time.Millisecond).Nanoseconds())
}
