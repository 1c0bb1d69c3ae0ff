// SPDX-License-Identifier: Apache-2.0

package embedded

import (
	"os/exec"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A verb may hold a process whose run ends meanwhile by the runner's word, before the kernel's: there is
// nothing to kill any more, and no error.
func TestKillLetGo(t *testing.T) {
	cmd := exec.Command("/bin/cat")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	p, err := identify(cmd.Process.Pid)
	require.NoError(t, err)
	assert.True(t, p.lives())
	p.close()
	assert.False(t, p.lives())
	require.NoError(t, p.kill())
	require.NoError(t, in.Close())
	require.NoError(t, cmd.Wait(), "left alone")
}
