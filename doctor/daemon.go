// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"fmt"
	"strings"
	"time"
)

// staleAfter is three of the daemon's own rounds: it writes the snapshot at least every minute.
const staleAfter = 3 * time.Minute

func checkDaemon(f *Facts) []Finding {
	d, s := f.Daemon, f.Snapshot
	switch {
	case d.Stopped != 0:
		return []Finding{brokenf(f.startDaemon(), "process %d is stopped by a signal: the network runs on, but what is started now gets none, and a network that is made now is guarded by nothing", d.Stopped)}
	case d.Err != nil:
		return []Finding{{State: Unknown, Detail: oneLine(d.Err.Error())}}
	case !d.Running && s == nil:
		return []Finding{notef(f.startDaemon(), "not running, and none has run here before")}
	case !d.Running:
		return []Finding{notef(f.startDaemon(), "not running, last news %s ago; the network runs on, but what is started now gets none", ago(f.Now, s.Written))}
	}
	var out []Finding
	if s != nil && s.PID != d.Status.PID {
		out = append(out, notef("", "process %d listens on the socket, but process %d wrote the state directory: do --socket and --state belong together?", d.Status.PID, s.PID))
	} else if s != nil && f.Now.Sub(s.Written) > staleAfter {
		out = append(out, notef(f.startDaemon(), "it answers, but has told nothing new for %s: it hangs, or cannot write to its state directory", ago(f.Now, s.Written)))
	}
	if d.Status.Version != f.Version {
		out = append(out, notef(f.startDaemon(), "version %s runs, this is %s", d.Status.Version, f.Version))
	}
	if s != nil {
		for _, src := range s.Sources {
			if src.Name == "docker" && !src.Connected {
				out = append(out, notef("systemctl start docker", "the Docker Engine does not answer it (%s); containers that it knows go on", src.Detail))
			}
		}
	}
	return one(out, "running, version %s, process %d", d.Status.Version, d.Status.PID)
}

// ago is an age in words, to the second.
func ago(now, t time.Time) string { return now.Sub(t).Round(time.Second).String() }

func checkState(f *Facts) []Finding {
	var out []Finding
	if f.StateErr != nil {
		// The store's own errors end with the command that moves the file away.
		text := oneLine(f.StateErr.Error())
		fix := ""
		if i := strings.LastIndex(text, ": "); i >= 0 {
			if j := strings.LastIndex(text, "mv "); j > i {
				text, fix = text[:i], text[j:]
			}
		}
		out = append(out, brokenf(fix, "%s", text))
	}
	if f.SnapshotErr != nil {
		out = append(out, notef(f.startDaemon(), "%s; the daemon writes it anew", oneLine(f.SnapshotErr.Error())))
	}
	if len(out) == 0 && f.Snapshot == nil && len(f.Pins) > 0 && !f.Daemon.Running {
		return []Finding{notef(f.ours("cleanup"), "%d programs are pinned below %s, but there is no state of the daemon that did so: they go on with what their maps hold", len(f.Pins), f.BPFFS)}
	}
	if f.Snapshot == nil {
		return one(out, "nothing is kept yet")
	}
	return one(out, "state file and snapshot can be read")
}

func checkEndpoints(f *Facts) []Finding {
	if f.Snapshot == nil {
		return []Finding{okf("none is known")}
	}
	var waiting []string
	for _, e := range f.Snapshot.Endpoints {
		if !e.Ready && f.suspect("endpoint %s", e.ID) {
			waiting = append(waiting, fmt.Sprintf("%s in %s (%s)", e.Name, e.Network, e.Why))
		}
	}
	if len(waiting) > 0 {
		return []Finding{notef(f.ours("status"), "not served yet: %s", some(waiting))}
	}
	return []Finding{okf("all %d are served", len(f.Snapshot.Endpoints))}
}

// The fills from which a map is worth a word, and from which there is no room for the next.
const (
	fillNote   = 0.80
	fillBroken = 0.99
)

func checkMaps(f *Facts) []Finding {
	var out []Finding
	for _, m := range f.Fill {
		share := float64(m.Entries) / float64(max(m.Max, 1))
		if share < fillNote {
			continue
		}
		fix, consequence := "", "what comes on top is not served"
		if m.Map == "syns4" || m.Map == "syns6" || m.Map == "frags" {
			out = append(out, notef("", "%s is %.0f %% full (%d of %d); the newest push out the oldest: a flood?", m.Map, 100*share, m.Entries, m.Max))
			continue
		}
		if m.Map == "flows4" || m.Map == "flows6" {
			// Two entries a flow; flows6 is half as large as flows4.
			flows := m.Max
			if m.Map == "flows6" {
				flows *= 2
			}
			fix, consequence = f.startDaemon("--flows", fmt.Sprint(flows)), "new flows are dropped when it is full"
		}
		text := fmt.Sprintf("%s is %.0f %% full (%d of %d); %s", m.Map, 100*share, m.Entries, m.Max, consequence)
		if share >= fillBroken {
			out = append(out, brokenf(fix, "%s", text))
		} else {
			out = append(out, notef(fix, "%s", text))
		}
	}
	if len(f.Fill) == 0 {
		return []Finding{okf("none is loaded")}
	}
	return one(out, "all have room")
}
