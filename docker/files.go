// SPDX-License-Identifier: Apache-2.0

package docker

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/bpfnet/bpfnet/policy"
)

// hostConfig is what is read of containers/ID/hostconfig.json below the Engine's root. The
// Engine replaces the file atomically; it is there before the container's first endpoint.
type hostConfig struct {
	PortBindings map[string][]struct {
		HostIP   string `json:"HostIp"`
		HostPort string
	}
}

// containerConfig is what is read of containers/ID/config.v2.json.
type containerConfig struct {
	Config struct {
		Labels map[string]string
	}
}

// readWish reads what a container asked for. The API would tell too, but waits for the
// container's lock, which is held until its process runs: too late for a port.
func readWish(root, id string) (wish, error) {
	if root == "" || id != filepath.Base(id) {
		return wish{}, fmt.Errorf("read configuration of container %q: no such directory", id)
	}
	dir := filepath.Join(root, "containers", id)
	var hc hostConfig
	if err := readJSON(filepath.Join(dir, "hostconfig.json"), &hc); err != nil {
		return wish{}, err
	}
	w := wish{fixed: fixedBindings(hc)}
	var cc containerConfig
	if err := readJSON(filepath.Join(dir, "config.v2.json"), &cc); err != nil {
		return w, err
	}
	w.allowed = parseAllowed(cc.Config.Labels[labelAllowed])
	return w, nil
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read container configuration: %w", err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("read container configuration %s: %w", path, err)
	}
	return nil
}

// fixedBindings returns the bindings with exactly one host port. Ephemeral ones and ranges are
// known when the Engine has chosen.
func fixedBindings(hc hostConfig) []binding {
	var out []binding
	for key, list := range hc.PortBindings {
		num, name, _ := strings.Cut(key, "/")
		target, err := strconv.ParseUint(num, 10, 16)
		if err != nil || target == 0 {
			continue
		}
		proto, err := policy.ParseProto(strings.ToLower(name))
		if err != nil {
			continue
		}
		for _, pb := range list {
			first, last, isRange := strings.Cut(pb.HostPort, "-")
			if isRange && first != last {
				continue
			}
			hp, err := strconv.ParseUint(first, 10, 16)
			if err != nil || hp == 0 {
				continue
			}
			b := binding{proto: proto, target: uint16(target), hostPort: uint16(hp)}
			if pb.HostIP != "" {
				if b.hostIP, err = netip.ParseAddr(pb.HostIP); err != nil {
					continue
				}
				b.hostIP = b.hostIP.Unmap()
			}
			out = append(out, b)
		}
	}
	return out
}
