// SPDX-License-Identifier: Apache-2.0

// Package bench measures the container data path, bpfnet's against what it replaces.
//
// A [Group] builds its labs and says what is to be measured in them: one [Probe] for each mode, path
// and metric. [Run] takes samples in turn (A B C A B C …), those of rr and crr in slices of 20 ms, so that
// whatever else the machine does falls on all modes alike, and makes a [Record] of each. Only ratios within one group
// are worth quoting: the modes of a group shared the machine.
//
// The package knows namespaces, engines and sockets by internal/lab. It knows nothing of maps or
// programs: what bpfnet does is measured from outside.
package bench
