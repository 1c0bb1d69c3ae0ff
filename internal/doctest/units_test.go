// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The units are what systemd takes without complaint, with each other and with the Engine's.
func TestUnits(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze")
	}
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	}
	unit := read(t, "packaging/bpfnet.service")
	// The program itself need not be installed.
	require.Contains(t, unit, "ExecStart=/usr/bin/bpfnet daemon\n")
	write("bpfnet.service", strings.Replace(unit, "ExecStart=/usr/bin/bpfnet", "ExecStart=/bin/true", 1))
	write("docker.service", "[Unit]\nDescription=the Engine\nRequires=docker.socket\nAfter=docker.socket\n[Service]\nType=notify\nExecStart=/bin/true\n")
	write("docker.socket", "[Socket]\nListenStream=/run/docker.sock\n[Install]\nWantedBy=sockets.target\n")
	write("docker.service.d/bpfnet.conf", read(t, "packaging/docker.service.d/bpfnet.conf"))
	verify := func() string {
		cmd := exec.Command(analyze, "verify", "--man=no", "docker.service", "bpfnet.service")
		cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
		out, err := cmd.CombinedOutput()
		if err != nil {
			return err.Error() + "\n" + string(out)
		}
		return string(out)
	}
	assert.Empty(t, mentions(verify(), "bpfnet", "docker", "cycle"))

	// What it would say.
	write("docker.service.d/bpfnet.conf", "[Unit]\nAfterwards=bpfnet.service\n")
	assert.NotEmpty(t, mentions(verify(), "bpfnet", "docker"))
}

// mentions are the lines that hold one of the words: other units of the machine are no matter of ours.
func mentions(text string, words ...string) []string {
	var out []string
	for line := range strings.Lines(text) {
		for _, w := range words {
			if strings.Contains(line, w) {
				out = append(out, strings.TrimSpace(line))
				break
			}
		}
	}
	return out
}
