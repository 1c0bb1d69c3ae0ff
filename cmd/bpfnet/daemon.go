// SPDX-License-Identifier: Apache-2.0

package main

import (
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/bpfnet/bpfnet/daemon"
	"github.com/bpfnet/bpfnet/loader"
	"github.com/bpfnet/bpfnet/metrics"
	"github.com/bpfnet/bpfnet/netdev"
)

// daemonFlags are the words of the daemon's flags, before they are understood.
type daemonFlags struct {
	cfg      daemon.Config
	timeouts []string
	subnets  []string
	logLevel string
	bridgeIP string
	mark     string
	strict   bool
	shield   bool
	mode     string
	listen   string
}

// config understands them. It looks at nothing but the words.
func (f *daemonFlags) config() (cfg daemon.Config, level slog.Level, err error) {
	cfg = f.cfg
	if cfg.Timeouts, err = parseTimeouts(f.timeouts); err != nil {
		return cfg, 0, err
	}
	if cfg.DefaultSubnets, err = parseDefaultSubnets(f.subnets); err != nil {
		return cfg, 0, err
	}
	if cfg.DefaultBridgeIP, err = parseBridgeIP(f.bridgeIP); err != nil {
		return cfg, 0, err
	}
	if cfg.AcceptMark, cfg.AcceptMask, err = parseMark(f.mark); err != nil {
		return cfg, 0, err
	}
	if cfg.MetricsListen, err = parseMetricsListen(f.listen); err != nil {
		return cfg, 0, err
	}
	if level, err = parseLogLevel(f.logLevel); err != nil {
		return cfg, 0, err
	}
	if err := cfg.CheckTimeouts(); err != nil {
		return cfg, 0, usagef("--%w", err)
	}
	if err := checkDaemon(cfg); err != nil {
		return cfg, 0, err
	}
	if cfg.Shield, err = shieldMode(f.shield, f.mode, cfg.ShieldSynRate); err != nil {
		return cfg, 0, err
	}
	_, err = strictCgroup(f.strict, cfg)
	return cfg, level, err
}

func (a *App) daemonCommand() *cobra.Command {
	f := &daemonFlags{}
	a.daemon = f
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Serve the containers of this host",
		Long: `Serve the containers of this host, in the foreground.

The daemon attaches its programs to the container interfaces, bridges and uplinks
of the network namespace that it runs in, and keeps their tables in step with the
Docker Engine, and with the networks and sandboxes of its own ("bpfnet run"). An
Engine that is absent, starts later or restarts is waited for; --docker off says
that there is none.
Stopping the daemon leaves the network running; "bpfnet cleanup" removes it.

Each flag can also be set in the configuration file and in the environment: see
"bpfnet config show". On SIGHUP the file is read again.`,
		Example: `  bpfnet daemon
  bpfnet daemon --docker off
  bpfnet daemon --uplink eth0 --flows 1000000 --timeout udp=5m`,
		Args: exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, level, err := f.config()
			if err != nil {
				return a.located(err)
			}
			if err := a.checkPrivilege(); err != nil {
				return err
			}
			cfg.Paths = a.paths
			if cfg.Cgroup, err = a.findCgroup(); err != nil {
				return err
			}
			if cfg.StrictCgroup, err = strictCgroup(f.strict, cfg); err != nil {
				return err
			}
			cfg.Version = a.Version
			a.level.Set(level)
			cfg.Logger = slog.New(slog.NewTextHandler(a.Stderr, &slog.HandlerOptions{Level: a.level}))
			cfg.Banner = a.Stdout
			return a.runReloading(cmd.Context(), cfg)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&f.cfg.Docker, "docker", "unix:///run/docker.sock", "`socket` of the Docker Engine, or off")
	flags.StringArrayVar(&f.cfg.Uplinks, "uplink", nil, "`device` to take as an uplink, instead of those found; repeatable")
	flags.StringVar(&f.cfg.Attach, "attach", "", "`how` to attach: tcx or clsact (default: tcx where the kernel has it, Linux 6.6)")
	flags.StringVar(&f.cfg.LinkType, "link-type", netdev.LinkAuto, "`kind` of link that joins bpfnet's own sandboxes to their networks: netkit, veth, or auto (netkit where the kernel has it)")
	flags.IntVar(&f.cfg.Flows, "flows", 0, "`number` of flows that the tables hold, rounded up to a power of two (default: by memory)")
	flags.IntVar(&f.cfg.EndpointFlows, "endpoint-flows", 0, "`number` of flows that one container may have in one network (default: any)")
	flags.StringArrayVar(&f.timeouts, "timeout", nil, "idle time after which a flow is forgotten, as `NAME=DURATION` ("+strings.Join(daemon.TimeoutNames(), ", ")+"); repeatable")
	flags.BoolVar(&f.cfg.IPForwardNoDrop, "ip-forward-no-drop", false, "let transit between foreign devices pass where the daemon turned forwarding on")
	flags.BoolVar(&f.cfg.DefaultBridgeNoMasquerade, "default-bridge-no-masquerade", false, "keep container addresses of Docker's network \"bridge\" on the way out")
	flags.BoolVar(&f.cfg.DefaultBridgeNoICC, "default-bridge-no-icc", false, "forbid traffic between the containers of Docker's network \"bridge\"")
	flags.StringVar(&f.bridgeIP, "default-bridge-ip", "", "host `address` of ports that are published without one on Docker's network \"bridge\" (default: all)")
	flags.BoolVar(&f.cfg.AllowDirectRouting, "allow-direct-routing", false, "let everybody dial published ports by the containers' own addresses")
	flags.StringVar(&f.mark, "bridge-accept-fwmark", "", "let packets with this `mark` (MARK or MARK/MASK) reach every port of every container")
	flags.StringArrayVar(&f.subnets, "default-subnet", nil, "`subnet` of bpfnet's own default network, at most one a family (default: one of the pools, and a generated IPv6 one)")
	flags.BoolVar(&f.strict, "strict", false, "let the Engine's containers send and receive only by the addresses of READY endpoints, from their first instruction on")
	flags.StringVar(&f.cfg.StrictCgroup, "strict-cgroup", "", "cgroup2 `directory` that the Engine's containers run below (default: docker, below --cgroup); implies --strict")
	flags.BoolVar(&f.shield, "shield", false, "drop at the uplinks, before all else, what the deny list names, direct access to containers, and too many new connections")
	flags.StringVar(&f.mode, "shield-mode", loader.ShieldNative, "`how` the shield runs: native (in the driver) or generic (behind it, for drivers that cannot)")
	flags.IntVar(&f.cfg.ShieldSynRate, "shield-syn-rate", 0, "`number` of connections a second that the shield lets one source open to published ports; 0: any")
	flags.StringVar(&f.cfg.Relay, "relay", daemon.RelayOwn, "`whose` containers with IPv4 only the relay process publishes on IPv6 addresses: own (bpfnet's own), all (the Engine's too, where its userland proxy is off) or none")
	flags.StringVar(&f.cfg.SocketGroup, "socket-group", "", "`group`, by name or number, that may ask the daemon by its socket, beside root (default: root's)")
	flags.StringVar(&f.listen, "metrics-listen", "", "`address` ADDR:PORT to serve metrics for Prometheus at, besides the daemon's socket")
	flags.IntVar(&f.cfg.MetricsLimit, "metrics-limit", metrics.DefaultLimit, "`number` of containers, and of published ports, that have metrics of their own; the others are summed")
	flags.StringVar(&f.logLevel, "log-level", "info", "`level` of the log on standard error: debug, info, warn or error")
	return cmd
}

func parseDefaultSubnets(list []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, usagef("--default-subnet %q: want a subnet like 172.30.0.0/16 or fd00:1::/64", s)
		}
		if p != p.Masked() {
			return nil, usagef("--default-subnet %s: has host bits set; write %s", p, p.Masked())
		}
		for _, have := range out {
			if have.Addr().Is4() == p.Addr().Is4() {
				return nil, usagef("--default-subnet %s: a second one of its family, behind %s; want one", p, have)
			}
		}
		out = append(out, p)
	}
	return out, nil
}

func parseBridgeIP(s string) (netip.Addr, error) {
	if s == "" {
		return netip.Addr{}, nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return a, usagef("--default-bridge-ip %q: want an address of this host, like 192.0.2.1", s)
	}
	if a = a.Unmap(); a == netip.IPv4Unspecified() {
		return netip.Addr{}, nil
	}
	return a, nil
}

func parseMetricsListen(s string) (netip.AddrPort, error) {
	if s == "" {
		return netip.AddrPort{}, nil
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 {
		return a, usagef("--metrics-listen %q: want ADDR:PORT, like 127.0.0.1:9633 or [::]:9633", s)
	}
	return a, nil
}

// parseMark reads MARK or MARK/MASK, in any base that C knows.
func parseMark(s string) (mark, mask uint32, err error) {
	if s == "" {
		return 0, 0, nil
	}
	text, maskText, given := strings.Cut(s, "/")
	m, err := strconv.ParseUint(text, 0, 32)
	all := uint64(0xffffffff)
	if err == nil && given {
		all, err = strconv.ParseUint(maskText, 0, 32)
	}
	switch {
	case err != nil:
		return 0, 0, usagef("--bridge-accept-fwmark %q: want MARK or MARK/MASK, like 0x1 or 0x100/0xff00", s)
	case m == 0:
		return 0, 0, usagef("--bridge-accept-fwmark %q: 0 is the mark of every packet that nobody has marked; choose another", s)
	case m&^all != 0:
		return 0, 0, usagef("--bridge-accept-fwmark %q: the mark has bits that the mask has not, so no packet would match", s)
	}
	return uint32(m), uint32(all), nil
}

// strictCgroup is where the programs of strict mode go; "" without it.
func strictCgroup(strict bool, cfg daemon.Config) (string, error) {
	switch dir := cfg.StrictCgroup; {
	case dir == "" && !strict:
		return "", nil
	case cfg.Docker == "off":
		return "", usagef("--strict is about the Docker Engine's containers: leave --docker off or --strict away")
	case dir == "":
		return filepath.Join(cfg.Cgroup, "docker"), nil
	case !filepath.IsAbs(dir):
		return "", usagef("--strict-cgroup %q: want a directory below the cgroup2 mount, as /sys/fs/cgroup/docker", dir)
	default:
		return filepath.Clean(dir), nil
	}
}

// maxSynRate is one connection every microsecond.
const maxSynRate = 1_000_000

// shieldMode is how the shield runs; "" without it.
func shieldMode(on bool, mode string, rate int) (string, error) {
	switch {
	case mode != loader.ShieldNative && mode != loader.ShieldGeneric:
		return "", usagef("--shield-mode %q: want native or generic", mode)
	case rate < 0 || rate > maxSynRate:
		return "", usagef("--shield-syn-rate %d: want 0 to %d connections a second", rate, maxSynRate)
	case !on:
		return "", nil
	}
	return mode, nil
}

// checkDaemon refuses what cannot be meant.
func checkDaemon(cfg daemon.Config) error {
	path, isUnix := strings.CutPrefix(cfg.Docker, "unix://")
	if cfg.Docker != "off" && !(isUnix && filepath.IsAbs(path)) {
		return usagef("--docker %q: want unix:///PATH or off", cfg.Docker)
	}
	if !slices.Contains([]string{"", "tcx", "clsact"}, cfg.Attach) {
		return usagef("--attach %q: want tcx or clsact", cfg.Attach)
	}
	if !slices.Contains([]string{netdev.LinkAuto, netdev.LinkVeth, netdev.LinkNetkit}, cfg.LinkType) {
		return usagef("--link-type %q: want auto, veth or netkit", cfg.LinkType)
	}
	if !slices.Contains([]string{daemon.RelayOwn, daemon.RelayAll, daemon.RelayNone}, cfg.Relay) {
		return usagef("--relay %q: want own, all or none", cfg.Relay)
	}
	if cfg.Flows < 0 {
		return usagef("--flows %d: want a positive number", cfg.Flows)
	}
	if cfg.EndpointFlows < 0 {
		return usagef("--endpoint-flows %d: want a positive number", cfg.EndpointFlows)
	}
	if cfg.MetricsLimit < 1 {
		return usagef("--metrics-limit %d: want a positive number", cfg.MetricsLimit)
	}
	if slices.Contains(cfg.Uplinks, "") {
		return usagef("--uplink: empty name")
	}
	return nil
}

func parseTimeouts(list []string) (map[string]time.Duration, error) {
	names := daemon.TimeoutNames()
	out := make(map[string]time.Duration)
	for _, s := range list {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			return nil, usagef("--timeout %q: want NAME=DURATION", s)
		}
		if !slices.Contains(names, name) {
			return nil, usagef("--timeout %q: no such timeout; the nearest names are %s", s, strings.Join(netdev.Nearest(name, names), ", "))
		}
		d, err := time.ParseDuration(value)
		if err != nil || d <= 0 {
			return nil, usagef("--timeout %q: want a duration like 30s, 5m or 2h4m", s)
		}
		out[name] = d
	}
	return out, nil
}

var logLevels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
}

func parseLogLevel(s string) (slog.Level, error) {
	level, ok := logLevels[s]
	if !ok {
		return 0, usagef("--log-level %q: want one of %s", s, strings.Join(slices.Sorted(maps.Keys(logLevels)), ", "))
	}
	return level, nil
}
