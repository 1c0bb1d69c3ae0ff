// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"encoding/json"
	"io"
	"slices"
	"syscall"
	"testing"
)

// Talk is a "labtool talk" that runs: one socket that stays open.
type Talk struct {
	// First is how opening it went; for TCP with the server's first words.
	First Reply

	in  io.WriteCloser
	out *json.Decoder
	end func()
}

// Talk starts "labtool talk" in the namespace, and fails the test if its socket cannot be opened. The
// socket ends with the test.
func (n *NS) Talk(t testing.TB, args ...string) *Talk {
	t.Helper()
	cmd := n.command(n.lab.Tool, slices.Concat([]string{"talk"}, args)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	k := &Talk{in: in, out: json.NewDecoder(out)}
	ended := false
	k.end = func() {
		if ended {
			return
		}
		ended = true
		in.Close()
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait()
	}
	t.Cleanup(k.end)
	k.First = k.read(t)
	if k.First.Error != "" {
		t.Fatalf("in %s: talk %q: %+v", n.Name, args, k.First)
	}
	return k
}

// Say sends a message and returns what came back, within the time that --timeout gives.
func (k *Talk) Say(t testing.TB, text string) Reply {
	t.Helper()
	if _, err := io.WriteString(k.in, text+"\n"); err != nil {
		t.Fatal(err)
	}
	return k.read(t)
}

// Send sends a message and waits for nothing.
func (k *Talk) Send(t testing.TB, text string) Reply {
	t.Helper()
	return k.Say(t, "!"+text)
}

// Close closes the socket.
func (k *Talk) Close() { k.end() }

func (k *Talk) read(t testing.TB) (r Reply) {
	t.Helper()
	if err := k.out.Decode(&r); err != nil {
		t.Fatalf("labtool talk: %v", err)
	}
	if json.Unmarshal([]byte(r.Text), &r.View) != nil {
		r.View = View{}
	}
	return r
}
