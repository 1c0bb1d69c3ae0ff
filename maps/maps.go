// SPDX-License-Identifier: Apache-2.0

// Package maps is typed access to the pinned maps: the daemon's tables on the way in, counters and
// flows on the way out. Readers need no daemon. All byte order lives here.
package maps

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/policy"
)

// Dir is the directory of the pinned maps below an instance's pin directory.
func Dir(bpffs string) string { return filepath.Join(bpffs, "maps") }

// ErrNotLoaded says that there are no pinned maps: no daemon has run, or cleanup has.
var ErrNotLoaded = errors.New("nothing is loaded")

// Maps are the pinned maps of one instance.
type Maps struct {
	m   map[string]*ebpf.Map
	dir string // of the pins; empty where a loader has opened them
}

// Open opens the pinned maps below the instance's pin directory; ErrNotLoaded where there are none.
func Open(bpffs string) (*Maps, error) {
	dir := Dir(bpffs)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil, fmt.Errorf("open maps below %s: %w", bpffs, ErrNotLoaded)
	}
	if err != nil {
		return nil, fmt.Errorf("open maps: %w", err)
	}
	out := &Maps{m: make(map[string]*ebpf.Map), dir: dir}
	for _, e := range entries {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, e.Name()), nil)
		if err != nil {
			out.Close()
			return nil, fmt.Errorf("open map %s: %w", e.Name(), err)
		}
		out.m[e.Name()] = m
	}
	for name, m := range spec().Maps {
		if _, ok := out.m[name]; !ok && m.Pinning == ebpf.PinByName {
			out.Close()
			return nil, fmt.Errorf("open maps below %s: they are another version's (no %s); restart the daemon", bpffs, name)
		}
	}
	return out, nil
}

// Use wraps maps that a loader has just opened; Close closes them.
func Use(m map[string]*ebpf.Map) *Maps { return &Maps{m: m} }

// Close closes the file descriptors; the pinned maps stay.
func (m *Maps) Close() {
	for _, v := range m.m {
		v.Close()
	}
}

// Map is the map of that name, for tests and the loader. It is nil if there is none.
func (m *Maps) Map(name string) *ebpf.Map { return m.m[name] }

var spec = sync.OnceValue(func() *ebpf.CollectionSpec {
	s, err := bpf.LoadDatapath()
	if err != nil {
		panic("the embedded object cannot be read: " + err.Error()) // the build is broken
	}
	return s
})

func init() {
	if policy.MaxEndpoints != maxEndpoints || policy.MaxNetworks != maxNetworks || policy.MaxPorts != maxPorts {
		panic("slot limits of policy and bpf differ")
	}
}

// What bpf/lib/types.h says; a test compares them with the maps' sizes.
const (
	maxEndpoints = 4096
	maxNetworks  = 1024
	maxPorts     = 16384
)

// enumNames are the enumerators of a C enumeration by value: lower case, without the prefix.
func enumNames(name, prefix string) []string {
	var e *btf.Enum
	if err := spec().Types.TypeByName(name, &e); err != nil {
		return nil
	}
	out := make([]string, len(e.Values))
	for _, v := range e.Values {
		if v.Value < uint64(len(out)) {
			out[v.Value] = strings.ToLower(strings.TrimPrefix(v.Name, prefix))
		}
	}
	return out
}

var (
	reasonNames = sync.OnceValue(func() []string { return enumNames("reason", "REASON_") })
	hookNames   = sync.OnceValue(func() []string { return enumNames("hook", "HOOK_") })
	fateNames   = sync.OnceValue(func() []string { return enumNames("fate", "FATE_") })
)

// Reasons are the names of the drop reasons by number.
func Reasons() []string { return reasonNames() }

// ReasonNames are the names that a packet can be dropped under.
func ReasonNames() []string {
	names := reasonNames()
	return slices.Clone(names[1 : len(names)-1]) // REASON_NONE, REASON_COUNT
}

// Drop is the counter of one reason at one hook.
type Drop struct {
	Reason  string `json:"reason"`
	Hook    string `json:"hook"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Fate is the counter of one way that packets went at one hook.
type Fate struct {
	Fate    string `json:"fate"`
	Hook    string `json:"hook"`
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

func sum(values []bpf.DatapathCount) (packets, bytes uint64) {
	for _, v := range values {
		packets += v.Packets
		bytes += v.Bytes
	}
	return packets, bytes
}

// eachCount calls f for every non-zero counter of a map that is indexed by kind and hook.
func (m *Maps) eachCount(name string, kinds []string, f func(kind, hook string, packets, bytes uint64)) error {
	hooks := hookNames()
	hooks = hooks[:len(hooks)-1] // HOOK_COUNT
	for k, kind := range kinds[:len(kinds)-1] {
		for h, hook := range hooks {
			var values []bpf.DatapathCount
			if err := m.m[name].Lookup(uint32(k*len(hooks)+h), &values); err != nil {
				return fmt.Errorf("read %s: %w", name, err)
			}
			if packets, bytes := sum(values); packets != 0 {
				f(kind, hook, packets, bytes)
			}
		}
	}
	return nil
}

// Drops are the drop counters that are not zero.
func (m *Maps) Drops() ([]Drop, error) {
	var out []Drop
	err := m.eachCount("drops", reasonNames(), func(kind, hook string, packets, bytes uint64) {
		out = append(out, Drop{Reason: kind, Hook: hook, Packets: packets, Bytes: bytes})
	})
	return out, err
}

// Fates are the counters of packets not dropped that are not zero.
func (m *Maps) Fates() ([]Fate, error) {
	var out []Fate
	err := m.eachCount("fates", fateNames(), func(kind, hook string, packets, bytes uint64) {
		out = append(out, Fate{Fate: kind, Hook: hook, Packets: packets, Bytes: bytes})
	})
	return out, err
}

// EndpointCount is an endpoint's traffic, as the container sees it.
type EndpointCount struct {
	RxPackets   uint64 `json:"rx_packets"`
	RxBytes     uint64 `json:"rx_bytes"`
	TxPackets   uint64 `json:"tx_packets"`
	TxBytes     uint64 `json:"tx_bytes"`
	DropPackets uint64 `json:"drop_packets"` // sent by it and dropped
	DropBytes   uint64 `json:"drop_bytes"`
}

// EndpointStats reads an endpoint's counters.
func (m *Maps) EndpointStats(slot uint16) (EndpointCount, error) {
	var values []bpf.DatapathEndpointCount
	if err := m.m["endpoint_stats"].Lookup(uint32(slot), &values); err != nil {
		return EndpointCount{}, fmt.Errorf("read endpoint_stats: %w", err)
	}
	var c EndpointCount
	for _, v := range values {
		c.RxPackets += v.Rx.Packets
		c.RxBytes += v.Rx.Bytes
		c.TxPackets += v.Tx.Packets
		c.TxBytes += v.Tx.Bytes
		c.DropPackets += v.Drop.Packets
		c.DropBytes += v.Drop.Bytes
	}
	return c, nil
}

// PortCount is a published port's traffic.
type PortCount struct {
	Connections uint64 `json:"connections"` // flows opened
	RxPackets   uint64 `json:"rx_packets"`  // towards the container
	RxBytes     uint64 `json:"rx_bytes"`
	TxPackets   uint64 `json:"tx_packets"`
	TxBytes     uint64 `json:"tx_bytes"`
	NotReady    uint64 `json:"not_ready"` // first packets dropped, their sender tries again
}

// PortStats reads a published port's counters.
func (m *Maps) PortStats(slot uint16) (PortCount, error) {
	var values []bpf.DatapathPortCount
	if err := m.m["port_stats"].Lookup(uint32(slot), &values); err != nil {
		return PortCount{}, fmt.Errorf("read port_stats: %w", err)
	}
	var c PortCount
	for _, v := range values {
		c.Connections += v.Connections
		c.RxPackets += v.Rx.Packets
		c.RxBytes += v.Rx.Bytes
		c.TxPackets += v.Tx.Packets
		c.TxBytes += v.Tx.Bytes
		c.NotReady += v.NotReady
	}
	return c, nil
}

// Fill is how full a map is.
type Fill struct {
	Map     string `json:"map"`
	Entries int    `json:"entries"`
	Max     int    `json:"max"`
}

// Flows are the entries of the two flow tables, two a flow, by the gauge that the data path keeps.
func (m *Maps) Flows() (v4, v6 int, err error) {
	var g bpf.DatapathFlowGauge
	if err := m.m["flow_gauge"].Lookup(uint32(0), &g); err != nil {
		return 0, 0, fmt.Errorf("read flow_gauge: %w", err)
	}
	return int(g.Entries[0]), int(g.Entries[1]), nil
}

// Fill says how full the maps are that can fill up.
func (m *Maps) Fill() ([]Fill, error) {
	v4, v6, err := m.Flows()
	if err != nil {
		return nil, err
	}
	out := []Fill{
		{Map: "flows4", Entries: v4, Max: int(m.m["flows4"].MaxEntries())},
		{Map: "flows6", Entries: v6, Max: int(m.m["flows6"].MaxEntries())},
	}
	now := monotonicTicks()
	c, err := m.config()
	if err != nil {
		return nil, err
	}
	waits := func(lastSeen uint32) bool { return now-lastSeen <= c.Timeouts.TcpSyn }
	for _, t := range []struct {
		name  string
		count func() (int, error)
		room  uint32
	}{
		// The newest push out the oldest, so that only the fresh ones tell how much is in use.
		{"syns4", func() (int, error) {
			return countIf[bpf.DatapathFlow4Key](m.m["syns4"], func(s bpf.DatapathSyn4) bool { return waits(s.Answer.F.LastSeen) })
		}, m.m["syns4"].MaxEntries()},
		{"syns6", func() (int, error) {
			return countIf[bpf.DatapathFlow6Key](m.m["syns6"], func(s bpf.DatapathSyn6) bool { return waits(s.Answer.F.LastSeen) })
		}, m.m["syns6"].MaxEntries()},
		{"frags", func() (int, error) {
			return countIf[bpf.DatapathFragKey](m.m["frags"], func(f bpf.DatapathFrag) bool { return now-f.Seen <= fragmentTicks })
		}, m.m["frags"].MaxEntries()},
		// Slot 0 is nobody's.
		{"network_slots", func() (int, error) {
			return countIf[uint32](m.m["network_slots"], func(n bpf.DatapathNetwork) bool { return n.Ifindex != 0 })
		}, maxNetworks - 1},
		{"endpoint_slots", func() (int, error) {
			return countIf[uint32](m.m["endpoint_slots"], func(e bpf.DatapathEndpoint) bool { return e.Ifindex != 0 })
		}, maxEndpoints - 1},
		{"port_slots", func() (int, error) {
			return countIf[uint32](m.m["port_slots"], func(p bpf.DatapathPortSlot) bool { return p.Live != 0 })
		}, maxPorts - 1},
	} {
		n, err := t.count()
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", t.name, err)
		}
		out = append(out, Fill{Map: t.name, Entries: n, Max: int(t.room)})
	}
	for _, name := range []string{"endpoints", "links", "ports", "open_ports", "pairs", "host_addrs", "subnets", "trusted", "allowed_sources"} {
		n, err := Entries(m.m[name])
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		out = append(out, Fill{Map: name, Entries: n, Max: int(m.m[name].MaxEntries())})
	}
	return out, nil
}

const fragmentTicks = 30 // FRAGMENT_TICKS of bpf/lib/fragment.h

func (m *Maps) config() (bpf.DatapathConfig, error) {
	var c bpf.DatapathConfig
	if err := m.m["config"].Lookup(uint32(0), &c); err != nil {
		return c, fmt.Errorf("read config: %w", err)
	}
	return c, nil
}

// countIf counts the values of a map that pass the test, in few system calls.
func countIf[K, V any](m *ebpf.Map, test func(V) bool) (n int, err error) {
	err = batches(m, func(_ K, v V) {
		if test(v) {
			n++
		}
	})
	return n, err
}

// Busiest is the destination towards which the most masquerade ports are taken, and how many there are.
type Busiest struct {
	Proto string         `json:"proto"`
	To    netip.AddrPort `json:"to"`
	Ports int            `json:"ports"`
	Max   int            `json:"max"`
}

// BusiestDestination reads the flows, unless they are too few for any destination to have the share (0 to 1)
// of all masquerade ports. The zero value: none has.
func (m *Maps) BusiestDestination(share float64) (Busiest, error) {
	c, err := m.config()
	if err != nil {
		return Busiest{}, err
	}
	room, err := m.masqueradePorts(&c)
	if err != nil {
		return Busiest{}, err
	}
	v4, v6, err := m.Flows()
	if err != nil || room == 0 {
		return Busiest{}, err
	}
	least := int(share * float64(room))
	type destination struct {
		proto uint8
		to    netip.AddrPort
	}
	taken := make(map[destination]int)
	const masqueraded = bpf.DatapathFlowFlagsFLOW_ORIGIN | bpf.DatapathFlowFlagsFLOW_SNAT
	count := func(proto uint8, flags bpf.DatapathFlowFlags, out netip.Addr, port uint16) {
		toUplink := bpf.DatapathHook(flags&bpf.DatapathFlowFlagsFLOW_OUT_MASK) == bpf.DatapathHookHOOK_UPLINK
		if flags&masqueraded == masqueraded && toUplink && (proto == unix.IPPROTO_TCP || proto == unix.IPPROTO_UDP) {
			taken[destination{proto, netip.AddrPortFrom(out, port)}]++
		}
	}
	if v4/2 >= least {
		err = batches(m.m["flows4"], func(k bpf.DatapathFlow4Key, f bpf.DatapathFlow4) {
			count(k.Proto, f.F.Flags, fromAddr4(f.Daddr), port16(f.F.Dport))
		})
	}
	if v6/2 >= least {
		err = errors.Join(err, batches(m.m["flows6"], func(k bpf.DatapathFlow6Key, f bpf.DatapathFlow6) {
			count(k.Proto, f.F.Flags, fromAddr(f.Daddr), port16(f.F.Dport))
		}))
	}
	if err != nil {
		return Busiest{}, fmt.Errorf("read flows: %w", err)
	}
	var most Busiest
	for d, n := range taken {
		if n >= least && n > most.Ports {
			most = Busiest{Proto: map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[d.proto], To: d.to, Ports: n, Max: room}
		}
	}
	return most, nil
}

// Entries counts what a map holds, in few system calls.
func Entries(m *ebpf.Map) (int, error) {
	const batch = 1024
	var cursor ebpf.MapBatchCursor
	room := func(size uint32) any {
		element := reflect.ArrayOf(int(size), reflect.TypeFor[byte]())
		return reflect.MakeSlice(reflect.SliceOf(element), batch, batch).Interface()
	}
	keys, values := room(m.KeySize()), room(m.ValueSize())
	for n := 0; ; {
		got, err := m.BatchLookup(&cursor, keys, values, nil)
		n += got
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return n, nil
		}
		if err != nil {
			return countSingly(m)
		}
	}
}

// countSingly counts a map's entries one by one, where the kernel knows no batches of its type.
func countSingly(m *ebpf.Map) (int, error) {
	n := 0
	it := m.Iterate()
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	for it.Next(&key, &value) {
		n++
	}
	return n, it.Err()
}

// Tries says how masquerade ports were found.
type Tries struct {
	Found     []uint64 // at the first try, at the second, …
	Exhausted uint64   // not at all
}

// MasqueradeTries reads the counters of the search for masquerade ports.
func (m *Maps) MasqueradeTries() (Tries, error) {
	var t Tries
	last := m.m["snat_stats"].MaxEntries() - 1
	for i := uint32(0); i <= last; i++ {
		var values []uint64
		if err := m.m["snat_stats"].Lookup(i, &values); err != nil {
			return Tries{}, fmt.Errorf("read snat_stats: %w", err)
		}
		var n uint64
		for _, v := range values {
			n += v
		}
		if i == last {
			t.Exhausted = n
		} else {
			t.Found = append(t.Found, n)
		}
	}
	return t, nil
}
