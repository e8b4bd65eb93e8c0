#!/bin/sh
# check.sh [LIBDIR] - the ABI: headers, map and exported symbols agree both ways; every public struct is
# locked; abidiff finds no change against the baseline; the library needs and calls only what it may.
# Each check is a function of what it looks at, and at the end is shown something bad that it must find.
# Needs a compiler, binutils and awk; MOE_CHECK_ALL=1 makes a missing abidiff a failure.
cd "$(dirname "$0")/../.." || exit 1
libdir=${1:-lib}
lib=$libdir/libmoe.so
map=src/libmoe.map
baseline=tests/abi/libmoe.abi
cc=${CC:-cc}
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
notes=""

exec 3>&1
fail() {
    echo "FAILED: $*" >&3
    exit 1
}

# All headers of a directory as one line without comments.
plain_headers() { # directory
    cat "$1"/*.h | tr '\n' ' ' | sed 's|/\*[^*]*\*\+\([^/*][^*]*\*\+\)*/||g'
    echo
}

# ---- names ------------------------------------------------------------------------------------------

# The modules' headers are compared with their own maps and libraries.
header_names() { # directory or header
    if test -d "$1"; then
        mkdir -p "$out/core" && rm -f "$out/core"/* && cp "$1"/*.h "$out/core" && rm -f "$out/core/mpi.h" "$out/core/io.h" "$out/core/cuda.h" "$out/core/nccl.h"
    else
        mkdir -p "$out/core" && rm -f "$out/core"/* && cp "$1" "$out/core"
    fi
    plain_headers "$out/core" | tr ';' '\n' | sed -n 's/.*MOE_API [^(]*[ *]\(moe_[a-z0-9_]*\) *(.*/\1/p' | sort -u
}
# moe__ names are the modules' private interface, under a version node of its own.
map_names() { sed -n 's/^ *\(moe_[a-z0-9][a-z0-9_]*\);.*/\1/p' "$1" | sort -u; }
symbol_names() {
    nm -D --defined-only "$1" | awk '$2 != "A" { sub(/@+LIBMOE_PRIVATE_0$/, "@", $3)
        if ($3 ~ /^moe__module_[a-z_]*@$/) next
        sub(/@.*/, "", $3); print $3 }' | sort -u
}

compare_names() { # headers map library
    header_names "$1" >"$out/headers"
    map_names "$2" >"$out/map"
    symbol_names "$3" >"$out/symbols"
    test -s "$out/headers" || { echo "no function found in $1"; return 1; }
    for pair in headers:map map:headers symbols:map map:symbols; do
        comm -23 "$out/${pair%:*}" "$out/${pair#*:}" >"$out/only"
        test ! -s "$out/only" || { echo "in ${pair%:*} but not in ${pair#*:}:" $(cat "$out/only"); return 1; }
    done
}

# Between "global:" and "local:" only names, and then one star.
check_map() { # map
    sed -n '/global:/,/local:/p' "$1" | grep -q '[*?[]' && { echo "$1 has a pattern"; return 1; }
    test "$(tr -d ' \n' <"$1" | sed 's/.*local://')" = '*;};' || { echo "$1 does not end with local: *"; return 1; }
}

# ---- layouts ----------------------------------------------------------------------------------------

# "struct field" for every field of every public struct.
struct_fields() { # directory
    plain_headers "$1" | awk '{
        while (match($0, /typedef struct [a-z0-9_]+ *\{[^}]*\}/)) {
            text = substr($0, RSTART, RLENGTH)
            $0 = substr($0, RSTART + RLENGTH)
            name = text
            sub(/typedef struct /, "", name)
            sub(/ *\{.*/, "", name)
            gsub(/^[^{]*\{|\}$/, "", text)
            count = split(text, declarations, ";")
            for (i = 1; i <= count; i++) {
                line = declarations[i]
                if (match(line, /\(\*[a-z0-9_]+\)/))
                    line = substr(line, RSTART + 2, RLENGTH - 3)
                fields = split(line, parts, ",")
                for (j = 1; j <= fields; j++) {
                    field = parts[j]
                    gsub(/\[[^]]*\]/, "", field)
                    gsub(/[ \t]+$/, "", field)
                    sub(/.*[ *]/, "", field)
                    if (field != "") print name, field
                }
            }
        }
    }'
}

lock_layout() { # directory of moe/
    "$cc" -std=c11 -I"$1" -fsyntax-only tests/abi/layout.c >"$out/log" 2>&1 || { cat "$out/log"; return 1; }
}

all_locked() { # directory
    struct_fields "$1" | sort >"$out/fields"
    test -s "$out/fields" || { echo "no struct found in $1"; return 1; }
    sed -n 's/^OFFSET(\([a-z0-9_]*\), \([a-z0-9_]*\),.*/\1 \2/p' tests/abi/layout.c | sort >"$out/locked"
    diff "$out/fields" "$out/locked" >"$out/log" || {
        echo "tests/abi/layout.c and the headers do not have the same fields:"
        cat "$out/log"
        return 1
    }
    cut -d' ' -f1 "$out/fields" | sort -u >"$out/structs"
    sed -n 's/^SIZE(\([a-z0-9_]*\),.*/\1/p' tests/abi/layout.c | sort -u >"$out/locked"
    cmp -s "$out/structs" "$out/locked" || { echo "a struct's size is not locked"; return 1; }
    # Enumerators and rows of the status list: every "MOE_NAME =" and "X(MOE_NAME," outside comments.
    cat "$1"/*.h | tr '\n' ' ' | sed 's|/\*[^*]*\*\+\([^/*][^*]*\*\+\)*/||g' |
        grep -oE 'MOE_[A-Z0-9_]+ *= |X\(MOE_[A-Z0-9_]+,' |
        grep -oE 'MOE_[A-Z0-9_]+' | sort >"$out/constants"
    sed -n 's/^VALUE(\([A-Z0-9_]*\),.*/\1/p' tests/abi/layout.c | sort >"$out/locked"
    diff "$out/constants" "$out/locked" >"$out/log" || {
        echo "tests/abi/layout.c and the headers do not have the same constants:"
        cat "$out/log"
        return 1
    }
}

# ---- what the library may need, call and include ------------------------------------------------------

forbidden='_?_?exit|_Exit|quick_exit|atexit|abort|assert|__assert|__assert_fail|__assert_perror_fail'
forbidden="$forbidden|(__)?v?f?printf(_chk)?|dprintf|puts|putchar|putc|fputs|fputc|fwrite|perror|psignal|write"
forbidden="$forbidden|signal|__sysv_signal|sigaction|raise|kill|pthread_kill|(secure_)?getenv|setenv|longjmp"
check_calls() { # archive or object, what its compiler may call
    calls=$(nm -u "$1" 2>/dev/null | awk 'NF == 2 && $1 == "U" { sub(/@.*/, "", $2); print $2 }' | sort -u |
        grep -Ex "$forbidden" | grep -vx "${2:-none}")
    test -z "$calls" || { echo "$1 calls" $calls; return 1; }
}

check_needed() { # library, what else it may need
    readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p' >"$out/needed"
    more=$(grep -Ev "^(libc|libm|libpthread|ld-linux[a-z0-9_-]*${2:+|$2})\\." "$out/needed")
    test -z "$more" || { echo "$1 needs" $more; return 1; }
}

# The core knows no device and no transport; only src/comm may, and intrinsics have one place.
check_includes() { # source directory
    wrong=$(cd "$1" && grep -rlE '^ *# *include *[<"](moe/)?(cuda|cublas|nccl|mpi|nvshmem)' . | grep -v '^\./comm/')
    test -z "$wrong" || { echo "includes of a module outside src/comm:" $wrong; return 1; }
    wrong=$(cd "$1" && grep -rlE '^ *# *include *[<"]([a-z0-9]*intrin|arm_[a-z]*)\.h' . | grep -v '^\./cpu/simd\.h$')
    test -z "$wrong" || { echo "intrinsics outside src/cpu/simd.h:" $wrong; return 1; }
}

# ---- abidiff ------------------------------------------------------------------------------------------

# abidiff says "no change" of a library without debug information, whatever changed in its types. What is
# not in the public headers, as the structs behind the handles, is no part of the comparison.
compare_abi() { # library [its directory of headers]
    readelf -S "$1" | grep -q '\.debug_info' || { echo "$1 has no debug information"; return 1; }
    abidiff --drop-private-types --exported-interfaces-only --headers-dir2 "${2:-include/moe}" "$baseline" "$1" >"$out/log" 2>&1
    result=$?
    test $((result & 3)) -eq 0 || { cat "$out/log" >&3; fail "abidiff broke down with $result"; }
    test $result -eq 0 || { cat "$out/log"; return 1; }
}

have_abidiff() {
    command -v abidiff >/dev/null || { why="abidiff (package abigail-tools) is not installed"; return 1; }
    test -f "$baseline" || { why="$baseline is missing; make abi-baseline"; return 1; }
    machine=$(sed -n "s/.*<abi-corpus .*architecture='\([^']*\)'.*/\1/p" "$baseline")
    case $machine:$("$cc" -dumpmachine) in
    elf-amd-x86_64:x86_64*) return 0 ;;
    esac
    why="the baseline is of $machine"
    return 1
}

# ---- the checks ---------------------------------------------------------------------------------------

test -f "$lib" || fail "$lib is missing; run make"
compare_names include/moe "$map" "$lib" || fail "headers, $map and $lib differ"
count=$(wc -l <"$out/symbols")
check_map "$map" || fail "$map"
lock_layout include || fail "a public struct changed its layout; see docs/abi.md"
all_locked include/moe || fail "tests/abi/layout.c is not complete; make abi-baseline"
structs=$(wc -l <"$out/structs")
check_calls "$libdir/libmoe.a" || fail "a library never ends, prints, signals or reads the environment"
check_needed "$lib" || fail "libmoe depends on libc, libm and threads only"
check_includes src || fail "src"
modules=0
check_module() { # name, header, map, libraries it may need, what its compiler may call
    test -f "$libdir/$1.so" || return 0
    compare_names "$2" "$3" "$libdir/$1.so" || fail "$2, $3 and $libdir/$1.so differ"
    check_map "$3" || fail "$3"
    check_calls "$libdir/$1.a" "$5" || fail "$1: a library never ends, prints, signals or reads the environment"
    check_needed "$libdir/$1.so" "libmoe|$4" || fail "$1 depends on too much"
    modules=$((modules + 1))
}
for module in openmpi mpich mpi; do
    check_module libmoe_mpi_$module include/moe/mpi.h src/comm/libmoe_mpi.map 'libmpi|libmpich'
done
check_module libmoe_io include/moe/io.h src/io/libmoe_io.map libjansson
# nvcc takes its kernels out of the registry at exit.
check_module libmoe_cuda include/moe/cuda.h cuda/libmoe_cuda.map 'libcudart|libcublas' atexit
check_module libmoe_nccl include/moe/nccl.h src/comm/libmoe_nccl.map 'libmoe_cuda|libnccl|libcudart'
if test -f "$libdir/libmoe_cuda.a"; then
    runtime=$(nm -uC "$libdir/libmoe_cuda.a" | grep -E ' (std::|operator (new|delete)|__cxa|__gxx|_Unwind)')
    test -z "$runtime" || fail "libmoe_cuda needs a C++ runtime:" $runtime
fi
if have_abidiff; then
    compare_abi "$lib" || fail "abidiff found changes; see docs/abi.md"
else
    test -z "$MOE_CHECK_ALL" || fail "$why"
    notes="; abidiff left out: $why"
fi

# ---- known to be bad ----------------------------------------------------------------------------------

bad=$out/bad
found=0
must_find() { # what, check and its arguments
    what=$1
    shift
    "$@" >"$out/found" 2>&1 && fail "not noticed: $what"
    found=$((found + 1))
}
anew() {
    rm -rf "$bad"
    mkdir -p "$bad/moe" "$bad/src/cpu"
    cp include/moe/*.h "$bad/moe"
}
edit() { # header, sed command: it must change something
    sed "$2" "include/moe/$1" >"$bad/moe/$1"
    cmp -s "include/moe/$1" "$bad/moe/$1" && fail "the bad copy of $1 is not bad"
}

anew
echo 'MOE_API int32_t moe_not_in_the_map(void);' >>"$bad/moe/gate.h"
must_find "a declared function that the map lacks" compare_names "$bad/moe" "$map" "$lib"
anew
edit gate.h 's/MOE_API moe_status moe_gate_create(/moe_status moe_gate_create(/'
must_find "an exported function that no header declares" compare_names "$bad/moe" "$map" "$lib"
sed '/moe_gate_create;/d' "$map" >"$bad/short.map"
must_find "a name that the map lost" compare_names include/moe "$bad/short.map" "$lib"
sed 's/moe_gate_create;/moe_gate_*;/' "$map" >"$bad/glob.map"
must_find "a pattern in the map" check_map "$bad/glob.map"

sed 's/.*/int &(void); int &(void) { return 0; }/' "$out/map" >"$bad/extra.c"
echo 'int extra(void); int extra(void) { return 0; }' >>"$bad/extra.c"
"$cc" -g -shared -fPIC "$bad/extra.c" -o "$out/extra.so" || fail "bad library"
must_find "a symbol that the map lacks" compare_names include/moe "$map" "$out/extra.so"
sed 1d "$bad/extra.c" | sed '$d' >"$bad/fewer.c"
"$cc" -g -shared -fPIC "$bad/fewer.c" -o "$bad/fewer.so" || fail "bad library"
must_find "a symbol that is gone" compare_names include/moe "$map" "$bad/fewer.so"

anew
edit gate.h 's|^    int64_t d_model; |    int64_t inserted; int64_t d_model; |'
must_find "a field inserted" lock_layout "$bad"
must_find "a field that layout.c lacks" all_locked "$bad/moe"
anew
edit gate.h '/^    double init_std;/d'
must_find "the last field removed" lock_layout "$bad"
anew
edit gate.h 's|^    int32_t score;|    int64_t score;|'
must_find "a field that grew" lock_layout "$bad"
anew
edit gate.h 's|MOE_GATE_HASH = 6|MOE_GATE_HASH = 9|'
must_find "a constant with another number" lock_layout "$bad"
anew
edit gate.h 's|MOE_GATE_SINKHORN = 7|MOE_GATE_SINKHORN = 7, MOE_GATE_NEW = 8|'
must_find "a constant that layout.c lacks" all_locked "$bad/moe"

for call in exit abort puts getenv raise; do
    echo "void $call(void); void f(void); void f(void) { $call(); }" >"$bad/call.c"
    "$cc" -w -fno-builtin -c "$bad/call.c" -o "$bad/call.o" || fail "bad object"
    must_find "a call of $call" check_calls "$bad/call.o"
done
echo '#include <cuda_runtime.h>' >"$bad/src/cpu/bad.c"
must_find "a CUDA header in src/cpu" check_includes "$bad/src"
echo '#include <immintrin.h>' >"$bad/src/cpu/bad.c"
must_find "intrinsics in a kernel" check_includes "$bad/src"

# Two small builds without kernels: with the headers as they are abidiff is content, with a field
# more it is not, nor with the debug information gone.
build_core() { # directory of moe/, library
    "$cc" -std=c11 -w -g -O0 -fPIC -shared -fvisibility=hidden -pthread -DNDEBUG -DMOE_BUILD -D_GNU_SOURCE \
        "-D_Static_assert(condition, text)=struct moe__ignored" -I"$1" -Isrc src/*.c src/comm/comm.c src/comm/world.c \
        -Wl,-soname,"libmoe.so.$(cat src/soname)" -Wl,--version-script="$map" -o "$2" || fail "small build"
}
if [ -z "$notes" ]; then
    build_core include "$bad/good.so"
    compare_abi "$bad/good.so" || fail "abidiff on a small build without kernels"
    objcopy --strip-debug "$bad/good.so" "$bad/stripped.so"
    must_find "a library without debug information" compare_abi "$bad/stripped.so"
    edit gate.h 's|^    int64_t d_model; |    int64_t inserted; int64_t d_model; |'
    build_core "$bad" "$bad/inserted.so"
    must_find "a field inserted, by abidiff" compare_abi "$bad/inserted.so" "$bad/moe"
    must_find "other symbols, by abidiff" compare_abi "$out/extra.so"
fi
echo "abi: $count functions, $modules modules, $structs structs and $(wc -l <"$out/constants") constants locked, $found bad copies found out$notes"
