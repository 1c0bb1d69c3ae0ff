// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A crowd is many flows at once, each of which says who it is with every message: "WHO/INDEX/NONCE NUMBER".
// crowd-serve answers with the address that it sees in front, and notices when another speaks over the
// same addresses and ports; crowd notices when an answer is another's, and when the address that is
// seen of a flow changes. The last message of a flow has "bye" in place of its number.

const (
	crowdLine  = 256 // bytes of a message, at most
	crowdBye   = "bye"
	crowdPause = time.Second / 4 // from round to round, at least
	crowdTries = 20              // of a datagram, one each half a second
)

// crowdServed is what crowd-serve prints. The lab package has the same fields in its CrowdServed.
type crowdServed struct {
	Flows    int `json:"flows"`    // that it has heard of
	Messages int `json:"messages"` // that it has answered
	Crossed  int `json:"crossed"`  // that came over another's addresses and ports
	Resets   int `json:"resets"`
}

type crowdServer struct {
	mu    sync.Mutex
	done  crowdServed
	names map[[2]netip.AddrPort]string // UDP: whose a pair of addresses is: ours, theirs
	conns map[net.Conn]bool
}

// crowdServe answers a crowd at some addresses, over TCP and UDP, until SIGTERM.
func crowdServe(ctx context.Context, args []string) error {
	f := newFlags("crowd-serve")
	if err := f.Parse(args); err != nil {
		return err
	}
	s := &crowdServer{names: make(map[[2]netip.AddrPort]string), conns: make(map[net.Conn]bool)}
	var all []io.Closer
	var work sync.WaitGroup
	for _, at := range f.Args() {
		l, err := net.Listen("tcp", at)
		if err != nil {
			return err
		}
		p, err := net.ListenPacket("udp", at)
		if err != nil {
			return err
		}
		u := p.(*net.UDPConn)
		roomy(u)
		all = append(all, l, u)
		work.Go(func() { s.accept(l, &work) })
		work.Go(func() { s.answer(u) })
	}
	if len(all) == 0 {
		return errors.New("nothing to serve: give ADDRESS:PORT")
	}
	ready()
	<-ctx.Done()
	for _, c := range all {
		c.Close()
	}
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	work.Wait()
	return printJSON(s.done)
}

func (s *crowdServer) accept(l net.Listener, work *sync.WaitGroup) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "accept:", err)
			continue
		}
		s.mu.Lock()
		s.conns[c] = true
		s.mu.Unlock()
		work.Go(func() {
			err := s.converse(c)
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.conns, c)
			c.Close()
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.done.Resets++
				fmt.Fprintf(os.Stderr, "%s: %v\n", c.RemoteAddr(), err)
			}
		})
	}
}

// converse answers one connection, all of whose messages must be of one flow. Its error says what ended it.
func (s *crowdServer) converse(c net.Conn) error {
	in := bufio.NewReaderSize(c, crowdLine)
	seen := unmap(c.RemoteAddr())
	name := ""
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return err
		}
		who, _, _ := strings.Cut(string(line), " ")
		s.note(name, who)
		name = who
		if _, err := fmt.Fprintf(c, "%s %s", seen, line); err != nil {
			return err
		}
	}
}

// note counts a message; known is whose the one before was, if there was one.
func (s *crowdServer) note(known, who string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done.Messages++
	if known == "" {
		s.done.Flows++
	} else if known != who {
		s.done.Crossed++
		fmt.Fprintf(os.Stderr, "%s speaks over the addresses of %s\n", who, known)
	}
}

func (s *crowdServer) answer(c *net.UDPConn) {
	here := c.LocalAddr().(*net.UDPAddr).AddrPort()
	buf := make([]byte, crowdLine)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "receive:", err)
			continue
		}
		from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		line := string(buf[:n])
		who, number, _ := strings.Cut(line, " ")
		s.noteDatagram([2]netip.AddrPort{here, from}, who, strings.TrimSpace(number) == crowdBye)
		_, _ = c.WriteToUDPAddrPort(fmt.Appendf(nil, "%s %s", from, line), from)
	}
}

func (s *crowdServer) noteDatagram(tuple [2]netip.AddrPort, who string, last bool) {
	s.mu.Lock()
	known := s.names[tuple]
	s.names[tuple] = who
	if last {
		delete(s.names, tuple)
	}
	s.mu.Unlock()
	s.note(known, who)
}

// crowdSummary is what crowd prints. The lab package has the same fields in its CrowdSummary.
type crowdSummary struct {
	Opened   int            `json:"opened"`   // flows
	Messages int            `json:"messages"` // whose answers came back
	Again    int            `json:"again"`    // datagrams that were sent once more
	Crossed  int            `json:"crossed"`  // answers that were another's
	Moved    int            `json:"moved"`    // flows that were seen with another address or port than before
	Lost     int            `json:"lost"`     // messages without an answer
	Resets   int            `json:"resets"`   // flows that ended with an error
	Own      int            `json:"own"`      // flows that were seen with the address and port that they have
	Refused  map[string]int `json:"refused"`  // flows that were not to be had, by call and error: "connect EADDRNOTAVAIL"
	Seen     map[string]int `json:"seen"`     // flows, by the address that they were seen with
	Some     []crowdSeen    `json:"some"`     // of the flows, the first to each destination
}

type crowdSeen struct {
	Network string `json:"network"`
	To      string `json:"to"`
	Seen    string `json:"seen"`
}

type crowd struct {
	who, nonce  string
	device      string
	locals      []netip.Addr
	ports       [][2]int
	unconnected bool

	mu    sync.Mutex
	next  int
	noted map[string]bool // what Some has
	sum   crowdSummary
}

// runCrowd opens flows to all destinations, says "ready" and how that went when all are there, and has all of
// them exchange messages, round after round, until SIGTERM; then once more. With --churn it
// replaces one after the other instead. It succeeds if nothing was lost, moved, reset or another's.
func runCrowd(ctx context.Context, args []string) error {
	f := newFlags("crowd")
	c := &crowd{noted: make(map[string]bool)}
	c.sum.Refused, c.sum.Seen = map[string]int{}, map[string]int{}
	networks := f.String("network", "tcp,udp", "`list` of tcp and udp")
	per := f.Int("flows", 1, "to each destination and by each network; with --churn: that are open at once, in all")
	workers := f.Int("workers", 16, "that open and exchange at once")
	churn := f.Bool("churn", false, "open and close until SIGTERM")
	f.StringVar(&c.who, "who", "", "`name` in all messages")
	f.StringVar(&c.device, "device", "", "bind sockets to it (SO_BINDTODEVICE)")
	locals := f.String("local", "", "`addresses` to bind to, one of which is taken for each flow; without one: all that there are")
	ports := f.String("ports", "", "bind to ports of these `ranges`: 1024-2047,3000-3999; without any the kernel chooses")
	f.BoolVar(&c.unconnected, "unconnected", false, "every second UDP socket is not connected")
	if err := f.Parse(args); err != nil {
		return err
	}
	for _, text := range strings.FieldsFunc(*locals, func(r rune) bool { return r == ',' }) {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return err
		}
		c.locals = append(c.locals, a)
	}
	for _, text := range strings.FieldsFunc(*ports, func(r rune) bool { return r == ',' }) {
		var r [2]int
		if _, err := fmt.Sscanf(text, "%d-%d", &r[0], &r[1]); err != nil || r[0] < 1 || r[1] < r[0] || r[1] > 65535 {
			return fmt.Errorf("--ports %s: want FIRST-LAST", text)
		}
		c.ports = append(c.ports, r)
	}
	var to []netip.AddrPort
	for _, text := range f.Args() {
		a, err := netip.ParseAddrPort(text)
		if err != nil {
			return err
		}
		to = append(to, a)
	}
	if len(to) == 0 {
		return errors.New("no destinations")
	}
	c.nonce = crand.Text()
	kinds := strings.Split(*networks, ",")
	if *churn {
		c.churn(ctx, kinds, to, *per, *workers)
	} else {
		c.stand(ctx, kinds, to, *per, *workers)
	}
	if err := printJSON(c.sum); err != nil {
		return err
	}
	if c.sum.Crossed+c.sum.Moved+c.sum.Lost+c.sum.Resets > 0 {
		return errors.New("not every flow had its own answers")
	}
	return nil
}

// stand opens all flows, and has them go on until the context ends.
func (c *crowd) stand(ctx context.Context, networks []string, to []netip.AddrPort, per, workers int) {
	type wanted struct {
		network string
		to      netip.AddrPort
	}
	var all []wanted
	for range per {
		for _, network := range networks {
			for _, a := range to {
				all = append(all, wanted{network, a})
			}
		}
	}
	flows := make([]*crowdFlow, len(all))
	inParallel(workers, len(all), func(i int) {
		if ctx.Err() == nil {
			flows[i] = c.open(ctx, all[i].network, all[i].to)
		}
	})
	c.standing()
	pause := time.NewTicker(crowdPause)
	defer pause.Stop()
	for last := false; !last; {
		select {
		case <-pause.C:
		case <-ctx.Done():
			last = true
		}
		inParallel(workers, len(flows), func(i int) {
			if f := flows[i]; f != nil && (last || ctx.Err() == nil) && !c.exchange(f, strconv.Itoa(f.number+1)) {
				flows[i] = nil
			}
		})
	}
	inParallel(workers, len(flows), func(i int) {
		if flows[i] != nil {
			c.close(flows[i])
		}
	})
}

// churn opens some flows, says so, and replaces one at a time until the context ends.
func (c *crowd) churn(ctx context.Context, networks []string, to []netip.AddrPort, open, workers int) {
	another := func() *crowdFlow {
		return c.open(ctx, networks[rand.IntN(len(networks))], to[rand.IntN(len(to))])
	}
	flows := make([]*crowdFlow, open)
	inParallel(workers, open, func(i int) { flows[i] = another() })
	c.standing()
	end := func(f *crowdFlow) {
		if f != nil && c.exchange(f, strconv.Itoa(f.number+1)) {
			c.close(f)
		}
	}
	var work sync.WaitGroup
	for share := range slices.Chunk(flows, max(open/workers, 1)) {
		work.Go(func() {
			for ctx.Err() == nil {
				i := rand.IntN(len(share))
				end(share[i])
				share[i] = another()
			}
			for _, f := range share {
				end(f)
			}
		})
	}
	work.Wait()
}

// standing says that all flows are open, and how that went.
func (c *crowd) standing() {
	ready()
	if err := printJSON(c.sum); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
}

// inParallel calls f with all numbers below n.
func inParallel(workers, n int, f func(i int)) {
	var work sync.WaitGroup
	next := make(chan int)
	for range workers {
		work.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	work.Wait()
}

type crowdFlow struct {
	conn   net.Conn
	in     *bufio.Reader // TCP
	name   string
	number int
	seen   string // how the server sees it
	owed   int    // UDP: datagrams without an answer so far
}

// open opens a flow and has it say its first message. Nil: there was none to be had.
func (c *crowd) open(ctx context.Context, network string, to netip.AddrPort) *crowdFlow {
	c.mu.Lock()
	c.next++
	index := c.next
	c.mu.Unlock()
	conn, err := c.dial(ctx, network, to, index)
	if err != nil {
		if ctx.Err() == nil {
			c.refused(err)
		}
		return nil
	}
	f := &crowdFlow{conn: conn, name: fmt.Sprintf("%s/%d/%s", c.who, index, c.nonce)}
	if network == "tcp" {
		f.in = bufio.NewReaderSize(conn, crowdLine)
	}
	c.mu.Lock()
	c.sum.Opened++
	c.mu.Unlock()
	if !c.exchange(f, "0") {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if a, err := netip.ParseAddrPort(f.seen); err == nil {
		c.sum.Seen[a.Addr().String()]++
	}
	if local, err := netip.ParseAddrPort(conn.LocalAddr().String()); err == nil {
		// What is not connected has no address, and its port.
		if seen, err := netip.ParseAddrPort(f.seen); err == nil && seen.Port() == local.Port() && (local.Addr().IsUnspecified() || seen.Addr() == local.Addr().Unmap()) {
			c.sum.Own++
		}
	}
	if key := network + " " + to.String(); !c.noted[key] {
		c.noted[key] = true
		c.sum.Some = append(c.sum.Some, crowdSeen{network, to.String(), f.seen})
	}
	return f
}

// refused counts a flow that was not to be had.
func (c *crowd) refused(err error) {
	what := cause(err)
	var call *os.SyscallError
	var errno syscall.Errno
	if errors.As(err, &errno) {
		what = unix.ErrnoName(errno)
	}
	if errors.As(err, &call) {
		what = call.Syscall + " " + what
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sum.Refused[what]++
}

func (c *crowd) dial(ctx context.Context, network string, to netip.AddrPort, index int) (net.Conn, error) {
	local := c.local(to.Addr())
	control := func(_, _ string, raw syscall.RawConn) error {
		var err error
		controlErr := raw.Control(func(fd uintptr) {
			if network == "tcp" { // a port may lead to many
				err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
			}
			if c.device != "" {
				err = errors.Join(err, os.NewSyscallError("setsockopt", unix.BindToDevice(int(fd), c.device)))
			}
		})
		return errors.Join(err, controlErr)
	}
	kind := map[bool]string{true: "4", false: "6"}[to.Addr().Is4()]
	if network == "udp" && c.unconnected && index%2 == 0 {
		p, err := (&net.ListenConfig{Control: control}).ListenPacket(ctx, "udp"+kind, local.String())
		if err != nil {
			return nil, err
		}
		return &loose{p.(*net.UDPConn), to}, nil
	}
	d := net.Dialer{Timeout: 30 * time.Second, Control: control}
	d.SetMultipathTCP(false)
	switch {
	case local.Port() == 0 && local.Addr().IsUnspecified(): // not bound: connect finds a port that is free towards there
	case network == "tcp":
		d.LocalAddr = net.TCPAddrFromAddrPort(local)
	default:
		d.LocalAddr = net.UDPAddrFromAddrPort(local)
	}
	return d.DialContext(ctx, network+kind, to.String())
}

// local is what a flow to that address is bound to.
func (c *crowd) local(to netip.Addr) netip.AddrPort {
	a := netip.IPv4Unspecified()
	if to.Is6() {
		a = netip.IPv6Unspecified()
	}
	var fit []netip.Addr
	for _, l := range c.locals {
		if l.Is4() == to.Is4() {
			fit = append(fit, l)
		}
	}
	if len(fit) > 0 {
		a = fit[rand.IntN(len(fit))]
	}
	port := 0
	if len(c.ports) > 0 {
		r := c.ports[rand.IntN(len(c.ports))]
		port = r[0] + rand.IntN(r[1]-r[0]+1)
	}
	return netip.AddrPortFrom(a, uint16(port))
}

// loose is a UDP socket that is not connected and speaks with one peer.
type loose struct {
	*net.UDPConn
	to netip.AddrPort
}

func (l *loose) Write(b []byte) (int, error) { return l.WriteToUDPAddrPort(b, l.to) }

func (l *loose) Read(b []byte) (int, error) {
	for {
		n, from, err := l.ReadFromUDPAddrPort(b)
		if err != nil || netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) == l.to {
			return n, err
		}
	}
}

// exchange sends a message and wants its answer. False: the flow is over, and closed.
func (c *crowd) exchange(f *crowdFlow, number string) bool {
	if n, err := strconv.Atoi(number); err == nil {
		f.number = n
	}
	answer, again, err := f.ask(f.name + " " + number + "\n")
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sum.Again += again
	seen, rest, _ := strings.Cut(answer, " ")
	// What a socket may not send is refused as what it may not connect to: it never was a flow.
	if errors.Is(err, syscall.EADDRNOTAVAIL) && f.seen == "" {
		c.sum.Opened--
		c.sum.Refused["sendto EADDRNOTAVAIL"]++
		f.conn.Close()
		return false
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		c.sum.Lost++
	case err != nil:
		c.sum.Resets++
	case rest != f.name+" "+number+"\n":
		c.sum.Crossed++
		err = fmt.Errorf("got %q", answer)
	case f.seen != "" && f.seen != seen:
		c.sum.Moved++
		err = fmt.Errorf("seen as %s", seen)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s %s %s, seen as %s, from %s to %s: %v\n", time.Now().Format(time.TimeOnly), f.name, number, f.seen, f.conn.LocalAddr(), f.conn.RemoteAddr(), err)
		f.conn.Close()
		return false
	}
	c.sum.Messages++
	f.seen = seen
	return true
}

// ask sends a line and waits for one. A datagram is sent again while nothing comes; answers to earlier ones of
// its own are passed over then.
func (f *crowdFlow) ask(line string) (answer string, again int, err error) {
	if f.in != nil {
		_ = f.conn.SetDeadline(time.Now().Add(crowdTries / 2 * time.Second))
		if _, err := io.WriteString(f.conn, line); err != nil {
			return "", 0, err
		}
		answer, err := f.in.ReadString('\n')
		return answer, 0, err
	}
	buf := make([]byte, 2*crowdLine)
	for ; again < crowdTries; again++ {
		if _, err := io.WriteString(f.conn, line); err != nil {
			return "", again, err
		}
		f.owed++
		_ = f.conn.SetReadDeadline(time.Now().Add(time.Second / 2))
		for {
			n, err := f.conn.Read(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return "", again, err
			}
			f.owed--
			answer := string(buf[:n])
			if _, rest, _ := strings.Cut(answer, " "); rest == line || !strings.HasPrefix(rest, f.name+" ") {
				return answer, again, nil
			}
		}
	}
	return "", again, os.ErrDeadlineExceeded
}

// close ends a flow. A datagram says so before, as nothing else would. Answers that are under way are waited for: the
// next who has the port could not tell them from its own.
func (c *crowd) close(f *crowdFlow) {
	if f.in == nil && !c.exchange(f, crowdBye) {
		return
	}
	_ = f.conn.SetReadDeadline(time.Now().Add(2 * time.Second))
	for buf := make([]byte, 2*crowdLine); f.owed > 0; f.owed-- {
		if _, err := f.conn.Read(buf); err != nil {
			break
		}
	}
	f.conn.Close()
}
