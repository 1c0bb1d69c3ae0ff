// SPDX-License-Identifier: Apache-2.0

// Package load is both ends of a measured exchange: servers and clients on blocking sockets and pinned
// threads, without the Go runtime's poller, so that one binary costs the same in every mode.
//
// # Workers
//
// [Main] is the command line of both ends. A server ("serve") says "ready" when it listens and ends with
// SIGTERM. A client is started for one window, prints one line of JSON, a [Result], and fails with the
// first exchange that fails: a number with errors in it is none. [Client] makes its arguments, and
// [Parse] reads its result.
//
//   - rr: one byte there and back, on one connection (or UDP socket), one exchange at a time.
//   - crr: connect, one byte there, one byte back, close.
//   - udp: small datagrams as fast as one thread sends them; the server counts.
//   - latency: rr with the time of each exchange, closed loop or at an offered rate.
//   - stream: iperf3, one or more flows, with the machine's algorithm of congestion control: BBR, which paces,
//     ends at a third of what Reno reaches on lo, so that the result names it.
//
// An offered rate is an open loop: exchanges are due at fixed times, and a latency is counted from when
// the exchange was due, not from when it was sent, so that a stall is seen by all that should have been
// sent meanwhile; one that is not sent by the end counts with the time that it has waited. Until an
// exchange is due the client sleeps, as the server may need the CPU that they share. What the timer takes
// to wake it is part of the figure, and the same in every mode.
//
// A datagram that the server's socket has no room for counts as lost, and its buffer holds what a sender
// can send while the server waits for its turn on a shared CPU.
//
// # What the runtime does meanwhile
//
// A measuring thread is locked and pinned, and calls the kernel past the scheduler, which therefore
// takes it for busy even while it waits in the kernel. There is no garbage collection, nothing is
// allocated in a loop, and the signals that ask for preemption are blocked in the thread. What remains
// of the runtime is one thread that looks around a hundred times a second, on any CPU.
//
// # Connections that close
//
// In crr the server closes first and the client waits for that, as netperf's TCP_CRR does: the port of
// a client is free at once, and TIME_WAIT is at the server, which takes the tuple's next SYN all the
// same. So neither ports nor the rate run out, whatever was measured before. All closing is by FIN: a
// RST would let connection tracking, ours and others', forget the connection early.
//
// Tuples come back only after the client has gone through all ports of its range, after about one
// second of crr: what was measured before then decides whether a tuple is new to connection tracking,
// in every mode alike. [Sysctls] let the table of TIME_WAIT sockets hold as many as there can be. With a
// full one, closing is cheaper, and the rate would tell how much was measured before.
//
// # CPU
//
// CPU time is that of the whole machine, all CPUs together, from the idle time in /proc/stat. That is
// told in hundredths of a second, so that a window is right to about 10 ms of busy time for each CPU
// that is at times idle; a CPU that never idles is exact.
package load
