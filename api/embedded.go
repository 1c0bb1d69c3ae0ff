// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"net/netip"
	"time"
)

// NetworkSpec asks for a network of bpfnet's own. The zero value of all but Name is the default.
type NetworkSpec struct {
	Name     string            `json:"name"`
	Driver   string            `json:"driver,omitempty"`   // "bridge"
	Subnets  []netip.Prefix    `json:"subnets,omitempty"`  // at most one a family; none: from the pools
	Gateways []netip.Addr      `json:"gateways,omitempty"` // in the subnet of its family; none: its first address
	Ranges   []netip.Prefix    `json:"ranges,omitempty"`   // the part of a subnet that addresses are taken from
	Internal bool              `json:"internal,omitempty"`
	IPv6     bool              `json:"ipv6,omitempty"` // without a subnet for it, a ULA is generated (RFC 4193)
	Options  map[string]string `json:"options,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
}

// Created names what a request has made.
type Created struct {
	ID   string `json:"id"` // 64 hexadecimal digits
	Name string `json:"name"`
}

// Named asks for something by its name, its ID or a unique beginning of that.
type Named struct {
	Name string `json:"name"`
}

// Attach is a sandbox's place in a network, as asked for.
type Attach struct {
	Network string     `json:"network"`
	IP4     netip.Addr `json:"ip4,omitzero"` // invalid: the lowest that is free
	IP6     netip.Addr `json:"ip6,omitzero"`
	Aliases []string   `json:"aliases,omitempty"`
}

// Connection asks to connect a sandbox, or to disconnect it.
type Connection struct {
	Attach
	Sandbox string `json:"sandbox"`
}

// PortSpec asks for a published port.
type PortSpec struct {
	Proto string `json:"proto"` // "tcp", "udp" or "sctp"
	// Host is the host's address; invalid: the network's default one, else all.
	Host netip.Addr `json:"host,omitzero"`
	// First and Last are the host ports to choose from, the lowest that is free; both 0: any.
	First  uint16 `json:"first,omitempty"`
	Last   uint16 `json:"last,omitempty"`
	Target uint16 `json:"target"` // the sandbox's port
}

// Where a sandbox's network is, apart from networks that it is connected to.
const (
	ModeHost      = "host"      // the host's
	ModeNone      = "none"      // its own, with nothing but lo
	ModeContainer = "container" // another sandbox's
)

// SandboxSpec asks for a sandbox: a process with a network namespace.
type SandboxSpec struct {
	Name     string   `json:"name,omitempty"`     // empty: made up
	Hostname string   `json:"hostname,omitempty"` // empty: the first 12 digits of the ID
	Mode     string   `json:"mode,omitempty"`     // empty: in networks; else one of the modes above
	Join     string   `json:"join,omitempty"`     // the sandbox, with ModeContainer
	Networks []Attach `json:"networks,omitempty"` // none, without a mode: the default network
	// Publish are published ports; with PublishAll, each of Expose gets a host port that is free.
	Publish    []PortSpec   `json:"publish,omitempty"`
	PublishAll bool         `json:"publish_all,omitempty"`
	Expose     []PortSpec   `json:"expose,omitempty"` // Proto and Target only
	DNS        []netip.Addr `json:"dns,omitempty"`    // none: the host's
	AutoRemove bool         `json:"auto_remove,omitempty"`

	Command []string `json:"command"` // the first is looked up in PATH of Env
	Dir     string   `json:"dir"`     // absolute
	Env     []string `json:"env"`
}

// SandboxInfo is what a process needs to know to run a sandbox.
type SandboxInfo struct {
	ID         string   `json:"id"`
	Name       string   `json:"name"`
	Mode       string   `json:"mode,omitempty"`
	JoinPID    int      `json:"join_pid,omitempty"` // with ModeContainer: a process of that sandbox
	Status     string   `json:"status"`
	PID        int      `json:"pid,omitempty"` // while it runs
	StartTime  uint64   `json:"start_time,omitempty"`
	Dir        string   `json:"dir"`    // of the sandbox's files: hosts, resolv.conf, log, exit
	Cgroup     string   `json:"cgroup"` // the directory for its processes; made and removed by who runs it
	AutoRemove bool     `json:"auto_remove,omitempty"`
	Hostname   string   `json:"hostname"` // empty: the host's
	Command    []string `json:"command"`
	WorkDir    string   `json:"work_dir"`
	Env        []string `json:"env"`
}

// The states of a sandbox.
const (
	StatusCreated = "created"
	StatusRunning = "running"
	StatusExited  = "exited"
)

// SandboxStart asks to give a namespace, which the asking process holds, its interfaces.
type SandboxStart struct {
	Name string `json:"name"`
	// TID is the thread of the asking process that is in the namespace. 0 with ModeHost and
	// ModeContainer, where there is no namespace of its own.
	TID int `json:"tid,omitempty"`
}

// SandboxGrant is the answer: the namespace is ready for a process.
type SandboxGrant struct {
	// Files are to be mounted over these paths: target → source.
	Files map[string]string `json:"files,omitempty"`
}

// SandboxRunning says which process of a granted start is the sandbox's. Its death ends the sandbox.
type SandboxRunning struct {
	ID  string `json:"id"`
	PID int    `json:"pid"`
}

// SandboxExited says that the process has ended, or could not be started.
type SandboxExited struct {
	ID   string `json:"id"`
	Code int    `json:"code"` // as a shell has it: 128 and the signal's number
	// Unstarted says that there never was a process: the sandbox is as before the start.
	Unstarted bool `json:"unstarted,omitempty"`
}

// SandboxStop asks to end a sandbox: SIGTERM, and after Grace SIGKILL to all that is left of it.
type SandboxStop struct {
	Name  string        `json:"name"`
	Grace time.Duration `json:"grace"` // nanoseconds
}

// SandboxWaited says how a sandbox ended, or that it still runs after some while: ask again.
type SandboxWaited struct {
	Running bool `json:"running,omitempty"`
	Code    int  `json:"code"`
}

// SandboxRemoval asks to remove a sandbox.
type SandboxRemoval struct {
	Name  string `json:"name"`
	Force bool   `json:"force,omitempty"` // end it first, if it runs
}

// PortChange asks to publish ports of a running sandbox, or to take published ones back.
type PortChange struct {
	Name  string     `json:"name"`
	Ports []PortSpec `json:"ports"`
}

// PublishedPorts lists what a change has done, as "bpfnet port" prints it.
type PublishedPorts struct {
	Ports []string `json:"ports"` // 8000/tcp -> 0.0.0.0:18000
}

// Embedded is the engine that bpfnet brings: networks and sandboxes of its own. A verb returns when
// the data path does what it asked for; one that fails has changed nothing. Names of another engine's
// things are refused with the command that is meant.
type Embedded interface {
	CreateNetwork(ctx context.Context, s NetworkSpec) (Created, error)
	RemoveNetwork(ctx context.Context, n Named) (Created, error)
	Connect(ctx context.Context, c Connection) (Result, error)
	Disconnect(ctx context.Context, c Connection) (Result, error)

	CreateSandbox(ctx context.Context, s SandboxSpec) (SandboxInfo, error)
	Sandbox(ctx context.Context, n Named) (SandboxInfo, error)
	// StartSandbox is called with the asking process's ID in ctx: see PeerPID.
	StartSandbox(ctx context.Context, s SandboxStart) (SandboxGrant, error)
	SandboxRuns(ctx context.Context, s SandboxRunning) (Result, error)
	SandboxEnded(ctx context.Context, s SandboxExited) (Result, error)
	StopSandbox(ctx context.Context, s SandboxStop) (Created, error)
	WaitSandbox(ctx context.Context, n Named) (SandboxWaited, error)
	RemoveSandbox(ctx context.Context, s SandboxRemoval) (Created, error)

	PublishPorts(ctx context.Context, p PortChange) (PublishedPorts, error)
	UnpublishPorts(ctx context.Context, p PortChange) (PublishedPorts, error)
}

// The client's side of the same.

// CreateNetwork makes a network.
func (c *Client) CreateNetwork(ctx context.Context, s NetworkSpec) (Created, error) {
	return call[Created](ctx, c, pathNetwork+"create", s)
}

// RemoveNetwork removes a network that no sandbox is in.
func (c *Client) RemoveNetwork(ctx context.Context, n Named) (Created, error) {
	return call[Created](ctx, c, pathNetwork+"remove", n)
}

// Connect gives a sandbox an interface in a network.
func (c *Client) Connect(ctx context.Context, conn Connection) (Result, error) {
	return call[Result](ctx, c, pathNetwork+"connect", conn)
}

// Disconnect takes it back.
func (c *Client) Disconnect(ctx context.Context, conn Connection) (Result, error) {
	return call[Result](ctx, c, pathNetwork+"disconnect", conn)
}

// CreateSandbox makes a sandbox and starts nothing.
func (c *Client) CreateSandbox(ctx context.Context, s SandboxSpec) (SandboxInfo, error) {
	return call[SandboxInfo](ctx, c, pathSandbox+"create", s)
}

// Sandbox asks for a sandbox of bpfnet's own.
func (c *Client) Sandbox(ctx context.Context, n Named) (SandboxInfo, error) {
	return call[SandboxInfo](ctx, c, pathSandbox+"inspect", n)
}

// StartSandbox has the namespace of one of this process's threads made ready for a process.
func (c *Client) StartSandbox(ctx context.Context, s SandboxStart) (SandboxGrant, error) {
	return call[SandboxGrant](ctx, c, pathSandbox+"start", s)
}

// SandboxRuns tells which process it is.
func (c *Client) SandboxRuns(ctx context.Context, s SandboxRunning) (Result, error) {
	return call[Result](ctx, c, pathSandbox+"runs", s)
}

// SandboxEnded tells that it has ended. It returns when its name, if it was one of --rm, and its ports are
// free again; its interfaces are gone moments later.
func (c *Client) SandboxEnded(ctx context.Context, s SandboxExited) (Result, error) {
	return call[Result](ctx, c, pathSandbox+"ended", s)
}

// StopSandbox ends a sandbox's process.
func (c *Client) StopSandbox(ctx context.Context, s SandboxStop) (Created, error) {
	return call[Created](ctx, c, pathSandbox+"stop", s)
}

// WaitSandbox waits, for a while, until a sandbox has ended.
func (c *Client) WaitSandbox(ctx context.Context, n Named) (SandboxWaited, error) {
	return call[SandboxWaited](ctx, c, pathSandbox+"wait", n)
}

// RemoveSandbox removes a sandbox.
func (c *Client) RemoveSandbox(ctx context.Context, s SandboxRemoval) (Created, error) {
	return call[Created](ctx, c, pathSandbox+"remove", s)
}

// PublishPorts publishes ports of a running sandbox.
func (c *Client) PublishPorts(ctx context.Context, p PortChange) (PublishedPorts, error) {
	return call[PublishedPorts](ctx, c, pathPort+"publish", p)
}

// UnpublishPorts takes published ports back.
func (c *Client) UnpublishPorts(ctx context.Context, p PortChange) (PublishedPorts, error) {
	return call[PublishedPorts](ctx, c, pathPort+"unpublish", p)
}
