#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# deps.sh GROUP...: install the Debian packages that a group of targets needs.
#
#   build     nothing but the Go toolchain, which must be there already
#   test      the engine under test and the tools that the lab runs
#   generate  the compiler of the BPF objects
#   check     the formatters
#   deb       what makes packages
#
# Says nothing and touches nothing when all is there. Services of the packages are not started: if the machine has
# no policy-rc.d of its own, one that forbids it stands there while packages are installed.
set -eu

die() {
	echo "deps.sh: $*" >&2
	exit 1
}

policy=/usr/sbin/policy-rc.d
own_policy=
log=

clean() {
	[ -z "$own_policy" ] || rm -f "$policy"
	[ -z "$log" ] || rm -f "$log"
}
trap clean EXIT
trap 'exit 130' INT TERM

[ $# -gt 0 ] || die "usage: deps.sh build|test|generate|check|deb ..."

# The packages of each group. The engine is Debian's docker.io, whose dockerd is /usr/sbin/dockerd.
packages=
for group in "$@"; do
	case $group in
	build)
		command -v go >/dev/null || die "no Go toolchain on PATH: install the version that go.mod names"
		;;
	test)
		packages="$packages docker.io docker-compose iptables nftables iproute2 conntrack tcpdump tshark
			busybox-static iperf3 ethtool iputils-ping traceroute procps util-linux curl
			qemu-system-x86 xz-utils strace groff-base bash-completion zsh fish"
		;;
	generate) packages="$packages clang-14 llvm-14 libbpf-dev linux-libc-dev" ;;
	check) packages="$packages clang-format-14" ;;
	deb) packages="$packages dpkg gzip" ;;
	*) die "unknown group \"$group\": want build, test, generate, check or deb" ;;
	esac
done

missing=
for package in $packages; do
	status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) || status=absent
	[ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

[ "$(id -u)" = 0 ] || die "must be root to install:$missing"
command -v apt-get >/dev/null || die "no apt-get; install by hand:$missing"

if [ ! -e "$policy" ]; then
	own_policy=yes
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
fi

log=$(mktemp)
run() {
	DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1 </dev/null
}
# A failed update is not the end: the lists that are there may do.
run update || true
# shellcheck disable=SC2086 # one word per package
run install --no-install-recommends $missing ||
	die "cannot install$missing: $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
