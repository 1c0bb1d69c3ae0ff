// SPDX-License-Identifier: Apache-2.0

// Package load is both ends of a measured exchange: servers and clients on blocking sockets and pinned
// threads, without the Go runtime's poller, so that one binary costs the same in every mode.
package load
