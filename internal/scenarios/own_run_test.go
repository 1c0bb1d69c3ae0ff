// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// outcome is how a command ended.
type outcome struct {
	code        int
	out, errors string
}

// outcome runs a command of bpfnet that may fail.
func (w *site) outcome(t *testing.T, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := w.b.Command(ctx, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil {
		require.ErrorAs(t, err, &exit, "%s", errs.String())
	}
	code := cmd.ProcessState.ExitCode()
	if status := cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() { // as a shell has it
		code = 128 + int(status.Signal())
	}
	return outcome{code, out.String(), errs.String()}
}

// Needs root. "bpfnet run" is to who calls it as the command itself: output, input, exit status and
// signals are the command's.
func TestOwnRun(t *testing.T) {
	w := newOwnSite(t)
	before := w.b.Belongings(t)
	run := func(args ...string) outcome {
		t.Helper()
		return w.outcome(t, append([]string{"run", "--rm", "--"}, args...)...)
	}
	assert.Equal(t, outcome{0, "", ""}, run("true"))
	assert.Equal(t, outcome{3, "out\n", "err\n"}, run("sh", "-c", "echo out; echo err >&2; exit 3"))
	assert.Equal(t, 128+int(syscall.SIGKILL), run("sh", "-c", "kill -9 $$").code)
	assert.Equal(t, 128+int(syscall.SIGTERM), run("sh", "-c", "kill -15 $$").code)
	for _, c := range []struct {
		command string
		code    int
	}{{"no-such-command", 127}, {"/etc/passwd", 126}, {"/no/such/file", 127}, {"/etc", 126}} {
		got := run(c.command)
		assert.Equal(t, c.code, got.code, c.command)
		assert.Empty(t, got.out)
		assert.Contains(t, got.errors, c.command)
		assert.Equal(t, 1, strings.Count(got.errors, "\n"), "one line: %s", got.errors)
	}
	// A word that looks like a flag is the command's, with and without "--".
	assert.Equal(t, "-d --rm\n", run("echo", "-d", "--rm").out)
	assert.Equal(t, "-d --rm\n", w.outcome(t, "run", "--rm", "echo", "-d", "--rm").out)

	cmd := w.b.Command(t.Context(), "run", "--rm", "--", "cat")
	cmd.Stdin = strings.NewReader("hello")
	out, err := cmd.Output()
	require.NoError(t, err)
	assert.Equal(t, "hello", string(out), "standard input")

	// The environment and the directory are the caller's.
	cmd = w.b.Command(t.Context(), "run", "--rm", "--", "sh", "-c", `echo "$WORD"; pwd`)
	cmd.Env, cmd.Dir = append(cmd.Env, "WORD=from outside"), w.Dir
	out, err = cmd.Output()
	require.NoError(t, err)
	assert.Equal(t, "from outside\n"+w.Dir+"\n", string(out))

	w.belongs(t, before)
	assert.Empty(t, w.b.Snapshot(t).Sandboxes, "nothing is left of --rm")

	// Without it the sandbox is remembered.
	assert.Equal(t, 3, w.outcome(t, "run", "--name", "kept", "--", "sh", "-c", "exit 3").code)
	s := w.b.Sandbox(t, "kept")
	assert.Equal(t, api.StatusExited, s.Status)
	require.NotNil(t, s.ExitCode)
	assert.Equal(t, 3, *s.ExitCode)
	assert.Equal(t, "3", w.b.MustCLI(t, "wait", "kept"))
	w.b.MustCLI(t, "rm", "kept")
	w.belongs(t, before)
}

// Needs root. Signals to a "run" in the foreground go to the command; so does "stop" to a detached one.
func TestOwnSignals(t *testing.T) {
	w := newOwnSite(t)
	before := w.b.Belongings(t)
	for _, c := range []struct {
		signal syscall.Signal
		name   string
	}{{syscall.SIGTERM, "TERM"}, {syscall.SIGINT, "INT"}, {syscall.SIGHUP, "HUP"}, {syscall.SIGUSR1, "USR1"}} {
		p := w.b.StartCLI(t, "run", "--rm", "--", "sh", "-c",
			fmt.Sprintf("trap 'echo got %s; exit 7' %[1]s; echo set; while :; do sleep 0.05; done", c.name))
		p.WaitOutput(t, "set")
		require.NoError(t, p.Signal(c.signal))
		var exit *exec.ExitError
		require.ErrorAs(t, p.Wait(10*time.Second), &exit, c.name)
		assert.Equal(t, 7, exit.ExitCode(), c.name)
		assert.Equal(t, "set\ngot "+c.name+"\n", p.Stdout())
	}
	// What the command leaves running ends with it.
	p := w.b.StartCLI(t, "run", "--rm", "--", "sh", "-c", "sleep 1000 & echo $!")
	require.NoError(t, p.Wait(10*time.Second))
	var child int
	_, err := fmt.Sscan(p.Stdout(), &child)
	require.NoError(t, err)
	assert.False(t, alive(child))

	// A runner that is killed takes nothing with it that a signal would have; the daemon cleans up.
	p = w.b.StartCLI(t, "run", "--rm", "--name", "orphan", "--", "sh", "-c", "echo set; exec sleep 1000")
	p.WaitOutput(t, "set")
	pid := w.status(t, "orphan", api.StatusRunning).PID
	p.Kill()
	assert.True(t, alive(pid), "the sandbox goes on")
	w.b.MustCLI(t, "rm", "-f", "orphan")
	assert.False(t, alive(pid))
	w.belongs(t, before)

	// stop: SIGTERM, and SIGKILL to what does not listen.
	w.b.MustCLI(t, "run", "-d", "--name", "polite", "--", "sh", "-c", "trap 'echo bye; exit 5' TERM; echo set; while :; do sleep 0.05; done")
	w.b.MustCLI(t, "run", "-d", "--name", "deaf", "--", "sh", "-c", "trap '' TERM; echo set; while :; do sleep 0.05; done")
	w.b.WaitLog(t, "polite", "set")
	w.b.WaitLog(t, "deaf", "set")
	waits := w.b.StartCLI(t, "wait", "polite")
	w.b.MustCLI(t, "stop", "polite")
	require.NoError(t, waits.Wait(10*time.Second))
	assert.Equal(t, "5\n", waits.Stdout())
	assert.Equal(t, "set\nbye", w.b.MustCLI(t, "logs", "polite"))
	w.b.MustCLI(t, "stop", "--time", "1", "deaf")
	assert.Equal(t, "137", w.b.MustCLI(t, "wait", "deaf"))
	w.b.MustCLI(t, "rm", "polite", "deaf")
	w.belongs(t, before)
}

// Needs root. What a sandbox sees of itself: host name, hosts, resolv.conf, interfaces, routes; the
// host sees none of that.
func TestOwnInside(t *testing.T) {
	w := newOwnSite(t)
	hostname := w.Host.MustRun(t, "hostname")
	hosts := w.Host.MustRun(t, "cat", "/etc/hosts")
	resolv := w.Host.MustRun(t, "cat", "/etc/resolv.conf")
	w.sandbox(t, "db", "blue", "--network-alias", "store")
	w.b.MustCLI(t, "run", "-d", "--name", "web", "--network", "blue", "--network", "red",
		"--dns", "203.0.113.1", "--dns", "2001:db8:3::1", "--", "labtool", "serve", "--tcp", "80", "--udp", "80")
	w.b.WaitLog(t, "web", "ready")
	inside := func(args ...string) string {
		t.Helper()
		return w.b.MustCLI(t, append([]string{"exec", "web"}, args...)...)
	}

	s := w.b.Sandbox(t, "web")
	assert.Equal(t, s.ID[:12], inside("hostname"))
	assert.Equal(t, s.ID[:12], inside("--", "hostname"))
	assert.Equal(t, "db", w.b.MustCLI(t, "exec", "db", "hostname"))
	names := parseHosts(t, inside("cat", "/etc/hosts"))
	web4, web6 := w.b.Addrs(t, "web", "blue")
	red4, _ := w.b.Addrs(t, "web", "red")
	db4, db6 := w.b.Addrs(t, "db", "blue")
	assert.Equal(t, []string{"127.0.0.1"}, names["localhost"][:1])
	assert.Contains(t, names["localhost"], "::1")
	assert.Contains(t, names[s.ID[:12]], web4.String(), "its own host name")
	assert.ElementsMatch(t, []string{db4.String(), db6.String()}, names["db"])
	assert.ElementsMatch(t, []string{db4.String(), db6.String()}, names["store"])
	assert.Contains(t, names["web"], web4.String(), "it finds itself")
	var servers []string
	for line := range strings.Lines(inside("cat", "/etc/resolv.conf")) {
		if server, ok := strings.CutPrefix(strings.TrimSpace(line), "nameserver "); ok {
			servers = append(servers, server)
		}
	}
	assert.Equal(t, []string{"203.0.113.1", "2001:db8:3::1"}, servers)

	assert.Equal(t, []string{"eth0", "eth1", "lo"}, strings.Fields(inside("ls", "/sys/class/net")))
	gateways := w.b.InspectNetwork(t, "blue").IPAM.Config
	routes := inside("ip", "route")
	assert.Contains(t, routes, "default via "+gateways[0].Gateway+" dev eth0")
	assert.Equal(t, 1, strings.Count(routes, "default"), routes)
	addrs := inside("ip", "-o", "addr")
	for _, a := range []netip.Addr{web4, web6, red4} {
		assert.Contains(t, addrs, " "+a.String()+"/")
	}
	// Docker's MAC address for that IPv4 address.
	b4 := web4.As4()
	assert.Contains(t, inside("cat", "/sys/class/net/eth0/address"), fmt.Sprintf("02:42:%02x:%02x:%02x:%02x", b4[0], b4[1], b4[2], b4[3]))
	assert.Equal(t, "web", inside("sh", "-c", "cd /sys/fs/bpf 2>/dev/null; echo web"), "exec ends as its command does")

	// Neighbours come and go; hosts follows, and an open file stays the same file.
	w.b.MustCLI(t, "network", "connect", "--alias", "second", "red", "db")
	lab.Eventually(t, 5*time.Second, "the alias is known", func() bool {
		return len(parseHosts(t, inside("cat", "/etc/hosts"))["second"]) > 0
	})
	w.b.MustCLI(t, "rm", "-f", "db")
	names = parseHosts(t, inside("cat", "/etc/hosts"))
	for _, gone := range []string{"db", "store", "second"} {
		assert.Empty(t, names[gone], gone)
	}

	// exec: its exit status, standard streams and errors.
	assert.Equal(t, outcome{4, "a\n", "b\n"}, w.outcome(t, "exec", "web", "sh", "-c", "echo a; echo b >&2; exit 4"))
	assert.Equal(t, 127, w.outcome(t, "exec", "web", "no-such-command").code)
	assert.Equal(t, 126, w.outcome(t, "exec", "web", "/etc/passwd").code)
	assert.Equal(t, 128+9, w.outcome(t, "exec", "web", "sh", "-c", "kill -9 $$").code)

	// The host is as before.
	assert.Equal(t, hostname, w.Host.MustRun(t, "hostname"))
	assert.Equal(t, hosts, w.Host.MustRun(t, "cat", "/etc/hosts"))
	assert.Equal(t, resolv, w.Host.MustRun(t, "cat", "/etc/resolv.conf"))
}

// parseHosts reads a hosts file: name to addresses.
func parseHosts(t *testing.T, text string) map[string][]string {
	t.Helper()
	out := map[string][]string{}
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		_, err := netip.ParseAddr(fields[0])
		require.NoError(t, err, line)
		for _, name := range fields[1:] {
			out[name] = append(out[name], fields[0])
		}
	}
	return out
}

// Needs root. The first packets of a process, sent by its first instructions, arrive where they may,
// and nowhere else: the data path is there before the process.
func TestOwnFirstPacket(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue", "-p", "8080:80", "-p", "8080:80/udp")
	w.sandbox(t, "far", "red")
	w.Client2.Serve(t, "--tcp", "7000", "--udp", "7000")
	m := w.maps(t)
	web4, web6 := w.b.Addrs(t, "web", "blue")
	far4, far6 := w.b.Addrs(t, "far", "red")
	for i := range count(50) {
		// A second SYN would come after a second.
		for _, to := range []string{
			"web:80", at(web4, 80), at(web6, 80), at(lab.Client24, 7000), at(lab.Client26, 7000), at(lab.Host4, 8080),
		} {
			network := []string{"tcp", "udp"}[i%2]
			got := w.outcome(t, "run", "--rm", "--network", "blue", "--", "labtool", "get", "--network", network, "--timeout", "900ms", to)
			require.Zero(t, got.code, "%s %s: %s%s", network, to, got.out, got.errors)
		}
		before := readCounters(t, m)
		for _, to := range []netip.Addr{far4, far6} {
			got := w.outcome(t, "run", "--rm", "--network", "blue", "--", "labtool", "udp-count", "--count", "50", at(to, 80))
			require.Zero(t, got.code, got.errors)
			require.Contains(t, got.out, `"sent":50`)
		}
		drops := since(t, m, before).drops()
		delete(drops, "not_ready/to_container") // what the bridge says to all of its ports, one that comes or goes too
		require.Equal(t, counters{"isolated/container": 100}, drops)
	}
}

// Needs root. No daemon, no sandbox: a start that cannot be guarded leaves nothing, and says why.
func TestOwnWithoutDaemon(t *testing.T) {
	w := newOwnSite(t)
	before := w.b.Belongings(t)
	w.b.Stop(t)
	for _, args := range [][]string{
		{"run", "--rm", "--", "true"}, {"network", "create", "green"}, {"create", "--", "true"}, {"network", "rm", "blue"},
	} {
		got := w.outcome(t, args...)
		assert.Equal(t, 1, got.code, args)
		assert.Contains(t, got.errors, "the daemon is not running", args)
		assert.Equal(t, 1, strings.Count(got.errors, "\n"), got.errors)
	}
	assert.Equal(t, before, w.b.Belongings(t))

	// A daemon that dies in the middle of a start: whatever it had made goes at its next start.
	w.b.Start(t)
	for range count(50) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.b.Command(ctx, "run", "--rm", "--network", "blue", "--", "sleep", "1000").Run() }()
		lab.Eventually(t, 10*time.Second, "the start has begun", func() bool {
			return len(w.b.Belongings(t)) > len(before)
		})
		w.b.Kill()
		cancel()
		require.Error(t, <-done)
		w.b.KillSandboxes(t)
		w.b.Start(t)
		for _, s := range w.b.Snapshot(t).Sandboxes { // one that was created, and not started yet
			w.b.MustCLI(t, "rm", "-f", s.Name)
		}
		w.belongs(t, before)
	}
}

// Needs root. Sandboxes come and go at once, by many hands; what was theirs goes with them.
func TestOwnChurn(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "peer", "blue")
	m := w.maps(t)
	belongings, start := w.b.Belongings(t), w.belongings(t, m)
	for range count(20) {
		errs := make(chan error)
		for i := range 20 {
			go func() {
				// Each its own port; all in both networks; every third detached.
				args := []string{"run", "--rm", "--network", "blue", "--network", "red", "-p", fmt.Sprintf("%d:80", 21000+i)}
				if i%3 == 0 {
					args = append(args, "-d")
				}
				_, err := w.b.CLI(append(args, "--", "labtool", "get", "peer:80")...)
				errs <- err
			}()
		}
		var all []error
		for range 20 {
			all = append(all, <-errs)
		}
		require.NoError(t, errors.Join(all...))
		w.belongs(t, belongings)
		w.nothingLeft(t, m, start)
	}
	assert.Len(t, w.b.Snapshot(t).Sandboxes, 1)
}
