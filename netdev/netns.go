// SPDX-License-Identifier: Apache-2.0

package netdev

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// NetnsCookie returns the kernel's name for the calling thread's network namespace, which eBPF
// programs get from bpf_get_netns_cookie. It is never reused while the machine runs. It fails
// with unix.ENOPROTOOPT on kernels before 5.14.
func NetnsCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("read netns cookie: %w", err)
	}
	defer unix.Close(fd)
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	if err != nil {
		return 0, fmt.Errorf("read netns cookie (needs Linux 5.14): %w", err)
	}
	return cookie, nil
}
