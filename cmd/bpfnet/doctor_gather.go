// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/bpf"
	"github.com/bpfnet/bpfnet/docker"
	"github.com/bpfnet/bpfnet/doctor"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/maps"
	"github.com/bpfnet/bpfnet/netdev"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/store"
)

// gatherer collects what the doctor judges. What fails is noted under the checks that need it.
type gatherer struct {
	a        *App
	ctx      context.Context
	f        *doctor.Facts
	deadline time.Time // of the tools of others; zero: none was asked yet
}

// fail notes that some checks cannot be made.
func (g *gatherer) fail(err error, checks ...string) {
	for _, c := range checks {
		if err != nil && g.f.Failed[c] == nil {
			g.f.Failed[c] = err
		}
	}
}

// gatherFacts looks at everything, and changes nothing. earlier are the facts of a first look: what
// takes long and does not change is taken from there.
func (a *App) gatherFacts(ctx context.Context, earlier *doctor.Facts) (*doctor.Facts, error) {
	g := &gatherer{a: a, ctx: ctx, f: &doctor.Facts{
		Now: a.Now(), Version: a.Version, Command: ownCommand(), Flags: a.flagsInUse(), Failed: make(map[string]error),
		BPFFS: a.paths.BPFFS,
	}}
	g.state()
	if earlier == nil {
		g.kernel()
	} else {
		g.f.Release, g.f.LoadErr, g.f.Features, g.f.Memcg = earlier.Release, earlier.LoadErr, earlier.Features, earlier.Memcg
		g.f.Memlock, g.f.Cgroup, g.f.CgroupErr = earlier.Memlock, earlier.Cgroup, earlier.CgroupErr
		g.f.DestroyErr = earlier.DestroyErr
	}
	g.f.BPFFSNearest, g.f.BPFFSMounted = loader.IsBPFFS(g.f.BPFFS)
	_, err := os.Stat("/proc/sys/net/ipv6")
	g.f.IPv6 = err == nil
	if err := g.devices(); err != nil {
		return nil, err
	}
	g.pins()
	g.programs()
	g.maps()
	g.sysctls()
	g.processes()
	g.engineBridges()
	g.sockets()
	g.rules()
	return g.f, ctx.Err()
}

// ownCommand is how this binary is called.
func ownCommand() string {
	if path, err := exec.LookPath("bpfnet"); err == nil {
		if self, err := os.Executable(); err == nil {
			if a, err := filepath.EvalSymlinks(path); err == nil && a == self {
				return "bpfnet"
			}
		}
	}
	if self, err := os.Executable(); err == nil {
		return self
	}
	return "bpfnet"
}

// flagsInUse are the options that name this instance, as far as they are not the default ones.
func (a *App) flagsInUse() []string {
	var out []string
	for _, x := range []struct{ flag, value, usual string }{
		{"--state", a.paths.State, defaultState}, {"--socket", a.paths.Socket, defaultSocket},
		{"--bpffs", a.paths.BPFFS, "/sys/fs/bpf/bpfnet"}, {"--cgroup", a.paths.Cgroup, ""},
	} {
		if x.value != x.usual {
			out = append(out, x.flag, x.value)
		}
	}
	return out
}

func (g *gatherer) kernel() {
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		g.f.Release = unix.ByteSliceToString(name.Release[:])
	}
	// Before the limit is raised, which trying may do.
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) == nil {
		g.f.Memlock = limit.Cur
	}
	g.f.Cgroup, g.f.CgroupErr = g.a.findCgroup()
	if !g.sameBinary() {
		g.f.LoadErr = loader.TryLoad()
	}
	g.f.Features = append(loader.Features(g.f.Cgroup), loader.Feature{
		Name: "netkit", Since: "6.12", Err: netdev.ProbeNetkit(), Without: "bpfnet's own sandboxes are joined by veth pairs",
	})
	g.f.DestroyErr = netdev.CanDestroySockets()
	g.f.Memcg = loader.MemcgAccounting()
}

// sameBinary reports whether the daemon that runs is this very program: then the kernel has taken its
// objects, and need not check them again, which takes it more than a second.
func (g *gatherer) sameBinary() bool {
	if !g.f.Daemon.Running {
		return false
	}
	mine, err1 := os.Stat("/proc/self/exe")
	its, err2 := os.Stat(fmt.Sprintf("/proc/%d/exe", g.f.Daemon.Status.PID))
	return err1 == nil && err2 == nil && os.SameFile(mine, its)
}

// state asks the daemon, and reads what it keeps.
func (g *gatherer) state() {
	f, paths := g.f, g.a.paths
	ctx, cancel := context.WithTimeout(g.ctx, askTimeout)
	defer cancel()
	client, err := api.Dial(ctx, paths.Socket)
	if err == nil {
		f.Daemon.Status, err = client.Status(ctx)
		f.Daemon.Running = err == nil
	}
	if err != nil && !errors.Is(err, api.ErrNotRunning) {
		f.Daemon.Err = err
	}
	if f.Daemon.Running {
		f.Daemon.Args = processArgs(f.Daemon.Status.PID)
		f.Daemon.Unit = unitOf(read("/proc/" + strconv.Itoa(f.Daemon.Status.PID) + "/cgroup"))
	} else if _, err := os.Stat("/run/systemd/system"); err == nil && len(f.Flags) == 0 {
		if path, err := exec.LookPath("systemctl"); err == nil {
			if _, err := g.run(path, "cat", "bpfnet.service"); err == nil {
				f.Daemon.Unit = "bpfnet.service"
			}
		}
	}
	f.Snapshot, err = api.ReadSnapshot(paths.State)
	if err != nil && !errors.Is(err, api.ErrNoSnapshot) {
		f.SnapshotErr = err
	}
	if snap := f.Snapshot; err == nil && snap != nil && f.Daemon.Err != nil && isStopped(snap.PID) {
		f.Daemon.Stopped, f.Daemon.Err = snap.PID, nil
	}
	// A daemon that runs has read its state, and has it locked.
	if _, err := os.Stat(filepath.Join(paths.State, store.FileName)); err == nil && !f.Daemon.Running {
		st, err := store.Open(paths.State)
		if err == nil {
			err = st.Close()
		}
		if !errors.Is(err, store.ErrLocked) {
			f.StateErr = err
		}
	}
}

// unitOf finds the systemd service in /proc/PID/cgroup.
func unitOf(cgroup string) string {
	for line := range strings.Lines(cgroup) {
		for part := range strings.SplitSeq(strings.TrimSpace(line), "/") {
			if strings.HasSuffix(part, ".service") && !strings.HasPrefix(part, "user@") {
				return part
			}
		}
	}
	return ""
}

func (g *gatherer) devices() error {
	d, err := netdev.Open(netdev.Options{})
	if err != nil {
		return err
	}
	defer d.Close()
	f := g.f
	served := make(map[string]bool)
	if f.Snapshot != nil {
		for _, n := range f.Snapshot.Networks {
			served[n.Bridge] = true
		}
	}
	if f.Devices, err = d.List(); err != nil {
		return err
	}
	if f.Seen, err = d.Snapshot(served, nil); err != nil {
		return err
	}
	g.chooseUplinks()
	if f.Routes6, err = d.DefaultRoutes6(); err != nil {
		g.fail(err, "accept_ra", "uplinks")
	}
	if f.Routes4, err = d.DefaultRoutes4(); err != nil {
		g.fail(err, "uplinks")
	}
	f.PeerMTU = make(map[int]int)
	for _, l := range f.Seen.Links {
		if mtu, err := d.PeerMTU(l.Ifindex); err != nil {
			g.fail(err, "mtu")
		} else if mtu != 0 {
			f.PeerMTU[l.Ifindex] = mtu
		}
	}
	f.Hooks = make(map[doctor.HookKey][]doctor.Entry)
	for _, dev := range f.Devices {
		for _, egress := range []bool{false, true} {
			list, err := g.hook(d, dev.Ifindex, egress)
			if errors.Is(err, unix.ENODEV) {
				continue // it went in between
			}
			g.fail(err, "attached", "strays", "foreign")
			if len(list) > 0 {
				f.Hooks[doctor.HookKey{Ifindex: dev.Ifindex, Egress: egress}] = list
			}
		}
	}
	return nil
}

// chooseUplinks takes those that the daemon was told, if it was: by a flag, its environment or its configuration.
func (g *gatherer) chooseUplinks() {
	f := g.f
	if f.Snapshot == nil || len(f.Snapshot.Uplinks) == 0 {
		return
	}
	f.Told = f.Snapshot.Uplinks
	var kept []policy.Uplink
	for _, u := range f.Seen.Uplinks {
		if slices.Contains(f.Told, u.Name) {
			kept = append(kept, u)
		} else {
			f.LeftOut = append(f.LeftOut, u)
		}
	}
	f.Seen.Uplinks = kept
}

// hook lists what runs at a hook, in order.
func (g *gatherer) hook(d *netdev.Devices, ifindex int, egress bool) ([]doctor.Entry, error) {
	chain, err := loader.TCXChain(ifindex, egress)
	if err != nil {
		return nil, err
	}
	var out []doctor.Entry
	for _, p := range chain {
		out = append(out, doctor.Entry{Program: p})
	}
	filters, err := d.Filters(ifindex, egress)
	if err != nil {
		return nil, err
	}
	for i := range filters {
		e := doctor.Entry{Filter: &filters[i]}
		if id := filters[i].Prog; id != 0 {
			e.Program, err = loader.ProgramByID(id)
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, err
			}
		}
		out = append(out, e)
	}
	return out, nil
}

// pins finds who holds the links: pins of ours and of others, and for what is pinned nowhere, processes.
func (g *gatherer) pins() {
	f := g.f
	var err error
	f.Pins, err = loader.Pins(f.BPFFS)
	g.fail(err, "attached", "strays")
	own := make(map[uint32]bool)
	filters := make(map[string]bool)
	for _, p := range f.Pins {
		if p.Link != 0 {
			own[p.Link] = true
		} else {
			filters[fmt.Sprint(p.Program, " ", p.Ifindex)] = true
		}
	}
	foreign := false
	for key, list := range f.Hooks {
		for i := range list {
			e := &list[i]
			if e.Filter == nil {
				e.Own = own[e.Program.Link]
			} else {
				e.Own = e.Filter.Ours && filters[fmt.Sprint(e.Program.Ours, " ", key.Ifindex)]
			}
			foreign = foreign || !e.Own
		}
	}
	f.LinkPins, f.LinkHolders = make(map[uint32]string), make(map[uint32]doctor.Process)
	xdp := slices.ContainsFunc(f.Devices, func(d netdev.Device) bool { return d.XDP != 0 })
	if !foreign && !xdp {
		return
	}
	for _, dir := range mountsOf(read(g.a.ProcMounts), "bpf") {
		for id, path := range loader.FindPins(dir) {
			f.LinkPins[id] = path
		}
	}
	f.LinkHolders = linkHolders(f.Daemon.Status.PID)
}

// mountsOf lists the mount points of a kind of file system.
func mountsOf(mounts, kind string) []string {
	var out []string
	for line := range strings.Lines(mounts) {
		if w := strings.Fields(line); len(w) > 2 && w[2] == kind {
			out = append(out, unescapeMount(w[1]))
		}
	}
	return out
}

// linkHolders finds the processes that have links open, apart from this one and the daemon.
func linkHolders(daemon int) map[uint32]doctor.Process {
	out := make(map[uint32]doctor.Process)
	for _, pid := range pids() {
		if pid == os.Getpid() || pid == daemon {
			continue
		}
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err != nil || !strings.Contains(to, "bpf") {
				continue
			}
			for line := range strings.Lines(read(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd.Name()))) {
				if v, ok := strings.CutPrefix(line, "link_id:"); ok {
					if id, err := strconv.ParseUint(strings.TrimSpace(v), 10, 32); err == nil {
						out[uint32(id)] = doctor.Process{PID: pid, Name: processName(pid)}
					}
				}
			}
		}
	}
	return out
}

func (g *gatherer) programs() {
	f := g.f
	if f.Cgroup != "" {
		var err error
		f.CgroupPrograms, err = loader.CgroupPrograms(f.Cgroup)
		g.fail(err, "attached")
	}
	for _, dir := range strictCgroups(f.Snapshot) {
		list, err := loader.CgroupPrograms(dir)
		if !errors.Is(err, fs.ErrNotExist) { // without the cgroup, its programs are missing
			g.fail(err, "attached")
		}
		f.CgroupPrograms = append(f.CgroupPrograms, list...)
	}
	f.XDP = make(map[uint32]loader.Program)
	for _, dev := range f.Devices {
		if dev.XDP == 0 {
			continue
		}
		p, err := loader.ProgramByID(dev.XDP)
		if err != nil {
			g.fail(err, "xdp")
			continue
		}
		p.Link = loader.XDPLink(dev.Ifindex)
		f.XDP[dev.XDP] = p
	}
}

// strictCgroups are where the programs of strict mode should be.
func strictCgroups(s *api.Snapshot) []string {
	if s == nil {
		return nil
	}
	var out []string
	for _, a := range s.Attachments {
		if loader.IsStrict(a.Program) && !slices.Contains(out, a.Device) {
			out = append(out, a.Device)
		}
	}
	return out
}

func (g *gatherer) maps() {
	m, err := maps.Open(g.f.BPFFS)
	if errors.Is(err, maps.ErrNotLoaded) {
		return
	}
	if err != nil {
		g.fail(err, "maps", "port range")
		return
	}
	defer m.Close()
	g.f.Fill, err = m.Fill()
	g.fail(err, "maps")
	var cfg bpf.DatapathConfig
	if err := m.Map("config").Lookup(uint32(0), &cfg); err != nil {
		g.fail(err, "port range")
		return
	}
	for _, r := range cfg.Snat {
		if r.Count > 0 {
			g.f.SNAT = append(g.f.SNAT, netdev.PortRange{First: r.First, Last: uint16(int(r.First) + int(r.Count) - 1)})
		}
	}
}

func (g *gatherer) sysctls() {
	f := g.f
	f.Sysctls = make(map[string]string)
	paths := []string{
		"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter",
		"net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables",
	}
	for _, dev := range []string{"all", "lo"} {
		paths = append(paths, "net/ipv4/conf/"+dev+"/route_localnet", "net/ipv4/conf/"+dev+"/accept_local")
	}
	for _, dev := range f.Devices {
		for _, name := range []string{"net/ipv4/conf/%s/forwarding", "net/ipv6/conf/%s/forwarding", "net/ipv4/conf/%s/rp_filter", "net/ipv6/conf/%s/accept_ra"} {
			paths = append(paths, fmt.Sprintf(name, dev.Name))
		}
	}
	for _, p := range paths {
		if v, err := netdev.ReadSysctl(p); err == nil {
			f.Sysctls[p] = v
		} else if !errors.Is(err, fs.ErrNotExist) {
			g.fail(err, "forwarding", "rp_filter", "accept_ra", "loopback", "bridge netfilter")
		}
	}
	var err error
	f.Local, err = netdev.LocalPortRange()
	g.fail(err, "port range")
	f.Reserved, err = netdev.ReservedPorts()
	g.fail(err, "port range")
}

func read(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(raw)
}

// processes finds Engines and their proxies in this network namespace.
func (g *gatherer) processes() {
	here, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		g.fail(err, "engine", "docker-proxy")
		return
	}
	for _, pid := range pids() {
		name := processName(pid)
		if name != "dockerd" && name != "docker-proxy" {
			continue
		}
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err != nil || ns != here {
			continue
		}
		args := processArgs(pid)
		if name == "dockerd" {
			e := doctor.Engine{PID: pid, Args: args, ConfigPath: configFile(args)}
			if raw, err := os.ReadFile(e.ConfigPath); err == nil {
				e.Config = raw
			}
			g.f.Engines = append(g.f.Engines, e)
			continue
		}
		// One that is bpfnet in its place is none.
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && filepath.Base(exe) == "docker-proxy" {
			g.f.Proxies = append(g.f.Proxies, doctor.Process{PID: pid, Name: name})
		}
	}
}

// isStopped reports whether a process of this program is stopped by a signal, or by a debugger.
func isStopped(pid int) bool {
	if processName(pid) != "bpfnet" {
		return false
	}
	_, rest, _ := strings.Cut(read(fmt.Sprintf("/proc/%d/stat", pid)), ") ")
	return strings.HasPrefix(rest, "T") || strings.HasPrefix(rest, "t")
}

// engineBridges asks the Engines of this namespace.
func (g *gatherer) engineBridges() {
	for _, e := range g.f.Engines {
		ctx, cancel := context.WithTimeout(g.ctx, askTimeout)
		list, err := docker.Bridges(ctx, engineHost(e.Args))
		cancel()
		if err == nil { // one that does not answer is told of with the daemon, and names tell most
			g.f.EngineBridges = append(g.f.EngineBridges, list...)
		}
	}
}

// engineHost is the unix socket that an Engine listens on.
func engineHost(args []string) string {
	for i, a := range args {
		for _, flag := range []string{"--host", "-H"} {
			v, ok := strings.CutPrefix(a, flag+"=")
			if a == flag && i+1 < len(args) {
				v, ok = args[i+1], true
			}
			if ok && strings.HasPrefix(v, "unix://") {
				return v
			}
		}
	}
	return "unix:///run/docker.sock"
}

func configFile(args []string) string {
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--config-file="); ok {
			return v
		}
		if a == "--config-file" && i+1 < len(args) {
			return args[i+1]
		}
	}
	return "/etc/docker/daemon.json"
}

func pids() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			out = append(out, pid)
		}
	}
	return out
}

func processName(pid int) string { return strings.TrimSpace(read(fmt.Sprintf("/proc/%d/comm", pid))) }

func processArgs(pid int) []string {
	raw := strings.TrimRight(read(fmt.Sprintf("/proc/%d/cmdline", pid)), "\x00")
	if raw == "" {
		return nil
	}
	return strings.Split(raw, "\x00")
}
