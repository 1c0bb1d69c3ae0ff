// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"context"
	"errors"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// talk exchanges one message for each line of its standard input, all on one socket, and prints one reply
// each: how a socket fares that stays open. The first reply is that to opening it. For a line that begins
// with "!" nothing is received.
func talk(ctx context.Context, args []string) error {
	f := newFlags("talk")
	network := f.String("network", "tcp", "tcp, tcp4, tcp6, udp, udp4 or udp6")
	timeout := f.Duration("timeout", 3*time.Second, "for each of connect and receive")
	bind := f.String("bind", "", "source `ADDRESS:PORT`")
	mapped := f.Bool("mapped", false, "reach an IPv4 address through an IPv6 socket, as Java does")
	unconnected := f.Bool("unconnected", false, "UDP: sendto and recvfrom, no connect")
	to, err := target(f, args)
	if err != nil {
		return err
	}
	dst, err := resolve(ctx, *network, to)
	if err != nil {
		return err
	}
	s, err := openSocket(*network, dst, *mapped, *timeout)
	if err != nil {
		return err
	}
	defer s.close()
	r := reply{}
	// No message: TCP hears the server's first words, UDP only connects.
	repeat := 0
	if s.stream {
		repeat = 1
	}
	err = s.exchange(&r, dst, *bind, *unconnected, "", repeat)
	if err := printReply(r, err); err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		r := reply{}
		err := s.say(&r, func(message []byte) error {
			if *unconnected {
				return unix.Sendto(s.fd, message, 0, s.sockaddr(dst))
			}
			return unix.Sendto(s.fd, message, unix.MSG_NOSIGNAL, nil)
		}, in.Text())
		if err := printReply(r, err); err != nil {
			return err
		}
	}
	return in.Err()
}

// say sends one message and waits for one.
func (s *socket) say(r *reply, send func([]byte) error, text string) error {
	text, only := strings.CutPrefix(text, "!")
	message := []byte(text)
	if s.stream {
		message = append(message, '\n')
	}
	if err := again(func() error { return send(message) }); err != nil || only {
		r.Stage = "send"
		return os.NewSyscallError("send", err)
	}
	buf := make([]byte, 1<<16)
	var n int
	var from unix.Sockaddr
	err := again(func() (err error) {
		n, from, err = unix.Recvfrom(s.fd, buf, 0)
		return err
	})
	if err == nil && n == 0 && s.stream {
		err = errors.New("the server has closed the connection")
	}
	if err != nil {
		r.Stage = "receive"
		return os.NewSyscallError("recvfrom", err)
	}
	r.Text = strings.TrimSuffix(string(buf[:n]), "\n")
	if from != nil {
		r.From = name(from)
	}
	return nil
}

func printReply(r reply, err error) error {
	if err != nil {
		r.Error = err.Error()
		var errno unix.Errno
		if errors.As(err, &errno) {
			r.Errno = unix.ErrnoName(errno)
		}
	}
	return printJSON(r)
}
