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
func build(pkg, name string) func() (string, error) {
	return sync.OnceValues(func() (string, error) {
		out := filepath.Join(binDir, name)
		cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", out, module+"/"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return "", fmt.Errorf("go build %s: %w\n%s", pkg, err, msg)
		}
		return out, nil
	})
}

var toolBinary = build("internal/lab/tool", "labtool")

func buildTool(t testing.TB) string {
	t.Helper()
	path, err := toolBinary()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// imageTar writes the image's file system, once per test process.
var imageTar = sync.OnceValues(func() (string, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return "", fmt.Errorf("%w (scripts/deps.sh test)", err)
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return "", fmt.Errorf("list busybox applets: %w", err)
	}
	tool, err := toolBinary()
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
	file("bin/busybox", busybox)
	file("bin/labtool", tool)
	for _, applet := range strings.Fields(string(applets)) {
		if applet = path.Base(applet); applet != "busybox" {
			add(tar.Header{Name: "bin/" + applet, Linkname: "busybox", Mode: 0o777, Typeflag: tar.TypeSymlink}, nil)
		}
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
