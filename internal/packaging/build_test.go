// SPDX-License-Identifier: Apache-2.0

package packaging

import (
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/bpfnet/bpfnet/internal/lab"
)

// tree copies what the build needs of the sources to a directory of its own, with no history.
func tree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	from := abs(t, root)
	err := filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if e.IsDir() {
			if slices.Contains([]string{".git", "bin", "docs", "testdata"}, e.Name()) {
				return fs.SkipDir
			}
			return os.MkdirAll(filepath.Join(dir, rel), 0o755)
		}
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || strings.HasSuffix(path, "_test.go") {
			return err
		}
		return copyFile(path, filepath.Join(dir, rel), info.Mode().Perm())
	})
	require.NoError(t, err)
	return dir
}

// run calls make in a copy of the tree. Settings are variables of the Makefile or of the environment.
func run(t *testing.T, dir string, targets []string, settings ...string) string {
	t.Helper()
	cmd := exec.Command("make", slices.Concat([]string{"-s", "-C", dir}, targets, settings)...)
	// Variables of an outer make are not for this one.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "MAKE") || strings.HasPrefix(e, "MFLAGS") })
	cmd.Env = append(append(cmd.Env, "DPKG_DEB_COMPRESSOR_TYPE=none"), settings...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "make %v: %s", targets, out)
	return string(out)
}

// script calls one of the scripts that make calls, in a copy of the tree that is built.
func script(t *testing.T, dir, name, arg string, settings ...string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(dir, "scripts", name), arg)
	cmd.Env = append(append(os.Environ(), "BIN=bin", "DPKG_DEB_COMPRESSOR_TYPE=none"), settings...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s: %s", name, out)
}

func sum(t *testing.T, path string) string {
	t.Helper()
	return fmt.Sprintf("%x", sha256.Sum256([]byte(read(t, path))))
}

const version = "v1.2.3-4-gabc"

// makeDeb calls "make deb" in a tree and returns the package's path, which make has said.
func makeDeb(t *testing.T, dir string, settings ...string) string {
	t.Helper()
	said := strings.Fields(run(t, dir, []string{"deb"}, append(settings, "VERSION="+version)...))
	require.NotEmpty(t, said)
	made := said[len(said)-1]
	require.Equal(t, "bin/bpfnet_1.2.3+4+gabc_"+goarch(t)+".deb", made)
	return filepath.Join(dir, made)
}

// Needs root. What "make build", "make install" and "make deb" make of one tree.
func TestMade(t *testing.T) {
	dir := tree(t)
	deb := makeDeb(t, dir, "SOURCE_DATE_EPOCH=1700000000")
	t.Run("reproducible", func(t *testing.T) { reproducible(t, dir, deb) })
	t.Run("install", func(t *testing.T) { install(t, dir) })
	h := &host{Lab: lab.New(t, lab.Opts{})}
	t.Run("deb in an image", func(t *testing.T) { debInImage(t, h, deb) })
	t.Run("deb", func(t *testing.T) { debLife(t, h, deb) })
}

// Two trees in two directories give the same binary, which needs nothing at run time, and the same package. At full
// counts the second is compiled from nothing.
func reproducible(t *testing.T, dir, deb string) {
	other := tree(t)
	settings := []string{"SOURCE_DATE_EPOCH=1700000000"}
	if os.Getenv("BPFNET_FULL") != "" {
		settings = append(settings, "GOCACHE="+t.TempDir())
	}
	same := makeDeb(t, other, settings...)
	binary := filepath.Join(dir, "bin/bpfnet")
	assert.Equal(t, sum(t, binary), sum(t, filepath.Join(other, "bin/bpfnet")))
	was := sum(t, deb)
	assert.Equal(t, was, sum(t, same))
	// Times are in it: another one is another package. Make would link once more.
	script(t, other, "deb.sh", version, "SOURCE_DATE_EPOCH=1700000001")
	assert.NotEqual(t, was, sum(t, same))
	// A candidate's version goes before that of the release, and its package takes the place of others, so that
	// bin/bpfnet_*.deb names one.
	script(t, other, "deb.sh", "v2.0.0-rc1-5-gabc", settings...)
	made, err := filepath.Glob(filepath.Join(other, "bin/bpfnet_*.deb"))
	require.NoError(t, err)
	assert.Equal(t, []string{filepath.Join(other, "bin/bpfnet_2.0.0~rc1+5+gabc_"+goarch(t)+".deb")}, made)
	for _, order := range [][2]string{{"2.0.0~rc1", "2.0.0~rc1+5+gabc"}, {"2.0.0~rc1+5+gabc", "2.0.0"}} {
		assert.NoError(t, exec.Command("dpkg", "--compare-versions", order[0], "lt", order[1]).Run(), "%v", order)
	}

	f, err := elf.Open(binary)
	require.NoError(t, err)
	defer f.Close()
	for _, p := range f.Progs {
		assert.NotContains(t, []elf.ProgType{elf.PT_INTERP, elf.PT_DYNAMIC}, p.Type, "it is not static")
	}
	raw := read(t, binary)
	for _, place := range []string{dir, other, abs(t, root)} {
		assert.False(t, strings.Contains(raw, place), "it tells where it was built: %s", place)
	}
}

func goarch(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOARCH").Output()
	require.NoError(t, err)
	return strings.TrimSpace(string(out))
}

// files lists what is below a directory, with modes.
func files(t *testing.T, dir string) map[string]fs.FileMode {
	t.Helper()
	out := make(map[string]fs.FileMode)
	require.NoError(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		out[strings.TrimPrefix(path, dir)] = info.Mode()
		return err
	}))
	return out
}

// Install puts everything in its place, with a unit that starts the binary that was installed, and with the notices of
// all that is linked into it. It makes no configuration; one that is there stays, and is all that uninstall leaves.
func install(t *testing.T, dir string) {
	dest := t.TempDir()
	settings := []string{"VERSION=" + version, "DESTDIR=" + dest, "PREFIX=/opt/net"}
	// Whoever calls it may forbid everything to others.
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	run(t, dir, []string{"install"}, settings...)
	have := files(t, dest)
	for path, mode := range map[string]fs.FileMode{
		"/opt/net/bin/bpfnet":                                  0o755,
		"/opt/net/lib/systemd/system/bpfnet.service":           0o644,
		"/opt/net/libexec/bpfnet/docker-proxy":                 0o777 | fs.ModeSymlink,
		"/opt/net/share/bash-completion/completions/bpfnet":    0o644,
		"/opt/net/share/zsh/site-functions/_bpfnet":            0o644,
		"/opt/net/share/fish/vendor_completions.d/bpfnet.fish": 0o644,
		"/opt/net/share/man/man8/bpfnet.8":                     0o644,
		"/opt/net/share/man/man8/bpfnet-network-create.8":      0o644,
		"/opt/net/share/bpfnet/config.yaml":                    0o644,
		"/opt/net/share/bpfnet/docker.service.d/bpfnet.conf":   0o644,
		"/opt/net/share/bpfnet/grafana/bpfnet-alerts.yaml":     0o644,
		"/opt/net/share/bpfnet/grafana/bpfnet-dashboard.json":  0o644,
		"/opt/net/share/doc/bpfnet/copyright":                  0o644,
		"/opt/net/share/doc/bpfnet/third-party.txt":            0o644,
	} {
		assert.Equal(t, mode, have[path], path)
	}
	binary := filepath.Join(dest, "opt/net/bin/bpfnet")
	out, err := exec.Command(binary, "--version").CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.Equal(t, "bpfnet "+version+"\n", string(out))
	assert.Contains(t, read(t, filepath.Join(dest, "opt/net/lib/systemd/system/bpfnet.service")), "\nExecStart=/opt/net/bin/bpfnet daemon\n")
	to, err := filepath.EvalSymlinks(filepath.Join(dest, "opt/net/libexec/bpfnet/docker-proxy"))
	require.NoError(t, err)
	assert.Equal(t, binary, to)
	out, err = exec.Command(binary, "--config", filepath.Join(dest, "opt/net/share/bpfnet/config.yaml"), "config", "check").CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.NoDirExists(t, filepath.Join(dest, "etc"))
	licensed(t, binary, read(t, filepath.Join(dest, "opt/net/share/doc/bpfnet/third-party.txt")))

	again := func() { // make would link once more
		t.Helper()
		script(t, dir, "install.sh", "install", settings...)
	}
	again()
	assert.Equal(t, have, files(t, dest))
	run(t, dir, []string{"uninstall"}, settings...)
	assert.Empty(t, files(t, dest))

	again()
	const edited = "log-level: debug\n"
	config := filepath.Join(dest, "etc/bpfnet/config.yaml")
	require.NoError(t, os.MkdirAll(filepath.Dir(config), 0o755))
	require.NoError(t, os.WriteFile(config, []byte(edited), 0o600))
	again()
	assert.Equal(t, edited, read(t, config))
	run(t, dir, []string{"uninstall"}, settings...)
	assert.Equal(t, []string{"/etc/bpfnet/config.yaml"}, slices.Collect(maps.Keys(files(t, dest))))
	assert.Equal(t, edited, read(t, config))
}

// licensed looks for a licence of each module that a binary says it is linked from, and of Go.
func licensed(t *testing.T, binary, notices string) {
	t.Helper()
	info, err := buildinfo.ReadFile(binary)
	require.NoError(t, err)
	require.NotEmpty(t, info.Deps)
	blocks := strings.Split("\n"+notices, "\n======== ")
	names := []string{"Go " + info.GoVersion}
	for _, m := range info.Deps {
		names = append(names, m.Path+" "+m.Version)
	}
	for _, name := range names {
		assert.True(t, slices.ContainsFunc(blocks, func(b string) bool {
			head, text, _ := strings.Cut(b, "\n")
			return strings.HasPrefix(head, name+": ") && strings.Contains(strings.ToLower(text), "copyright")
		}), name)
	}
	// Some want more than the licence to be told.
	assert.Contains(t, notices, "\n======== github.com/prometheus/client_golang "+versionOf(info, "github.com/prometheus/client_golang")+": NOTICE\n")
}

func versionOf(info *buildinfo.BuildInfo, module string) string {
	for _, m := range info.Deps {
		if m.Path == module {
			return m.Version
		}
	}
	return "not linked"
}
