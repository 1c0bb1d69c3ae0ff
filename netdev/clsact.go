// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Our clsact filters have a priority and handle of their own, so that replacing or removing them
// touches nobody else's. A low priority number runs first.
const (
	filterPriority = 0xb9f
	filterHandle   = 0xb9f
)

// Clsact attaches programs by clsact filters (tc-bpf(8)), where the kernel has no tcx.
type Clsact struct{}

func filterParent(egress bool) uint32 {
	if egress {
		return netlink.HANDLE_MIN_EGRESS
	}
	return netlink.HANDLE_MIN_INGRESS
}

// AttachFilter puts the program on the device in direct-action mode, replacing an older filter of
// ours. It makes the clsact qdisc if there is none.
func (Clsact) AttachFilter(ifindex int, egress bool, fd int, name string) error {
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		},
		QdiscType: "clsact",
	}
	if err := netlink.QdiscAdd(qdisc); errors.Is(err, unix.EEXIST) {
		if err := checkClsact(ifindex); err != nil {
			return err
		}
	} else if err != nil {
		return fmt.Errorf("add clsact: %w", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: filterParent(egress), Handle: filterHandle,
			Protocol: unix.ETH_P_ALL, Priority: filterPriority,
		},
		Fd: fd, Name: name, DirectAction: true,
	}
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	return nil
}

// checkClsact refuses a device that has an ingress qdisc instead: there, what is meant for egress would
// take the place of what is for ingress, without an error.
func checkClsact(ifindex int) error {
	list, err := netlink.QdiscList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}})
	if err != nil {
		return fmt.Errorf("list qdiscs: %w", err)
	}
	for _, q := range list {
		if q.Attrs().LinkIndex == ifindex && q.Attrs().Parent == netlink.HANDLE_CLSACT && q.Type() == "ingress" {
			return errors.New("it has an ingress qdisc, where clsact has to be; take that away (tc qdisc del dev DEVICE ingress), and put its filters on clsact")
		}
	}
	return nil
}

// DetachFilter removes our filter and leaves the qdisc: others may use it. That there is none, or no
// device, is no error.
func (Clsact) DetachFilter(ifindex int, egress bool) error {
	filter := &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
		LinkIndex: ifindex, Parent: filterParent(egress), Handle: filterHandle,
		Protocol: unix.ETH_P_ALL, Priority: filterPriority,
	}}
	err := netlink.FilterDel(filter)
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) {
		return nil
	}
	return fmt.Errorf("remove filter: %w", err)
}

// HasFilter reports whether our filter is on the device; a missing device has none.
func (Clsact) HasFilter(ifindex int, egress bool) (bool, error) {
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}
	list, err := netlink.FilterList(link, filterParent(egress))
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) { // no clsact, or no device
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("list filters: %w", err)
	}
	for _, f := range list {
		if a := f.Attrs(); a.Priority == filterPriority && a.Handle == filterHandle {
			return true, nil
		}
	}
	return false, nil
}
