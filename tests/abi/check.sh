#!/bin/sh
# check.sh LIBDIR - the ABI: headers, map and exported symbols agree both ways; layouts are locked; abidiff
# finds no change against the baseline; nothing in the library ends or prints; and a library and a header
# that are known to be bad are found to be bad.
cd "$(dirname "$0")/../.." || exit 1
lib=${1:-lib}/libmoe.so
cc=${CC:-cc}
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
notes=""

fail() {
    echo "FAILED: $*"
    exit 1
}

# ---- names ----------------------------------------------------------------------------------------

header_names() { # directory
    cat "$1"/*.h | tr '\n' ' ' | sed 's|/\*[^*]*\*\+\([^/*][^*]*\*\+\)*/||g' | tr ';' '\n' |
        sed -n 's/.*MOE_API [^(]*[ *]\(moe_[a-z0-9_]*\)(.*/\1/p' | sort -u
}
map_names() { sed -n 's/^ *\(moe_[a-z0-9_]*\);.*/\1/p' "$1" | sort -u; }
symbol_names() { nm -D --defined-only "$1" | sed -n 's/.* [A-Z] \(.*\)/\1/p' | sed 's/@.*//' | grep -v '^MOE_' | sort -u; }

compare_names() { # headers map library
    header_names "$1" >"$out/headers"
    map_names "$2" >"$out/map"
    symbol_names "$3" >"$out/symbols"
    test -s "$out/headers" || return 1
    cmp -s "$out/headers" "$out/map" || { diff "$out/headers" "$out/map"; return 1; }
    cmp -s "$out/map" "$out/symbols" || { diff "$out/map" "$out/symbols"; return 1; }
}

compare_names include/moe src/libmoe.map "$lib" || fail "headers, src/libmoe.map and $lib differ"
grep -q '\*;' src/libmoe.map && test "$(grep -c '\*;' src/libmoe.map)" -eq 1 || fail "the map has a glob beside local"
count=$(wc -l <"$out/symbols")

# ---- layouts ----------------------------------------------------------------------------------------

lock_layout() { "$cc" -std=c11 -I"$1" -fsyntax-only tests/abi/layout.c >"$out/log" 2>&1; }
lock_layout include || { cat "$out/log"; fail "a public struct changed its layout"; }
if command -v python3 >/dev/null; then
    python3 tests/abi/make_layout.py --check tests/abi/layout.c || fail "tests/abi/layout.c is not complete"
fi

# ---- what a library must not call --------------------------------------------------------------------

forbidden='exit|_exit|abort|printf|puts|putchar|fputs|perror|signal|sigaction|raise|__assert_fail|getenv|secure_getenv'
calls=$(nm -D --undefined-only "$lib" | sed 's/.* //; s/@.*//' | grep -Ex "$forbidden")
test -z "$calls" || fail "the library calls $calls"
wrong=$(grep -rlE '#include *[<"](cuda|cublas|nccl|mpi)' src | grep -v '^src/comm/')
test -z "$wrong" || fail "$wrong include a module's header"
wrong=$(grep -lE '#include *<(immintrin|x86intrin|arm_neon)' -r src | grep -v '^src/cpu/simd.h$')
test -z "$wrong" || fail "$wrong include intrinsics outside src/cpu/simd.h"

# ---- abidiff ------------------------------------------------------------------------------------------

compare_abi() { abidiff --no-show-locs --headers-dir2 include/moe tests/abi/libmoe.abi "$1" >"$out/log" 2>&1; }
if command -v abidiff >/dev/null && [ -f tests/abi/libmoe.abi ]; then
    compare_abi "$lib" || { cat "$out/log"; fail "abidiff found changes; see docs/abi.md"; }
else
    notes="; abidiff not installed: left out"
fi

# ---- known to be bad ----------------------------------------------------------------------------------

mkdir -p "$out/bad/moe"
cp include/moe/*.h "$out/bad/moe"
sed 's|^    int64_t d_model;  *|    int64_t inserted; int64_t d_model; |' include/moe/gate.h >"$out/bad/moe/gate.h"
lock_layout "$out/bad" && fail "a field inserted into moe_gate_config was not noticed"
cp include/moe/gate.h "$out/bad/moe/gate.h"
echo 'MOE_API int32_t moe_not_in_the_map(void);' >>"$out/bad/moe/gate.h"
compare_names "$out/bad/moe" src/libmoe.map "$lib" >/dev/null && fail "a function missing in the map was not noticed"
sed '/moe_gate_create;/d' src/libmoe.map >"$out/bad.map"
compare_names include/moe "$out/bad.map" "$lib" >/dev/null && fail "a name missing in the map was not noticed"
echo 'int moe_extra(void); int moe_extra(void) { return 0; }' >"$out/extra.c"
"$cc" -shared -fPIC "$out/extra.c" -o "$out/extra.so"
compare_names include/moe src/libmoe.map "$out/extra.so" >/dev/null && fail "a library with other symbols was not noticed"
if command -v abidiff >/dev/null && [ -f tests/abi/libmoe.abi ]; then
    compare_abi "$out/extra.so" && fail "abidiff did not notice a library with other symbols"
fi
echo "abi: $count functions, $(grep -c '^SIZE' tests/abi/layout.c) structs locked$notes"
