// SPDX-License-Identifier: Apache-2.0

package daemon

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
)

func TestNetworkNames(t *testing.T) {
	networks := []policy.Network{
		{Name: "bridge", Source: policy.SourceDocker},
		{Name: "bpfnet", Source: policy.SourceStore},
		{Name: "twice", Source: policy.SourceDocker},
		{Name: "twice", Source: policy.SourceStore},
	}
	for name, want := range map[string]string{
		"bridge": "docker/bridge", "docker/bridge": "docker/bridge", "bpfnet": "bpfnet/bpfnet",
		"docker/twice": "docker/twice", "bpfnet/twice": "bpfnet/twice",
	} {
		have, err := qualify(name, networks)
		require.NoError(t, err, name)
		assert.Equal(t, want, have)
	}
	_, err := qualify("twice", networks)
	require.EqualError(t, err, `network "twice": there are several of that name; say bpfnet/twice or docker/twice`)
	for _, name := range []string{"bridg", "bpfnet/bridge", "", "/bridge"} {
		_, err := qualify(name, networks)
		var unknown *api.UnknownError
		require.ErrorAs(t, err, &unknown, name)
		assert.Contains(t, unknown.Nearest, "bridge", "%q", name)
	}

	for qualified, want := range map[string]string{
		"docker/bridge": "bridge", "docker/twice": "docker/twice", "bpfnet/twice": "bpfnet/twice", "docker/gone": "gone",
		"bpfnet/bridge": "bpfnet/bridge", // gone, and its name is another's now
	} {
		assert.Equal(t, want, shortName(qualified, networks))
	}
}
