// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"cmp"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/maps"
)

// A scenario is a sequence of commands that users follow, and what they must see.
type scenario struct {
	name string
	run  func(t *testing.T, w *world)
}

// scenarios are those that need nothing but an engine: the same commands, whatever stands behind
// them. What only Docker has (Compose, links, builds) is a scenario of Docker's alone.
var scenarios = []scenario{
	{"S02-connect-and-disconnect", s02},
	{"S03-reverse-proxy", s03},
	{"S04-aliases-and-published-ports", s04},
	{"S05-client-address-and-isolation", s05},
	{"S07-host-none-and-shared-namespaces", s07},
	{"S09-allow-two-networks", s09},
	{"S10-default-network", s10},
	{"S11-published-on-loopback", s11},
	{"S12-fixed-addresses", s12},
	{"S13-names", s13},
	{"S15-nothing-of-ours", s15},
}

var dockerScenarios = []scenario{
	{"S01-compose", s01},
	{"S06-link-names", s06},
	{"S14-links", s14},
	{"S17-macvlan", s17},
	{"S20-swarm", s20},
	{"S18-build-classic", func(t *testing.T, w *world) { s18(t, w, "0") }},
	{"S19-veth-by-hand", s19},
	{"S18-build-buildkit", func(t *testing.T, w *world) { s18(t, w, "1") }},
}

// Needs root and a Docker Engine. All scenarios on one host, one after another, as a user who tries
// things out would: the default network has IPv6, and addresses are used again and again.
func TestDocker(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{ExtraArgs: []string{"--ipv6", "--fixed-cidr-v6", "fd00:d0c::/64"}})
	w := newWorld(t, l, dockerEngine{d}, l.StartBpfnet(t, d))
	for _, s := range slices.SortedFunc(slices.Values(append(dockerScenarios, scenarios...)),
		func(a, b scenario) int { return cmp.Compare(a.name, b.name) }) {
		t.Run(s.name, func(t *testing.T) {
			w.start(t)
			s.run(t, w)
		})
	}
}

// Needs root. The same scenarios on a host without Docker: bpfnet is the engine, and sandboxes are what
// containers were. Addresses are those that Docker would give.
func TestEmbedded(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	b := l.StartBpfnet(t, nil, "--default-subnet", "172.17.0.0/16", "--default-subnet", "fd00:d0c::/64")
	w := newWorld(t, l, embeddedEngine{b}, b)
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			w.start(t)
			s.run(t, w)
		})
	}
}

// An engine runs containers. Its commands are docker's, whatever its name: options, networks and
// names mean the same.
type engine interface {
	// Run is a command line without its first word: Run("network", "create", "my-net").
	Run(args ...string) (string, error)
	MustRun(t testing.TB, args ...string) string
	// Create makes a container without starting it, Start makes and starts it; options are those
	// of "run", apart by spaces.
	Create(t testing.TB, options string, command ...string)
	Start(t testing.TB, options string, command ...string)
	// Serve starts the test tool's server and waits until it listens.
	Serve(t testing.TB, options, ports string)
	// Get has the test tool in a container reach something, by name or address.
	Get(container string, args ...string) (lab.Reply, error)
	MustGet(t testing.TB, container string, args ...string) lab.Reply

	WaitLog(t testing.TB, container, text string)
	Addrs(t testing.TB, container, network string) (v4, v6 netip.Addr)
	NS(t testing.TB, container string) *lab.NS
	// Gateway is a network's IPv4 gateway, as the engine tells it.
	Gateway(t testing.TB, network string) netip.Addr
	// Default is the name of the network that containers are on when nothing is said, Bridge its
	// device.
	Default() string
	Bridge() string
	// Clear removes all containers, and all networks but the engine's own.
	Clear(t testing.TB)
	// Belongings are what the engine itself keeps for containers on the host, as far as it is
	// bpfnet's to take away again. Sorted.
	Belongings(t testing.TB) []string
}

// dockerEngine is Docker, with bpfnet as its data path.
type dockerEngine struct{ *lab.Docker }

func (d dockerEngine) Create(t testing.TB, options string, command ...string) {
	t.Helper()
	d.MustRun(t, slices.Concat([]string{"create"}, strings.Fields(options), []string{lab.Image}, command)...)
}

func (d dockerEngine) Start(t testing.TB, options string, command ...string) {
	t.Helper()
	d.MustRun(t, slices.Concat([]string{"run", "-d"}, strings.Fields(options), []string{lab.Image}, command)...)
}

func (d dockerEngine) Serve(t testing.TB, options, ports string) {
	t.Helper()
	d.Docker.Serve(t, slices.Concat(strings.Fields(options), []string{"--"}, strings.Fields(ports))...)
}

func (d dockerEngine) Gateway(t testing.TB, network string) netip.Addr {
	t.Helper()
	return netip.MustParseAddr(d.MustRun(t, "network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", network))
}

func (dockerEngine) Default() string { return "bridge" }
func (dockerEngine) Bridge() string  { return "docker0" }

// Belongings are Docker's own business here.
func (dockerEngine) Belongings(testing.TB) []string { return nil }

func (d dockerEngine) Clear(t testing.TB) {
	t.Helper()
	if all := strings.Fields(d.MustRun(t, "ps", "--all", "--quiet")); len(all) > 0 {
		d.MustRun(t, append([]string{"rm", "--force"}, all...)...)
	}
	if own := strings.Fields(d.MustRun(t, "network", "ls", "--quiet", "--filter", "type=custom")); len(own) > 0 {
		d.MustRun(t, append([]string{"network", "rm"}, own...)...)
	}
}

// embeddedEngine is bpfnet alone.
type embeddedEngine struct{ *lab.Bpfnet }

func (e embeddedEngine) Run(args ...string) (string, error) { return e.CLI(args...) }

func (e embeddedEngine) MustRun(t testing.TB, args ...string) string {
	t.Helper()
	return e.MustCLI(t, args...)
}

func (e embeddedEngine) Create(t testing.TB, options string, command ...string) {
	t.Helper()
	e.MustCLI(t, slices.Concat([]string{"create"}, strings.Fields(options), []string{"--"}, command)...)
}

func (e embeddedEngine) Start(t testing.TB, options string, command ...string) {
	t.Helper()
	e.MustCLI(t, slices.Concat([]string{"run", "-d"}, strings.Fields(options), []string{"--"}, command)...)
}

func (e embeddedEngine) Serve(t testing.TB, options, ports string) {
	t.Helper()
	e.Bpfnet.Serve(t, slices.Concat(strings.Fields(options), []string{"--"}, strings.Fields(ports))...)
}

func (e embeddedEngine) Gateway(t testing.TB, network string) netip.Addr {
	t.Helper()
	config := e.InspectNetwork(t, network).IPAM.Config
	require.NotEmpty(t, config)
	return netip.MustParseAddr(config[0].Gateway)
}

func (embeddedEngine) Default() string { return "bpfnet" }
func (embeddedEngine) Bridge() string  { return "bpfnet0" }

func (e embeddedEngine) Clear(t testing.TB) {
	t.Helper()
	snap := e.Snapshot(t)
	remove := func(command []string, names []string) {
		if len(names) > 0 {
			e.MustCLI(t, append(command, names...)...)
		}
	}
	var sandboxes, networks []string
	for _, s := range snap.Sandboxes {
		sandboxes = append(sandboxes, s.Name)
	}
	for _, n := range snap.Networks {
		if n.Source == "bpfnet" && n.Name != e.Default() {
			networks = append(networks, n.Name)
		}
	}
	remove([]string{"rm", "--force"}, sandboxes)
	remove([]string{"network", "rm"}, networks)
}

// world is what a scenario happens in.
type world struct {
	*lab.Lab
	engine
	bpfnet *lab.Bpfnet
	maps   *maps.Maps
	empty  left // what there is without any container
}

func newWorld(t *testing.T, l *lab.Lab, e engine, b *lab.Bpfnet) *world {
	t.Helper()
	m, err := maps.Open(l.BPFFS)
	require.NoError(t, err)
	t.Cleanup(m.Close)
	w := &world{Lab: l, engine: e, bpfnet: b, maps: m}
	w.empty = w.left(t)
	require.Zero(t, w.empty.Ports)
	return w
}

// start makes sure that the scenario leaves nothing behind.
func (w *world) start(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s", w.bpfnet.MustCLI(t, "stats"))
			t.Logf("%s", w.bpfnet.MustCLI(t, "status"))
			t.Logf("%s", w.Host.MustRun(t, "ip", "-br", "addr"))
		}
		w.Clear(t)
		w.nothingLeft(t)
	})
}

// left is what a container makes bpfnet keep.
type left struct {
	Endpoints, Ports, Attachments []string // in the snapshot
	EndpointMap, LinkMap, PortMap int      // entries
	Flows4, Flows6                int
	Pins                          []string
	Sandboxes, Belongings         []string
}

func (w *world) left(t *testing.T) left {
	t.Helper()
	var out left
	snap := w.snapshot(t)
	for _, e := range snap.Endpoints {
		out.Endpoints = append(out.Endpoints, e.Name+" on "+e.Network)
	}
	for _, p := range snap.Ports {
		out.Ports = append(out.Ports, p.Host+" "+p.Proto)
	}
	out.Attachments = attachments(snap)
	for _, s := range snap.Sandboxes {
		out.Sandboxes = append(out.Sandboxes, s.Name)
	}
	out.Belongings = w.Belongings(t)
	fill, err := w.maps.Fill()
	require.NoError(t, err)
	for _, f := range fill {
		switch f.Map {
		case "flows4":
			out.Flows4 = f.Entries
		case "flows6":
			out.Flows6 = f.Entries
		case "endpoints":
			out.EndpointMap = f.Entries
		case "links":
			out.LinkMap = f.Entries
		case "ports":
			out.PortMap = f.Entries
		}
	}
	err = filepath.WalkDir(w.BPFFS, func(path string, e fs.DirEntry, err error) error {
		// Programs are pinned for the next start, whenever there is time; they are no container's.
		if pin := strings.TrimPrefix(path, w.BPFFS); err == nil && !e.IsDir() && !strings.HasPrefix(pin, "/programs/") {
			out.Pins = append(out.Pins, pin)
		}
		return nil // a pin may go away meanwhile
	})
	require.NoError(t, err)
	return out
}

// attachments says which program is on which device, sorted.
func attachments(snap *api.Snapshot) []string {
	var out []string
	for _, a := range snap.Attachments {
		out = append(out, a.Program+" at "+a.Hook+" of "+a.Device)
	}
	slices.Sort(out)
	return out
}

func (w *world) snapshot(t *testing.T) *api.Snapshot {
	t.Helper()
	snap, err := api.ReadSnapshot(w.bpfnet.State)
	require.NoError(t, err)
	return snap
}

// nothingLeft waits until endpoints, ports, links, attachments and pins are those of a host without
// containers.
func (w *world) nothingLeft(t *testing.T) {
	t.Helper()
	var now left
	defer func() {
		if t.Failed() {
			t.Logf("left: %+v", now)
		}
	}()
	lab.Eventually(t, 10*time.Second, "nothing is left of the containers", func() bool {
		now = w.left(t)
		return now.equal(w.empty)
	})
}

func (a left) equal(b left) bool {
	return slices.Equal(a.Endpoints, b.Endpoints) && slices.Equal(a.Ports, b.Ports) &&
		slices.Equal(a.Attachments, b.Attachments) && slices.Equal(a.Pins, b.Pins) &&
		slices.Equal(a.Sandboxes, b.Sandboxes) && slices.Equal(a.Belongings, b.Belongings) &&
		a.EndpointMap == b.EndpointMap && a.LinkMap == b.LinkMap && a.PortMap == b.PortMap &&
		a.Flows4 == b.Flows4 && a.Flows6 == b.Flows6
}

// drop names a counter.
type drop struct{ reason, hook string }

// isolated is how the data path counts what a container sends to another network.
var isolated = drop{"isolated", "container"}

func (w *world) drops(t *testing.T) map[drop]uint64 {
	t.Helper()
	all, err := w.maps.Drops()
	require.NoError(t, err)
	out := make(map[drop]uint64)
	for _, d := range all {
		out[drop{d.Reason, d.Hook}] = d.Packets
	}
	return out
}

// dropped runs f and returns by how much the drop counters grew.
func (w *world) dropped(t *testing.T, f func()) map[drop]uint64 {
	t.Helper()
	before := w.drops(t)
	f()
	delta := make(map[drop]uint64)
	for d, n := range w.drops(t) {
		if n != before[d] {
			delta[d] = n - before[d]
		}
	}
	return delta
}
