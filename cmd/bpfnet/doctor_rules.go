// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/bpfnet/bpfnet/doctor"
)

// How long the tools of others may take, one and all of them together: a ruleset of a hundred thousand
// rules takes two seconds.
const (
	commandTimeout  = 5 * time.Second
	commandsTimeout = 15 * time.Second
)

// run runs a tool of others and returns what it prints.
func (g *gatherer) run(name string, args ...string) ([]byte, error) {
	if g.deadline.IsZero() {
		g.deadline = time.Now().Add(commandsTimeout)
	}
	left := min(commandTimeout, time.Until(g.deadline))
	ctx, cancel := context.WithTimeout(g.ctx, left)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	err := cmd.Run()
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return nil, fmt.Errorf("%s: no answer within %v", filepath.Base(name), max(left, 0).Round(100*time.Millisecond))
	case err != nil:
		return nil, fmt.Errorf("%s: %w: %s", filepath.Base(name), err, oneLine(strings.TrimSpace(stderr.String())))
	}
	return stdout.Bytes(), nil
}

// findTool looks for a tool, also where a user's PATH does not lead.
func findTool(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

// rules reads netfilter's rules by all tools that there are: nft for its own, iptables for those that it
// keeps in nft's or its old place, whose matches nft does not know.
func (g *gatherer) rules() {
	rs := &g.f.Rules
	var problems []string
	problem := func(err error) { problems = append(problems, oneLine(err.Error())) }
	iptables := make(map[string]bool) // "ip filter": tables that iptables lists
	for _, x := range []struct{ save, tool, family, legacyTables string }{
		{"iptables-save", "iptables", "ip", "ip_tables_names"},
		{"ip6tables-save", "ip6tables", "ip6", "ip6_tables_names"},
		{"iptables-legacy-save", "iptables-legacy", "ip", "ip_tables_names"},
		{"ip6tables-legacy-save", "ip6tables-legacy", "ip6", "ip6_tables_names"},
	} {
		path := findTool(x.save)
		if path == "" {
			continue
		}
		version, err := g.run(path, "--version")
		if err != nil {
			problem(err)
			continue
		}
		legacy := !bytes.Contains(version, []byte("nf_tables"))
		if legacy {
			// Asking for tables that are not there would load modules. And the plain command may be the
			// legacy one itself.
			if read("/proc/self/net/"+x.legacyTables) == "" || strings.Contains(x.tool, "legacy") && g.plainIsLegacy(x.save) {
				rs.Read = true
				continue
			}
		}
		out, err := g.run(path)
		if err != nil {
			problem(err)
			continue
		}
		rs.Read = true
		for _, c := range doctor.ParseIPTables(x.tool, x.family, string(out)) {
			rs.Chains = append(rs.Chains, c)
			if !legacy {
				iptables[x.family+" "+c.Table] = true
			}
		}
	}
	nft := findTool("nft")
	if nft == "" {
		if !rs.Read {
			rs.Why = strings.Join(append([]string{"neither nft nor iptables-save is there to read the rules with"}, problems...), "; ")
		}
		return
	}
	out, err := g.run(nft, "-j", "list", "ruleset")
	var devices []byte
	if err == nil {
		devices, err = g.run(nft, "list", "chains")
	}
	var chains []*doctor.Chain
	if err == nil {
		chains, err = doctor.ParseNFT(out, devices)
	}
	if err != nil {
		rs.Read, rs.Why = false, strings.Join(append(problems, oneLine(err.Error())), "; ")
		return
	}
	rs.Read = true
	for _, c := range chains {
		if !iptables[c.Family+" "+c.Table] {
			rs.Chains = append(rs.Chains, c)
		}
	}
}

// plainIsLegacy reports whether iptables-save is what iptables-legacy-save is, and has been asked.
func (g *gatherer) plainIsLegacy(legacySave string) bool {
	path := findTool(strings.Replace(legacySave, "-legacy", "", 1))
	if path == "" {
		return false
	}
	version, err := g.run(path, "--version")
	return err == nil && !bytes.Contains(version, []byte("nf_tables"))
}
