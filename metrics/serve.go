// SPDX-License-Identifier: Apache-2.0

package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/bpfnet/bpfnet/api"
	"github.com/bpfnet/bpfnet/policy"
	"github.com/bpfnet/bpfnet/reserve"
)

// Path is where the metrics are, on the daemon's socket and on the address of their own.
const Path = "/metrics"

const (
	maxScrapes    = 4
	scrapeTimeout = 10 * time.Second
	retryEvery    = 10 * time.Second
	maxHeader     = 1 << 16
)

// Handler answers scrapes: with what c collects, and with what the Go runtime and the kernel tell of
// the daemon's process.
func Handler(c *Collector) http.Handler {
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes, Timeout: scrapeTimeout,
		ErrorLog:      slog.NewLogLogger(c.o.Log.Handler(), slog.LevelError),
		ErrorHandling: promhttp.ContinueOnError,
	})
}

// TakenError says that another process has the metrics' address.
type TakenError struct {
	Addr    netip.AddrPort
	PID     int // 0: not found out
	Process string
}

func (e *TakenError) Error() string {
	who := "another process"
	if e.PID != 0 {
		who = fmt.Sprintf("%s (pid %d)", e.Process, e.PID)
	}
	return fmt.Sprintf("--metrics-listen %s: in use by %s; stop that, or choose another port", e.Addr, who)
}

// Unwrap returns EADDRINUSE.
func (e *TakenError) Unwrap() error { return syscall.EADDRINUSE }

// Listen binds the metrics' address; the error is a *TakenError where another process has it.
func Listen(addr netip.AddrPort) (net.Listener, error) {
	network := "tcp" // [::] is all addresses
	if addr.Addr().Is4() {
		network = "tcp4" // else 0.0.0.0 would be all of them too
	}
	l, err := net.Listen(network, addr.String())
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, syscall.EADDRINUSE):
		pid, process := reserve.Holder(policy.TCP, addr)
		return nil, &TakenError{Addr: addr, PID: pid, Process: process}
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("--metrics-listen %s: this host does not have the address; choose one that it has", addr)
	}
	return nil, fmt.Errorf("--metrics-listen %s: %w", addr, err)
}

// Serve answers at addr until ctx ends. An address that cannot be had is no reason to stop: it is logged
// once, and tried again.
func Serve(ctx context.Context, addr netip.AddrPort, h http.Handler, log *slog.Logger) {
	told := ""
	for {
		l, err := Listen(addr)
		if err == nil {
			log.Info("serve metrics", "address", l.Addr().String(), "path", Path)
			err, told = serve(ctx, l, h), ""
		}
		if ctx.Err() != nil {
			return
		}
		if err.Error() != told {
			told = err.Error()
			log.Error("no metrics there; everything else runs, and it is tried again", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(retryEvery):
		}
	}
}

func serve(ctx context.Context, l net.Listener, h http.Handler) error {
	mux := http.NewServeMux()
	mux.Handle("GET "+Path, h)
	srv := &http.Server{
		Handler: mux, ReadHeaderTimeout: scrapeTimeout, ReadTimeout: scrapeTimeout, WriteTimeout: 2 * scrapeTimeout,
		MaxHeaderBytes: maxHeader, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug),
	}
	if err := api.Serve(ctx, srv, l); err != nil {
		return fmt.Errorf("serve the metrics: %w", err)
	}
	return nil
}
