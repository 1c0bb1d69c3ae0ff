// SPDX-License-Identifier: Apache-2.0

package lab

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Image is the one image that every engine of a lab has: a static busybox and the test
// tool, both on PATH.
const Image = "lab"

const module = "github.com/bpfnet/bpfnet"

// binDir holds what is built once per test process. Main makes and removes it.
var binDir string

// build compiles a command of this module into binDir, once per test process.
func build(pkg, name string, flags ...string) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		out := filepath.Join(binDir, name)
		args := slices.Concat([]string{"build", "-trimpath", "-buildvcs=false", "-o", out}, flags, []string{module + "/" + pkg})
		cmd := exec.Command("go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("go build %s: %w\n%s", pkg, err, msg)
		}
		return out, nil
	})
}

var builtTool = build("internal/lab/tool", "labtool")

func toolBinary() (string, error) {
	if given.Tool != "" {
		return given.Tool, nil
	}
	return builtTool()
}

func buildTool(t testing.TB) string {
	t.Helper()
	path, err := toolBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// programs are those of the image.
type programs struct {
	busybox, tool string   // paths on this machine
	applets       []string // links to busybox, by name
}

func findPrograms() (p programs, err error) {
	if p.busybox, err = exec.LookPath("busybox"); err != nil {
		return p, fmt.Errorf("%w (scripts/deps.sh test)", err)
	}
	list, err := exec.Command(p.busybox, "--list").Output()
	if err != nil {
		return p, fmt.Errorf("list busybox applets: %w", err)
	}
	for _, applet := range strings.Fields(string(list)) {
		if applet = path.Base(applet); applet != "busybox" {
			p.applets = append(p.applets, applet)
		}
	}
	p.tool, err = toolBinary()
	return p, err
}

// toolsDir makes a directory with the programs of the image, once per test process: PATH
// for sandboxes, which have no image.
var toolsDir = sync.OnceValues(func() (string, error) {
	p, err := findPrograms()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(binDir, "tools")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	links := map[string]string{"busybox": p.busybox, "labtool": p.tool}
	for _, applet := range p.applets {
		links[applet] = "busybox"
	}
	for name, to := range links {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	return dir, nil
})

// imageTar writes the image's file system, once per test process.
var imageTar = sync.OnceValues(func() (string, error) {
	p, err := findPrograms()
	if err != nil {
		return "", err
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	add := func(h tar.Header, body []byte) {
		if err == nil {
			h.Size = int64(len(body))
			err = w.WriteHeader(&h)
		}
		if err == nil {
			_, err = w.Write(body)
		}
	}
	file := func(name, from string) {
		body, readErr := os.ReadFile(from)
		if err == nil {
			err = readErr
		}
		add(tar.Header{Name: name, Mode: 0o755, Typeflag: tar.TypeReg}, body)
	}
	for _, dir := range []string{"bin/", "etc/", "root/", "var/", "proc/", "sys/", "dev/"} {
		add(tar.Header{Name: dir, Mode: 0o755, Typeflag: tar.TypeDir}, nil)
	}
	add(tar.Header{Name: "tmp/", Mode: 0o1777, Typeflag: tar.TypeDir}, nil)
	add(tar.Header{Name: "etc/passwd", Mode: 0o644, Typeflag: tar.TypeReg}, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	add(tar.Header{Name: "etc/group", Mode: 0o644, Typeflag: tar.TypeReg}, []byte("root:x:0:\n"))
	file("bin/busybox", p.busybox)
	file("bin/labtool", p.tool)
	for _, applet := range p.applets {
		add(tar.Header{Name: "bin/" + applet, Linkname: "busybox", Mode: 0o777, Typeflag: tar.TypeSymlink}, nil)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return "", fmt.Errorf("build the lab's image: %w", err)
	}
	out := filepath.Join(binDir, "image.tar")
	return out, os.WriteFile(out, buf.Bytes(), 0o600)
})
