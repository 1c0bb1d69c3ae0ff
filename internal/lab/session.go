// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
)

// Programs are the binaries that a session's labs use in place of what tests build.
type Programs struct {
	// Bpfnet is the daemon and its command line.
	Bpfnet string
	// Tool is a static binary that every image has as "labtool".
	Tool string
}

// given is set by Open.
var given Programs

// Session lets a command have labs outside of "go test". There is one in a process.
type Session struct {
	finish func(check bool) error
}

// Open prepares for labs, as [Main] does for the tests of a package. It needs root.
func Open(p Programs) (*Session, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("needs root: labs are made of network namespaces and loaded programs")
	}
	for _, path := range []string{p.Bpfnet, p.Tool} {
		if _, err := os.Stat(path); err != nil {
			return nil, err
		}
	}
	var err error
	if p.Bpfnet, err = filepath.Abs(p.Bpfnet); err != nil {
		return nil, err
	}
	if p.Tool, err = filepath.Abs(p.Tool); err != nil {
		return nil, err
	}
	given = p
	finish, err := prepare()
	if err != nil {
		return nil, err
	}
	return &Session{finish: finish}, nil
}

// Close looks for what the labs left behind, and names it in its error.
func (s *Session) Close() error { return s.finish(true) }

// Do calls f as a test is called: what f registers for cleanup runs when it is over, and a fatal
// failure ends it. The error tells all that failed. Log lines go to log. ctx is f's t.Context.
func (s *Session) Do(ctx context.Context, log io.Writer, f func(t testing.TB)) error {
	t := &host{ctx: ctx, log: log}
	t.guard(func() { f(t) })
	for len(t.cleanups) > 0 {
		last := t.cleanups[len(t.cleanups)-1]
		t.cleanups = t.cleanups[:len(t.cleanups)-1]
		t.guard(last)
	}
	return errors.Join(t.errs...)
}

// host is a testing.TB without "go test". What it does not have is nil in the embedded interface.
type host struct {
	testing.TB
	ctx      context.Context
	log      io.Writer
	cleanups []func()

	mu   sync.Mutex
	errs []error
}

// guard calls f on a goroutine of its own, which FailNow ends.
func (t *host) guard(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if r := recover(); r != nil {
				buf := make([]byte, 16<<10)
				t.fail(fmt.Errorf("panic: %v\n%s", r, buf[:runtime.Stack(buf, false)]))
			}
		}()
		f()
	}()
	<-done
}

func (t *host) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.errs = append(t.errs, err)
}

func (t *host) Name() string             { return "lab" }
func (t *host) Helper()                  {}
func (t *host) Context() context.Context { return t.ctx }
func (t *host) Cleanup(f func())         { t.cleanups = append(t.cleanups, f) }
func (t *host) Failed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.errs) > 0
}
func (t *host) Fail()                             { t.fail(errors.New("failed")) }
func (t *host) FailNow()                          { t.Fail(); runtime.Goexit() }
func (t *host) Log(args ...any)                   { fmt.Fprintln(t.log, args...) }
func (t *host) Logf(format string, args ...any)   { fmt.Fprintf(t.log, format+"\n", args...) }
func (t *host) Error(args ...any)                 { t.fail(errors.New(fmt.Sprint(args...))) }
func (t *host) Errorf(format string, args ...any) { t.fail(fmt.Errorf(format, args...)) }
func (t *host) Fatal(args ...any)                 { t.Error(args...); runtime.Goexit() }
func (t *host) Fatalf(format string, args ...any) { t.Errorf(format, args...); runtime.Goexit() }
func (t *host) Skip(args ...any)                  { t.Fatal(args...) }
func (t *host) Skipf(format string, args ...any)  { t.Fatalf(format, args...) }

func (t *host) TempDir() string {
	dir, err := os.MkdirTemp("", processTag+"-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
