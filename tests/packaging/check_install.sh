#!/bin/sh
# check_install.sh [BUILD] - installs into an empty place and uses it as a stranger would: pkg-config, a
# shared and a static program; then the same from the tree; then uninstalls and looks that nothing is left.
# The program is the one in README.md.
cd "$(dirname "$0")/../.." || exit 1
build=${1:-build}
make=${MAKE:-make}
cc=${CC:-cc}
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
case $build in
build) lib=$PWD/lib ;;
/*) lib=$build/lib ;;
*) lib=$PWD/$build/lib ;;
esac
version=$(sed -n 's/^#define MOE_VERSION_[A-Z]* \([0-9]*\)$/\1/p' include/moe/version.h | paste -sd.)
soname=libmoe.so.$(cat src/soname)

fail() {
    echo "FAILED: $*"
    exit 1
}
quietly() { "$@" >"$out/log" 2>&1 || { cat "$out/log"; fail "$*"; }; }

sed -n '/^```c$/,/^```$/p' README.md | sed '/^```/d' >"$out/program.c"
test -s "$out/program.c" || fail "README.md has no program"

# The library for GPUs takes minutes to compile: it is installed if it is there.
test -e "$lib/libmoe_cuda.so" || { NO_CUDA=1; export NO_CUDA; }

# make in the tree that is tested, whatever make called this.
in_root() { quietly $make -s BUILD="$build" DESTDIR="$out/root" "$@"; }

installed() { # libdir includedir
    for file in "$2/moe/moe.h" "$1/libmoe.a" "$1/libmoe.so.$version" "$1/pkgconfig/moe.pc"; do
        test -f "$out/root$file" || fail "$file was not installed"
    done
    test "$(readlink "$out/root$1/libmoe.so")" = "$soname" || fail "libmoe.so is no link to $soname"
    test "$(readlink "$out/root$1/$soname")" = "libmoe.so.$version" || fail "$soname is no link"
    for header in include/moe/*.h; do
        cmp -s "$header" "$out/root$2/moe/${header##*/}" || fail "$header was not installed as it is"
    done
}

use() { # what, pkg-config path, sysroot, library directory
    flags=$(PKG_CONFIG_PATH=$2 PKG_CONFIG_SYSROOT_DIR=$3 pkg-config --cflags --libs moe) || fail "pkg-config $1"
    test "$(PKG_CONFIG_PATH=$2 pkg-config --modversion moe)" = "$version" || fail "the version in moe.pc $1"
    quietly $cc -std=c99 "$out/program.c" $flags -o "$out/shared"
    readelf -d "$out/shared" | grep -q "NEEDED.*\[$soname\]" || fail "the program does not need $soname, $1"
    LD_LIBRARY_PATH=$4 "$out/shared" >"$out/shared.out" || fail "shared program, $1"
    static=$(PKG_CONFIG_PATH=$2 PKG_CONFIG_SYSROOT_DIR=$3 pkg-config --cflags --libs --static moe) ||
        fail "pkg-config --static $1"
    quietly $cc -std=c99 "$out/program.c" $(echo "$static" | sed 's/-lmoe/-l:libmoe.a/') -o "$out/static"
    "$out/static" >"$out/static.out" || fail "static program, $1"
    cmp -s "$out/shared.out" "$out/static.out" || fail "shared and static programs differ, $1"
}

gone() {
    left=$(find "$out/root" ! -type d)
    test -z "$left" || fail "uninstall left $left"
}

in_root PREFIX=/opt/moe install
installed /opt/moe/lib /opt/moe/include
use "of the install" "$out/root/opt/moe/lib/pkgconfig" "$out/root" "$out/root/opt/moe/lib"
in_root PREFIX=/opt/moe uninstall
gone

in_root PREFIX=/usr LIBDIR=/usr/lib/triplet INCLUDEDIR=/usr/include/api install
installed /usr/lib/triplet /usr/include/api
use "of the install with LIBDIR" "$out/root/usr/lib/triplet/pkgconfig" "$out/root" "$out/root/usr/lib/triplet"
in_root PREFIX=/usr LIBDIR=/usr/lib/triplet INCLUDEDIR=/usr/include/api uninstall
gone

# Where there is no MPI its libraries are left out, and that is all.
in_root have= PREFIX=/opt/moe install
installed /opt/moe/lib /opt/moe/include
left=$(find "$out/root" -name '*mpi*' ! -name mpi.h)
test -z "$left" || fail "without MPI there is $left"
in_root have= PREFIX=/opt/moe uninstall
gone

use "of the tree" "$lib/pkgconfig" "" "$lib"
echo "install: $(cat "$out/shared.out")"
