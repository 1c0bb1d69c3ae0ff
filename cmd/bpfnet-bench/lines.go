// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// lines shows what is going on: on a terminal in one line, which is written anew, elsewhere in a line
// for each step.
type lines struct {
	f        *os.File
	terminal bool
	shown    bool
}

func newLines(f *os.File) *lines {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return &lines{f: f, terminal: err == nil}
}

func (l *lines) Write(b []byte) (int, error) {
	if !l.terminal {
		return l.f.Write(b)
	}
	line := strings.TrimSpace(string(b))
	if size, err := unix.IoctlGetWinsize(int(l.f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 1 {
		line = line[:min(len(line), int(size.Col)-1)]
	}
	l.shown = true
	fmt.Fprintf(l.f, "\r\033[K%s", line)
	return len(b), nil
}

// end takes the line away.
func (l *lines) end() {
	if l.shown {
		fmt.Fprint(l.f, "\r\033[K")
	}
	l.shown = false
}
