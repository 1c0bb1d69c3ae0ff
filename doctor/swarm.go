// SPDX-License-Identifier: Apache-2.0

package doctor

import "github.com/bpfnet/bpfnet/policy"

// gossipPort is where every node of a swarm listens; it cannot be changed.
const gossipPort = 7946

// checkSwarm tells a swarm's node what is served there, since its users cannot see it from the outside.
func checkSwarm(f *Facts) []Finding {
	for _, s := range f.Sockets {
		if s.Process.Name == "dockerd" && s.Proto == policy.TCP && s.Addr.Port() == gossipPort {
			return []Finding{notef("", "dockerd (process %d) is in a swarm: services that publish with mode=host are served as any container;"+
				" those with mode=ingress, the default, and overlay networks are not: publish with --publish mode=host,published=PORT,target=PORT", s.Process.PID)}
		}
	}
	return []Finding{okf("no Engine here is in a swarm")}
}
