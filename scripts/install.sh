#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# install.sh install|uninstall: for "make install" and "make uninstall". Reads from the environment:
#
#   BIN      where "make build" has put the binary, and notices.sh the notices
#   PREFIX   what the files are below, /usr/local say
#   DESTDIR  goes before that; empty: this host
#   ZSHDIR   where zsh looks below share/zsh (default: site-functions)
set -eu
umask 022

cd "$(dirname "$0")/.."
dest=${DESTDIR:-}
config=$dest/etc/bpfnet/config.yaml

# each VERB: call VERB MODE SOURCE DESTINATION for every file.
each() {
	$1 755 "$BIN/bpfnet" "$PREFIX/bin/bpfnet"
	$1 644 packaging/bpfnet.service "$PREFIX/lib/systemd/system/bpfnet.service"
	$1 644 packaging/config.yaml "$PREFIX/share/bpfnet/config.yaml"
	$1 644 packaging/docker.service.d/bpfnet.conf "$PREFIX/share/bpfnet/docker.service.d/bpfnet.conf"
	$1 644 packaging/grafana/bpfnet-dashboard.json "$PREFIX/share/bpfnet/grafana/bpfnet-dashboard.json"
	$1 644 packaging/grafana/bpfnet-alerts.yaml "$PREFIX/share/bpfnet/grafana/bpfnet-alerts.yaml"
	$1 644 packaging/completions/bpfnet.bash "$PREFIX/share/bash-completion/completions/bpfnet"
	$1 644 packaging/completions/bpfnet.zsh "$PREFIX/share/zsh/${ZSHDIR:-site-functions}/_bpfnet"
	$1 644 packaging/completions/bpfnet.fish "$PREFIX/share/fish/vendor_completions.d/bpfnet.fish"
	$1 644 packaging/deb/copyright "$PREFIX/share/doc/bpfnet/copyright"
	$1 644 "$BIN/third-party.txt" "$PREFIX/share/doc/bpfnet/third-party.txt"
	$1 644 CHANGELOG.md "$PREFIX/share/doc/bpfnet/changelog"
	for page in packaging/man/*.8; do
		$1 644 "$page" "$PREFIX/share/man/man8/${page##*/}"
	done
}

put() {
	install -D -m "$1" "$2" "$dest$3"
}

take() {
	rm -f "$dest$3"
}

case ${1:-} in
install)
	each put
	# The path that the unit starts is the one that the binary has.
	sed -i "s|/usr/bin/bpfnet|$PREFIX/bin/bpfnet|" "$dest$PREFIX/lib/systemd/system/bpfnet.service"
	install -d "$dest$PREFIX/libexec/bpfnet"
	ln -sfn ../../bin/bpfnet "$dest$PREFIX/libexec/bpfnet/docker-proxy"
	[ -n "$dest" ] || echo 'installed and not started: systemctl daemon-reload && systemctl enable --now bpfnet'
	;;
uninstall)
	each take
	rm -f "$dest$PREFIX/libexec/bpfnet/docker-proxy"
	for dir in "$PREFIX/libexec/bpfnet" "$PREFIX/share/doc/bpfnet" \
		"$PREFIX/share/bpfnet/docker.service.d" "$PREFIX/share/bpfnet/grafana" "$PREFIX/share/bpfnet"; do
		[ ! -d "$dest$dir" ] || rmdir --ignore-fail-on-non-empty "$dest$dir"
	done
	[ ! -e "$config" ] || echo "left: $config, which is yours"
	;;
*)
	echo 'usage: install.sh install|uninstall' >&2
	exit 2
	;;
esac
