#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# deb.sh VERSION: for "make deb": make $BIN/bpfnet_VERSION_ARCH.deb of what "make install" installs. VERSION is a tag
# (v1.2.0, v1.2.0-5-gabcdef0) or anything else, a commit say, that is put behind the time of the last commit.
#
# The same files give the same bytes: times are no later than SOURCE_DATE_EPOCH (default: the last commit's), owners
# and modes are set, and the compressor has one thread.
set -eu
umask 022

cd "$(dirname "$0")/.."
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH

case $1 in
# What is on the way to a release goes before it, and what follows a tag behind it.
v[0-9]* | [0-9]*.*) version=$(printf %s "${1#v}" | sed -E 's/-(alpha|beta|pre|rc)/~\1/; s/-/+/g') ;;
*) version=0~$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).$(printf %s "$1" | tr - +) ;;
esac
arch=$(go env GOARCH)
case $arch in
ppc64le) arch=ppc64el ;;
esac

root=$BIN/deb
rm -rf "$root"
DESTDIR=$root PREFIX=/usr ZSHDIR=vendor-completions scripts/install.sh install
gzip -9n "$root"/usr/share/man/man8/*.8 "$root/usr/share/doc/bpfnet/changelog"

mkdir "$root/DEBIAN"
install -m 755 packaging/deb/postinst packaging/deb/prerm packaging/deb/postrm "$root/DEBIAN"
(cd "$root" && find . -path ./DEBIAN -prune -o -type f -printf '%P\n' | LC_ALL=C sort | xargs md5sum) >"$root/DEBIAN/md5sums"
# In units of 1024 bytes, each file rounded up: deb-substvars(5).
size=$(find "$root" -path "$root/DEBIAN" -prune -o -type f -printf '%s\n' | awk '{ n += int(($1 + 1023) / 1024) } END { print n }')
sed -e "s/@VERSION@/$version/" -e "s/@ARCH@/$arch/" -e "s/@SIZE@/$size/" packaging/deb/control.in >"$root/DEBIAN/control"
chmod 644 "$root/DEBIAN/md5sums" "$root/DEBIAN/control"

# One at a time: $BIN/bpfnet_*.deb is what the documents have installed.
rm -f "$BIN"/bpfnet_*_"$arch".deb
deb=$BIN/bpfnet_${version}_$arch.deb
DPKG_DEB_THREADS_MAX=1 dpkg-deb --root-owner-group --build "$root" "$deb" >/dev/null
rm -rf "$root"
echo "$deb"
