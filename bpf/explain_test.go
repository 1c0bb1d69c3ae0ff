// SPDX-License-Identifier: Apache-2.0

// Needs root: it makes a network namespace and loads BPF programs (see datapath_host_test.go).
//
// The programs loaded once more to be asked, by loader.Dry, on the maps of those that run.
package bpf_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/explain"
	"github.com/bpfnet/bpfnet/internal/lab/packet"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/policy"
)

// inHost runs in the host's namespace, where the devices are.
type inHost struct {
	h   *host
	dry *loader.Dry
}

func newDry(h *host) inHost {
	h.t.Helper()
	dry, err := loader.NewDry(h.coll.Maps)
	require.NoError(h.t, err)
	h.t.Cleanup(dry.Close)
	return inHost{h, dry}
}

func (r inHost) Run(s loader.Shot) (l loader.Landing, err error) {
	r.h.do(func() { l, err = r.dry.Run(s) })
	return l, err
}

func (r inHost) run(s loader.Shot) loader.Landing {
	r.h.t.Helper()
	l, err := r.Run(s)
	require.NoError(r.h.t, err)
	return l
}

// everything is what maps hold, as text by map: all of them, or only those of the names.
func (h *host) everything(only ...string) map[string][]string {
	h.t.Helper()
	out := make(map[string][]string)
	for name, m := range h.coll.Maps {
		if len(only) > 0 && !slices.Contains(only, name) {
			continue
		}
		switch m.Type() {
		case ebpf.RingBuf, ebpf.ArrayOfMaps, ebpf.LPMTrie: // nobody writes the last but the daemon
			continue
		case ebpf.Array, ebpf.PerCPUArray:
			out[name] = h.elements(m)
			continue
		}
		var list []string
		key := make([]byte, m.KeySize())
		var value []byte
		it := m.Iterate()
		for it.Next(&key, &value) {
			list = append(list, fmt.Sprintf("%x %x", key, value))
		}
		require.NoError(h.t, it.Err(), name)
		slices.Sort(list)
		out[name] = list
	}
	return out
}

// elements are those of an array, on each CPU where it has one for each: all at once, for there are half a million.
func (h *host) elements(m *ebpf.Map) (out []string) {
	h.t.Helper()
	size, each := int(m.ValueSize()), 1
	if m.Type() == ebpf.PerCPUArray {
		size, each = (size+7)&^7, ebpf.MustPossibleCPU()
	}
	keys := make([]uint32, m.MaxEntries())
	values := reflect.MakeSlice(reflect.SliceOf(reflect.ArrayOf(size, reflect.TypeFor[byte]())), len(keys)*each, len(keys)*each)
	var cursor ebpf.MapBatchCursor
	n, err := m.BatchLookup(&cursor, keys, values.Interface(), nil)
	if !errors.Is(err, ebpf.ErrKeyNotExist) { // as at the end
		require.NoError(h.t, err)
	}
	require.Equal(h.t, len(keys), n)
	for i := range values.Len() {
		out = append(out, string(values.Index(i).Bytes()))
	}
	return out
}

// unchanged requires that no map holds anything else than before.
func (h *host) unchanged(before map[string][]string) {
	h.t.Helper()
	after := h.everything(slices.Collect(maps.Keys(before))...)
	require.Equal(h.t, slices.Sorted(maps.Keys(before)), slices.Sorted(maps.Keys(after)))
	for name := range before {
		require.True(h.t, slices.Equal(before[name], after[name]), "%s has changed", name)
	}
}

// explainRounds is how many states of the host there are, each with as many packets.
func explainRounds() (rounds, packets int) {
	if os.Getenv("BPFNET_FULL") == "1" {
		return 200, 200
	}
	return 30, 100
}

// Whatever the host's state and whatever flows there are, policy and the programs say the same of a packet that belongs to
// no flow, and asking writes no map.
func TestExplainAgrees(t *testing.T) {
	h := newHost(t, 4096)
	writer, counts := newWriter(h), newSequenceCounts()
	dry := newDry(h)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	bytes := func(n int) []byte {
		data := make([]byte, n)
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		return data
	}
	rounds, packets := explainRounds()
	asked := make(map[string]int)
	for round := range rounds {
		d := &dice{data: bytes(2000)}
		s := &sequence{
			h: h, writer: writer, d: d, w: newWorld(d), counts: counts,
			m: &model{flows: make(map[flowKey]*modelFlow), waiting: make(map[flowKey]*modelFlow)},
		}
		s.apply()
		h.reset()
		s.before = h.counters()
		for len(d.data) > 1000 { // flows and changes
			s.step()
		}
		var before map[string][]string
		if round%10 == 0 {
			before = h.everything()
		}
		for n := range packets {
			d.data = bytes(64)
			p := pick(d, s.fromContainer, s.fromContainer, s.fromUplink, s.fromHost)()
			q := p.packet
			// Nobody else's flow.
			if own := uint16(60000 + n); q.Tuple.Src.Port() != 0 || q.Proto != unix.IPPROTO_ICMP && q.Proto != unix.IPPROTO_ICMPV6 {
				q.Tuple.Src = at(q.Tuple.Src.Addr(), own)
			} else {
				q.Tuple.Dst = at(q.Tuple.Dst.Addr(), own)
			}
			place := explain.Place{Link: explain.Link{Dst: policy.MAC(p.frame[:6]), Src: policy.MAC(p.frame[6:12])}}
			for slot, link := range h.links {
				if link == q.Device {
					place.Bridge = h.bridges[places[slot].network]
				}
			}
			v := s.m.tables.Explain(s.m.host, q)
			o, err := explain.Ask(dry, q, place)
			require.NoError(t, err)
			differ := explain.Differ(v, o)
			if differ != "" || explain.ByState(v, o) {
				t.Fatalf("seed %d, round %d: %s\n%+v\n%+v\nby policy %q\n%s\nafter\n%s", seed, round, differ, q, o, v.Steps,
					hex.Dump(explain.Frame(q, place.Link)), strings.Join(s.log, "\n"))
			}
			asked[o.Path.String()+" "+o.Reason]++
			if len(o.Programs) > 1 {
				asked[strings.Join(o.Programs, " ")]++
			}
		}
		if before != nil {
			h.unchanged(before)
		}
	}
	t.Logf("%d states, %d packets: %v", rounds, rounds*packets, asked)
	for _, want := range []string{"container ", "uplink ", "stack ", "host ", "dropped isolated", "dropped internal", "dropped icc_disabled",
		"from_container to_uplink", "from_container from_bridge", "dropped direct_access", "dropped spoofed_address"} {
		require.NotZero(t, asked[want], "%s: none of %v", want, asked)
	}
}

// A dry run meets the flows that there are: ports and room that these take it does not get either, and it leaves them alone.
func TestExplainMeetsFlows(t *testing.T) {
	const entries = 64
	h := newHost(t, entries)
	dry := newDry(h)
	f := families[0]
	server := at(f.client2, 443)
	syn := func(slot int, port uint16, to netip.AddrPort) []byte {
		return packet.TCP(at(f.addr(slot), port), to, toGateway(slot))
	}
	ask := func(slot int, frame []byte) loader.Landing {
		t.Helper()
		before := h.everything("flows4", "flows6", "syns4", "syns6", "flow_gauge", "endpoint_flows", "drops", "fates", "snat_stats", "event_buckets")
		l := dry.run(loader.Shot{Program: "from_container", Ifindex: h.links[slot], Frame: frame})
		h.unchanged(before)
		return l
	}

	o, err := explain.Ask(dry, policy.Packet{
		From: policy.FromHost, Device: 1, Proto: policy.TCP, Tuple: policy.Tuple{Src: at(f.host, 40000), Dst: at(f.host1, pubAlice)},
	}, explain.Place{})
	require.NoError(t, err)
	require.Equal(t, policy.PathContainer, o.Path)
	require.Equal(t, at(f.addr(alice), 80), o.Dst)
	require.Equal(t, []string{"from_host", "to_container"}, o.Programs, "it leaves by the container's own device, which lets it pass")

	h.setSNAT(snatFirst, 2)
	l := ask(alice, syn(alice, 40000, server))
	require.Equal(t, "uplink", l.Fate)
	require.NotNil(t, l.Opened)
	require.Equal(t, f.host, l.Opened.Src.Addr())
	first := l.Opened.Src.Port()
	require.EqualValues(t, actRedirect, h.from(alice, syn(alice, 40000, server)).action)
	require.Equal(t, first, h.outer(f, alice, 40000, server.Addr(), server.Port()), "the run that counts takes the port that was told")

	// Whoever is next gets the port that is left, and then there is none.
	taken := map[uint16]bool{first: true}
	for port := uint16(40001); len(taken) < 2; port++ {
		l = ask(bob, syn(bob, port, server))
		require.Equal(t, "uplink", l.Fate)
		require.False(t, taken[l.Opened.Src.Port()], "port %d is alice's", l.Opened.Src.Port())
		require.EqualValues(t, actRedirect, h.from(bob, syn(bob, port, server)).action)
		taken[l.Opened.Src.Port()] = true
	}
	l = ask(carol, syn(carol, 40000, server))
	require.Equal(t, "snat_exhausted", l.Reason)
	require.Nil(t, l.Opened)

	h.setConfig(func(c *bpf.DatapathConfig) { c.EndpointFlows = 1 })
	l = ask(alice, packet.TCP(at(f.addr(alice), 40001), at(f.addr(bob), 80), toNeighbour(alice, bob)))
	require.Equal(t, "flow_cap", l.Reason, "alice has her one flow")
	h.setConfig(func(c *bpf.DatapathConfig) { c.EndpointFlows = 0 })

	for port := uint16(41000); ; port++ {
		if h.from(alice, packet.TCP(at(f.addr(alice), port), at(f.addr(bob), 80), toNeighbour(alice, bob))).action == actShot {
			break
		}
	}
	require.Equal(t, entries, h.entries(f))
	l = ask(alice, packet.TCP(at(f.addr(alice), 50000), at(f.addr(bob), 80), toNeighbour(alice, bob)))
	require.Equal(t, "flow_table_full", l.Reason)

	known := func(hook string, src, dst netip.AddrPort) bool {
		is, err := dry.dry.FlowKnown(hook, unix.IPPROTO_TCP, src, dst)
		require.NoError(t, err)
		return is
	}
	require.True(t, known("container", at(f.addr(alice), 40000), server))
	require.True(t, known("uplink", server, at(f.host, first)))
	require.False(t, known("uplink", at(f.addr(alice), 40000), server))
	require.False(t, known("container", at(f.addr(alice), 39999), server))
}
