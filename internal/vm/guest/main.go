// SPDX-License-Identifier: Apache-2.0

// Command guest is the init of a virtual machine with an older kernel. It takes the part of the
// daemon there (load, attach, fill the tables, load again, clean up) and sends real packets in
// between. Then bpfnet itself is started and makes networks and sandboxes; last come tests of
// packages. Every check is a line on the console: "ok NAME" or "FAIL NAME: why"; "GUEST DONE" with
// their number is the last.
//
// What to do is told by the file /plan. In a sandbox the guest is server or client:
//
//	guest serve PORT
//	guest ask tcp|udp NAME:PORT
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// plan is what the test has written for the guest; it has the same fields.
type plan struct {
	Kernel  string   // as in "6.1"
	Golden  string   // text of its golden file
	Update  bool     // run nothing but the tests, to write that anew
	Attach  string   // the way of attaching that the kernel should lead to, tcx or clsact
	Link    string   // the kind of links that bpfnet's own sandboxes should get, veth or netkit
	Lacks   []string // the features that doctor should name as missing
	Modules []string // to be loaded, in this order
	Tests   []tests
}

// tests are some of a package, in a test binary.
type tests struct{ Binary, Run, Skip string }

const home = "/root"

var checks int

func check(name string, err error) {
	checks++
	if err != nil {
		fmt.Printf("FAIL %s: %s\n", name, strings.ReplaceAll(err.Error(), "\n", "; "))
		return
	}
	fmt.Println("ok", name)
}

// took tells how many seconds something has taken, for whom a guest is too slow.
func took(what string, seconds float64) { fmt.Printf("took %s %.1f\n", what, seconds) }

func main() {
	if os.Getpid() == 1 {
		if err := errors.Join(initialize(), unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)); err != nil {
			panic(err)
		}
		return
	}
	if len(os.Args) > 1 {
		if err := role(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	p, err := readPlan()
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Dir(p.golden()), 0o755), os.WriteFile(p.golden(), []byte(p.Golden), 0o644))
	}
	if err == nil && !p.Update {
		started := time.Now()
		err = run(p)
		took("run", time.Since(started).Seconds())
	}
	if err != nil {
		check("run", err) // what it found itself unable to go on after
	}
	for _, t := range p.Tests {
		started := time.Now()
		check("tests of "+strings.TrimSuffix(t.Binary, ".test"), t.run(p.Update))
		took(t.Binary, time.Since(started).Seconds())
	}
	if p.Update {
		text, err := os.ReadFile(p.golden())
		check("read the golden file", err)
		for line := range strings.Lines(string(text)) {
			fmt.Print("GOLDEN ", line)
		}
	}
	fmt.Println("GUEST DONE", checks)
}

// golden is where the tests of package bpf look for the kernel's file.
func (p plan) golden() string {
	return filepath.Join(home, "testdata", "kernels", p.Kernel+".golden")
}

func readPlan() (p plan, err error) {
	text, err := os.ReadFile("/plan")
	if err == nil {
		err = json.Unmarshal(text, &p)
	}
	return p, err
}

// run runs the tests. Whoever reads the console gets a line a test with the time that it took, and what those said that
// have failed.
func (t tests) run(update bool) error {
	args := []string{"-test.v", "-test.run", t.Run}
	if update {
		args = append(args, "-update")
	}
	if t.Skip != "" {
		args = append(args, "-test.skip", t.Skip)
	}
	cmd := exec.Command("/"+t.Binary, args...)
	cmd.Dir = home
	out, in := io.Pipe()
	cmd.Stdout, cmd.Stderr = in, in
	cmd.WaitDelay = time.Minute // for processes that a test has left with its output
	var told sync.WaitGroup
	told.Go(func() { tell(out) })
	err := cmd.Run()
	in.Close()
	told.Wait()
	return err
}

// ended is the line by which a test that is no other's part tells that it has ended.
var ended = regexp.MustCompile(`^--- (PASS|FAIL|SKIP): (\S+) \(([\d.]+)s\)`)

// tell writes what is wanted of the output of tests that run one after another: a serial line is slow.
func tell(out io.Reader) {
	var said []string // since the last one has ended
	lines := bufio.NewReader(out)
	for {
		line, err := lines.ReadString('\n')
		said = append(said, line)
		if m := ended.FindStringSubmatch(line); m != nil {
			if m[1] == "PASS" {
				said = nil
			}
			fmt.Print(strings.Join(said, ""))
			fmt.Println("took", m[2], m[3])
			said = nil
		}
		if err != nil {
			fmt.Print(strings.Join(said, "")) // as of a panic
			return
		}
	}
}

// initialize is what an init does: it boots, starts the guest proper, and waits for it and for all
// processes whose parents have ended.
func initialize() error {
	p, err := readPlan()
	if err != nil {
		return err
	}
	if err := boot(p.Modules); err != nil {
		return err
	}
	// In a process of its own, as packages look at /proc when they are initialized.
	child, err := os.StartProcess(os.Args[0], os.Args[:1], &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Env:   []string{"PATH=/bin", "HOME=" + home, "BPFNET_REQUIRE_ROOT=1"},
	})
	if err != nil {
		return err
	}
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if pid == child.Pid {
			return nil
		}
	}
}

// boot does what a distribution would have done.
func boot(modules []string) error {
	for _, m := range []struct{ fstype, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"},
		{"devpts", "/dev/pts"}, {"bpf", bpffsRoot}, {"cgroup2", cgroupRoot},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.dir, m.fstype, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	// As systemd does it: mount namespaces(7) tells of what that means to those who make namespaces.
	if err := unix.Mount("", "/", "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	for _, name := range modules {
		if err := loadModule("/" + name); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return fill()
}

// fill makes the files that programs look for.
func fill() error {
	for _, dir := range []string{"/bin", "/etc", "/mnt", "/root", "/var/lib"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"/etc/hosts":       "127.0.0.1 localhost\n::1 localhost\n",
		"/etc/resolv.conf": "nameserver 192.0.2.53\n", // nobody's
		"/etc/passwd":      "root:x:0:0:root:/root:/bin/sh\n",
		"/etc/group":       "root:x:0:\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := os.Symlink("/run", "/var/run"); err != nil {
		return err
	}
	out, err := exec.Command("/busybox", "--install", "-s", "/bin").CombinedOutput()
	if err != nil {
		return fmt.Errorf("install busybox: %w: %s", err, out)
	}
	return os.Symlink("/bpfnet", "/bin/bpfnet")
}

func loadModule(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.FinitModule(int(file.Fd()), "", 0)
}

// eventually waits for what takes effect a moment later.
func eventually(cond func() error) error {
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := cond()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			return err
		}
	}
}
