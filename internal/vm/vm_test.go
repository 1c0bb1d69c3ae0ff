// SPDX-License-Identifier: Apache-2.0

// Package vm_test boots kernels older than this machine's under emulation and has bpfnet carry real
// packets there. See guest for what is checked.
package vm_test

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/internal/promise"
)

func TestMain(m *testing.M) { lab.Main(m) }

// modules are what Debian's kernels do not have built in; what these need comes with them. Other
// machines load them when they are asked for. The last two are for the tests, whose netlink package
// wants sockets of theirs.
var modules = []string{"bridge", "veth", "sch_ingress", "cls_bpf", "inet_diag", "tcp_diag", "udp_diag", "xfrm_user", "nfnetlink"}

var update = flag.Bool("update", false, "write the golden files of these kernels anew, and run nothing else there")

// plan is what the guest is told; it has the same fields.
type plan struct {
	Kernel  string
	Golden  string
	Update  bool
	Attach  string
	Link    string
	Lacks   []string
	Modules []string
	Tests   []tests
}

type tests struct{ Binary, Run, Skip string }

// verified is the test that compares with a kernel's golden file, or writes it.
const verified = "TestInstructionsVerified"

// selected are the tests that run there too, at a tenth of their counts, and how long a machine may take, from power-on to
// power-off, with the other beside it: several times what it needs in the short form, twice that in the full one.
//
// In the full form all tests of the programs run in which a kernel can matter. Most of their time is the verifier's.
func selected() ([]tests, time.Duration) {
	all := []tests{
		// These few have shown differences between kernels. What is skipped has nothing of the kernel: instructions are
		// counted in the object, and the fuzzer's judge is plain Go. Fuzzing wants a fast machine; TestPackets and
		// TestSequences play the same.
		{"bpf.test", "TestFlowLife|TestSockReservation$|" + verified, "TestInstructions$|TestFuzzJudge|^Fuzz"},
		// Which sockets share a port, and what a closed one leaves, changes from kernel to kernel.
		// One test is for a machine of usual speed, and so on below.
		{"reserve.test", ".", "TestHoldThousand"},
		// The one floods a socket, which takes an emulated machine ten seconds.
		{"netdev.test", ".", "TestWatchOverflow"},
		// Two want bash, one counts the variables that Debian's shell sets, one is about speed.
		{"sandbox.test", ".", "TestTerminalStop|TestTerminalShell|TestSurroundings|TestCost"},
	}
	if *update {
		return []tests{{"bpf.test", verified, ""}}, 5 * time.Minute
	}
	if os.Getenv("BPFNET_FULL") == "" {
		return all, 7 * time.Minute
	}
	all[0].Run = "."
	return all, 30 * time.Minute
}

// Needs qemu, and apt for its first run with a kernel: it is kept in the user's cache directory.
func TestOlderKernels(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		unable(t, "the kernels are of amd64")
	}
	for _, tool := range []string{"qemu-system-x86_64", "apt-get", "apt-cache", "dpkg-deb", "xz", "busybox"} {
		if _, err := exec.LookPath(tool); err != nil {
			unable(t, "%v (scripts/deps.sh test)", err)
		}
	}
	programs := []file{
		build(t, "init", "build", "./guest"),
		build(t, "bpfnet", "build", "../../cmd/bpfnet"),
		busybox(t),
	}
	run, _ := selected()
	for _, r := range run {
		programs = append(programs, build(t, r.Binary, "test", "-c", "../../"+strings.TrimSuffix(r.Binary, ".test")))
	}

	// Debian's have later flags of helpers in older versions: another reason to try.
	lacks61, lacks612 := []string{"tcx", "netkit"}, []string(nil)
	var checked [2]int // on each of them
	t.Cleanup(func() {
		if *update || slices.Contains(checked[:], 0) {
			return
		}
		promise.Kept(t, promise.Kernels, "bpfnet runs on Linux 6.1 and 6.12 as on newer kernels: networks, published ports, isolation, restart and cleanup, by clsact filters, by tcx and by netkit.",
			"%d checks on 6.1 (clsact, veth), %d on 6.12 (tcx, netkit beside veth), emulated.", checked[0], checked[1])
		promise.Kept(t, promise.Lifecycle, "Setting the host's clock ends no flow, keeps the daemon from nothing and is told of in the log; drops are told of with the time that it is.",
			"8 flows through a day forward, two back and one forward, on each of two kernels, emulated.")
		promise.Kept(t, promise.Kernels, "What a kernel lacks is found by trying, and doctor says what is done instead.",
			"%d features are missing on 6.1 and %d on 6.12: doctor names just those.", len(lacks61), len(lacks612))
	})
	for i, k := range []struct {
		version string
		pkg     string // whose dependency the newest image of that version is
		attach  string
		link    string
		lacks   []string
	}{
		{"6.1", "linux-image-cloud-amd64", "clsact", "veth", lacks61},
		{"6.12", "linux-image-6.12-cloud-amd64", "tcx", "netkit", lacks612},
	} {
		t.Run(k.version, func(t *testing.T) {
			t.Parallel()
			kernel := fetch(t, k.pkg, k.version)
			started := time.Now()
			golden := filepath.Join("..", "..", "bpf", "testdata", "kernels", k.version+".golden")
			text, err := os.ReadFile(golden)
			if !*update {
				require.NoError(t, err, "make kernels-golden")
			}
			console := boot(t, kernel, programs, plan{
				Attach: k.attach, Link: k.link, Lacks: k.lacks, Kernel: k.version, Golden: string(text), Update: *update,
			})
			checked[i] = report(t, console)
			if *update && !t.Failed() {
				var lines strings.Builder
				for _, m := range goldenLine.FindAllStringSubmatch(console, -1) {
					lines.WriteString(m[1] + "\n")
				}
				require.NotEmpty(t, lines.String())
				require.NoError(t, os.WriteFile(golden, []byte(lines.String()), 0o644))
			}
			t.Logf("%s: %v", filepath.Base(kernel), time.Since(started).Round(time.Second/10))
		})
	}
}

var goldenLine = regexp.MustCompile(`(?m)^GOLDEN (.+)$`)

// build compiles a program for the guest.
func build(t *testing.T, name string, args ...string) file {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	cmd := exec.Command("go", slices.Insert(args, len(args)-1, "-trimpath", "-ldflags", "-s -w", "-o", path)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	body, err := os.ReadFile(path)
	require.NoError(t, err)
	return file{name, body}
}

// busybox is the userland of the guest.
func busybox(t *testing.T) file {
	t.Helper()
	path, err := exec.LookPath("busybox")
	require.NoError(t, err)
	body, err := os.ReadFile(path)
	require.NoError(t, err)
	return file{"busybox", body}
}

// unable skips the test, or fails it where all tests must have run.
func unable(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") != "" || os.Getenv("BPFNET_FULL") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

func output(name string, args ...string) (string, error) {
	var stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return string(out), nil
}

var dependency = regexp.MustCompile(`(?m)^Depends: (linux-image-\S+) \(= (\S+)\)$`)

// fetch returns the directory of an unpacked kernel package: the image that pkg depends on.
func fetch(t *testing.T, pkg, version string) string {
	t.Helper()
	dir, err := newest(pkg, version)
	if err != nil {
		// The lists may be missing, or name what the mirror has no more.
		if _, uerr := output("apt-get", "-q", "update"); uerr != nil {
			unable(t, "no kernel %s: %v; %v", version, err, uerr)
		}
		if dir, err = newest(pkg, version); err != nil {
			unable(t, "no kernel %s: %v", version, err)
		}
	}
	return dir
}

func newest(pkg, version string) (string, error) {
	info, err := output("apt-cache", "show", "--no-all-versions", pkg)
	if err != nil {
		return "", err
	}
	image := dependency.FindStringSubmatch(info)
	if image == nil || !strings.HasPrefix(image[2], version+".") {
		return "", fmt.Errorf("%s does not lead to a kernel %s:\n%s", pkg, version, info)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "bpfnet", "kernels")
	dir := filepath.Join(cache, image[1]+"_"+image[2])
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	// Whole or not at all.
	work, err := os.MkdirTemp(cache, "fetch-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	download := exec.Command("apt-get", "-q", "download", image[1]+"="+image[2])
	download.Dir = work
	if out, err := download.CombinedOutput(); err != nil {
		return "", fmt.Errorf("download %s: %w: %s", image[1], err, out)
	}
	debs, err := filepath.Glob(filepath.Join(work, "*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("download %s: %w, %d packages", image[1], err, len(debs))
	}
	root := filepath.Join(work, "root")
	if _, err := output("dpkg-deb", "-x", debs[0], root); err != nil {
		return "", err
	}
	older, err := filepath.Glob(filepath.Join(cache, "*_"+version+".*"))
	if err != nil {
		return "", err
	}
	for _, path := range older {
		if err := os.RemoveAll(path); err != nil {
			return "", err
		}
	}
	return dir, os.Rename(root, dir)
}

// file is a file of the initramfs.
type file struct {
	name string
	body []byte
}

// resolve reads kernel modules, uncompressed, and what they depend on, in the order in which they can be loaded.
func resolve(t *testing.T, kernel string, names []string) []file {
	t.Helper()
	files := make(map[string]string)
	require.NoError(t, filepath.WalkDir(filepath.Join(kernel, "lib", "modules"), func(path string, _ fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok {
			files[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	}))
	var out []file
	var add func(name string)
	add = func(name string) {
		if slices.ContainsFunc(out, func(m file) bool { return m.name == name+".ko" }) {
			return
		}
		require.Contains(t, files, name, "module")
		body, err := os.ReadFile(files[name])
		require.NoError(t, err)
		if strings.HasSuffix(files[name], ".xz") {
			text, err := output("xz", "-dc", files[name])
			require.NoError(t, err)
			body = []byte(text)
		}
		for _, dep := range depends(t, body) {
			add(dep)
		}
		out = append(out, file{name + ".ko", body})
	}
	for _, name := range names {
		add(name)
	}
	return out
}

// depends are the modules that a module says it needs.
func depends(t *testing.T, body []byte) []string {
	t.Helper()
	file, err := elf.NewFile(bytes.NewReader(body))
	require.NoError(t, err)
	info, err := file.Section(".modinfo").Data()
	require.NoError(t, err)
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			return strings.Split(list, ",")
		}
	}
	return nil
}

// archive writes files into an initramfs: a cpio archive in the "newc" format.
func archive(w io.Writer, files []file) error {
	pad := func(n int) string { return strings.Repeat("\x00", -n&3) }
	for i, f := range append(files, file{name: "TRAILER!!!"}) {
		head := "070701"
		for _, field := range []int{i + 1, 0o100755, 0, 0, 1, 0, len(f.body), 0, 0, 0, 0, len(f.name) + 1, 0} {
			head += fmt.Sprintf("%08x", field)
		}
		head += f.name + "\x00"
		if _, err := fmt.Fprintf(w, "%s%s%s%s", head, pad(len(head)), f.body, pad(len(f.body))); err != nil {
			return err
		}
	}
	return nil
}

// boot runs the guest under a kernel and returns what came out of the console.
func boot(t *testing.T, kernel string, programs []file, p plan) string {
	t.Helper()
	mods := resolve(t, kernel, modules)
	run, timeout := selected()
	p.Tests = run
	for _, m := range mods {
		p.Modules = append(p.Modules, m.name)
	}
	text, err := json.Marshal(p)
	require.NoError(t, err)
	initramfs := filepath.Join(t.TempDir(), "initramfs")
	out, err := os.Create(initramfs)
	require.NoError(t, err)
	defer out.Close()
	require.NoError(t, archive(out, slices.Concat(programs, mods, []file{{"plan", text}})))
	images, err := filepath.Glob(filepath.Join(kernel, "boot", "vmlinuz-*"))
	require.NoError(t, err)
	require.Len(t, images, 1)

	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	// -cpu max: one with random numbers. A busy machine is late with the timer's ticks that Linux checks for.
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024",
		"-nic", "none", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-kernel", images[0], "-initrd", initramfs, "-append", "console=ttyS0 quiet panic=-1 no_timer_check")
	console, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("qemu: %v (%v)", err, ctx.Err())
	}
	return strings.ReplaceAll(string(console), "\r", "")
}

// slow is from how many seconds on it is logged what something has taken; the console has all of that.
const slow = 10

// report makes subtests of the guest's lines, and returns their number.
func report(t *testing.T, console string) (checks int) {
	t.Helper()
	last := ""
	lines := bufio.NewScanner(strings.NewReader(console))
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "GUEST DONE") {
			last = line
		}
		var what string
		var seconds float64
		if n, _ := fmt.Sscanf(line, "took %s %f", &what, &seconds); n == 2 && seconds >= slow {
			t.Logf("%.0f s: %s", seconds, what)
		}
		if name, ok := strings.CutPrefix(line, "ok "); ok {
			checks++
			t.Run(name, func(*testing.T) {})
		} else if text, ok := strings.CutPrefix(line, "FAIL "); ok {
			checks++
			name, why, _ := strings.Cut(text, ": ")
			t.Run(name, func(t *testing.T) { t.Error(why) })
		}
	}
	if t.Failed() || last != fmt.Sprintf("GUEST DONE %d", checks) {
		t.Errorf("the guest told of %d checks and ended with %q; its console:\n%s", checks, last, console)
	}
	return checks
}
