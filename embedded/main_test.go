// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/bpfnet/bpfnet/internal/lab"
	"github.com/bpfnet/bpfnet/sandbox"
)

const (
	// roleEnv makes the test binary a runner: what "bpfnet run" is but for the requests, which the test
	// makes in its name.
	roleEnv = "BPFNET_EMBEDDED_TEST_RUNNER"
	// hostEnv says that the process is in a network namespace of the tests' own.
	hostEnv = "BPFNET_EMBEDDED_TEST_HOST"
)

// TestMain runs the tests in a network namespace of their own, which is the host to them: all threads are
// in it, whatever goroutine does something.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv(roleEnv) != "":
		os.Exit(runner())
	case os.Geteuid() != 0 || os.Getenv(hostEnv) != "":
		lab.Main(m)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), hostEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if !cmd.ProcessState.Exited() {
		fmt.Fprintln(os.Stderr, cmd.ProcessState)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

// runner makes a namespace, says "TID n", and for a line "CGROUP COMMAND…" starts that there and says
// "PID n". It ends with its standard input, or when it is killed, and leaves the command running.
func runner() int {
	t := sandbox.NewThread()
	if err := t.NewNetNS(); err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("TID", t.TID())
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		words := strings.Fields(in.Text())
		p, err := t.Start(sandbox.Command{Path: words[1], Args: words[1:], Dir: "/", Cgroup: words[0]})
		if err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Println("PID", p.PID())
	}
	return 0
}
