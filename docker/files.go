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
	Links []string // "container:alias"
}

// containerConfig is what is read of containers/ID/config.v2.json.
type containerConfig struct {
	Name   string // with a slash before it
	Config struct {
		Labels       map[string]string
		ExposedPorts map[string]struct{}
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
	w := wish{known: true, fixed: fixedBindings(hc), asked: askedBindings(hc), anywhere: anywhereBindings(hc), links: linkedNames(hc.Links)}
	var cc containerConfig
	if err := readJSON(filepath.Join(dir, "config.v2.json"), &cc); err != nil {
		return w, err
	}
	w.name = strings.TrimPrefix(cc.Name, "/")
	w.allowed = parseAllowed(cc.Config.Labels[labelAllowed])
	for key := range cc.Config.ExposedPorts {
		if proto, port, ok := parsePort(key); ok {
			w.exposed = append(w.exposed, exposed{proto, port})
		}
	}
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

// parsePort reads a container's port: "80/tcp".
func parsePort(s string) (policy.Proto, uint16, bool) {
	num, name, _ := strings.Cut(s, "/")
	port, err := strconv.ParseUint(num, 10, 16)
	if err != nil || port == 0 {
		return 0, 0, false
	}
	proto, err := policy.ParseProto(strings.ToLower(name))
	return proto, uint16(port), err == nil
}

// anywhereBindings returns the bindings that name 0.0.0.0 or [::] themselves, with the host's port where
// there is exactly one.
func anywhereBindings(hc hostConfig) map[binding]bool {
	out := make(map[binding]bool)
	for key, list := range hc.PortBindings {
		proto, target, ok := parsePort(key)
		for _, pb := range list {
			a, err := netip.ParseAddr(pb.HostIP)
			if !ok || err != nil || !a.IsUnspecified() {
				continue
			}
			hp, err := strconv.ParseUint(pb.HostPort, 10, 16)
			if err != nil {
				hp = 0
			}
			out[binding{proto: proto, target: target, hostIP: a, hostPort: uint16(hp)}] = true
		}
	}
	return out
}

// linkedNames are the containers of links, which read "name:alias", or "/name:/own-name/alias".
func linkedNames(links []string) []string {
	var out []string
	for _, l := range links {
		name, _, _ := strings.Cut(l, ":")
		if name = strings.TrimPrefix(name, "/"); name != "" {
			out = append(out, name)
		}
	}
	return out
}

// askedBindings returns all bindings as they were asked for. What cannot be read is left out, as the
// Engine would have refused it.
func askedBindings(hc hostConfig) []asked {
	var out []asked
	for key, list := range hc.PortBindings {
		proto, target, ok := parsePort(key)
		if !ok {
			continue
		}
		for _, pb := range list {
			a := asked{proto: proto, target: target, last: 65535}
			if pb.HostIP != "" {
				var err error
				if a.hostIP, err = netip.ParseAddr(pb.HostIP); err != nil {
					continue
				}
				a.hostIP = a.hostIP.Unmap()
			}
			first, last, isRange := strings.Cut(pb.HostPort, "-")
			if !isRange {
				last = first
			}
			if n, err := strconv.ParseUint(first, 10, 16); err == nil && n != 0 {
				a.first, a.last = uint16(n), uint16(n)
			}
			if n, err := strconv.ParseUint(last, 10, 16); err == nil && n != 0 {
				a.last = uint16(n)
			}
			out = append(out, a)
		}
	}
	return out
}

// fixedBindings returns the bindings with exactly one host port. Ephemeral ones and ranges are
// known when the Engine has chosen.
func fixedBindings(hc hostConfig) []binding {
	var out []binding
	for key, list := range hc.PortBindings {
		proto, target, ok := parsePort(key)
		if !ok {
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
			b := binding{proto: proto, target: target, hostPort: uint16(hp)}
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
