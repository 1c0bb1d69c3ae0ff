// SPDX-License-Identifier: Apache-2.0

package bench

// Groups are all that there are, in the order of a run.
func Groups() []Group {
	var all []Group
	for _, scenario := range trafficScenarios {
		all = append(all, trafficGroup(scenario))
	}
	all = append(all, portsGroup(), networksGroup(), endpointsGroup(), flowsGroup())
	all = append(all, hostOnlyGroup(), watchedGroup(), memoryGroup())
	all = append(all, enginesGroup(), crowdGroup(), restartGroup(), dropGroup(), floodGroup())
	return all
}
