// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/doctor"
)

// A line a finding, the command that mends it below; JSON has the four words and no others.
func TestFindings(t *testing.T) {
	list := []doctor.Finding{
		{Check: "kernel", State: doctor.OK, Detail: "takes the programs"},
		{Check: "accept_ra", State: doctor.Broken, Detail: "up0 forwards", Fix: "sysctl -w a=2"},
		{Check: "firewall", State: doctor.Unknown, Detail: "no tool"},
	}
	var out strings.Builder
	require.NoError(t, writeFindings(&out, list))
	assert.Equal(t, `ok        kernel      takes the programs
broken    accept_ra   up0 forwards
                      fix: sysctl -w a=2
unknown   firewall    no tool
`, out.String())

	out.Reset()
	require.NoError(t, writeJSON(&out, list[1:2]))
	var back []map[string]string
	require.NoError(t, json.Unmarshal([]byte(out.String()), &back))
	assert.Equal(t, []map[string]string{{"check": "accept_ra", "state": "broken", "detail": "up0 forwards", "fix": "sysctl -w a=2"}}, back)
}

func TestDoctorRefuses(t *testing.T) {
	w := newWorld(t)
	assert.Contains(t, w.fails(statusUsage, "doctor", "-o", "yaml"), "want text or json")
	assert.Contains(t, w.fails(statusUsage, "doctor", "me"), `unexpected argument "me"`)
	w.may(0)
	assert.Equal(t, "bpfnet: doctor: not permitted: missing CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON; run this as root", w.fails(statusError, "doctor"))
}

func TestUnitOf(t *testing.T) {
	assert.Equal(t, "bpfnet.service", unitOf("0::/system.slice/bpfnet.service\n"))
	assert.Equal(t, "x.service", unitOf("1:name=systemd:/system.slice/x.service/sub\n"))
	assert.Empty(t, unitOf("0::/user.slice/user-0.slice/user@0.service/app.slice/vte.scope\n0::/\n"))
}

func TestMountsOf(t *testing.T) {
	mounts := "proc /proc proc rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\nbpf /mnt/a\\040b bpf rw 0 0\nshort\n"
	assert.Equal(t, []string{"/sys/fs/bpf", "/mnt/a b"}, mountsOf(mounts, "bpf"))
}
