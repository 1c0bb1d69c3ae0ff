// SPDX-License-Identifier: Apache-2.0

// Command guest is the init of a virtual machine with an older kernel. It takes the part of the
// daemon there (load, attach, fill the tables, load again, clean up) and sends real packets in
// between. Every check is a line on the console: "ok NAME" or "FAIL NAME: why"; "GUEST DONE" with their
// number is the last.
//
//	guest ATTACH TESTS MODULE...
//
// ATTACH is the way of attaching that the kernel should lead to, tcx or clsact. TESTS is a pattern of
// names: these tests of package bpf run too. The modules are loaded in this order.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var checks int

func check(name string, err error) {
	checks++
	if err != nil {
		fmt.Printf("FAIL %s: %s\n", name, strings.ReplaceAll(err.Error(), "\n", "; "))
		return
	}
	fmt.Println("ok", name)
}

func main() {
	if len(os.Args) > 3 {
		// Packages look at /proc as they are initialized: once more, now that there is one.
		err := boot(os.Args[3:])
		if err == nil {
			err = unix.Exec(os.Args[0], os.Args[:3], nil)
		}
		check("boot", err)
	} else {
		if err := run(os.Args[1]); err != nil {
			check("run", err) // what it found itself unable to go on after
		}
		check("tests of bpf", runTests(os.Args[2]))
	}
	fmt.Println("GUEST DONE", checks)
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		panic(err)
	}
}

// runTests runs tests of package bpf. Their output is for whoever reads the console.
func runTests(pattern string) error {
	// The instructions are counted in the object: any kernel will do, one with the sources best.
	cmd := exec.Command("/bpf.test", "-test.run", pattern, "-test.skip", "TestInstructions")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// boot does what a distribution would have done.
func boot(modules []string) error {
	for _, m := range []struct{ fstype, dir string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"bpf", bpffsRoot}, {"cgroup2", cgroupRoot},
	} {
		if err := os.MkdirAll(m.dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.dir, m.fstype, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.dir, err)
		}
	}
	for _, name := range modules {
		if err := loadModule("/" + name); err != nil {
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return nil
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
