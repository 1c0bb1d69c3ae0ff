// SPDX-License-Identifier: Apache-2.0

package relay

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/bpfnet/bpfnet/reserve"
)

// SocketName is the relay's socket in the state directory: unlike a runtime directory, that stays
// where it is as long as the relay can.
const SocketName = "relay.sock"

// askTimeout: a relay answers at once; one that is being started, when its program is loaded.
const askTimeout = 10 * time.Second

// KeeperOptions are a keeper's.
type KeeperOptions struct {
	Dir     string // of the relay's socket
	Cgroup  string // cgroup2 directory; the relay's own is in it
	Version string // of this program; a relay of another one is replaced
	// Held is another descriptor of a bound socket, where the port is held already. Optional.
	Held func(Key) (fd int, ok bool)
	// Lost is called when the relay has ended unasked: ports are to be applied again. Optional.
	Lost func()
	Log  *slog.Logger // optional
}

// Keeper starts a relay when there is something to relay, finds it again that an earlier daemon has
// started, and tells it what to serve. It is safe for concurrent use.
type Keeper struct {
	o KeeperOptions

	mu     sync.Mutex
	conn   *net.UnixConn // nil: no relay is known
	watch  *net.UnixConn // tells by its end that the relay has ended
	served map[Key]netip.AddrPort
	yields map[Key]bool  // given up for a while
	failed map[Key]error // could not be bound; tried again when asked to
	work   sync.WaitGroup
}

// NewKeeper finds a relay that runs. It starts none.
func NewKeeper(o KeeperOptions) *Keeper {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	k := &Keeper{o: o, failed: make(map[Key]error), yields: make(map[Key]bool)}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.find(); err != nil {
		k.o.Log.Warn("take the relay over", "err", err)
	}
	return k
}

// Close lets the relay run on.
func (k *Keeper) Close() {
	k.mu.Lock()
	k.forget()
	k.mu.Unlock()
	k.work.Wait()
}

// Has says whether the relay has the port's socket.
func (k *Keeper) Has(key Key) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, ok := k.served[key]
	return ok
}

// Served are the ports that the relay serves.
func (k *Keeper) Served() map[Key]bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.list()
}

// Apply has the relay serve these ports and no others. It returns which of them it serves, and why not
// the others. A port that could not be bound is tried again with the next call that says so. Where
// nothing has changed, nothing is done.
func (k *Keeper) Apply(want map[Key]netip.AddrPort, again bool) (served map[Key]bool, failed map[Key]error, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	err = k.apply(want, again)
	return k.list(), maps.Clone(k.failed), err
}

// list is Served. The caller holds k.mu.
func (k *Keeper) list() map[Key]bool {
	out := make(map[Key]bool, len(k.served))
	for key := range k.served {
		out[key] = true
	}
	for key := range k.yields {
		out[key] = true // still ours, as far as others are concerned
	}
	return out
}

// Yield gives up, until Resume, the sockets that only the relay holds: somebody else may be about to bind
// one of them, and who has a right to it is known a moment later. TCP connections go on.
func (k *Keeper) Yield() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var list []Port
	for key := range k.served {
		if k.o.Held != nil {
			if fd, ok := k.o.Held(key); ok {
				unix.Close(fd)
				continue
			}
		}
		list = append(list, Port{Key: key})
	}
	if len(list) == 0 {
		return nil
	}
	if _, err := k.ask(request{Op: opYield, Ports: list}, nil); err != nil {
		return err
	}
	for _, p := range list {
		k.yields[p.Key] = true
		delete(k.served, p.Key)
	}
	return nil
}

// Resume has the next Apply bind again what was yielded.
func (k *Keeper) Resume() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.yields)
}

func (k *Keeper) apply(want map[Key]netip.AddrPort, again bool) error {
	for key := range k.failed {
		if _, ok := want[key]; again || !ok {
			delete(k.failed, key)
		}
	}
	var remove, lead, add []Port
	for key := range k.served {
		if _, ok := want[key]; !ok {
			remove = append(remove, Port{Key: key})
		}
	}
	for key := range k.yields {
		if _, ok := want[key]; !ok {
			remove = append(remove, Port{Key: key})
		}
	}
	for key, target := range want {
		have, ok := k.served[key]
		switch {
		case k.yields[key]:
		case ok && have != target:
			lead = append(lead, Port{key, target})
		case !ok && k.failed[key] == nil:
			add = append(add, Port{key, target})
		}
	}
	if k.conn != nil && len(want) == 0 {
		return k.stop()
	}
	if len(remove) > 0 {
		if _, err := k.ask(request{Op: opRemove, Ports: remove}, nil); err != nil {
			return err
		}
		for _, p := range remove {
			delete(k.served, p.Key)
			delete(k.yields, p.Key)
		}
	}
	if len(lead) > 0 {
		if _, err := k.ask(request{Op: opLead, Ports: lead}, nil); err != nil {
			return err
		}
		for _, p := range lead {
			k.served[p.Key] = p.Target
		}
	}
	for part := range slices.Chunk(add, maxFiles) {
		if err := k.add(part); err != nil {
			return err
		}
	}
	return nil
}

// add binds ports and gives them to the relay, which is started if there is none.
func (k *Keeper) add(list []Port) error {
	var ports []Port
	var fds []int
	defer func() { closeFiles(fds) }()
	for _, p := range list {
		fd, err := k.bind(p.Key)
		if err != nil {
			k.failed[p.Key] = err
			continue
		}
		ports, fds = append(ports, p), append(fds, fd)
	}
	if len(ports) == 0 {
		return nil
	}
	if k.conn == nil {
		if err := k.start(); err != nil {
			return err
		}
	}
	if _, err := k.ask(request{Op: opAdd, Ports: ports}, fds); err != nil {
		return err
	}
	for _, p := range ports {
		k.served[p.Key] = p.Target
	}
	return nil
}

func (k *Keeper) bind(key Key) (int, error) {
	if k.o.Held != nil {
		if fd, ok := k.o.Held(key); ok {
			return fd, nil
		}
	}
	hold, err := reserve.Hold(key.Proto, key.Host)
	if err != nil {
		return -1, err
	}
	defer hold.Close()
	return hold.Dup()
}

// find connects to a relay that runs. One of another version is replaced, and goes on for the clients
// that it has. The caller holds k.mu.
func (k *Keeper) find() error {
	conn, err := dial(k.o.Dir)
	if conn == nil || err != nil {
		return err
	}
	if err := k.take(conn); err != nil {
		return err
	}
	a, err := k.ask(request{Op: opAsk}, nil)
	if err != nil {
		return err
	}
	for _, p := range a.State.Ports {
		k.served[p.Key] = p.Target
	}
	if a.State.Version == k.o.Version {
		return nil
	}
	return k.replace()
}

// replace starts another relay with the sockets of the one that runs.
func (k *Keeper) replace() error {
	old, ports := k.conn, k.served
	var list []Port
	for key, target := range ports {
		list = append(list, Port{key, target})
	}
	var given []Port
	var fds []int
	defer func() { closeFiles(fds) }()
	for part := range slices.Chunk(list, maxFiles) {
		a, got, err := exchange(old, request{Op: opTake, Ports: part}, nil, askTimeout)
		fds = append(fds, got...)
		if err != nil {
			return err
		}
		given = append(given, a.Ports...)
	}
	if len(given) != len(fds) {
		return fmt.Errorf("relay's socket: %d sockets for %d ports", len(fds), len(given))
	}
	k.unwatch()
	k.conn, k.served = nil, nil
	if len(given) > 0 {
		if err := k.start(); err != nil {
			old.Close()
			return err
		}
	}
	for i := 0; i < len(given); i += maxFiles {
		end := min(i+maxFiles, len(given))
		if _, err := k.ask(request{Op: opAdd, Ports: given[i:end]}, fds[i:end]); err != nil {
			old.Close()
			return err
		}
		for _, p := range given[i:end] {
			k.served[p.Key] = p.Target
		}
	}
	defer old.Close()
	if _, _, err := exchange(old, request{Op: opRetire}, nil, askTimeout); err != nil {
		return fmt.Errorf("end the former relay: %w", err)
	}
	return nil
}

// stop ends the relay: nothing is left to serve.
func (k *Keeper) stop() error {
	_, err := k.ask(request{Op: opStop}, nil)
	k.forget()
	return err
}

// take makes a connection the keeper's.
func (k *Keeper) take(conn *net.UnixConn) error {
	watch, err := dial(k.o.Dir)
	if err == nil && watch == nil {
		err = errors.New("the relay has ended")
	}
	if err != nil {
		conn.Close()
		return err
	}
	k.conn, k.watch, k.served = conn, watch, make(map[Key]netip.AddrPort)
	k.work.Go(func() {
		_, _ = watch.Read(make([]byte, 1)) // nothing is sent
		k.mu.Lock()
		lost := k.watch == watch
		if lost {
			k.forget()
		}
		k.mu.Unlock()
		if lost && k.o.Lost != nil {
			k.o.Log.Warn("the relay has ended unasked; it is started again")
			k.o.Lost()
		}
	})
	return nil
}

// forget lets go of the relay. The caller holds k.mu.
func (k *Keeper) forget() {
	k.unwatch()
	if k.conn != nil {
		k.conn.Close()
	}
	k.conn, k.served = nil, nil
	clear(k.yields)
}

func (k *Keeper) unwatch() {
	if k.watch != nil {
		k.watch.Close()
	}
	k.watch = nil
}

// ask is one exchange with the relay. After an error of the connection no relay is known.
func (k *Keeper) ask(q request, fds []int) (answer, error) {
	a, got, err := exchange(k.conn, q, fds, askTimeout)
	closeFiles(got)
	if err != nil {
		k.forget()
		return a, fmt.Errorf("ask the relay: %w", err)
	}
	if a.Error != "" {
		return a, fmt.Errorf("relay: %s", a.Error)
	}
	return a, nil
}

func exchange(c *net.UnixConn, q request, fds []int, within time.Duration) (a answer, got []int, err error) {
	_ = c.SetDeadline(time.Now().Add(within))
	if err := send(c, q, fds); err != nil {
		return a, nil, err
	}
	got, err = receive(c, &a)
	return a, got, err
}

// dial connects to the relay of a directory; nil: there is none.
func dial(dir string) (*net.UnixConn, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: filepath.Join(dir, SocketName), Net: "unix"})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, nil
	}
	return c, err
}

// Ask returns how the relay of a directory does; nil: there is none.
func Ask(dir string) (*State, error) { return AskWithin(dir, askTimeout) }

// AskWithin is Ask for those who cannot wait until a relay has started.
func AskWithin(dir string, within time.Duration) (*State, error) {
	c, err := dial(dir)
	if c == nil || err != nil {
		return nil, err
	}
	defer c.Close()
	a, got, err := exchange(c, request{Op: opAsk}, nil, within)
	closeFiles(got)
	if err != nil {
		return nil, fmt.Errorf("ask the relay: %w", err)
	}
	slices.SortFunc(a.State.Ports, func(a, b PortState) int { return a.Host.Compare(b.Host) })
	return &a.State, nil
}

// End ends the relay of a directory with its clients' connections, those that a former one of another
// version still serves too, and removes what is left of it. None is no error.
func End(dir, cgroup string) error {
	c, err := dial(dir)
	if err != nil {
		return err
	}
	if c != nil {
		_, got, err := exchange(c, request{Op: opStop}, nil, askTimeout)
		closeFiles(got)
		if err == nil {
			_, _ = c.Read(make([]byte, 1)) // until it has closed
		}
		c.Close()
	}
	if err := endCgroup(cgroup); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, SocketName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
