// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"
	"os"
	"strconv"
)

// Cookies finds the cookies of network namespaces, given by the numbers by which this one knows them
// (policy.Link.PeerNS), through the processes that are in them. A namespace that no process is in, or
// that ends meanwhile, is left out.
func (d *Devices) Cookies(ids map[int]bool) (map[int]uint64, error) {
	out := make(map[int]uint64, len(ids))
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for namespaces: %w", err)
	}
	seen := make(map[string]bool)
	for _, e := range entries {
		if len(out) == len(ids) {
			break
		}
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		path := "/proc/" + e.Name() + "/ns/net"
		name, err := os.Readlink(path)
		if err != nil || seen[name] {
			continue
		}
		seen[name] = true
		ns, err := OpenNetNS(path)
		if err != nil {
			continue // it has ended
		}
		id, cookie, err := d.cookieOf(ns, ids)
		ns.Close()
		if err != nil {
			return nil, err
		}
		if cookie != 0 {
			out[id] = cookie
		}
	}
	return out, nil
}

// cookieOf is 0 where the namespace is none of those asked for.
func (d *Devices) cookieOf(ns *os.File, ids map[int]bool) (id int, cookie uint64, err error) {
	if id, err = d.handle.GetNetNsIdByFd(int(ns.Fd())); err != nil || id < 0 || !ids[id] {
		return 0, 0, nil // it has no number here
	}
	err = inNetNS(ns, func() (err error) {
		cookie, err = NetnsCookie()
		return err
	})
	return id, cookie, err
}
