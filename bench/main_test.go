// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"testing"

	"github.com/bpfnet/bpfnet/internal/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
