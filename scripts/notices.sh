#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# notices.sh: for "make install" and "make deb": print the licences and notices of what the binary has of others: of each
# module that a package is linked from, from the module's directory and those down to the package's, and of Go itself.
set -eu
export LC_ALL=C CGO_ENABLED=0

cd "$(dirname "$0")/.."

# show NAME DIRECTORY: print what lies there, under NAME. Fails where nothing does.
show() {
	files=$(find "$2/" -maxdepth 1 -type f \( -iname 'licen[cs]e*' -o -iname 'copying*' -o -iname 'notice*' -o -iname 'patents*' \) ! -name '*.go' | sort)
	[ -n "$files" ] || return 1
	printf '%s\n' "$files" | while IFS= read -r file; do
		printf '======== %s: %s\n\n' "$1" "${file##*/}"
		cat "$file"
		printf '\n\n'
	done
}

tab=$(printf '\t')
linked=$(go list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{"\t"}}{{.Dir}}{{"\t"}}{{$.Dir}}{{end}}{{end}}' ./cmd/bpfnet)
# Distributions take Go's own licence out of GOROOT; that of its authors' modules is the same.
show "Go $(go env GOVERSION)" "$(go env GOROOT)" || show "Go $(go env GOVERSION)" "$(go list -m -f '{{.Dir}}' golang.org/x/sys)"
printf '%s\n' "$linked" | awk -F '\t' '{ for (dir = $3; length(dir) > length($2); sub("/[^/]*$", "", dir)) print $1 FS $2 FS dir; print $1 FS $2 FS $2 }' |
	sort -u | while IFS=$tab read -r module root dir; do
	show "$module${dir#"$root"}" "$dir" && continue
	[ "$dir" != "$root" ] || { echo "notices.sh: $module: no licence in $root" >&2; exit 1; }
done
