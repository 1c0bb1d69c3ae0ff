// SPDX-License-Identifier: Apache-2.0

package sandbox

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	at := func(path ...string) string { return filepath.Join(append([]string{dir}, path...)...) }
	for _, d := range []string{"a", "b", "work/sub", "a/folder", "b/both"} {
		require.NoError(t, os.MkdirAll(at(d), 0o755))
	}
	for path, mode := range map[string]os.FileMode{
		"a/tool": 0o755, "b/tool": 0o755, "b/second": 0o755, "a/plain": 0o644, "b/late": 0o755, "a/late": 0o644,
		"work/here": 0o755, "work/sub/deep": 0o755, "b/folder": 0o755,
	} {
		require.NoError(t, os.WriteFile(at(path), nil, mode))
	}
	path := []string{"PATH=" + at("a") + ":" + at("none") + ":" + at("b")}
	for _, c := range []struct {
		name, file string
		env        []string
		want       string
		is         error
	}{
		{"the first", "tool", path, at("a/tool"), nil},
		{"a later one", "second", path, at("b/second"), nil},
		{"later, as the first cannot be executed", "late", path, at("b/late"), nil},
		{"later, as the first is a directory", "folder", path, at("b/folder"), nil},
		{"not executable", "plain", path, "", ErrNotExecutable},
		{"a directory is none", "both", path, "", ErrNotFound},
		{"not in PATH", "here", path, "", ErrNotFound},
		{"an empty element is the working directory", "here", []string{"PATH=:" + at("a")}, at("work/here"), nil},
		{"so is a relative one", "deep", []string{"PATH=sub"}, at("work/sub/deep"), nil},
		{"the last PATH counts", "second", []string{"PATH=/none", path[0]}, at("b/second"), nil},
		{"without PATH", "sh", nil, "", nil},
		{"an empty PATH", "tool", []string{"PATH="}, "", ErrNotFound},
		{"absolute", at("b/tool"), nil, at("b/tool"), nil},
		{"relative", "./here", path, at("work/here"), nil},
		{"relative, below", "sub/deep", path, at("work/sub/deep"), nil},
		{"relative, none", "./tool", path, "", ErrNotFound},
		{"below a file", at("a/tool/x"), path, "", ErrNotFound},
		{"a directory", at("a"), path, "", ErrNotExecutable},
		{"a file that is not executable", at("a/plain"), path, "", ErrNotExecutable},
		{"empty", "", path, "", ErrNotFound},
	} {
		got, err := LookPath(c.file, c.env, at("work"))
		if c.is != nil {
			require.ErrorIs(t, err, c.is, c.name)
			assert.Empty(t, got, c.name)
			continue
		}
		require.NoError(t, err, c.name)
		if c.want != "" {
			assert.Equal(t, c.want, got, c.name)
		} else {
			assert.FileExists(t, got)
		}
	}
	_, err := LookPath("nosuchthing", path, "/")
	assert.EqualError(t, err, `"nosuchthing": command not found`)
	_, err = LookPath("plain", path, "/")
	assert.EqualError(t, err, `"plain": not executable: permission denied`)
}
