// SPDX-License-Identifier: Apache-2.0

package bench

// The scenarios of control: how long it takes until something can be used.
const (
	RunPorts  = "run-ports" // docker run with published ports; at: how many
	Ready     = "ready"     // docker network connect; at: endpoints that are there
	Churn     = "churn"     // containers started and stopped
	Reconcile = "reconcile" // start of the daemon; at: endpoints that are there
)
