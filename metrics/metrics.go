// SPDX-License-Identifier: Apache-2.0

// Package metrics shows Prometheus what the data path counts and how the daemon does. Everything is
// read when somebody asks: no packet pays for it.
package metrics

import (
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/maps"
)

// DefaultLimit is how many containers, and how many ports, have series of their own by default.
const DefaultLimit = 1000

// Other stands for the containers and ports that are over the limit.
const Other = "_other"

// Counters is what is read of the pinned maps.
type Counters interface {
	Drops() ([]maps.Drop, error)
	Fates() ([]maps.Fate, error)
	EndpointStats(slot uint16) (maps.EndpointCount, error)
	PortStats(slot uint16) (maps.PortCount, error)
	Fill() ([]maps.Fill, error)
	MasqueradeTries() (maps.Tries, error)
}

// Relay is how the relay process does.
type Relay struct {
	Active int // clients at work now
	Ports  []RelayPort
}

// RelayPort is a port that the relay serves, with its counters since its socket was bound.
type RelayPort struct {
	Host, Proto              string
	Clients, Dropped, Failed uint64
}

// Options of a Collector.
type Options struct {
	Version  string
	Counters Counters
	// Snapshot is what the maps' slots stand for; nil before the first round.
	Snapshot func() *api.Snapshot
	// Relay asks the relay process; nil where none runs. Optional.
	Relay func() (*Relay, error)
	// Rounds are the daemon's own counters. Optional.
	Rounds *Rounds
	// Limit is how many containers, and how many ports, have series of their own. 0: DefaultLimit.
	Limit int
	Log   *slog.Logger // Optional.
}

// Family is a metric by name.
type Family struct {
	Name, Help string
	Type       string // "counter", "gauge" or "histogram"
	Labels     []string
}

var (
	byHook      = []string{"hook"}
	byContainer = []string{"network", "container"}
	byPort      = []string{"network", "container", "host", "proto"}
)

// families are all metrics of ours, in the order of the documentation.
var families = []Family{
	{"bpfnet_build_info", "Always 1; the labels say which bpfnet runs, and how its programs are attached.", "gauge", []string{"version", "goversion", "attach"}},
	{"bpfnet_forwarded_packets_total", "Packets let go, by fate and hook: container, uplink and lo are the fast path, stack and bridge are left to the kernel.", "counter", append([]string{"fate"}, byHook...)},
	{"bpfnet_forwarded_bytes_total", "Bytes let go, by fate and hook.", "counter", append([]string{"fate"}, byHook...)},
	{"bpfnet_dropped_packets_total", "Packets dropped, by reason and hook; a pair appears with its first packet.", "counter", append([]string{"reason"}, byHook...)},
	{"bpfnet_dropped_bytes_total", "Bytes dropped, by reason and hook.", "counter", append([]string{"reason"}, byHook...)},
	{"bpfnet_endpoint_receive_packets_total", "Packets into a container.", "counter", byContainer},
	{"bpfnet_endpoint_receive_bytes_total", "Bytes into a container.", "counter", byContainer},
	{"bpfnet_endpoint_transmit_packets_total", "Packets out of a container.", "counter", byContainer},
	{"bpfnet_endpoint_transmit_bytes_total", "Bytes out of a container.", "counter", byContainer},
	{"bpfnet_endpoint_dropped_packets_total", "Packets that a container sent and that were dropped.", "counter", byContainer},
	{"bpfnet_endpoint_dropped_bytes_total", "Bytes that a container sent and that were dropped.", "counter", byContainer},
	{"bpfnet_published_port_connections_total", "Flows opened through a published port.", "counter", byPort},
	{"bpfnet_published_port_receive_packets_total", "Packets through a published port, towards the container.", "counter", byPort},
	{"bpfnet_published_port_receive_bytes_total", "Bytes through a published port, towards the container.", "counter", byPort},
	{"bpfnet_published_port_transmit_packets_total", "Packets through a published port, from the container.", "counter", byPort},
	{"bpfnet_published_port_transmit_bytes_total", "Bytes through a published port, from the container.", "counter", byPort},
	{"bpfnet_published_port_not_ready_packets_total", "First packets dropped because the container was not READY; their sender tries again.", "counter", byPort},
	{"bpfnet_networks", "Served networks.", "gauge", nil},
	{"bpfnet_endpoints", "Containers' interfaces by network and state: ready or not_ready.", "gauge", []string{"network", "state"}},
	{"bpfnet_published_ports", "Published ports.", "gauge", nil},
	{"bpfnet_attached_programs", "Attached programs, by program.", "gauge", []string{"program"}},
	{"bpfnet_setting_problems", "Labels and options that cannot be served as asked for; see bpfnet status.", "gauge", nil},
	{"bpfnet_map_entries", "Entries of a map that can fill up. In flows4 and flows6, most flows have two.", "gauge", []string{"map"}},
	{"bpfnet_map_max_entries", "Room of a map, in entries.", "gauge", []string{"map"}},
	{"bpfnet_flow_entries_deleted_total", "Flow table entries that the daemon deleted since its start, by cause: expired, or purged with their endpoint or port.", "counter", []string{"family", "cause"}},
	{"bpfnet_expiry_duration_seconds", "How long the daemon's walks through the flow tables took.", "histogram", nil},
	{"bpfnet_masquerade_port_tries", "At which try a masquerade port was found.", "histogram", nil},
	{"bpfnet_masquerade_ports_exhausted_total", "Packets of new flows that got no masquerade port.", "counter", nil},
	{"bpfnet_reconcile_duration_seconds", "How long the daemon's rounds took.", "histogram", nil},
	{"bpfnet_reconcile_errors_total", "Rounds that failed.", "counter", nil},
	{"bpfnet_reconcile_last_success_timestamp_seconds", "When the last round ended without an error.", "gauge", nil},
	{"bpfnet_source_connected", "1 if a source of state answers.", "gauge", []string{"source"}},
	{"bpfnet_source_last_sync_timestamp_seconds", "When a source's full state was last read.", "gauge", []string{"source"}},
	{"bpfnet_relay_active_clients", "Clients of the relay at work.", "gauge", nil},
	{"bpfnet_relay_clients_total", "Clients that the relay has taken.", "counter", []string{"host", "proto"}},
	{"bpfnet_relay_dropped_clients_total", "Clients beyond a limit of the relay.", "counter", []string{"host", "proto"}},
	{"bpfnet_relay_failed_clients_total", "Clients whose container did not answer the relay, or refused.", "counter", []string{"host", "proto"}},
	{"bpfnet_metrics_folded", "Things over --metrics-limit, which are summed under " + Other + ", by kind: container, port or relayed_port.", "gauge", []string{"kind"}},
	{"bpfnet_metrics_read_errors_total", "Reads for the metrics that failed; the log has the error.", "counter", []string{"what"}},
}

// Families are the metrics that a Collector and its Rounds have.
func Families() []Family { return append([]Family(nil), families...) }

func family(name string) Family {
	for _, f := range families {
		if f.Name == name {
			return f
		}
	}
	panic("metrics: no family " + name)
}

// Rounds are the counters of the daemon itself. They begin with it. A nil one counts nothing.
type Rounds struct {
	reconcile, expiry prometheus.Histogram
	errors            prometheus.Counter
	success           prometheus.Gauge
	deleted           *prometheus.CounterVec
}

// NewRounds makes counters at zero.
func NewRounds() *Rounds {
	histogram := func(name string, buckets []float64) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: family(name).Help, Buckets: buckets})
	}
	errs, success, deleted := family("bpfnet_reconcile_errors_total"), family("bpfnet_reconcile_last_success_timestamp_seconds"), family("bpfnet_flow_entries_deleted_total")
	r := &Rounds{
		reconcile: histogram("bpfnet_reconcile_duration_seconds", []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}),
		expiry:    histogram("bpfnet_expiry_duration_seconds", []float64{.0001, .001, .005, .01, .05, .1, .5, 1, 5}),
		errors:    prometheus.NewCounter(prometheus.CounterOpts{Name: errs.Name, Help: errs.Help}),
		success:   prometheus.NewGauge(prometheus.GaugeOpts{Name: success.Name, Help: success.Help}),
		deleted:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: deleted.Name, Help: deleted.Help}, deleted.Labels),
	}
	for _, cause := range []string{"expired", "purged"} {
		r.Swept(cause, 0, 0)
	}
	return r
}

// Reconciled counts a round.
func (r *Rounds) Reconciled(began time.Time, took time.Duration, err error) {
	if r == nil {
		return
	}
	r.reconcile.Observe(took.Seconds())
	if err != nil {
		r.errors.Inc()
		return
	}
	r.success.Set(float64(began.Add(took).UnixNano()) / 1e9)
}

// Expired counts a walk through the flow tables.
func (r *Rounds) Expired(took time.Duration) {
	if r != nil {
		r.expiry.Observe(took.Seconds())
	}
}

// Swept counts entries deleted, by cause: "expired" or "purged".
func (r *Rounds) Swept(cause string, v4, v6 int) {
	if r != nil {
		r.deleted.WithLabelValues("ipv4", cause).Add(float64(v4))
		r.deleted.WithLabelValues("ipv6", cause).Add(float64(v6))
	}
}

func (r *Rounds) all() []prometheus.Collector {
	if r == nil {
		return nil
	}
	return []prometheus.Collector{r.reconcile, r.expiry, r.errors, r.success, r.deleted}
}

// Collector is a prometheus.Collector of the maps and the daemon.
type Collector struct {
	o     Options
	descs map[string]*prometheus.Desc

	mu         sync.Mutex
	limit      int
	containers fold
	ports      fold
	relayed    fold
	errors     map[string]int    // reads that failed, by what was read
	told       map[string]string // the errors that are logged already
}

// New makes a collector. It has nothing to close.
func New(o Options) *Collector {
	c := &Collector{o: o, descs: make(map[string]*prometheus.Desc), errors: make(map[string]int), told: make(map[string]string)}
	if c.o.Log == nil {
		c.o.Log = slog.New(slog.DiscardHandler)
	}
	c.SetLimit(o.Limit)
	for _, f := range families {
		c.descs[f.Name] = prometheus.NewDesc(f.Name, f.Help, f.Labels, nil)
	}
	for _, what := range []string{"drops", "fates", "endpoints", "ports", "fill", "masquerade", "relay"} {
		c.errors[what] = 0
	}
	return c
}

// SetLimit changes how many containers, and how many ports, have series of their own. 0: DefaultLimit.
func (c *Collector) SetLimit(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.limit = n; n == 0 {
		c.limit = DefaultLimit
	}
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	own := make(map[string]bool)
	for _, r := range c.o.Rounds.all() {
		found := make(chan *prometheus.Desc, 1)
		r.Describe(found)
		d := <-found
		own[d.String()] = true
		ch <- d
	}
	for _, f := range families {
		if d := c.descs[f.Name]; !own[d.String()] {
			ch <- d
		}
	}
}

// scrape is one run of Collect.
type scrape struct {
	*Collector
	ch chan<- prometheus.Metric
}

func (s *scrape) send(kind prometheus.ValueType, name string, v float64, labels ...string) {
	for i := range labels {
		labels[i] = strings.ToValidUTF8(labels[i], "\uFFFD")
	}
	s.ch <- prometheus.MustNewConstMetric(s.descs[name], kind, v, labels...)
}

func (s *scrape) counter(name string, v uint64, labels ...string) {
	s.send(prometheus.CounterValue, name, float64(v), labels...)
}

func (s *scrape) gauge(name string, v float64, labels ...string) {
	s.send(prometheus.GaugeValue, name, v, labels...)
}

// failed counts a read that failed, and logs it when it is news. What else there is, is shown.
func (s *scrape) failed(what string, err error) bool {
	if err == nil {
		delete(s.told, what)
		return false
	}
	s.errors[what]++
	if text := err.Error(); s.told[what] != text {
		s.told[what] = text
		s.o.Log.Error("read for the metrics", "what", what, "err", err)
	}
	return true
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &scrape{c, ch}
	snap := c.o.Snapshot()
	if snap == nil {
		snap = &api.Snapshot{}
	}
	s.gauge("bpfnet_build_info", 1, c.o.Version, runtime.Version(), snap.Attach)
	s.hostCounters()
	s.endpoints(snap)
	s.publishedPorts(snap)
	s.state(snap)
	s.relay()
	for what, n := range c.errors {
		s.counter("bpfnet_metrics_read_errors_total", uint64(n), what)
	}
	for _, r := range c.o.Rounds.all() {
		r.Collect(ch)
	}
}

func (s *scrape) hostCounters() {
	fates, err := s.o.Counters.Fates()
	if !s.failed("fates", err) {
		for _, f := range fates {
			s.counter("bpfnet_forwarded_packets_total", f.Packets, f.Fate, f.Hook)
			s.counter("bpfnet_forwarded_bytes_total", f.Bytes, f.Fate, f.Hook)
		}
	}
	drops, err := s.o.Counters.Drops()
	if !s.failed("drops", err) {
		for _, d := range drops {
			s.counter("bpfnet_dropped_packets_total", d.Packets, d.Reason, d.Hook)
			s.counter("bpfnet_dropped_bytes_total", d.Bytes, d.Reason, d.Hook)
		}
	}
	fill, err := s.o.Counters.Fill()
	if !s.failed("fill", err) {
		for _, m := range fill {
			s.gauge("bpfnet_map_entries", float64(m.Entries), m.Map)
			s.gauge("bpfnet_map_max_entries", float64(m.Max), m.Map)
		}
	}
	tries, err := s.o.Counters.MasqueradeTries()
	if !s.failed("masquerade", err) {
		s.counter("bpfnet_masquerade_ports_exhausted_total", tries.Exhausted)
		s.tries(tries.Found)
	}
}

// tries sends the tries as a histogram: one bucket each time the tries double.
func (s *scrape) tries(found []uint64) {
	var count, sum uint64
	buckets := make(map[float64]uint64)
	for i, n := range found {
		try := uint64(i) + 1
		count += n
		sum += n * try
		if try&(try-1) == 0 {
			buckets[float64(try)] = count
		}
	}
	s.ch <- prometheus.MustNewConstHistogram(s.descs["bpfnet_masquerade_port_tries"], count, float64(sum), buckets)
}

func (s *scrape) endpoints(snap *api.Snapshot) {
	var rows []row
	for _, e := range snap.Endpoints {
		if e.Slot == 0 { // nobody's: no slot was left for it
			continue
		}
		n, err := s.o.Counters.EndpointStats(e.Slot)
		if s.failed("endpoints", err) {
			return
		}
		rows = append(rows, row{e.ID, []string{e.Network, e.Name},
			counts{n.RxPackets, n.RxBytes, n.TxPackets, n.TxBytes, n.DropPackets, n.DropBytes}})
	}
	s.folded("container", &s.containers, rows, 1, []string{
		"bpfnet_endpoint_receive_packets_total", "bpfnet_endpoint_receive_bytes_total",
		"bpfnet_endpoint_transmit_packets_total", "bpfnet_endpoint_transmit_bytes_total",
		"bpfnet_endpoint_dropped_packets_total", "bpfnet_endpoint_dropped_bytes_total",
	})
}

func (s *scrape) publishedPorts(snap *api.Snapshot) {
	var rows []row
	for _, p := range snap.Ports {
		if p.Slot == 0 {
			continue
		}
		n, err := s.o.Counters.PortStats(p.Slot)
		if s.failed("ports", err) {
			return
		}
		rows = append(rows, row{p.Endpoint + " " + p.Host + " " + p.Proto, []string{p.Network, p.Container, p.Host, p.Proto},
			counts{n.Connections, n.RxPackets, n.RxBytes, n.TxPackets, n.TxBytes, n.NotReady}})
	}
	s.folded("port", &s.ports, rows, 1, []string{
		"bpfnet_published_port_connections_total",
		"bpfnet_published_port_receive_packets_total", "bpfnet_published_port_receive_bytes_total",
		"bpfnet_published_port_transmit_packets_total", "bpfnet_published_port_transmit_bytes_total",
		"bpfnet_published_port_not_ready_packets_total",
	})
}

// folded sends rows; those over the limit are summed under their first labels.
func (s *scrape) folded(kind string, f *fold, rows []row, keep int, names []string) {
	rows, over := f.bound(rows, s.limit, keep)
	for _, r := range rows {
		for i, name := range names {
			s.counter(name, r.n[i], r.labels...)
		}
	}
	s.gauge("bpfnet_metrics_folded", float64(over), kind)
}

func (s *scrape) state(snap *api.Snapshot) {
	s.gauge("bpfnet_networks", float64(len(snap.Networks)))
	s.gauge("bpfnet_published_ports", float64(len(snap.Ports)))
	s.gauge("bpfnet_setting_problems", float64(len(snap.Problems)))
	type key struct{ network, state string }
	count := make(map[key]int)
	for _, n := range snap.Networks {
		count[key{n.Name, "ready"}], count[key{n.Name, "not_ready"}] = 0, 0
	}
	for _, e := range snap.Endpoints {
		if e.Ready {
			count[key{e.Network, "ready"}]++
		} else {
			count[key{e.Network, "not_ready"}]++
		}
	}
	for k, n := range count {
		s.gauge("bpfnet_endpoints", float64(n), k.network, k.state)
	}
	programs := make(map[string]int)
	for _, a := range snap.Attachments {
		programs[a.Program]++
	}
	for name, n := range programs {
		s.gauge("bpfnet_attached_programs", float64(n), name)
	}
	for _, src := range snap.Sources {
		connected := 0.0
		if src.Connected {
			connected = 1
		}
		s.gauge("bpfnet_source_connected", connected, src.Name)
		if !src.LastSync.IsZero() {
			s.gauge("bpfnet_source_last_sync_timestamp_seconds", float64(src.LastSync.UnixNano())/1e9, src.Name)
		}
	}
}

func (s *scrape) relay() {
	var r *Relay
	if s.o.Relay != nil {
		var err error
		if r, err = s.o.Relay(); s.failed("relay", err) {
			return
		}
	}
	if r == nil {
		r = &Relay{}
	}
	s.gauge("bpfnet_relay_active_clients", float64(r.Active))
	var rows []row
	for _, p := range r.Ports {
		rows = append(rows, row{p.Host + " " + p.Proto, []string{p.Host, p.Proto}, counts{p.Clients, p.Dropped, p.Failed}})
	}
	s.folded("relayed_port", &s.relayed, rows, 0, []string{
		"bpfnet_relay_clients_total", "bpfnet_relay_dropped_clients_total", "bpfnet_relay_failed_clients_total",
	})
}

var _ prometheus.Collector = (*Collector)(nil)

// String is the family as the documentation shows it.
func (f Family) String() string {
	if len(f.Labels) == 0 {
		return f.Name
	}
	return fmt.Sprintf("%s{%s}", f.Name, strings.Join(f.Labels, ","))
}
