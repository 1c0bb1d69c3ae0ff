// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/bpfnet/bpfnet/bench/load"
	"github.com/bpfnet/bpfnet/internal/lab"
)

// firstPort is the first that is published, on the host and in the container: below those that the kernel
// gives to clients.
const firstPort = 20000

// engineModes are those that control is measured in.
var engineModes = []string{Engine, DockerIPTables, DockerProxy, Bpfnet}

// enginesGroup times "docker run" with many published ports, and counts containers that come and go.
func enginesGroup() Group {
	return enginesGroupOf([]int{1, 100, 1000}, []int{10000}, 3*time.Second)
}

// enginesGroupOf has all modes publish so many ports, and those that can more.
func enginesGroupOf(all, more []int, window time.Duration) Group {
	return Group{
		Name:      "engines",
		Rounds:    3,
		Labs:      2 * time.Minute,
		Round:     50 * time.Second,
		Scenarios: []string{RunPorts, Churn},
		Modes:     append(slices.Clone(engineModes), Sandboxes),
		Build: func(t testing.TB, o Options) []Probe {
			var ports, comers []Probe
			for _, mode := range engineModes {
				if !o.Wants(mode) {
					continue
				}
				e := newDockerHost(t, mode)
				if o.WantsScenario(RunPorts) {
					ports = append(ports, portsProbes(t, e, all, more)...)
				}
				comers = append(comers, churnProbes(mode, window, func(ctx context.Context) *exec.Cmd {
					return e.d.Command(ctx, "run", "--rm", lab.Image, "true")
				})...)
			}
			if o.Wants(Sandboxes) {
				own := lab.New(t, lab.Opts{Plain: true}).StartBpfnet(t, nil)
				comers = append(comers, churnProbes(Sandboxes, window, func(ctx context.Context) *exec.Cmd {
					return own.Command(ctx, "run", "--rm", "--", "true")
				})...)
			}
			return append(comers, ports...)
		},
	}
}

// slowFrom is the number of ports from which on an engine that makes rules one by one takes minutes to make
// them and to take them back: it is thrown away after one run.
const slowFrom = 1000

func portsProbes(t testing.TB, standing *dockerHost, all, more []int) []Probe {
	mode := standing.mode
	rules := mode == DockerIPTables || mode == DockerProxy
	counts := all
	if !rules {
		counts = slices.Concat(all, more)
	}
	var probes []Probe
	for _, n := range counts {
		p := Probe{Key: Key{Scenario: RunPorts, Mode: mode, Metric: "start", At: n}, Unit: "s"}
		measure := func(ctx context.Context) (started, error) { return standing.run(ctx, t, n, true) }
		if rules && n >= slowFrom {
			measure = func(ctx context.Context) (s started, err error) {
				once := &scope{TB: t}
				defer once.end()
				return newDockerHost(once, mode).run(ctx, once, n, false)
			}
			p.Note, p.Rounds = "one round only, as it takes minutes; by an engine of its own", 1
		}
		answers := mode != Engine // which forwards nothing
		if answers {
			p.More = []Output{{"answers", "s"}}
		}
		p.Measure = func(ctx context.Context) (Sample, error) {
			s, err := measure(ctx)
			if err != nil {
				return Sample{}, err
			}
			sample := Sample{Value: s.start.Seconds()}
			if answers {
				sample.More = []float64{s.answers.Seconds()}
			}
			return sample, nil
		}
		probes = append(probes, p)
	}
	return probes
}

// scope is a test within a test: what is registered for cleanup runs at its end.
type scope struct {
	testing.TB
	undo []func()
}

func (s *scope) Cleanup(f func()) { s.undo = append(s.undo, f) }

// end runs all of it, also where one ends the test.
func (s *scope) end() {
	for _, undo := range s.undo {
		defer undo()
	}
	s.undo = nil
}

// dockerHost is a host with a Docker Engine in one of the modes of control.
type dockerHost struct {
	mode string
	lab  *lab.Lab
	d    *lab.Docker
	b    *lab.Bpfnet // of mode Bpfnet
}

// engineOpts are the Engine's settings in a mode.
func engineOpts(mode string) lab.DockerOpts {
	switch mode {
	case DockerIPTables:
		return lab.DockerOpts{IPTables: true}
	case DockerProxy:
		return lab.DockerOpts{IPTables: true, Proxy: true}
	}
	return lab.DockerOpts{} // iptables, ip6tables and userland-proxy off
}

func newDockerHost(t testing.TB, mode string) *dockerHost {
	e := &dockerHost{mode: mode, lab: lab.New(t, lab.Opts{Plain: true})}
	e.d = e.lab.StartDocker(t, engineOpts(mode))
	if mode == Bpfnet {
		e.b = e.lab.StartBpfnet(t, e.d)
	}
	return e
}

// started is how long after "docker run" was called its container ran, and its last port answered.
type started struct {
	start, answers time.Duration
}

const (
	published   = "published" // the container
	answerWait  = 30 * time.Second
	answerRetry = 20 * time.Millisecond // shorter than TCP's own second
)

// run starts a container with n published ports and checks that they are there.
func (e *dockerHost) run(ctx context.Context, t testing.TB, n int, remove bool) (s started, err error) {
	defer func() {
		if err != nil { // for those that come after it
			_, _ = e.d.Run("rm", "-f", published)
		}
	}()
	last := firstPort + n - 1
	ports := fmt.Sprintf("%d-%d", firstPort, last)
	begin := time.Now()
	server := load.ServerArgs(netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(last)).String(), -1)
	out, err := e.d.Command(ctx, slices.Concat([]string{"run", "-d", "--name", published, "-p", ports + ":" + ports, lab.Image, "labtool"},
		server)...).CombinedOutput()
	s.start = time.Since(begin)
	if err != nil {
		return s, fmt.Errorf("docker run: %w: %s", err, out)
	}
	if e.mode != Engine {
		if err := answer(ctx, e.lab.Client, netip.AddrPortFrom(lab.Host4, uint16(last))); err != nil {
			return s, err
		}
		s.answers = time.Since(begin)
	}
	// The daemon tells of what it serves at the end of its round, which an answer may precede.
	publishes := func(n int) error {
		return within(answerWait, func() error { return counted("published ports", e.published(t), n) })
	}
	if err := publishes(n); err != nil {
		return s, err
	}
	if !remove {
		return s, nil
	}
	if _, err := e.d.Run("rm", "-f", published); err != nil {
		return s, err
	}
	return s, publishes(0)
}

// published counts the IPv4 ports that lead to containers, where the mode keeps them.
func (e *dockerHost) published(t testing.TB) (n int) {
	switch e.mode {
	case Bpfnet:
		for _, p := range e.b.Snapshot(t).Ports {
			if strings.HasPrefix(p.Host, "0.0.0.0:") {
				n++
			}
		}
	case DockerIPTables, DockerProxy:
		n = strings.Count(e.lab.Host.MustRun(t, "iptables", "-t", "nat", "-S", "DOCKER"), "--to-destination")
	default: // the Engine says so itself, as long as there is a container
		out, _ := e.d.Run("port", published)
		n = strings.Count(out, "-> 0.0.0.0:")
	}
	return n
}

// answer waits until a request of the client is answered.
func answer(ctx context.Context, client *lab.NS, to netip.AddrPort) error {
	ctx, cancel := context.WithTimeout(ctx, answerWait)
	defer cancel()
	return client.Do(func() error {
		var last error
		for ctx.Err() == nil {
			if last = ask(to); last == nil {
				return nil
			}
		}
		return errors.Join(fmt.Errorf("port %s does not answer", to), last)
	})
}

// ask makes one exchange, or fails soon.
func ask(to netip.AddrPort) error {
	conn, err := net.DialTimeout("tcp", to.String(), answerRetry)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte{load.Once}); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}
