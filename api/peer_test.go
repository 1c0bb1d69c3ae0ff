// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/promise"
)

// asker names the socket that a process of TestPeers asks by, and as whom: PATH UID GID.
const asker = "BPFNET_TEST_ASKER"

// TestAsker is the process that TestPeers starts.
func TestAsker(t *testing.T) {
	words := strings.Fields(os.Getenv(asker))
	if len(words) != 3 {
		t.Skip("TestPeers starts it")
	}
	uid, _ := strconv.Atoi(words[1])
	gid, _ := strconv.Atoi(words[2])
	require.NoError(t, errors.Join(syscall.Setgroups(nil), syscall.Setgid(gid), syscall.Setuid(uid)))
	c, err := Dial(t.Context(), words[0])
	if err == nil {
		_, err = c.Allow(t.Context(), Pair{"a", "b"})
	}
	fmt.Println("answer:", err)
	os.Exit(0)
}

// Needs root. Who is neither root nor of the group does not get as far as a request, and root in another PID namespace,
// as a container is one, not as far as a verb.
func TestPeers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to be somebody else")
	}
	dir, err := os.MkdirTemp("", "api")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	const group = 4242
	n := &networks{names: []string{"a", "b"}, allowed: map[Pair]bool{}}
	path := serveAt(t, n, filepath.Join(dir, "bpfnet.sock"), strconv.Itoa(group))
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(socketMode), info.Mode().Perm())
	require.EqualValues(t, group, info.Sys().(*syscall.Stat_t).Gid)

	ask := func(uid, gid int, flags uintptr) string {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAsker$")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d", asker, path, uid, gid))
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		_, answer, found := strings.Cut(string(out), "answer: ")
		require.True(t, found, "%s", out)
		return strings.TrimSpace(answer)
	}
	require.Equal(t, "<nil>", ask(0, 0, 0))
	require.Equal(t, "<nil>", ask(4000, group, 0))
	require.Contains(t, ask(4000, 4000, 0), "permission denied")
	require.Contains(t, ask(0, 0, syscall.CLONE_NEWPID), "PID namespace")
	// The mode alone does not decide: somebody has opened the socket to all.
	require.NoError(t, os.Chmod(path, 0o666))
	require.Contains(t, ask(4000, 4000, 0), "neither root nor in the socket's group")
	promise.Kept(t, promise.Hostile, "The daemon takes orders from root and the socket's group only, and from no container, even where the socket is mounted there.",
		"%d kinds of clients", 5)
}

// crowd names the socket that a process of TestGuestsKeepNobodyOut crowds.
const crowd = "BPFNET_TEST_CROWD"

// TestCrowd is the process that TestGuestsKeepNobodyOut starts: it says when all of its connections are made.
func TestCrowd(t *testing.T) {
	path := os.Getenv(crowd)
	if path == "" {
		t.Skip("TestGuestsKeepNobodyOut starts it")
	}
	var all []net.Conn
	for range maxConnections {
		c, err := net.Dial("unix", path)
		require.NoError(t, err)
		all = append(all, c)
	}
	fmt.Println("crowded")
	_, _ = io.ReadAll(os.Stdin)
	for _, c := range all {
		c.Close()
	}
	os.Exit(0)
}

// Needs root. However many connections a container holds, those who may ask are served.
func TestGuestsKeepNobodyOut(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make a PID namespace")
	}
	n := &networks{names: []string{"a", "b"}, allowed: map[Pair]bool{}}
	path := serve(t, n)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCrowd$")
	cmd.Env = append(os.Environ(), crowd+"="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	end, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, "crowded\n", line)
	changed, err := dial(t, path).Allow(t.Context(), Pair{"a", "b"})
	require.NoError(t, err)
	require.True(t, changed)
	require.NoError(t, end.Close())
	require.NoError(t, cmd.Wait())
}

// The processes of TestPeerIsNoOther: the first is the daemon in a PID namespace of its own, the second its client.
const (
	alone  = "BPFNET_TEST_ALONE"
	leaver = "BPFNET_TEST_LEAVER"
)

// TestLeaver connects, leaves its connection to a child and ends.
func TestLeaver(t *testing.T) {
	path := os.Getenv(leaver)
	if path == "" {
		t.Skip("TestPeerIsNoOther starts it")
	}
	c, err := net.Dial("unix", path)
	require.NoError(t, err)
	f, err := c.(*net.UnixConn).File()
	require.NoError(t, err)
	heir := exec.Command("sleep", "60")
	heir.ExtraFiles = []*os.File{f}
	require.NoError(t, heir.Start())
	os.Exit(0)
}

// TestAlone is that daemon. What it starts ends with its namespace.
func TestAlone(t *testing.T) {
	path := os.Getenv(alone)
	if path == "" {
		t.Skip("TestPeerIsNoOther starts it")
	}
	require.NoError(t, syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""))
	require.NoError(t, syscall.Mount("proc", "/proc", "proc", 0, ""))
	l, err := Listen(path, "")
	require.NoError(t, err)
	who, err := rightsAt(l)
	require.NoError(t, err)
	client := exec.Command(os.Args[0], "-test.run=^TestLeaver$")
	client.Env = append(os.Environ(), leaver+"="+path)
	require.NoError(t, client.Run())
	number := client.Process.Pid
	// Threads take numbers too.
	for range 100 {
		require.NoError(t, os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(number-1)), 0))
		other := exec.Command("sleep", "60")
		require.NoError(t, other.Start())
		if other.Process.Pid == number {
			break
		}
		require.NoError(t, other.Process.Kill())
		_ = other.Wait()
	}
	ns, err := os.Readlink(pidNamespace(strconv.Itoa(number)))
	require.NoError(t, err, "no other process got the number")
	require.Equal(t, who.pidns, ns)

	c, err := l.Accept()
	require.NoError(t, err)
	p, err := peerOf(c.(*net.UnixConn))
	require.NoError(t, err)
	require.Equal(t, number, p.pid, "the number is another's now")
	if p.process == nil && !p.gone {
		fmt.Println("answer: the kernel has no SO_PEERPIDFD")
		os.Exit(0)
	}
	fmt.Println("answer:", who.check(p), PeerPID(context.WithValue(t.Context(), peerKey{}, p)))
	os.Exit(0)
}

// Needs root. A process that has the number of one which has connected and ended is not taken for that.
func TestPeerIsNoOther(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make a PID namespace")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAlone$")
	cmd.Env = append(os.Environ(), alone+"="+filepath.Join(t.TempDir(), "s.sock"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	_, answer, found := strings.Cut(string(out), "answer: ")
	require.True(t, found, "%s", out)
	if strings.Contains(answer, "no SO_PEERPIDFD") {
		t.Skip("the kernel names who has connected by a number only (before Linux 6.5)")
	}
	require.Equal(t, "the process that has connected is no more, and another one goes on with its connection 0", strings.TrimSpace(answer))
}

// Connections beyond the limit are closed at once, idle ones after a while, and those within are served.
func TestConnectionsAreLimited(t *testing.T) {
	path := serve(t, &networks{})
	var all []net.Conn
	t.Cleanup(func() {
		for _, c := range all {
			c.Close()
		}
	})
	open := func() net.Conn {
		c, err := net.Dial("unix", path)
		require.NoError(t, err)
		all = append(all, c)
		return c
	}
	for range maxConnections {
		open()
	}
	beyond := open()
	require.NoError(t, beyond.SetReadDeadline(time.Now().Add(10*time.Second)))
	_, err := beyond.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	all[0].Close()
	require.Eventually(t, func() bool {
		c, err := Dial(t.Context(), path)
		if err != nil {
			return false
		}
		_, err = c.Status(t.Context())
		return err == nil
	}, 10*time.Second, 10*time.Millisecond)
	silent := all[1]
	require.NoError(t, silent.SetReadDeadline(time.Now().Add(2*headerTimeout)))
	_, err = silent.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF, "who asks nothing is sent away")
}
