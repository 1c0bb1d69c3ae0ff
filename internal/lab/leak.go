// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// labPrefix begins the name of everything that labs make on a machine, processTag of
// what this process's labs make.
const labPrefix = "bl-"

var processTag = newTag()

func newTag() string {
	var b [3]byte
	_, _ = rand.Read(b[:])
	return labPrefix + hex.EncodeToString(b[:])
}

var mainRuns bool

const machineLock = "/run/bpfnet-lab.lock"

// The main thread stays where the process was started, since it is what /proc/self shows, /proc/mounts
// too: a test that leaves it in namespaces of its own would blind all that follow.
func init() { runtime.LockOSThread() }

// Main runs the tests of a package, and then looks for what they left behind: open
// files and goroutines of the process; pins, interfaces and cgroup programs; namespaces,
// cgroups, mounts, files and processes of its labs; loaded programs; changed sysctls of
// the machine. It ends the process, with status 1 if the tests fail or anything is left.
//
//	func TestMain(m *testing.M) { lab.Main(m) }
//
// What cannot be traced to this process (interfaces, loaded programs, sysctls) is held
// against it only when no other process runs a lab at that moment.
func Main(m *testing.M) {
	os.Exit(runMain(m))
}

func runMain(m *testing.M) int {
	finish, err := prepare()
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	code := m.Run()
	// The leaks of a test that was cut short say nothing new.
	if err := finish(code == 0); err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	return code
}

// prepare takes the machine's lock and looks at what is there. finish gives the lock back; with check
// its error names what was left behind since.
func prepare() (finish func(check bool) error, err error) {
	mainRuns = true
	root := os.Geteuid() == 0
	unlock := func() {}
	if root {
		if unlock, err = lockMachine(); err != nil {
			return nil, err
		}
	}
	if binDir, err = os.MkdirTemp("", processTag+"-bin-"); err != nil {
		unlock()
		return nil, err
	}
	before := look(root)
	traces := engineTraces()
	return func(check bool) error {
		defer unlock()
		os.RemoveAll(binDir)
		removeEngineTraces(traces)
		if !check {
			return nil
		}
		return leftSince(before, root)
	}, nil
}

// leftSince waits for all that came since before to go. Some things go away by themselves a moment
// later: programs after a grace period, namespaces in a worker thread of the kernel.
func leftSince(before findings, root bool) error {
	var own, shared []string
	clean := poll(10*time.Second, func() bool {
		after := look(root)
		own, shared = before.own.missingFrom(after.own), before.shared.missingFrom(after.shared)
		return len(own) == 0 && len(shared) == 0
	})
	if clean {
		return nil
	}
	if len(shared) > 0 && !onlyLab() {
		fmt.Fprintf(os.Stderr, "lab: other labs run; not held against this one:\n\t%s\n", strings.Join(shared, "\n\t"))
		shared = nil
	}
	left := append(own, shared...)
	if len(left) == 0 {
		return nil
	}
	if slices.ContainsFunc(left, func(s string) bool { return strings.HasPrefix(s, "goroutine") }) {
		buf := make([]byte, 1<<20)
		fmt.Fprintf(os.Stderr, "%s\n", buf[:runtime.Stack(buf, true)])
	}
	return fmt.Errorf("left behind:\n\t%s", strings.Join(left, "\n\t"))
}

// engineTraces lists what every engine makes outside of its own directories, whatever
// it is told, as far as it is not there. Innermost first.
func engineTraces() []string {
	return slices.DeleteFunc([]string{
		"/etc/docker/key.json", "/etc/docker",
		"/run/docker/plugins", "/run/docker",
		"/run/containerd/s", "/run/containerd",
	}, func(path string) bool {
		_, err := os.Lstat(path)
		return err == nil
	})
}

// removeEngineTraces removes files and empty directories of that list, unless another
// process may have an engine that wants them.
func removeEngineTraces(paths []string) {
	if len(paths) == 0 || os.Geteuid() != 0 || !onlyLab() {
		return
	}
	for _, path := range paths {
		_ = os.Remove(path)
	}
}

// census counts things by their description.
type census map[string]int

func (c census) add(format string, args ...any) { c[fmt.Sprintf(format, args...)]++ }

// missingFrom describes what after has more of. For the machine's settings, whose
// description contains their value, that is each that has changed.
func (c census) missingFrom(after census) []string {
	var more []string
	for _, what := range slices.Sorted(maps.Keys(after)) {
		if n := after[what] - c[what]; n > 0 {
			more = append(more, fmt.Sprintf("%s (%d more)", what, n))
		}
	}
	return more
}

// findings are what a look at the machine finds: own is certainly of this process,
// shared may be somebody else's.
type findings struct{ own, shared census }

func look(root bool) findings {
	f := findings{census{}, census{}}
	f.openFiles()
	f.goroutines()
	if !root {
		return f
	}
	f.pins()
	f.links()
	f.namespaces()
	f.cgroups()
	f.mounts()
	f.files()
	f.processes()
	f.programs()
	f.sysctls()
	return f
}

// of returns the census that a thing with this path or name belongs to, or nil if it is
// another lab's.
func (f findings) of(name string) census {
	switch {
	case strings.Contains(name, processTag):
		return f.own
	case strings.Contains(name, labPrefix):
		return nil
	default:
		return f.shared
	}
}

var digits = regexp.MustCompile(`\d+`)

func (f findings) openFiles() {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", e.Name()))
		switch {
		case err != nil: // the directory's own
		case target == "anon_inode:[eventpoll]", target == "anon_inode:[eventfd]":
			// the run time's, opened when first needed
		case strings.Contains(target, "testlog"), strings.HasSuffix(target, ".lock"):
		case strings.HasPrefix(target, "socket:"), strings.HasPrefix(target, "pipe:"):
			f.own.add("open file %s", digits.ReplaceAllString(target, "N"))
		default:
			f.own.add("open file %s", target)
		}
	}
}

func (f findings) goroutines() {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	for stack := range strings.SplitSeq(string(buf), "\n\n") {
		lines := strings.Split(strings.TrimSpace(stack), "\n")
		// The caller, the testing package's own, and the one that hands out signals.
		if strings.Contains(stack, "lab.runMain") || strings.Contains(stack, "signal.signal_recv") ||
			strings.Contains(stack, "testing.(*M)") {
			continue
		}
		// "created by F in goroutine N" names what started it.
		created := "unknown"
		for _, line := range lines {
			if rest, ok := strings.CutPrefix(line, "created by "); ok {
				created, _, _ = strings.Cut(rest, " in goroutine ")
			}
		}
		f.own.add("goroutine started by %s", created)
	}
}

func (f findings) pins() {
	_ = filepath.WalkDir(bpffsRoot, func(path string, d fs.DirEntry, err error) error {
		if err == nil && path != bpffsRoot {
			if c := f.of(path); c != nil {
				c.add("pin %s", path)
			}
		}
		return nil
	})
}

func (f findings) links() {
	links, err := netlink.LinkList()
	if err != nil {
		return
	}
	for _, l := range links {
		f.shared.add("interface %s", l.Attrs().Name)
	}
}

func (f findings) namespaces() {
	entries, _ := os.ReadDir("/var/run/netns")
	for _, e := range entries {
		if c := f.of(e.Name()); c != nil {
			c.add("network namespace %s", e.Name())
		}
	}
}

// cgroupAttachTypes are the points at which programs can stand at a cgroup.
var cgroupAttachTypes = []ebpf.AttachType{
	ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress, ebpf.AttachCGroupInetSockCreate,
	ebpf.AttachCgroupInetSockRelease, ebpf.AttachCGroupSockOps, ebpf.AttachCGroupDevice,
	ebpf.AttachCGroupInet4Bind, ebpf.AttachCGroupInet6Bind,
	ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect,
	ebpf.AttachCGroupInet4PostBind, ebpf.AttachCGroupInet6PostBind,
	ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg,
	ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg,
	ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
	ebpf.AttachCgroupInet4GetSockname, ebpf.AttachCgroupInet6GetSockname,
	ebpf.AttachCGroupSysctl, ebpf.AttachCGroupGetsockopt, ebpf.AttachCGroupSetsockopt,
}

func (f findings) cgroups() {
	all, err := mounts()
	if err != nil {
		return
	}
	for _, m := range all {
		if m.fstype != "cgroup" && m.fstype != "cgroup2" {
			continue
		}
		_ = filepath.WalkDir(m.dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			c := f.of(path)
			if c == nil {
				return fs.SkipDir
			}
			if strings.Contains(path, processTag) {
				c.add("cgroup %s", path)
			}
			if m.fstype == "cgroup2" {
				queryCgroup(c, path)
			}
			return nil
		})
	}
}

func queryCgroup(c census, path string) {
	dir, err := os.Open(path)
	if err != nil {
		return
	}
	defer dir.Close()
	for _, attach := range cgroupAttachTypes {
		result, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: attach})
		if err != nil {
			continue
		}
		for range result.Programs {
			c.add("%v program at %s", attach, path)
		}
	}
}

func (f findings) mounts() {
	all, _ := mounts()
	for _, m := range all {
		if strings.Contains(m.dir, processTag) && !strings.HasPrefix(m.dir, "/run/netns/") {
			f.own.add("mount %s", m.dir)
		}
	}
}

func (f findings) files() {
	own, _ := filepath.Glob(filepath.Join(os.TempDir(), processTag+"*"))
	for _, path := range own {
		if path != binDir {
			f.own.add("directory %s", path)
		}
	}
	for _, pattern := range []string{"/run/containerd/s/*", "/run/docker*", "/etc/docker*", "/var/lib/docker*"} {
		paths, _ := filepath.Glob(pattern)
		for _, path := range paths {
			f.shared.add("file %s", path)
		}
	}
}

// procInfo is a live process, with its arguments separated by spaces and the lines of
// its /proc/PID/cgroup.
type procInfo struct{ comm, cmdline, cgroups string }

// processes lists the ids of live processes for which match holds. Zombies do not count:
// waiting for them is their parent's business.
func processes(match func(procInfo) bool) []int {
	var pids []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		dir := filepath.Join("/proc", e.Name())
		stat := read(filepath.Join(dir, "stat"))
		if i := strings.LastIndexByte(stat, ')'); i < 0 || strings.HasPrefix(stat[i:], ") Z") || strings.HasPrefix(stat[i:], ") X") {
			continue
		}
		p := procInfo{
			comm:    strings.TrimSpace(read(filepath.Join(dir, "comm"))),
			cmdline: strings.ReplaceAll(read(filepath.Join(dir, "cmdline")), "\x00", " "),
			cgroups: read(filepath.Join(dir, "cgroup")),
		}
		if match(p) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (f findings) processes() {
	processes(func(p procInfo) bool {
		if strings.Contains(p.cmdline, processTag) || strings.Contains(p.cgroups, processTag) {
			f.own.add("process %s", p.comm)
		}
		return false
	})
}

// programs finds all that are loaded: a program says neither who loaded it nor what for.
func (f findings) programs() {
	var id ebpf.ProgramID
	for {
		next, err := ebpf.ProgramGetNextID(id)
		if err != nil {
			return
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // gone in between
		}
		if info, err := p.Info(); err == nil {
			f.shared.add("loaded %v program %s", info.Type, info.Name)
		}
		p.Close()
	}
}

// watchedSysctls are those of the machine that bpfnet sets in its own namespace.
var watchedSysctls = []string{
	"net.ipv4.ip_forward", "net.ipv4.ip_local_reserved_ports", "net.ipv4.ip_local_port_range",
	"net.ipv4.ip_unprivileged_port_start", "net.ipv4.conf.all.route_localnet", "net.ipv4.conf.all.rp_filter",
	"net.ipv4.conf.all.forwarding", "net.ipv6.conf.all.forwarding", "net.ipv6.conf.default.forwarding",
}

func (f findings) sysctls() {
	for _, key := range watchedSysctls {
		f.shared.add("sysctl %s = %s", key, strings.TrimSpace(read(sysctlPath(key))))
	}
}

// withMachineLock runs f while no other lab process is inside of its own f.
func withMachineLock(f func() error) error {
	file, err := os.OpenFile(machineLock+".mount", os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	return f()
}

var heldLock *os.File

// lockMachine marks this process as one that runs a lab. If it is the only one, what
// test processes have left that died before their cleanup is swept away first.
func lockMachine() (unlock func(), err error) {
	heldLock, err = os.OpenFile(machineLock, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if onlyLab() {
		err = sweep()
	}
	if err == nil {
		err = unix.Flock(int(heldLock.Fd()), unix.LOCK_SH)
	}
	if err != nil {
		heldLock.Close()
		return nil, fmt.Errorf("lock %s: %w", machineLock, err)
	}
	return func() { heldLock.Close() }, nil
}

// sweep removes everything that bears the labs' prefix: processes by their cgroups,
// cgroups, namespaces, pins and directories. No lab may be running.
func sweep() error {
	root, err := cgroup2Root()
	if err != nil {
		return err
	}
	var errs []error
	all := func(pattern string) []string {
		paths, _ := filepath.Glob(pattern)
		return paths
	}
	for _, dir := range all(filepath.Join(root, labPrefix+"*")) {
		fmt.Fprintf(os.Stderr, "lab: sweep away %s, left by a test process that died\n", filepath.Base(dir))
		errs = append(errs, killCgroup(dir), removeCgroups(filepath.Base(dir)))
	}
	for _, path := range all("/var/run/netns/" + labPrefix + "*") {
		errs = append(errs, netns.DeleteNamed(filepath.Base(path)))
	}
	for _, dir := range all(filepath.Join(bpffsRoot, labPrefix+"*")) {
		errs = append(errs, os.RemoveAll(dir))
	}
	for _, dir := range all(filepath.Join(os.TempDir(), labPrefix+"*")) {
		for _, engine := range all(filepath.Join(dir, "docker*")) {
			removeShimSockets(engine)
		}
		errs = append(errs, removeTree(dir))
	}
	return errors.Join(errs...)
}

// onlyLab reports whether this is the only process that runs a lab.
func onlyLab() bool {
	err := unix.Flock(int(heldLock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	return !errors.Is(err, unix.EWOULDBLOCK)
}
