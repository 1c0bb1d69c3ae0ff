// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

const composeFile = `version: "2.4"
services:
  db:
    image: lab
    command: labtool serve --tcp 27017
    ports:
      - 27017:27017
    networks:
      - mongo
  wait:
    image: lab
    command: sleep 1000
    networks:
      - mongo
networks:
  mongo:
    driver: bridge
`

// s01: a Compose file with a network of its own, a service with a published port, and one that
// waits for it.
func s01(t *testing.T, w *world) {
	d := w.engine.(dockerEngine)
	dir := filepath.Join(t.TempDir(), "tutorial") // gives the project its name
	require.NoError(t, os.Mkdir(dir, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "docker-compose.yml"), []byte(composeFile), 0o644))
	_, err := d.Compose(dir, "up", "-d")
	require.NoError(t, err)
	d.WaitLog(t, "tutorial_db_1", "ready")

	out, err := d.Compose(dir, "exec", "-T", "wait", "ping", "-c", "2", "db")
	require.NoError(t, err)
	assert.Equal(t, []int{64, 64}, ttlsIn(out), out)
	// 27017 is open by name.
	_, err = d.Compose(dir, "exec", "-T", "wait", "nc", "-w", "3", "db", "27017", "-e", "true")
	require.NoError(t, err)
	seen := d.MustGet(t, "tutorial_wait_1", "db:27017")
	assert.Equal(t, w.v4(t, "tutorial_wait_1", "tutorial_mongo"), remote(t, seen))

	r := w.Client.MustGet(t, addrPort(lab.Host4, "27017"))
	assert.Equal(t, lab.Client4, remote(t, r), "who the server saw")

	var list []struct {
		IPAM struct {
			Config []struct{ Subnet, Gateway string }
		}
		Containers map[string]struct{ Name, MacAddress, IPv4Address string }
	}
	require.NoError(t, json.Unmarshal([]byte(d.MustRun(t, "network", "inspect", "tutorial_mongo")), &list))
	require.Len(t, list, 1)
	require.Len(t, list[0].IPAM.Config, 1)
	subnet := netip.MustParsePrefix(list[0].IPAM.Config[0].Subnet)
	gateway := netip.MustParseAddr(list[0].IPAM.Config[0].Gateway)
	assert.True(t, subnet.Contains(gateway), "%v in %v", gateway, subnet)
	names := map[string]bool{}
	for _, c := range list[0].Containers {
		names[c.Name] = true
		assert.NotEmpty(t, c.MacAddress)
		p := netip.MustParsePrefix(c.IPv4Address)
		assert.Equal(t, subnet, p.Masked(), c.Name)
	}
	assert.Equal(t, map[string]bool{"tutorial_db_1": true, "tutorial_wait_1": true}, names)

	_, err = d.Compose(dir, "down", "--timeout", "1")
	require.NoError(t, err)
}
