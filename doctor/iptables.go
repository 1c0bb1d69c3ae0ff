// SPDX-License-Identifier: Apache-2.0

package doctor

import (
	"strings"
)

// The hooks and priorities of iptables' chains (linux/netfilter_ipv4.h).
var (
	iptablesHooks = map[string]string{
		"PREROUTING": "prerouting", "INPUT": "input", "FORWARD": "forward", "OUTPUT": "output", "POSTROUTING": "postrouting",
	}
	iptablesPrio = map[string]int{"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}
)

// ParseIPTables reads what iptables-save prints. tool is the command that changes those rules, without
// "-save"; family is "ip" or "ip6". iptables prints its negations before what they negate.
func ParseIPTables(tool, family, text string) []*Chain {
	var out []*Chain
	byName := make(map[string]*Chain)
	table := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
			clear(byName)
		case strings.HasPrefix(line, ":"):
			f := strings.Fields(line[1:])
			if len(f) < 2 {
				continue
			}
			c := &Chain{Tool: tool, Family: family, Table: table, Name: f[0]}
			if f[1] != "-" {
				c.Hook, c.Policy, c.Prio = iptablesHooks[f[0]], strings.ToLower(f[1]), iptablesPrio[table]
				if table == "nat" && (f[0] == "INPUT" || f[0] == "POSTROUTING") {
					c.Prio = 100
				}
			}
			byName[f[0]] = c
			out = append(out, c)
		case strings.HasPrefix(line, "-A "):
			words := shellWords(line)
			if len(words) < 2 || byName[words[1]] == nil {
				continue
			}
			r := iptablesRule(words[2:])
			r.Text = line
			byName[words[1]].Rules = append(byName[words[1]].Rules, r)
		}
	}
	return out
}

// iptablesRule reads the words behind the chain's name.
func iptablesRule(words []string) Rule {
	var r Rule
	not := false
	fields := map[string]string{
		"-i": "iif", "-o": "oif", "-s": "saddr", "-d": "daddr", "-p": "proto",
		"--ctstate": "state", "--state": "state", "--dst-type": "dsttype", "--src-type": "srctype", "--pkt-type": "pkttype",
	}
	for i := 0; i < len(words); i++ {
		w := words[i]
		arg := ""
		if i+1 < len(words) {
			arg = words[i+1]
		}
		switch {
		case w == "!":
			not = true
			continue
		case w == "-m" || w == "--comment":
			i++
		case w == "-j" || w == "-g":
			r.Verdict = iptablesVerdict(w, arg)
			return r // what follows are the target's own options
		case fields[w] != "":
			r.Matches = append(r.Matches, Match{Field: fields[w], Not: not, Values: strings.Split(arg, ",")})
			i++
		case strings.HasPrefix(w, "-"):
			r.Matches = append(r.Matches, Match{Not: not})
			for i+1 < len(words) && !strings.HasPrefix(words[i+1], "-") && words[i+1] != "!" {
				i++
			}
		}
		not = false
	}
	return r
}

func iptablesVerdict(option, target string) Verdict {
	switch target {
	case "ACCEPT", "DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP":
		return Verdict{Kind: "accept"}
	case "DROP", "REJECT":
		return Verdict{Kind: "drop"}
	case "RETURN":
		return Verdict{Kind: "return"}
	case "LOG", "NFLOG", "MARK", "CONNMARK", "CT", "NOTRACK", "TCPMSS", "CHECKSUM", "TTL", "HL", "DSCP", "TOS", "CLASSIFY", "AUDIT", "TRACE", "SET", "ULOG", "RATEEST", "TEE", "SECMARK", "CONNSECMARK":
		return Verdict{}
	case "NFQUEUE", "QUEUE", "TPROXY", "SYNPROXY":
		return Verdict{Kind: "maybe"}
	}
	if option == "-g" {
		return Verdict{Kind: "goto", Target: target}
	}
	return Verdict{Kind: "jump", Target: target}
}

// shellWords splits a line of iptables-save, which quotes with " and escapes with \.
func shellWords(line string) []string {
	var out []string
	var word strings.Builder
	inWord, quoted := false, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && i+1 < len(line):
			i++
			word.WriteByte(line[i])
			inWord = true
		case c == '"':
			quoted = !quoted
			inWord = true
		case c == ' ' && !quoted:
			if inWord {
				out = append(out, word.String())
			}
			word.Reset()
			inWord = false
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if inWord {
		out = append(out, word.String())
	}
	return out
}
