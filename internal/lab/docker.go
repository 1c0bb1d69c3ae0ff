// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The Engine under test is the distribution's, whatever else PATH leads to.
const (
	dockerd       = "/usr/sbin/dockerd"
	dockerCLI     = "/usr/bin/docker"
	dockerCompose = "docker-compose"
)

// DockerOpts are the ways in which engines differ. The zero value is the engine that
// bpfnet asks for in its plainest form: no iptables, no userland proxy.
type DockerOpts struct {
	// Proxy switches the userland proxy on.
	Proxy bool
	// ProxyPath is the program run for each published port. Optional; with it, Proxy
	// is implied. Without, it is the engine's own docker-proxy.
	ProxyPath string
	// IPTables lets the engine write its own rules: the reference, not what is under test.
	IPTables bool
	// IP6Tables lets it write rules for IPv6 too, which Engine 20.10 counts as experimental.
	IP6Tables bool
	// ExtraArgs go to dockerd behind all others.
	ExtraArgs []string
}

// Docker is an engine in the lab's host namespace, with its own data, sockets and
// containerd.
type Docker struct {
	// Socket is the path of the API socket; Host the same as a URL, for DOCKER_HOST.
	Socket, Host string
	// Dir holds all that the engine keeps: data, exec (run-time state) and its logs.
	Dir string

	lab  *Lab
	args []string
	proc *Process
}

// StartDocker starts an engine in the host's namespace, below the lab's cgroup, waits
// until it answers, and gives it the image [Image]. It ends with the test, and takes
// its containers, mounts and processes with it.
func (l *Lab) StartDocker(t testing.TB, opts DockerOpts) *Docker {
	t.Helper()
	if _, err := os.Stat(dockerd); err != nil {
		t.Fatalf("no engine (scripts/deps.sh test): %v", err)
	}
	tar, err := imageTar()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(l.Dir, fmt.Sprintf("docker%d", l.serial.Add(1)))
	d := &Docker{lab: l, Dir: dir, Socket: filepath.Join(dir, "docker.sock")}
	d.Host = "unix://" + d.Socket
	if err := os.MkdirAll(filepath.Join(dir, "cli"), 0o711); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "daemon.json") // not the machine's /etc/docker/daemon.json
	if err := os.WriteFile(config, []byte("{}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d.configure(t, opts)

	t.Cleanup(func() {
		if t.Failed() && d.proc != nil {
			t.Logf("dockerd: %s", tail(d.proc.stderr))
		}
		d.destroy(t)
	})
	d.Start(t)
	if _, err := d.Run("import", "--change", `CMD ["/bin/sh"]`, "--change", "ENV PATH=/bin", tar, Image); err != nil {
		t.Fatal(err)
	}
	return d
}

// configure sets the engine's command line.
func (d *Docker) configure(t testing.TB, opts DockerOpts) {
	t.Helper()
	root, err := cgroup2Root()
	if err != nil {
		t.Fatal(err)
	}
	d.args = []string{
		"--config-file", filepath.Join(d.Dir, "daemon.json"),
		"--data-root", filepath.Join(d.Dir, "data"),
		"--exec-root", filepath.Join(d.Dir, "exec"),
		"--pidfile", filepath.Join(d.Dir, "docker.pid"),
		"--host", d.Host,
		"--cgroup-parent", strings.TrimPrefix(d.lab.cgroup("containers"), root),
		"--exec-opt", "native.cgroupdriver=cgroupfs",
		"--storage-driver", "overlay2",
		"--log-level", "warn", // containerd is talkative
		fmt.Sprintf("--iptables=%t", opts.IPTables),
		fmt.Sprintf("--ip6tables=%t", opts.IP6Tables),
		fmt.Sprintf("--experimental=%t", opts.IP6Tables),
		fmt.Sprintf("--userland-proxy=%t", opts.Proxy || opts.ProxyPath != ""),
	}
	if opts.ProxyPath != "" {
		d.args = append(d.args, "--userland-proxy-path", opts.ProxyPath)
	}
	d.args = append(d.args, opts.ExtraArgs...)
}

// Reconfigure restarts the engine with other options, as an operator does who has changed its settings.
// Containers live on where both have live-restore among their arguments.
func (d *Docker) Reconfigure(t testing.TB, opts DockerOpts) {
	t.Helper()
	d.Stop(t)
	d.configure(t, opts)
	d.Start(t)
}

// Reload gives the engine a new daemon.json and has it read that, as "systemctl reload docker" does. What
// it has taken up shows in "docker info".
func (d *Docker) Reload(t testing.TB, config string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(d.Dir, "daemon.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.proc.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
}

// Start starts the engine again after Stop or Kill, and waits until it answers.
func (d *Docker) Start(t testing.TB) {
	t.Helper()
	var err error
	d.proc, err = d.lab.start(d.lab.Host.command(dockerd, d.args...), "dockerd")
	if err != nil {
		t.Fatal(err)
	}
	Eventually(t, 60*time.Second, "dockerd answers", func() bool {
		if d.proc.Exited() {
			t.Fatalf("dockerd ended: %v\n%s", d.proc.err, tail(d.proc.stderr))
		}
		return d.ping()
	})
}

// ping reports whether the API answers.
func (d *Docker) ping() bool {
	client := http.Client{
		Timeout: 5 * time.Second,
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", d.Socket)
			},
		},
	}
	answer, err := client.Get("http://docker/_ping")
	if err != nil {
		return false
	}
	answer.Body.Close()
	return answer.StatusCode == http.StatusOK
}

// Stop ends the engine with SIGTERM, as the machine's shutdown does, and waits for it.
// Without live-restore its containers get ten seconds to end.
func (d *Docker) Stop(t testing.TB) {
	t.Helper()
	_ = d.proc.Signal(syscall.SIGTERM)
	if err := d.proc.Wait(60 * time.Second); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("stop dockerd: %v", err)
	}
}

// Kill ends the engine with SIGKILL, and its containerd with it, as the service manager
// would. Containers and their shims live on.
func (d *Docker) Kill(t testing.TB) {
	t.Helper()
	pid, _ := strconv.Atoi(strings.TrimSpace(read(filepath.Join(d.Dir, "exec/containerd/containerd.pid"))))
	d.proc.Kill()
	if pid == 0 {
		return
	}
	// A new dockerd would wait in vain for a containerd that is about to end.
	Eventually(t, 10*time.Second, "end of containerd", func() bool {
		if strings.Contains(read(fmt.Sprintf("/proc/%d/cmdline", pid)), d.Dir) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return syscall.Kill(pid, 0) == syscall.ESRCH
	})
}

// Restart is Stop and Start.
func (d *Docker) Restart(t testing.TB) {
	t.Helper()
	d.Stop(t)
	d.Start(t)
}

// PID is the process id of dockerd.
func (d *Docker) PID() int { return d.proc.PID() }

// destroy ends the engine, its containerd, shims and containers at once, without
// asking them, and removes what they leave on the machine.
func (d *Docker) destroy(t testing.TB) {
	if d.proc != nil {
		d.proc.Kill()
	}
	// The engine's processes are known by its directory in their arguments, and by the
	// cgroup of the containers; those of the rest of the lab go on.
	for _, pid := range d.processes() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if err := d.lab.killContainers(); err != nil {
		t.Error(err)
	}
	Eventually(t, 10*time.Second, "end of dockerd's children", func() bool { return len(d.processes()) == 0 })
	removeShimSockets(d.Dir)
	if err := removeTree(d.Dir); err != nil {
		t.Errorf("remove the engine's files: %v", err)
	}
}

// processes lists the processes that carry the engine's directory in their arguments:
// dockerd, containerd, shims, proxies of the lab.
func (d *Docker) processes() []int {
	return processes(func(p procInfo) bool { return strings.Contains(p.cmdline, d.Dir) })
}

// killContainers ends all processes of containers. Where the hierarchies of version 1
// are mounted, they stand there below the cgroup parent, and in cgroup2 perhaps not.
func (l *Lab) killContainers() error {
	if err := killCgroup(l.cgroup("containers")); err != nil {
		return err
	}
	parent := ":/" + l.name + "/host/containers"
	inside := func() []int {
		return processes(func(p procInfo) bool { return strings.Contains(p.cgroups, parent) })
	}
	for _, pid := range inside() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if !poll(10*time.Second, func() bool { return len(inside()) == 0 }) {
		return fmt.Errorf("containers' processes left: %v", inside())
	}
	return nil
}

// removeShimSockets removes the sockets of an engine's killed shims, which containerd
// keeps in a directory that all engines of a machine share.
func removeShimSockets(dir string) {
	addresses, _ := filepath.Glob(filepath.Join(dir, "exec/containerd/daemon/io.containerd.runtime.v2.task/*/*/address"))
	for _, a := range addresses {
		socket := strings.TrimPrefix(strings.TrimSpace(read(a)), "unix://")
		if strings.HasPrefix(socket, "/run/containerd/s/") {
			_ = os.Remove(socket)
		}
	}
}

// Env is the environment of a Docker client of this engine.
func (d *Docker) Env() []string {
	return append(os.Environ(), "DOCKER_HOST="+d.Host, "DOCKER_CONFIG="+filepath.Join(d.Dir, "cli"))
}

func (d *Docker) command(name string, args ...string) (*exec.Cmd, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	cmd := d.lab.Host.Command(ctx, name, args...)
	cmd.Env = d.Env()
	return cmd, cancel
}

// Run runs the docker client: d.Run("run", "-d", lab.Image, "sleep", "100"). It returns
// standard output without the last newline; the error carries standard error.
func (d *Docker) Run(args ...string) (string, error) {
	cmd, cancel := d.command(dockerCLI, args...)
	defer cancel()
	return run(cmd)
}

// MustRun is Run for commands that must succeed.
func (d *Docker) MustRun(t testing.TB, args ...string) string {
	t.Helper()
	out, err := d.Run(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Compose runs docker-compose in a directory that holds a Compose file.
func (d *Docker) Compose(dir string, args ...string) (string, error) {
	cmd, cancel := d.command(dockerCompose, args...)
	defer cancel()
	cmd.Dir = dir
	return run(cmd)
}

// Import makes an image from a tar of a file system. Changes are Dockerfile
// instructions: `CMD ["/bin/sh"]`.
func (d *Docker) Import(tar, image string, changes ...string) error {
	args := []string{"import"}
	for _, c := range changes {
		args = append(args, "--change", c)
	}
	_, err := d.Run(append(args, tar, image)...)
	return err
}

// Inspect returns one field of a container, network or image as a Go template prints it.
func (d *Docker) Inspect(t testing.TB, object, template string) string {
	t.Helper()
	return d.MustRun(t, "inspect", "--format", template, object)
}

// NS returns the network namespace of a running container. Commands that run there see
// the machine's files, not the container's, but stand in the container's cgroup, so
// that programs at the lab's cgroup take them for processes of the container.
func (d *Docker) NS(t testing.TB, container string) *NS {
	t.Helper()
	return d.lab.processNS(t, container, d.Inspect(t, container, "{{.State.Pid}}"))
}

// Addrs returns the IPv4 and IPv6 addresses that a container has on a network. An
// address that it does not have is the zero Addr.
func (d *Docker) Addrs(t testing.TB, container, network string) (v4, v6 netip.Addr) {
	t.Helper()
	out := d.Inspect(t, container, fmt.Sprintf(
		`{{with index .NetworkSettings.Networks %q}}{{.IPAddress}},{{.GlobalIPv6Address}}{{end}}`, network))
	first, second, found := strings.Cut(out, ",")
	if !found {
		t.Fatalf("container %s is not on network %s", container, network)
	}
	v4, _ = netip.ParseAddr(first)
	v6, _ = netip.ParseAddr(second)
	return v4, v6
}

// WaitLog waits until a container has written text, and fails the test when it ends
// before, or after twenty seconds.
func (d *Docker) WaitLog(t testing.TB, container, text string) {
	t.Helper()
	Eventually(t, 20*time.Second, fmt.Sprintf("%q in the log of %s", text, container), func() bool {
		running := d.Inspect(t, container, "{{.State.Running}}") // before the look at the log
		cmd, cancel := d.command(dockerCLI, "logs", container)
		defer cancel()
		log, _ := cmd.CombinedOutput()
		if !strings.Contains(string(log), text) && running != "true" {
			t.Fatalf("container %s ended before it said %q:\n%s", container, text, log)
		}
		return strings.Contains(string(log), text)
	})
}

// Serve runs a container of [Image] with the tool's server in it, and waits until it
// listens. Args are those of docker run; behind "--" follow those of labtool serve.
// It returns the container's id.
func (d *Docker) Serve(t testing.TB, args ...string) string {
	t.Helper()
	args, serve := splitServe(args)
	id := d.MustRun(t, slices.Concat([]string{"run", "-d"}, args, []string{Image, "labtool", "serve"}, serve)...)
	d.WaitLog(t, id, "ready")
	return id
}

// splitServe takes the arguments of labtool serve off those of "run", behind "--".
func splitServe(args []string) (run, serve []string) {
	if i := slices.Index(args, "--"); i >= 0 {
		return args[:i], args[i+1:]
	}
	return args, []string{"--tcp", "80", "--udp", "80"}
}
