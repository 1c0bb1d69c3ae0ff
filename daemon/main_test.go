// SPDX-License-Identifier: Apache-2.0

package daemon_test

import (
	"testing"

	"github.com/bpfnet/bpfnet/internal/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
