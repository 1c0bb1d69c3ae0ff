// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Forwarded lists the signals that a runner asks for with signal.Notify and passes on: all that would
// end it. Not those that its own working or a fault sends, and not those by which a terminal stops
// its foreground group, in which the runner is, too. What the caller was started to ignore (nohup) is
// not among them, and is ignored by the process as well.
func Forwarded() []os.Signal {
	list := []os.Signal{
		unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGABRT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM,
		unix.SIGTERM, unix.SIGSTKFLT, unix.SIGCONT, unix.SIGVTALRM, unix.SIGWINCH, unix.SIGIO, unix.SIGPWR,
	}
	for s := syscall.Signal(35); s <= 64; s++ { // real-time signals, but those of the C library
		list = append(list, s)
	}
	return slices.DeleteFunc(list, signal.Ignored)
}

// Supervise passes signals on to the process until it ends, and then ends what it has left running in
// the cgroup, and removes that. It returns the process's exit code, see [Process.Wait], also when
// that last part fails.
//
// The process is in the runner's process group, as a shell's child would be. What a terminal sends to
// the whole group has reached the process already, and is not sent again. A process that has made a
// group of its own, as a shell does, and stops takes the runner with it, so that whoever waits for
// the runner notices.
func Supervise(p *Process, signals <-chan os.Signal, cgroup string) (code int, err error) {
	type exit struct {
		code int
		err  error
	}
	ended := make(chan exit, 1)
	go func() {
		stopTogether(p.PID())
		code, err := p.Wait()
		ended <- exit{code, err}
	}()
	for {
		select {
		case sig := <-signals:
			forward(p, sig)
		case e := <-ended:
			if e.err != nil {
				return 1, e.err
			}
			if cgroup == "" {
				return e.code, nil
			}
			if err := KillCgroup(cgroup); err != nil {
				return e.code, err
			}
			return e.code, RemoveCgroup(cgroup)
		}
	}
}

// forward passes one signal on. An error means that the process is ending, which Wait tells better.
func forward(p *Process, sig os.Signal) {
	switch sig {
	case unix.SIGCHLD, unix.SIGURG, unix.SIGPIPE:
		return
	case unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGWINCH, unix.SIGCONT:
		if sharesTerminal(p.PID()) {
			return
		}
	}
	_ = p.Signal(sig)
}

// sharesTerminal reports whether the process and the caller are together in the foreground of a
// terminal.
func sharesTerminal(pid int) bool {
	return sharesGroup(pid) && terminalGroup() == unix.Getpgrp()
}

func sharesGroup(pid int) bool {
	group, err := unix.Getpgid(pid)
	return err == nil && group == unix.Getpgrp()
}

// terminalGroup is the foreground process group of the caller's terminal, -1 without a terminal.
func terminalGroup() int {
	stat, err := procStat("self")
	if err != nil {
		return -1
	}
	group, err := strconv.Atoi(stat[statForeground])
	if err != nil {
		return -1
	}
	return group
}

// stopTogether returns when the process has ended, which is still to be waited for. Each time that it
// stops before, the caller stops, and when that goes on again, so does the process. In the same
// group there is nothing to do: what stops one stops the other.
func stopTogether(pid int) {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WSTOPPED|unix.WNOWAIT, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || info.Code != cldStopped {
			return
		}
		// Takes note of the stop, so that the next round waits for another.
		if err := unix.Waitid(unix.P_PID, pid, nil, unix.WSTOPPED|unix.WNOHANG, nil); err != nil {
			return
		}
		if sharesGroup(pid) || terminalGroup() == -1 {
			continue
		}
		stopSelf()
		if group, err := unix.Getpgid(pid); err == nil {
			_ = unix.Kill(-group, unix.SIGCONT)
		}
	}
}

// stopSelf stops this process, and returns when it has been continued. Sent to the process, the signal
// could be another thread's to take, later than this one goes on.
func stopSelf() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = unix.Tgkill(os.Getpid(), unix.Gettid(), unix.SIGSTOP)
}

// cldStopped is CLD_STOPPED of sigaction(2).
const cldStopped = 5
