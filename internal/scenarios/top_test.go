// SPDX-License-Identifier: Apache-2.0

package scenarios

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// Needs root. On a terminal, top shows containers of the real data path with rates that are not zero; keys sort, filter,
// pause and end it.
func TestTopLive(t *testing.T) {
	w := newOwnSite(t)
	w.sandbox(t, "web", "blue")
	w.sandbox(t, "peer", "blue")
	to, _ := w.b.Addrs(t, "web", "blue")
	w.b.NS(t, "peer").Start(t, "ping", "-q", "-i", "0.01", to.String())

	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	require.NoError(t, err)
	defer screen.Close()
	require.NoError(t, unix.IoctlSetPointerInt(int(screen.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(screen.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	defer tty.Close()
	require.NoError(t, unix.IoctlSetWinsize(int(screen.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 100}))
	cmd := w.b.Command(t.Context(), "top", "--interval", "200ms")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, tty, tty
	cmd.Env = append(cmd.Environ(), "TERM=xterm-256color", "NO_COLOR=1")
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })

	buf := make([]byte, 1<<16)
	// until reads what is drawn from now on, until it has the pattern. A screen that stands still draws nothing.
	until := func(pattern string) {
		t.Helper()
		re, got := regexp.MustCompile(pattern), strings.Builder{}
		lab.Eventually(t, 10*time.Second, pattern, func() bool {
			for {
				n, err := unix.Read(int(screen.Fd()), buf)
				if n <= 0 || err != nil {
					break
				}
				got.Write(buf[:n])
			}
			return re.MatchString(got.String())
		})
	}
	press := func(keys string) {
		t.Helper()
		_, err := unix.Write(int(screen.Fd()), []byte(keys))
		require.NoError(t, err)
	}
	// A hundred pings a second: RX and TX of some packets and bytes.
	until(`web +blue +[1-9][0-9.]* / [1-9]`)
	press("s")
	until(`packets[^,]`) // the order; with a comma it is the total
	press("/web\r")
	until(`1 of 2`)
	press("p")
	until(`PAUSED`)
	press("q")
	until(`\x1b\[\?1049l`)
	require.NoError(t, cmd.Wait())
}
