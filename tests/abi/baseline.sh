#!/bin/sh
# baseline.sh [LIBDIR] - writes anew what check.sh compares with: layout.c and libmoe.abi. Only for a
# change of the interface that is meant, on x86-64 with gcc, after make; see docs/abi.md.
cd "$(dirname "$0")/../.." || exit 1
lib=${1:-lib}/libmoe.so
new=$(mktemp -d) || exit 1
trap 'rm -rf "$new"' EXIT
for tool in python3 abidw readelf; do
    command -v $tool >/dev/null || { echo "$tool is missing (packages python3, abigail-tools, binutils)"; exit 1; }
done
readelf -S "$lib" | grep -q '\.debug_info' || { echo "$lib has no debug information"; exit 1; }
python3 tests/abi/make_layout.py >"$new/layout.c" || exit 1
abidw --no-corpus-path --no-comp-dir-path --short-locs --drop-private-types --exported-interfaces-only \
    --headers-dir include/moe "$lib" --out-file "$new/libmoe.abi" || exit 1
cp "$new/layout.c" "$new/libmoe.abi" tests/abi/
echo "baseline: $(grep -c '^SIZE' tests/abi/layout.c) structs, $(grep -c '<function-decl' tests/abi/libmoe.abi) functions"
