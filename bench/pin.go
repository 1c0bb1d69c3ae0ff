// SPDX-License-Identifier: Apache-2.0

package bench

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// allowed are the CPUs that the process was started on, before it retires.
var allowed = func() (cpus []int) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return []int{0}
	}
	for cpu := 0; len(cpus) < set.Count(); cpu++ {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus
}()

// WorkCPU is where both ends of all traffic run, the last. Everything else keeps to the other CPUs.
func WorkCPU() int { return allowed[len(allowed)-1] }

// Retire keeps the calling process, and all that it starts from now on, off the working CPU. With one
// CPU there is no other.
func Retire() error {
	if len(allowed) == 1 {
		return nil
	}
	var others unix.CPUSet
	for _, cpu := range allowed[:len(allowed)-1] {
		others.Set(cpu)
	}
	return setCPUs("self", &others)
}

// setCPUs pins all threads of a process, and those that they start from then on.
func setCPUs(pid string, cpus *unix.CPUSet) error {
	// Threads inherit from those that start them: twice is enough for one that came in between.
	for range 2 {
		threads, err := os.ReadDir(filepath.Join("/proc", pid, "task"))
		if err != nil {
			return err
		}
		for _, thread := range threads {
			id, err := strconv.Atoi(thread.Name())
			if err != nil {
				return err
			}
			if err := unix.SchedSetaffinity(id, cpus); err != nil && err != unix.ESRCH {
				return fmt.Errorf("pin process %s: %w", pid, err)
			}
		}
	}
	return nil
}

// proxyNote tells where the Engine's proxies run, in the modes that have them.
var proxyNote = map[string]string{
	DockerProxy: "docker-proxy runs on any CPU, as the Engine starts it", ProxyPinned: "docker-proxy runs on the CPU of client and server",
}

// placeProxies lets the site's proxies run on these CPUs.
func (s *site) placeProxies(t testing.TB, cpus ...int) {
	t.Helper()
	pids, err := processesIn(s.lab.Host, "docker-proxy")
	if err != nil {
		t.Fatal(err)
	}
	if len(pids) == 0 {
		t.Fatal("no docker-proxy runs")
	}
	var set unix.CPUSet
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	for _, pid := range pids {
		if err := setCPUs(strconv.Itoa(pid), &set); err != nil {
			t.Fatal(err)
		}
	}
}

// Pinning says what runs where.
func Pinning() string {
	return fmt.Sprintf("client and server, iperf3 included: CPU %d; harness, engines, daemons: the other %d; docker-proxy: any, and in mode docker-proxy-pinned that of client and server. "+
		"Both ends are started by the harness and enter the namespaces and cgroups of containers and hosts: no seccomp profile, in no mode. "+
		"Congestion control reno; neighbours stay reachable; br_netfilter is on, as an Engine leaves it",
		WorkCPU(), len(allowed)-1)
}
