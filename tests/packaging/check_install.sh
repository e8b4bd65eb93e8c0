#!/bin/sh
# check_install.sh BUILD - installs into an empty place and uses it as a stranger would: pkg-config, a shared
# and a static program; then from the tree; then uninstalls and looks that nothing is left.
cd "$(dirname "$0")/../.." || exit 1
build=${1:-build}
make=${MAKE:-make}
cc=${CC:-cc}
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT

fail() {
    echo "FAILED: $*"
    exit 1
}

sed -n '/^```c$/,/^```$/p' README.md | sed '/^```/d' >"$out/program.c"
test -s "$out/program.c" || fail "README.md has no program"

$make -s BUILD="$build" PREFIX=/opt/moe DESTDIR="$out/root" install >"$out/log" 2>&1 || { cat "$out/log"; fail install; }
for file in include/moe/moe.h lib/libmoe.a lib/libmoe.so lib/pkgconfig/moe.pc; do
    test -e "$out/root/opt/moe/$file" || fail "$file was not installed"
done

use() { # what, pkg-config path, sysroot
    flags=$(PKG_CONFIG_PATH=$2 PKG_CONFIG_SYSROOT_DIR=$3 pkg-config --cflags --libs moe) || fail "pkg-config $1"
    $cc -std=c99 "$out/program.c" $flags -o "$out/shared" || fail "shared link, $1"
    LD_LIBRARY_PATH=$4 "$out/shared" >"$out/shared.out" || fail "shared program, $1"
    static=$(PKG_CONFIG_PATH=$2 PKG_CONFIG_SYSROOT_DIR=$3 pkg-config --cflags --libs --static moe) || fail "pkg-config --static $1"
    $cc -std=c99 "$out/program.c" $(echo "$static" | sed 's/-lmoe/-l:libmoe.a/') -o "$out/static" || fail "static link, $1"
    "$out/static" >"$out/static.out" || fail "static program, $1"
    cmp -s "$out/shared.out" "$out/static.out" || fail "shared and static programs differ, $1"
}
use "of the install" "$out/root/opt/moe/lib/pkgconfig" "$out/root" "$out/root/opt/moe/lib"
lib=lib
test "$build" = build || lib=$build/lib
use "of the tree" "$PWD/$lib/pkgconfig" "" "$PWD/$lib"

$make -s BUILD="$build" PREFIX=/opt/moe DESTDIR="$out/root" uninstall >"$out/log" 2>&1 || fail uninstall
left=$(find "$out/root" ! -type d)
test -z "$left" || fail "uninstall left $left"
echo "install: $(cat "$out/shared.out")"
