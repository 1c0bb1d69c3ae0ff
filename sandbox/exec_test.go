// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// execIn runs a script by Exec in another process, and returns what that says and its exit code.
func execIn(t *testing.T, r role) (stdout, stderr string, code int) {
	t.Helper()
	cmd := asRole(t, r)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else {
		require.NoError(t, err)
	}
	return out.String(), errs.String(), code
}

func inShell(target Target, script string) role {
	return role{Exec: &target, Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: os.Environ(), Dir: "/"}
}

func TestExec(t *testing.T) {
	dir := t.TempDir()
	source, file := filepath.Join(dir, "source"), filepath.Join(dir, "file")
	writeFile(t, source, "sandbox's\n")
	writeFile(t, file, "host's\n")
	c := shell("exec sleep infinity")
	c.Cgroup, c.Hostname, c.Sysfs, c.Files = testCgroup(t), "web", true, map[string]string{file: source}
	p := begin(t, c)
	target := Target{PID: p.PID(), StartTime: p.StartTime(), Cgroup: c.Cgroup}

	r := inShell(target, fmt.Sprintf("for ns in net mnt uts; do readlink /proc/self/ns/$ns; done; grep ^0:: /proc/self/cgroup; pwd; hostname; cat %s; ls /sys/class/net; echo $A; exit 6", file))
	r.Dir = dir
	r.Env = append(r.Env, "A=a", "A=b")
	out, errs, code := execIn(t, r)
	assert.Equal(t, 6, code, errs)
	var want strings.Builder
	for _, kind := range []string{"net", "mnt", "uts"} {
		fmt.Fprintln(&want, namespace(t, p.PID(), kind))
	}
	for line := range strings.Lines(readFile(t, fmt.Sprintf("/proc/%d/cgroup", p.PID()))) {
		if strings.HasPrefix(line, "0::") {
			want.WriteString(line)
		}
	}
	fmt.Fprintf(&want, "%s\nweb\nsandbox's\nlo\nb\n", dir)
	assert.Equal(t, want.String(), out)

	for _, x := range []struct {
		name   string
		change func(*role)
		code   int
		text   string
	}{
		{"another process", func(r *role) { r.Exec.StartTime++ }, 1, fmt.Sprintf("join process %d: process has ended", p.PID())},
		{"no cgroup", func(r *role) { r.Exec.Cgroup += "/none" }, 1, "join cgroup"},
		{"no program", func(r *role) { r.Path = "/none" }, 127, "command not found"},
		{"not executable", func(r *role) { r.Path = file }, 126, "not executable: permission denied"},
		{"no directory", func(r *role) { r.Dir = dir + "/none" }, 1, "does not exist"},
		{"directory a file", func(r *role) { r.Dir = file }, 1, "is not a directory"},
	} {
		r := inShell(target, "echo ran")
		x.change(&r)
		out, errs, code := execIn(t, r)
		assert.Equal(t, x.code, code, x.name)
		assert.Contains(t, errs, x.text, x.name)
		assert.Equal(t, 1, strings.Count(errs, "\n"), "%s: %s", x.name, errs)
		assert.Empty(t, out, x.name)
	}

	// A process that joined ends with the sandbox.
	joined := asRole(t, inShell(target, "echo; exec sleep infinity"))
	lines, w := pipe(t)
	joined.Stdout = w
	require.NoError(t, joined.Start())
	w.Close()
	lines.next()
	require.NoError(t, KillCgroup(c.Cgroup))
	assert.EqualError(t, joined.Wait(), "signal: killed")

	_, err := p.Wait()
	require.NoError(t, err)
	out, errs, code = execIn(t, inShell(target, "echo ran"))
	assert.Equal(t, 1, code)
	assert.Equal(t, fmt.Sprintf("join process %d: process has ended\n", p.PID()), errs)
	assert.Empty(t, out)
}

// With the host's network there are no namespaces to join.
func TestExecOnHost(t *testing.T) {
	c := shell("exec sleep infinity")
	c.Cgroup = testCgroup(t)
	th := NewThread()
	defer th.Close()
	p, err := th.Start(c)
	require.NoError(t, err)
	t.Cleanup(func() { end(p) })
	assert.Equal(t, namespace(t, os.Getpid(), "net"), namespace(t, p.PID(), "net"))
	out, errs, code := execIn(t, inShell(Target{PID: p.PID(), StartTime: p.StartTime(), Cgroup: c.Cgroup}, "readlink /proc/self/ns/net; grep ^0:: /proc/self/cgroup"))
	assert.Zero(t, code, errs)
	assert.Contains(t, out, namespace(t, os.Getpid(), "net")+"\n")
	assert.Contains(t, out, "/sandbox\n")
}
