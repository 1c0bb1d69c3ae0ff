// SPDX-License-Identifier: Apache-2.0

package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"
)

// clientTimeout is longer than the server's own.
const clientTimeout = requestTimeout + 5*time.Second

// Client asks a daemon.
type Client struct {
	path string
	http http.Client
}

// Dial checks that a daemon listens on the socket; ErrNotRunning if none does.
func Dial(ctx context.Context, path string) (*Client, error) {
	c := &Client{path: path}
	c.http.Timeout = clientTimeout
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", path)
		},
		// One request a connection: nothing is left behind that had to be closed.
		DisableKeepAlives: true,
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, c.explain(err)
	}
	conn.Close()
	return c, nil
}

// Status asks how the daemon is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var st Status
	err := c.do(ctx, http.MethodGet, pathStatus, nil, &st)
	return st, err
}

// Allow lets two networks talk, in both directions.
func (c *Client) Allow(ctx context.Context, p Pair) (changed bool, err error) {
	var r Result
	err = c.do(ctx, http.MethodPost, pathAllow, p, &r)
	return r.Changed, err
}

// Disallow takes Allow back.
func (c *Client) Disallow(ctx context.Context, p Pair) (changed bool, err error) {
	var r Result
	err = c.do(ctx, http.MethodPost, pathDisallow, p, &r)
	return r.Changed, err
}

// Announce has a port lead to a container that is about to start. It returns when it does.
func (c *Client) Announce(ctx context.Context, p PortBinding) error {
	return c.do(ctx, http.MethodPost, pathAnnounce, p, &Result{})
}

func call[A any](ctx context.Context, c *Client, path string, in any) (A, error) {
	var out A
	err := c.do(ctx, http.MethodPost, path, in, &out)
	return out, err
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		raw, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("ask the daemon: %w", err)
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://bpfnet"+path, body)
	if err != nil {
		return fmt.Errorf("ask the daemon: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(err)
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(resp.Body)
	if resp.StatusCode != http.StatusOK {
		var f failure
		if err := dec.Decode(&f); err != nil || f.Error == "" {
			return fmt.Errorf("socket %s: not a bpfnet daemon, or one of another version: it answers %q to %s", c.path, resp.Status, path)
		}
		if f.Unknown != nil {
			return f.Unknown
		}
		return errors.New(f.Error)
	}
	if err := dec.Decode(out); err != nil {
		return fmt.Errorf("socket %s: read the daemon's answer: %w", c.path, err)
	}
	return nil
}

// explain says why the daemon cannot be asked and what to do.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: nothing listens on %s; start it with \"bpfnet daemon\", or name its socket with --socket", ErrNotRunning, c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("socket %s: permission denied; run this as root", c.path)
	}
	return fmt.Errorf("socket %s: %w", c.path, bare(err))
}
