// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// hostOnlyGroup is what bpfnet costs traffic that is none of its business: between a client outside and a
// process of the host, beside a container with a published port. Mode host is the same without bpfnet.
func hostOnlyGroup() Group {
	const scenario = "host-only"
	return Group{
		Name: scenario, Scenarios: []string{scenario}, Modes: []string{Host, Bpfnet}, Warm: true, Quick: true, Labs: 10 * time.Second, Round: 12 * time.Second,
		Build: func(t testing.TB, o Options) []Probe {
			paths := map[string]*site{}
			for _, mode := range []string{Host, Bpfnet} {
				o.Step("%s: build the lab of mode %s", scenario, mode)
				paths[mode] = newSpot(t, mode, spotOpts{port: firstOther})
			}
			var probes []Probe
			families, metrics := []int{4, 6}, []string{"rr", "crr"}
			if o.Quick { // what the line of the Reach table needs
				families, metrics = families[:1], metrics[:1]
			}
			for _, family := range families {
				for _, metric := range metrics {
					for _, mode := range []string{Host, Bpfnet} {
						p := paths[mode].toHost(family)
						p.serve(t)
						if err := p.settle(t); err != nil {
							t.Fatalf("%s, mode %s: nobody answers at %s: %v", scenario, mode, p.target(loadPort), err)
						}
						probe := p.probe(meterOf(metric), o, nil)
						probe.Key.Scenario, probe.Key.Mode = scenario, mode
						probes = append(probes, probe)
					}
				}
				probes = append(probes, paths[Bpfnet].packetTime(scenario, family, o))
			}
			return probes
		},
	}
}

// toHost is the path to the host itself, whatever the mode of the site.
func (s *site) toHost(family int) path {
	host := *s
	host.mode = Host
	return host.path("published", family)
}

func meterOf(metric string) meter {
	return meters[slices.IndexFunc(meters, func(m meter) bool { return m.metric == metric })]
}

// packetTime is how long bpfnet's programs run for each packet that the host's uplink receives or sends,
// in a window of its own: to count it costs time.
func (s *site) packetTime(scenario string, family int, o Options) Probe {
	return Probe{
		Key:  Key{Scenario: scenario, Mode: Bpfnet, Family: family, Metric: "bpf-packet"},
		Unit: "ns",
		Note: "run time of all of bpfnet's programs, by the kernel's statistics, for each packet of rr received or sent",
		Measure: func(ctx context.Context) (Sample, error) {
			counting, err := lab.CountRuns()
			if err != nil {
				return Sample{}, err
			}
			defer counting.Close()
			before, err := s.bpfnet.Runs()
			if err != nil {
				return Sample{}, err
			}
			_, moved, err := meterOf("rr").measure(ctx, s.toHost(family), o.Window)
			if err != nil {
				return Sample{}, err
			}
			after, err := s.bpfnet.Runs()
			if err != nil {
				return Sample{}, err
			}
			var spent time.Duration
			for name, r := range after {
				spent += r.Time - before[name].Time
			}
			var packets uint64
			for _, uplink := range []string{"from_uplink", "to_uplink"} {
				packets += after[uplink].Count - before[uplink].Count
			}
			if packets < 2*moved.packets {
				return Sample{}, fmt.Errorf("%d packets each way, but the programs of the uplink have seen only %d", moved.packets, packets)
			}
			return Sample{Value: float64(spent) / float64(packets)}, nil
		},
	}
}

// memoryPoints are the numbers of endpoints at which the daemon's memory is read.
var memoryPoints = []int{0, 100, 1000}

// memoryPorts is how many ports the memory of one is found by.
const memoryPorts = 1000

// proxyPorts is how many docker-proxy processes the memory of one is found by.
const proxyPorts = 20

func memoryGroup() Group { return memoryOf(memoryPoints, memoryPorts) }

// memoryOf is what bpfnet takes of memory: the kernel's for a flow, an endpoint and a port; that of the
// daemon with so many endpoints. For a port, the Engine's proxies beside it.
func memoryOf(points []int, ports int) Group {
	const scenario = "memory"
	key := func(mode, metric string, at int) Key {
		return Key{Scenario: scenario, Mode: mode, Metric: metric, At: at}
	}
	return Group{
		Name: scenario, Scenarios: []string{scenario}, Modes: []string{DockerProxy, Bpfnet}, Labs: 90 * time.Second, Round: time.Second,
		Build: func(t testing.TB, o Options) []Probe {
			var probes []Probe
			if o.Wants(Bpfnet) {
				o.Step("%s: build the lab of mode %s with %d ports", scenario, Bpfnet, ports)
				probes = append(probes, mapProbes(t, key, ports)...)
				for _, at := range points {
					o.Step("%s: build the lab of mode %s with %d endpoints", scenario, Bpfnet, at)
					s := newEngine(t, Bpfnet)
					switch {
					case at > realEndpoints:
						s.addBareEndpoints(t, at, endpointNetworks)
					case at > 0:
						s.addContainers(t, at, endpointNetworks)
					}
					stands := func() error { return s.hasEndpoints(at) }
					waitUntil(t, patience, stands)
					pid := s.bpfnet.PID()
					probes = append(probes, Probe{Key: key(Bpfnet, "rss", at), Unit: "bytes",
						Note: "resident memory of the daemon, by number of endpoints",
						Measure: func(context.Context) (Sample, error) {
							if err := stands(); err != nil {
								return Sample{}, err
							}
							return memoryOfProcess(pid, "Rss")
						}})
				}
			}
			if o.Wants(DockerProxy) {
				o.Step("%s: build the lab of mode %s", scenario, DockerProxy)
				probes = append(probes, proxyProbes(t, key)...)
			}
			return probes
		},
	}
}

// mapProbes are the shares of a flow, an endpoint and a port in the maps.
func mapProbes(t testing.TB, key func(mode, metric string, at int) Key, ports int) []Probe {
	t.Helper()
	s := newEngine(t, Bpfnet)
	empty, err := s.bpfnet.MapSizes()
	if err != nil {
		t.Fatal(err)
	}
	s.docker.MustRun(t, slices.Concat([]string{"run", "-d", "-p", publish(firstOther, ports)}, sleep)...)
	stands := func() error { return s.publishes(ports) }
	waitUntil(t, patience, stands)
	// An element of a map that has its memory from the start.
	element := func(sizes map[string]lab.MapSize, name string) float64 {
		return float64(sizes[name].Bytes) / float64(sizes[name].MaxEntries)
	}
	shares := []struct {
		metric, note string
		bytes        func(sizes map[string]lab.MapSize) float64
	}{
		{"flow", "two entries of map flows4, IPv4", func(m map[string]lab.MapSize) float64 { return 2 * element(m, "flows4") }},
		{"flow6", "two entries of map flows6, IPv6", func(m map[string]lab.MapSize) float64 { return 2 * element(m, "flows6") }},
		{"endpoint", "an element of maps endpoint_slots, endpoint_stats and links, and of endpoints for IPv4", func(m map[string]lab.MapSize) float64 {
			return element(m, "endpoint_slots") + element(m, "endpoint_stats") + element(m, "links") + element(m, "endpoints")
		}},
		{"port", fmt.Sprintf("an element of maps port_slots and port_stats, and a %dth part of what map ports grew by", ports), func(m map[string]lab.MapSize) float64 {
			return element(m, "port_slots") + element(m, "port_stats") + float64(m["ports"].Bytes-empty["ports"].Bytes)/float64(ports)
		}},
	}
	var probes []Probe
	for _, share := range shares {
		probes = append(probes, Probe{Key: key(Bpfnet, share.metric, 0), Unit: "bytes", Note: share.note,
			Measure: func(context.Context) (Sample, error) {
				if err := stands(); err != nil {
					return Sample{}, err
				}
				sizes, err := s.bpfnet.MapSizes()
				if err != nil {
					return Sample{}, err
				}
				bytes := share.bytes(sizes)
				if !(bytes > 0 && bytes < 1<<20) { // also where a map is missing
					return Sample{}, fmt.Errorf("%s takes %g bytes, by %v", share.metric, bytes, sizes)
				}
				return Sample{Value: bytes}, nil
			}})
	}
	return probes
}

// proxyProbes are what the Engine's docker-proxy takes for a port.
func proxyProbes(t testing.TB, key func(mode, metric string, at int) Key) []Probe {
	t.Helper()
	s := newEngine(t, DockerProxy)
	s.docker.MustRun(t, slices.Concat([]string{"run", "-d", "-p", publish(firstOther, proxyPorts)}, sleep)...)
	waitUntil(t, patience, func() error { return s.publishes(proxyPorts) })
	var probes []Probe
	for _, m := range []struct{ metric, field, note string }{
		{"port", "Pss", "a docker-proxy process: its resident memory, with its share of what it shares with others"},
		{"port-rss", "Rss", "a docker-proxy process: its resident memory"},
	} {
		probes = append(probes, Probe{Key: key(DockerProxy, m.metric, 0), Unit: "bytes", Note: m.note,
			Measure: func(context.Context) (Sample, error) {
				pids, err := processesIn(s.lab.Host, "docker-proxy")
				if err != nil {
					return Sample{}, err
				}
				if err := counted("docker-proxy processes", len(pids), proxyPorts); err != nil {
					return Sample{}, err
				}
				var sum float64
				for _, pid := range pids {
					one, err := memoryOfProcess(pid, m.field)
					if err != nil {
						return Sample{}, err
					}
					sum += one.Value
				}
				return Sample{Value: sum / float64(len(pids))}, nil
			}})
	}
	return probes
}

// memoryOfProcess is a field of /proc/PID/smaps_rollup in bytes.
func memoryOfProcess(pid int, field string) (Sample, error) {
	path := filepath.Join("/proc", strconv.Itoa(pid), "smaps_rollup")
	b, err := os.ReadFile(path)
	if err != nil {
		return Sample{}, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			f := strings.Fields(rest)
			kib, err := strconv.ParseFloat(f[0], 64)
			return Sample{Value: kib * 1024}, err
		}
	}
	return Sample{}, fmt.Errorf("%s has no %s", path, field)
}
