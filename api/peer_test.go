// SPDX-License-Identifier: Apache-2.0

package api

import (
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
