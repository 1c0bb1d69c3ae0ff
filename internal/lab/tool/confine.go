// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// confine runs a program as systemd runs a service of its unit: with those capabilities, and under those
// restrictions that are the kernel's to enforce (systemd.exec(5)). A setting that it does not know is an error: nobody
// would have tried it.
func confine(_ context.Context, args []string) error {
	f := newFlags("confine")
	without := f.String("without", "", "`capabilities` of the unit to leave away, with commas between")
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() < 2 {
		return fmt.Errorf("want a unit and a command behind the flags, got %q", f.Args())
	}
	unit, err := readUnit(f.Arg(0))
	if err != nil {
		return err
	}
	path, err := exec.LookPath(f.Arg(1))
	if err != nil {
		return err
	}
	// Capabilities and filters are a thread's; exec leaves this one alone.
	runtime.LockOSThread()
	if err := unit.apply(strings.Split(*without, ",")); err != nil {
		return err
	}
	return unix.Exec(path, f.Args()[1:], os.Environ())
}

// unit is what of a service's settings concerns its process.
type unit struct {
	capabilities []string
	noNewPrivs   bool
	rules        []rule
}

// otherSettings are those of a service that are for systemd itself, or give rather than take.
var otherSettings = []string{
	"Type", "NotifyAccess", "ExecStart", "ExecReload", "TimeoutStartSec", "TimeoutStopSec", "Restart", "RestartSec", "KillMode",
	"StateDirectory", "RuntimeDirectory", "RuntimeDirectoryPreserve", "OOMScoreAdjust",
}

func readUnit(path string) (*unit, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	u := new(unit)
	section := ""
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if line[0] == '[' {
			section = line
			continue
		}
		key, value, _ := strings.Cut(line, "=")
		if section != "[Service]" || slices.Contains(otherSettings, key) {
			continue
		}
		if err := u.set(key, value); err != nil {
			return nil, fmt.Errorf("%s: %s=%s: %w", path, key, value, err)
		}
	}
	if len(u.capabilities) == 0 {
		return nil, fmt.Errorf("%s: no CapabilityBoundingSet", path)
	}
	return u, nil
}

var families = map[string]uint32{
	"AF_UNIX": unix.AF_UNIX, "AF_INET": unix.AF_INET, "AF_INET6": unix.AF_INET6, "AF_NETLINK": unix.AF_NETLINK, "AF_PACKET": unix.AF_PACKET,
}

func (u *unit) set(key, value string) error {
	switch key {
	case "CapabilityBoundingSet":
		for _, name := range strings.Fields(value) {
			if capability(name) < 0 {
				return fmt.Errorf("no capability %q", name)
			}
			u.capabilities = append(u.capabilities, name)
		}
		return nil
	case "RestrictAddressFamilies":
		allowed := rule{nr: unix.SYS_SOCKET, mask: ^uint32(0), only: true, errno: unix.EAFNOSUPPORT}
		for _, name := range strings.Fields(value) {
			family, ok := families[name]
			if !ok {
				return fmt.Errorf("family %q is not known here", name)
			}
			allowed.values = append(allowed.values, family)
		}
		u.rules = append(u.rules, allowed)
		return nil
	case "SystemCallArchitectures": // the filter's first words, whatever rules follow
		if value != "native" {
			return errors.New("want native")
		}
		return nil
	}
	if value != "yes" {
		return errors.New("not known here")
	}
	switch key {
	case "NoNewPrivileges":
		u.noNewPrivs = true
	case "LockPersonality":
		u.rules = append(u.rules, rule{nr: unix.SYS_PERSONALITY, mask: ^uint32(0), only: true, values: []uint32{0, 0xffffffff}, errno: unix.EPERM})
	case "MemoryDenyWriteExecute":
		const both = unix.PROT_WRITE | unix.PROT_EXEC
		u.rules = append(u.rules,
			rule{nr: unix.SYS_MMAP, arg: 2, mask: both, values: []uint32{both}, errno: unix.EPERM},
			rule{nr: unix.SYS_MPROTECT, arg: 2, mask: unix.PROT_EXEC, values: []uint32{unix.PROT_EXEC}, errno: unix.EPERM},
			rule{nr: unix.SYS_PKEY_MPROTECT, arg: 2, mask: unix.PROT_EXEC, values: []uint32{unix.PROT_EXEC}, errno: unix.EPERM})
	case "RestrictRealtime":
		u.rules = append(u.rules, rule{nr: unix.SYS_SCHED_SETSCHEDULER, arg: 1, mask: ^uint32(0), only: true, errno: unix.EPERM,
			values: []uint32{unix.SCHED_NORMAL, unix.SCHED_BATCH, unix.SCHED_IDLE}})
	case "RestrictSUIDSGID":
		for nr, arg := range map[uint32]uint32{unix.SYS_FCHMOD: 1, unix.SYS_FCHMODAT: 2, unix.SYS_MKDIRAT: 2, unix.SYS_MKNODAT: 2, unix.SYS_OPENAT: 3} {
			for _, bit := range []uint32{unix.S_ISUID, unix.S_ISGID} {
				u.rules = append(u.rules, rule{nr: nr, arg: arg, mask: bit, values: []uint32{bit}, errno: unix.EPERM})
			}
		}
		u.rules = append(u.rules, rule{nr: unix.SYS_OPENAT2, only: true, errno: unix.ENOSYS})
	default:
		return errors.New("not known here")
	}
	return nil
}

func (u *unit) apply(without []string) error {
	if u.noNewPrivs {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("no new privileges: %w", err)
		}
	}
	for _, name := range without {
		if name != "" && !slices.Contains(u.capabilities, name) {
			return fmt.Errorf("the unit has no %s to leave away", name)
		}
	}
	for i, name := range capabilities {
		if slices.Contains(u.capabilities, "CAP_"+strings.ToUpper(name)) && !slices.Contains(without, "CAP_"+strings.ToUpper(name)) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(i), 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) { // unknown to the kernel
			return fmt.Errorf("drop %s: %w", name, err)
		}
	}
	return filter(u.rules)
}

// capability is the number of one that is called so; -1: there is none.
func capability(name string) int {
	return slices.IndexFunc(capabilities, func(c string) bool { return "CAP_"+strings.ToUpper(c) == name })
}

// capabilities are the kernel's, by number: include/uapi/linux/capability.h.
var capabilities = []string{
	"chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "linux_immutable",
	"net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner", "sys_module", "sys_rawio", "sys_chroot",
	"sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease",
	"audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read",
	"perfmon", "bpf", "checkpoint_restore",
}

// rule refuses a system call with errno where an argument's lower half, masked, is one of the values; or, with only, where
// it is none of them.
type rule struct {
	nr, arg, mask uint32
	only          bool
	values        []uint32
	errno         unix.Errno
}

// Offsets in struct seccomp_data, include/uapi/linux/seccomp.h; arguments are little-endian.
const (
	dataNr   = 0
	dataArch = 4
	dataArgs = 16
)

// filter puts the rules into force for the calling thread, and for what it executes.
func filter(rules []rule) error {
	arch := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if arch == 0 {
		return fmt.Errorf("no filter for %s", runtime.GOARCH)
	}
	refuse := func(e unix.Errno) bpf.Instruction { return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(e)} }
	program := []bpf.Instruction{
		bpf.LoadAbsolute{Off: dataArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: arch, SkipTrue: 1},
		refuse(unix.EPERM),
	}
	for _, r := range rules {
		var verdict []bpf.Instruction
		for i, v := range r.values {
			if r.only {
				left := len(r.values) - i - 1
				verdict = append(verdict, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipTrue: uint8(left + 1)})
			} else {
				verdict = append(verdict, bpf.JumpIf{Cond: bpf.JumpEqual, Val: v, SkipFalse: 1}, refuse(r.errno))
			}
		}
		if r.only {
			verdict = append(verdict, refuse(r.errno))
		}
		program = append(program,
			bpf.LoadAbsolute{Off: dataNr, Size: 4},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: r.nr, SkipTrue: uint8(2 + len(verdict))},
			bpf.LoadAbsolute{Off: dataArgs + 8*r.arg, Size: 4},
			bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: r.mask})
		program = append(program, verdict...)
	}
	program = append(program, bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW})
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("filter: %w", err)
	}
	code := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&prog)), 0, 0); err != nil {
		return fmt.Errorf("filter: %w", err)
	}
	return nil
}
