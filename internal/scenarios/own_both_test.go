// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root and a Docker Engine. Networks of Docker and of bpfnet's own on one host: isolated from each
// other until allowed, listed together, each engine's verbs for its own.
func TestOwnBesideDocker(t *testing.T) {
	l := lab.New(t, lab.Opts{})
	d := l.StartDocker(t, lab.DockerOpts{})
	b := l.StartBpfnet(t, d)
	w := newWorld(t, l, dockerEngine{d}, b)
	assert.Empty(t, w.empty.Belongings, "with Docker there, the default network waits for its first user")

	d.MustRun(t, "network", "create", "--ipv6", "--subnet", "fd00:d1::/64", "theirs")
	d.Serve(t, "--name", "whale", "--network", "theirs", "-p", "8080:80")
	d.Serve(t, "--name", "plain")
	b.MustCLI(t, "network", "create", "--ipv6", "--subnet", "fd00:e1::/64", "ours")
	b.Serve(t, "--name", "fish", "--network", "ours", "-p", "8081:80")
	b.Serve(t, "--name", "usual")
	w.ready(t, "whale", "theirs")
	whale, fish := d.NS(t, "whale"), b.NS(t, "fish")
	both := func(v4, v6 netip.Addr) []netip.Addr {
		require.True(t, v4.IsValid() && v6.IsValid())
		return []netip.Addr{v4, v6}
	}
	whaleAddrs, fishAddrs := both(d.Addrs(t, "whale", "theirs")), both(b.Addrs(t, "fish", "ours"))
	plain4, _ := d.Addrs(t, "plain", "bridge")
	usual4, _ := b.Addrs(t, "usual", "bpfnet")

	apart := func() {
		t.Helper()
		w.closed(t, whale, isolated, fishAddrs...)
		w.closed(t, fish, isolated, whaleAddrs...)
	}
	apart()
	w.closed(t, d.NS(t, "plain"), isolated, usual4)
	w.closed(t, b.NS(t, "usual"), isolated, plain4)

	b.MustCLI(t, "network", "allow", "theirs", "ours")
	open(t, whale, whaleAddrs, fishAddrs...)
	open(t, fish, fishAddrs, whaleAddrs...)
	for i := range whaleAddrs {
		assert.Equal(t, []int{63}, ttls(whale, fishAddrs[i], 1), "a routed hop")
		assert.Equal(t, []int{63}, ttls(fish, whaleAddrs[i], 1), "a routed hop")
	}
	w.closed(t, whale, isolated, usual4) // the pair, and no other
	b.Restart(t)
	open(t, fish, fishAddrs, whaleAddrs...)
	b.MustCLI(t, "network", "disallow", "ours", "theirs")
	apart()

	// Published ports are for everybody, the other engine's containers among them.
	for from, to := range map[*lab.NS]string{whale: "8081", fish: "8080"} {
		r := from.MustGet(t, addrPort(lab.Host4, to))
		assert.Contains(t, append(whaleAddrs, fishAddrs...), remote(t, r), "who the server saw")
	}
	assert.Equal(t, lab.Client4, remote(t, w.Client.MustGet(t, addrPort(lab.Host4, "8080"))))
	assert.Equal(t, lab.Client4, remote(t, w.Client.MustGet(t, addrPort(lab.Host4, "8081"))))

	// Listings have both, marked.
	sources := func(key string, args ...string) map[string]string {
		t.Helper()
		out := map[string]string{}
		for _, row := range rows(t, b.MustCLI(t, append(args, "-o", "json")...)) {
			out[row[key].(string)] = row["source"].(string)
		}
		return out
	}
	for name, source := range map[string]string{"theirs": "docker", "bridge": "docker", "ours": "bpfnet", "bpfnet": "bpfnet"} {
		assert.Equal(t, source, sources("name", "network", "ls")[name], name)
		assert.Regexp(t, `(?m)^.*\b`+name+`\b.*\b`+source+`\b`, b.MustCLI(t, "network", "ls"))
	}
	for name, source := range map[string]string{"whale": "docker", "plain": "docker", "fish": "bpfnet", "usual": "bpfnet"} {
		assert.Equal(t, source, sources("name", "ps")[name], name)
		assert.Regexp(t, `(?m)^.*\b`+name+`\b`, b.MustCLI(t, "ps"))
	}
	assert.Contains(t, b.MustCLI(t, "port", "whale"), "80/tcp -> 0.0.0.0:8080")
	assert.Equal(t, "theirs", b.InspectNetwork(t, "theirs").Name)
	assert.Len(t, b.InspectNetwork(t, "theirs").Containers, 1)

	// Verbs on what is Docker's are refused, and say whose they are to do; nothing changes.
	before := b.Belongings(t)
	for _, c := range []struct{ command, way string }{
		{"rm whale", "docker rm whale"},
		{"rm -f whale", "docker rm"},
		{"stop whale", "docker stop whale"},
		{"start whale", "docker start whale"},
		{"exec whale true", "docker exec whale"},
		{"logs whale", "docker logs whale"},
		{"wait whale", "docker wait whale"},
		{"publish whale 9090:80", "docker"},
		{"unpublish whale 8080:80", "docker"},
		{"network rm theirs", "docker network rm theirs"},
		{"network connect ours whale", "docker"},
		{"network connect theirs fish", "docker"},
		{"network disconnect theirs whale", "docker network disconnect theirs whale"},
		{"run --rm --network theirs -- true", "docker"},
		{"run --rm --network container:whale -- true", "docker"},
		{"network create theirs", `"theirs"`},
		{"network create bridge", `"bridge"`},
	} {
		_, err := b.CLI(strings.Fields(c.command)...)
		require.Error(t, err, c.command)
		assert.Contains(t, err.Error(), "exit status 1", c.command)
		assert.Contains(t, err.Error(), c.way, c.command)
		assert.Contains(t, strings.ToLower(err.Error()), "docker", c.command)
	}
	assert.Equal(t, before, b.Belongings(t))

	// Subnets and ports of Docker's are taken.
	subnet := strings.Fields(d.Inspect(t, "theirs", "{{range .IPAM.Config}}{{.Subnet}} {{end}}"))
	for _, s := range subnet {
		if strings.Contains(s, "fd00:d1") {
			s = "fd00:d1::/64"
		}
		args := []string{"network", "create", "--subnet", s, "clash"}
		if strings.Contains(s, ":") {
			args = append(args, "--ipv6")
		}
		_, err := b.CLI(args...)
		require.ErrorContains(t, err, "theirs", "the overlap is named")
	}
	_, err := b.CLI("run", "--rm", "-p", "8080:80", "--", "true")
	require.ErrorContains(t, err, "whale")
	_, err = d.Run("run", "-d", "--rm", "-p", "8081:80", lab.Image, "sleep", "100")
	require.ErrorContains(t, err, "8081", "Docker meets the reservation")

	// Docker asks nobody, and makes a network of a name that bpfnet has: from then on it is said which.
	d.MustRun(t, "network", "create", "ours")
	d.Serve(t, "--name", "late", "--network", "ours")
	w.ready(t, "late", "ours")
	_, err = b.CLI("network", "allow", "ours", "theirs")
	require.ErrorContains(t, err, "docker/ours")
	require.ErrorContains(t, err, "bpfnet/ours")
	late4, _ := d.Addrs(t, "late", "ours")
	b.MustCLI(t, "network", "allow", "bpfnet/ours", "theirs")
	open(t, fish, fishAddrs, whaleAddrs[0])
	w.closed(t, d.NS(t, "late"), isolated, whaleAddrs[0])
	b.MustCLI(t, "network", "allow", "docker/ours", "bpfnet/ours")
	open(t, fish, fishAddrs, late4)
	b.MustCLI(t, "network", "disallow", "docker/ours", "bpfnet/ours")
	b.MustCLI(t, "network", "disallow", "bpfnet/ours", "theirs")
	w.closed(t, fish, isolated, late4)
	apart()

	// Docker's ups and downs are not ours.
	stay := converse(t, w.Client, addrPort(lab.Host4, "8081"))
	d.Restart(t)
	stay.say(t, "hello")
	b.MustGet(t, "fish", addrPort(fishAddrs[0], "80"))
	b.MustCLI(t, "rm", "-f", "fish", "usual")
	b.MustCLI(t, "network", "rm", "bpfnet/ours")
}
