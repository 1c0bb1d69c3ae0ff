// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"strings"
)

// morePorts is what iptables-save would say if the Engine had published other ports before one that it
// has published: that port's own lines, with another number. It comes last in its chains, which is the
// worst place.
func morePorts(save string, host, container uint16, others []uint16) (string, error) {
	hostIs := fmt.Sprintf(" --dport %d -j DNAT", host)
	containerIs := fmt.Sprintf(" --dport %d -j ", container)
	target := fmt.Sprintf(":%d", container)
	return multiplied(save, len(others), func(line string) bool {
		return strings.Contains(line, hostIs) || strings.Contains(line, containerIs)
	}, func(line string, i int) string {
		port := fmt.Sprint(others[i])
		if head, ok := strings.CutSuffix(line, target+"\n"); ok && strings.Contains(line, hostIs) {
			return strings.Replace(head, fmt.Sprintf(" --dport %d ", host), " --dport "+port+" ", 1) + ":" + port + "\n"
		}
		return strings.Replace(line, fmt.Sprintf(" --dport %d ", container), " --dport "+port+" ", 1)
	})
}

// wire is a network's bridge and subnet.
type wire struct{ bridge, subnet string }

// moreNetworks is what iptables-save would say if the Engine had made others beside a network that it has
// made: that network's own lines, with other names, where they stand.
func moreNetworks(save string, made wire, others []wire) (string, error) {
	bridge, subnet := " "+made.bridge+" ", " "+made.subnet+" "
	return multiplied(save, len(others), func(line string) bool {
		return strings.Contains(line, bridge)
	}, func(line string, i int) string {
		line = strings.ReplaceAll(line, bridge, " "+others[i].bridge+" ")
		return strings.ReplaceAll(line, subnet, " "+others[i].subnet+" ")
	})
}

// multiplied puts n copies before each line that matches.
func multiplied(save string, n int, match func(string) bool, copied func(line string, i int) string) (string, error) {
	var b strings.Builder
	found := false
	for line := range strings.Lines(strings.TrimRight(save, "\n") + "\n") {
		if strings.HasPrefix(line, "-A ") && match(line) {
			found = true
			for i := range n {
				b.WriteString(copied(line, i))
			}
		}
		b.WriteString(line)
	}
	if !found {
		return "", fmt.Errorf("the Engine's rules are not as expected: nothing to multiply in\n%s", save)
	}
	return b.String(), nil
}
