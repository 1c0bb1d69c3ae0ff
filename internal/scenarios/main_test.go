// SPDX-License-Identifier: Apache-2.0

// Package scenarios runs what users do, literally, against a real Docker Engine with iptables off and
// bpfnet as its data path. Needs root.
package scenarios

import (
	"testing"

	"github.com/bpfnet/bpfnet/internal/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
