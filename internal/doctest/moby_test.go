// SPDX-License-Identifier: Apache-2.0

package doctest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// mobyTests are the tests of moby's suite that docs/moby-tests.md must tell of.
var mobyTests = strings.Fields(`
	TestPortMappedHairpinTCP TestPortMappedHairpinUDP TestProxy4To6 TestAccessPublishedPortFromHost
	TestAccessPublishedPortFromRemoteHost TestAccessPublishedPortFromCtr TestRestartUserlandProxyUnder2MSL
	TestDirectRoutingOpenPorts TestAcceptFwMark TestRoutedNonGateway TestAccessPublishedPortFromAnotherNetwork
	TestDirectRemoteAccessOnExposedPort TestAllowDirectRemoteAccessOnExposedPort
	TestAccessPortPublishedOnLoopbackAddress TestMixAnyWithSpecificHostAddrs TestPortMappingOnDistinctLoopbackAddrs
	TestBridgeICC TestBridgeINC TestBridgeINCRouted TestAccessToPublishedPort TestInterNetworkDirectRouting
	TestInternalNwConnectivity TestGatewaySelection TestAdvertiseAddresses TestDropInForwardChain
	TestInternalNetworkDNS TestIsolated TestPublishedPortAlreadyInUse TestFirewalldReloadNoZombies TestLegacyLink
	TestPortMappingRestore TestHostIPv4BridgeLabel TestConntrackFlowsLeak TestDockerNetworkInternalMode`)

// Each has its row, and each test that a row names is there: the function, and in its file the subtest.
func TestMoby(t *testing.T) {
	require.Len(t, mobyTests, 34)
	tests := make(map[string]string) // top-level test: its file
	files, err := filepath.Glob(filepath.Join(root, "*", "*", "*_test.go"))
	require.NoError(t, err)
	more, err := filepath.Glob(filepath.Join(root, "*", "*_test.go"))
	require.NoError(t, err)
	for _, file := range append(files, more...) {
		src, err := os.ReadFile(file)
		require.NoError(t, err)
		for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`).FindAllSubmatch(src, -1) {
			tests[string(m[1])] = string(src)
		}
	}
	rows := make(map[string]bool)
	for line := range strings.Lines(read(t, "docs/moby-tests.md")) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) != 3 || !strings.HasPrefix(strings.TrimSpace(cells[0]), "Test") {
			continue
		}
		name, ours := strings.TrimSpace(cells[0]), strings.TrimSpace(cells[1])
		assert.False(t, rows[name], "%s: two rows", name)
		rows[name] = true
		if ours == "" {
			assert.NotEmpty(t, strings.TrimSpace(cells[2]), "%s: no test, and no reason", name)
			continue
		}
		top, sub, _ := strings.Cut(ours, "/")
		src, found := tests[top]
		assert.True(t, found, "%s: there is no test %s", name, top)
		assert.True(t, sub == "" || strings.Contains(src, `"`+sub+`"`), "%s: %s has no subtest %s", name, top, sub)
	}
	for _, name := range mobyTests {
		assert.True(t, rows[name], "%s has no row", name)
	}
	assert.Len(t, rows, len(mobyTests))
}
