// SPDX-License-Identifier: Apache-2.0

// Package doctest keeps the documentation true: it writes what can be written from the sources, and
// checks links and command lines in the rest.
//
// "go test ./internal/doctest -update" writes docs/generated anew.
package doctest
