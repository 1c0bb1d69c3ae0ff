// SPDX-License-Identifier: Apache-2.0

package main

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
)

var (
	addr   = netip.MustParseAddr
	prefix = netip.MustParsePrefix
)

func TestNetworkVerbs(t *testing.T) {
	w, e := newWorld(t), newEngine(t)
	defer w.serve(e)()
	for line, want := range map[string]any{
		"create be": api.NetworkSpec{Name: "be", Driver: "bridge"},
		"create -d bridge --subnet 172.30.0.0/16 --subnet fd00:1::/64 --gateway 172.30.0.9 --gateway fd00:1::9 --ip-range 172.30.5.0/24 " +
			"--internal --ipv6 -o com.docker.network.driver.mtu=1400 --opt a=b=c --label tier=back --label bare be": api.NetworkSpec{
			Name: "be", Driver: "bridge",
			Subnets: []netip.Prefix{prefix("172.30.0.0/16"), prefix("fd00:1::/64")}, Gateways: []netip.Addr{addr("172.30.0.9"), addr("fd00:1::9")},
			Ranges: []netip.Prefix{prefix("172.30.5.0/24")}, Internal: true, IPv6: true,
			Options: map[string]string{"com.docker.network.driver.mtu": "1400", "a": "b=c"}, Labels: map[string]string{"tier": "back", "bare": ""},
		},
		"connect be web": api.Connection{Attach: api.Attach{Network: "be"}, Sandbox: "web"},
		"connect --ip 172.30.0.5 --ip6 fd00:1::5 --alias db --alias db2 be web": api.Connection{Sandbox: "web", Attach: api.Attach{
			Network: "be", IP4: addr("172.30.0.5"), IP6: addr("fd00:1::5"), Aliases: []string{"db", "db2"},
		}},
		"disconnect be web": api.Connection{Attach: api.Attach{Network: "be"}, Sandbox: "web"},
	} {
		out := w.must(append([]string{"network"}, strings.Fields(line)...)...)
		if strings.HasPrefix(line, "create") {
			assert.Equal(t, id("f1")+"\n", out)
		} else {
			assert.Empty(t, out)
		}
		assert.Equal(t, []any{want}, e.requests(), line)
	}

	assert.Equal(t, "be\nfe\n", w.must("network", "rm", "be", "fe"))
	assert.Equal(t, []any{api.Named{Name: "be"}, api.Named{Name: "fe"}}, e.requests())
	status, out, errs := w.run("network", "rm", "be", "busy", "fe")
	assert.Equal(t, 1, status)
	assert.Equal(t, "be\nfe\n", out, "one that fails does not stop the rest")
	assert.Equal(t, "bpfnet: network rm: network \"busy\": is used by web\n", errs)

	e.fail(map[string]error{"Disconnect": &api.UnknownError{What: "sandbox", Name: "web"}})
	assert.Equal(t, `bpfnet: network disconnect: sandbox "web": no such sandbox; no sandbox is known yet`, w.fails(1, "network", "disconnect", "be", "web"))
	assert.Empty(t, w.must("network", "disconnect", "-f", "be", "web"))
}

func TestSandboxWishes(t *testing.T) {
	w, e := newWorld(t), newEngine(t)
	defer w.serve(e)()
	base := api.SandboxSpec{Command: []string{"true"}, Dir: "/tmp", Env: []string{"PATH=/usr/bin:/bin", "A=1"}}
	with := func(change func(*api.SandboxSpec)) api.SandboxSpec {
		s := base
		change(&s)
		return s
	}
	for line, want := range map[string]api.SandboxSpec{
		"true":                  base,
		"-- true":               base,
		"true --rm -p 80 -- -x": with(func(s *api.SandboxSpec) { s.Command = []string{"true", "--rm", "-p", "80", "--", "-x"} }),
		"--name n --hostname h --rm true": with(func(s *api.SandboxSpec) {
			s.Name, s.Hostname, s.AutoRemove = "n", "h", true
		}),
		"--network fe --net be --ip 172.30.0.5 --ip6 fd00::5 --network-alias db --net-alias db2 true": with(func(s *api.SandboxSpec) {
			s.Networks = []api.Attach{
				{Network: "fe", IP4: addr("172.30.0.5"), IP6: addr("fd00::5"), Aliases: []string{"db", "db2"}}, {Network: "be"},
			}
		}),
		"--ip 172.17.0.9 true": with(func(s *api.SandboxSpec) {
			s.Networks = []api.Attach{{Network: "bpfnet", IP4: addr("172.17.0.9")}}
		}),
		"--net host true":             with(func(s *api.SandboxSpec) { s.Mode = "host" }),
		"--network none true":         with(func(s *api.SandboxSpec) { s.Mode = "none" }),
		"--network=container:db true": with(func(s *api.SandboxSpec) { s.Mode, s.Join = "container", "db" }),
		"--dns 9.9.9.9 --dns 2620:fe::fe true": with(func(s *api.SandboxSpec) {
			s.DNS = []netip.Addr{addr("9.9.9.9"), addr("2620:fe::fe")}
		}),
		"-P --expose 80 --expose 5000-5001/udp true": with(func(s *api.SandboxSpec) {
			s.PublishAll = true
			s.Expose = []api.PortSpec{{Proto: "tcp", Target: 80}, {Proto: "udp", Target: 5000}, {Proto: "udp", Target: 5001}}
		}),
		"-p 8080:80 -p 80 -p 0:81 -p 127.0.0.1::82/udp -p [fd00::1]:9000-9010:83/sctp -p 8000-8001:8000-8001 true": with(func(s *api.SandboxSpec) {
			s.Publish = []api.PortSpec{
				{Proto: "tcp", First: 8080, Last: 8080, Target: 80},
				{Proto: "tcp", Target: 80},
				{Proto: "tcp", Target: 81},
				{Proto: "udp", Host: addr("127.0.0.1"), Target: 82},
				{Proto: "sctp", Host: addr("fd00::1"), First: 9000, Last: 9010, Target: 83},
				{Proto: "tcp", First: 8000, Last: 8000, Target: 8000},
				{Proto: "tcp", First: 8001, Last: 8001, Target: 8001},
			}
		}),
	} {
		assert.Regexp(t, "^ab[0-9a-f]{2}0{60}\n$", w.must(append([]string{"create"}, strings.Fields(line)...)...))
		assert.Equal(t, []any{want}, e.requests(), line)
	}
}

// What cannot be read is an error of status 1, asks nobody, and says what is wanted.
func TestMalformedValues(t *testing.T) {
	const (
		publish  = "; want [IP:][HOST[-END]:]PORT[-END][/PROTO]"
		noOthers = ", which is no network of the sandbox's own; leave one of them out"
	)
	w, e := newWorld(t), newEngine(t)
	defer w.serve(e)()
	for line, want := range map[string]string{
		"network create --subnet 172.30.0.0/33 n":     `--subnet "172.30.0.0/33": want a subnet like 172.30.0.0/16 or fd00:1::/64`,
		"network create --subnet 172.30.0.0 n":        `--subnet "172.30.0.0": want a subnet like 172.30.0.0/16 or fd00:1::/64`,
		"network create --ip-range x n":               `--ip-range "x": want a subnet like 172.30.0.0/16 or fd00:1::/64`,
		"network create --gateway x n":                `--gateway "x": want an address like 172.30.0.2 or fd00:1::2`,
		"network create --gateway= n":                 `--gateway: empty address`,
		"network create --gateway fe80::1%eth0 n":     `--gateway "fe80::1%eth0": want an address like 172.30.0.2 or fd00:1::2`,
		"network create -o mtu n":                     `--opt "mtu": want KEY=VALUE`,
		"network create --label =x n":                 `--label "=x": want KEY=VALUE`,
		"network create --subnet x --gateway y n":     `--subnet "x": want a subnet like 172.30.0.0/16 or fd00:1::/64; --gateway "y": want an address like 172.30.0.2 or fd00:1::2`,
		"network connect --ip fd00::1 n s":            `--ip "fd00::1": want an IPv4 address like 172.30.0.2`,
		"network connect --ip6 1.2.3.4 n s":           `--ip6 "1.2.3.4": want an IPv6 address like fd00:1::2`,
		"network connect --ip6 ::ffff:1.2.3.4 n s":    `--ip6 "::ffff:1.2.3.4": want an IPv6 address like fd00:1::2`,
		"create --ip 300.1.1.1 true":                  `--ip "300.1.1.1": want an IPv4 address like 172.30.0.2`,
		"create --dns ns.example true":                `--dns "ns.example": want an address like 172.30.0.2 or fd00:1::2`,
		"create -p 80:http true":                      `--publish "80:http": invalid containerPort: http` + publish,
		"create -p 80: true":                          `--publish "80:": no port specified: 80:<empty>` + publish,
		"create -p 70000:80 true":                     `--publish "70000:80": invalid hostPort: 70000` + publish,
		"create -p 80:0 true":                         `--publish "80:0": no port is numbered 0` + publish,
		"create -p 0-9:80 true":                       `--publish "0-9:80": no port is numbered 0` + publish,
		"create -p localhost:80:80 true":              `--publish "localhost:80:80": invalid IP address: localhost` + publish,
		"create -p 80/quic true":                      `--publish "80/quic": invalid proto: quic` + publish,
		"create -p 1-2:1-3 true":                      `--publish "1-2:1-3": invalid ranges specified for container and host Ports: 1-3 and 1-2` + publish,
		"create --expose 80:80 true":                  `--expose "80:80": has no host port; want PORT[-END][/PROTO]`,
		"create --expose x true":                      `--expose "x": invalid containerPort: x; want PORT[-END][/PROTO]`,
		"create --network= true":                      `--network: empty name`,
		"create --network container: true":            `--network "container:": want container:NAME, with the name of a sandbox`,
		"create --network be --network host true":     `--network host: goes with no other network; want it alone`,
		"create --network host -p 80:80 true":         `--publish: not with --network host` + noOthers,
		"create --network none -P true":               `--publish-all: not with --network none` + noOthers,
		"create --network none --ip 1.2.3.4 true":     `--ip: not with --network none` + noOthers,
		"create --network host --ip6 fd00::1 true":    `--ip6: not with --network host` + noOthers,
		"create --net none --network-alias a true":    `--network-alias: not with --network none` + noOthers,
		"create --net container:x --hostname h true":  `--hostname: not with --network container:x` + noOthers,
		"create --net container:x --dns 9.9.9.9 true": `--dns: not with --network container:x` + noOthers,
		"run --ip x true":                             `--ip "x": want an IPv4 address like 172.30.0.2`,
		"publish web 80:x":                            `port "80:x": invalid containerPort: x` + publish,
		"unpublish web 80 x":                          `port "x": invalid containerPort: x` + publish,
	} {
		args := strings.Fields(line)
		verb := args[0]
		if verb == "network" {
			verb += " " + args[1]
		}
		assert.Equal(t, "bpfnet: "+verb+": "+want, w.fails(1, args...), line)
	}
	assert.Empty(t, e.requests())
}

func TestUsageOfSandboxes(t *testing.T) {
	for line, want := range map[string]string{
		"run":                           `run: missing COMMAND`,
		"run --":                        `run: missing COMMAND`,
		"run --wat true":                `run: unknown flag: --wat`,
		"run -it true":                  `run: unknown shorthand flag: 'i' in -it`,
		"create -d true":                `create: unknown shorthand flag: 'd' in -d`,
		"start":                         `start: missing NAME`,
		"start -a x y":                  `start: --attach: unexpected argument "y"; want one sandbox`,
		"stop":                          `stop: missing NAME`,
		"stop -t soon x":                `stop: invalid argument "soon" for "-t, --time" flag: strconv.ParseInt: parsing "soon": invalid syntax`,
		"wait":                          `wait: missing NAME`,
		"logs":                          `logs: missing NAME`,
		"logs a b":                      `logs: unexpected argument "b"`,
		"ps x":                          `ps: unexpected argument "x"`,
		"ps -o yaml":                    `ps: --output "yaml": want text or json`,
		"ps -q -o json":                 `ps: --quiet and --output json: want one of them`,
		"rm":                            `rm: missing NAME`,
		"exec":                          `exec: missing NAME and COMMAND`,
		"exec x":                        `exec: missing COMMAND`,
		"exec x --":                     `exec: missing COMMAND`,
		"port":                          `port: missing NAME`,
		"port a 80 81":                  `port: unexpected argument "81"`,
		"publish":                       `publish: missing NAME and PORTS`,
		"publish x":                     `publish: missing PORTS`,
		"unpublish x":                   `unpublish: missing PORTS`,
		"network create":                `network create: missing NAME`,
		"network create a b":            `network create: unexpected argument "b"`,
		"network ls a":                  `network ls: unexpected argument "a"`,
		"network ls -q --output=json":   `network ls: --quiet and --output json: want one of them`,
		"network inspect":               `network inspect: missing NAME`,
		"network rm":                    `network rm: missing NAME`,
		"network connect a":             `network connect: missing SANDBOX`,
		"network disconnect":            `network disconnect: missing NETWORK and SANDBOX`,
		"network connect a b c":         `network connect: unexpected argument "c"`,
		"network create --subnet":       `network create: flag needs an argument: --subnet`,
		"network disconnect -x net box": `network disconnect: unknown shorthand flag: 'x' in -x`,
	} {
		w := newWorld(t)
		command := strings.SplitN(want, ":", 2)[0]
		assert.Equal(t, "bpfnet: "+want+`; see "bpfnet `+command+` --help"`, w.fails(2, strings.Fields(line)...), line)
	}
}

func TestVerbsNeedADaemon(t *testing.T) {
	for _, line := range []string{
		"network create n", "network rm n", "network connect n s", "network disconnect n s", "create true", "run true", "start s",
		"start -a s", "stop s", "wait s", "rm s", "exec s true", "publish s 80", "unpublish s 80",
	} {
		w := newWorld(t)
		args := strings.Fields(line)
		verb := args[0]
		if verb == "network" {
			verb += " " + args[1]
		}
		assert.Equal(t, "bpfnet: "+verb+": the daemon is not running: nothing listens on "+w.socket()+
			`; start it with "bpfnet daemon", or name its socket with --socket`, w.fails(1, args...))
	}
}

func TestVerbs(t *testing.T) {
	w, e := newWorld(t), newEngine(t)
	defer w.serve(e)()
	w.must("create", "--name", "web", "true")
	w.must("create", "--name", "db", "true")
	e.requests()

	assert.Equal(t, "web\n", w.must("stop", "web"))
	assert.Equal(t, "web\ndb\n", w.must("stop", "-t", "3", "web", "db"))
	assert.Equal(t, []any{
		api.SandboxStop{Name: "web", Grace: 10 * time.Second}, api.SandboxStop{Name: "web", Grace: 3 * time.Second},
		api.SandboxStop{Name: "db", Grace: 3 * time.Second},
	}, e.requests())
	assert.Equal(t, `bpfnet: stop: sandbox "x": no such sandbox; no sandbox is known yet`, w.fails(1, "stop", "x"))

	e.set(func() { e.waits = 2 })
	assert.Equal(t, "5\n", w.must("wait", "web"))
	assert.Len(t, e.requests(), 3)
	assert.Equal(t, "5\n5\n", w.must("wait", "web", "db"))
	e.requests()

	ports := []api.PortSpec{{Proto: "tcp", First: 8080, Last: 8080, Target: 80}, {Proto: "udp", Target: 53}}
	assert.Equal(t, "80/tcp -> 0.0.0.0:8080\n80/tcp -> [::]:8080\n", w.must("publish", "web", "8080:80", "53/udp"))
	assert.Equal(t, []any{api.PortChange{Name: "web", Ports: ports}}, e.requests())
	assert.Equal(t, "80/tcp -> 0.0.0.0:8080\n", w.must("unpublish", "web", "8080:80", "53/udp"))
	assert.Equal(t, []any{api.PortChange{Name: "web", Ports: ports}}, e.requests())

	status, out, errs := w.run("rm", "-f", "web", "x", "db")
	assert.Equal(t, 1, status)
	assert.Equal(t, "web\ndb\n", out)
	assert.Equal(t, "bpfnet: rm: sandbox \"x\": no such sandbox; no sandbox is known yet\n", errs)
	assert.Equal(t, []any{api.SandboxRemoval{Name: "web", Force: true}, api.SandboxRemoval{Name: "db", Force: true}}, e.requests())
	require.Empty(t, e.boxes)
}

func TestRunnersNeedCapabilities(t *testing.T) {
	const netAdmin, sysAdmin = 1 << 12, 1 << 21
	for have, missing := range map[uint64]string{0: "CAP_SYS_ADMIN, CAP_NET_ADMIN", netAdmin: "CAP_SYS_ADMIN", sysAdmin: "CAP_NET_ADMIN"} {
		for _, line := range []string{"run true", "start x", "exec x true"} {
			w, e := newWorld(t), newEngine(t)
			stop := w.serve(e)
			w.may(have)
			args := strings.Fields(line)
			assert.Equal(t, "bpfnet: "+args[0]+": not permitted: missing "+missing+"; run this as root", w.fails(1, args...))
			assert.Empty(t, e.requests())
			stop()
		}
	}
}
