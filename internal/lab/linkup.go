// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// LinkUp is an interface that was set up.
type LinkUp struct {
	Ifindex int
	Peer    int // index of the other end of a pair, in that end's namespace
	At      time.Time
}

// LinkUps tells of every interface of the namespace that is set up from now on. It ends with the test.
func (n *NS) LinkUps(t testing.TB) <-chan LinkUp {
	t.Helper()
	ns, err := netns.GetFromPath(n.Path)
	if err != nil {
		t.Fatalf("open namespace %s: %v", n.Name, err)
	}
	defer ns.Close()
	updates := make(chan netlink.LinkUpdate, 64)
	done := make(chan struct{})
	err = netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{Namespace: &ns})
	if err != nil {
		t.Fatalf("watch links of %s: %v", n.Name, err)
	}
	ups := make(chan LinkUp, 64)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer close(ups)
		up := make(map[int]bool)
		for u := range updates {
			index, is := int(u.Index), u.Header.Type == unix.RTM_NEWLINK && u.IfInfomsg.Flags&unix.IFF_UP != 0
			if is && !up[index] {
				select {
				case ups <- LinkUp{Ifindex: index, Peer: u.Attrs().ParentIndex, At: time.Now()}:
				case <-done:
				}
			}
			up[index] = is
		}
	}()
	t.Cleanup(func() {
		close(done)
		<-ended
	})
	return ups
}
