// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Runs is how often something has run, and for how long in all.
type Runs struct {
	Count uint64
	Time  time.Duration
}

// CountRuns has the kernel count the runs of all programs of the machine, and their time, until it is
// closed. That itself takes time: on each run of each program.
func CountRuns() (io.Closer, error) {
	c, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		return nil, fmt.Errorf("count the runs of programs: %w", err)
	}
	return c, nil
}

// Runs are those of the programs that the daemon has attached, by name, as far as they were counted.
func (b *Bpfnet) Runs() (map[string]Runs, error) {
	all := make(map[string]Runs)
	seen := make(map[ebpf.ProgramID]bool)
	dir := filepath.Join(b.lab.BPFFS, "links")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		id, err := linkedProgram(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		if seen[id] { // attached to several devices
			continue
		}
		seen[id] = true
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			return nil, err
		}
		info, err := p.Info()
		stats, statsErr := p.Stats()
		p.Close()
		if err != nil {
			return nil, err
		}
		if statsErr != nil {
			return nil, statsErr
		}
		r := all[info.Name]
		all[info.Name] = Runs{Count: r.Count + stats.RunCount, Time: r.Time + stats.Runtime}
	}
	return all, nil
}

func linkedProgram(pin string) (ebpf.ProgramID, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return 0, fmt.Errorf("open link %s: %w", pin, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("link %s: %w", pin, err)
	}
	return info.Program, nil
}

// MapSize is what a map takes of the kernel's memory, and for how many entries it is made.
type MapSize struct {
	Bytes      uint64
	MaxEntries int
}

// MapSizes are those of the daemon's maps, by name.
func (b *Bpfnet) MapSizes() (map[string]MapSize, error) {
	all := make(map[string]MapSize)
	dir := filepath.Join(b.lab.BPFFS, "maps")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, e.Name()), nil)
		if err != nil {
			return nil, fmt.Errorf("open map %s: %w", e.Name(), err)
		}
		info, err := m.Info()
		m.Close()
		if err != nil {
			return nil, err
		}
		bytes, _ := info.Memlock()
		all[e.Name()] = MapSize{Bytes: bytes, MaxEntries: int(info.MaxEntries)}
	}
	return all, nil
}
