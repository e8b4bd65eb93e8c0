#!/bin/sh
# check.sh [LIBDIR] - every public header alone in every language version that an embedding program may
# use, with every compiler found; no implicit padding on a 64-bit machine; moe.h includes them all but the
# optional modules; a C++ program that calls across the boundary. What is not installed is left out.
cd "$(dirname "$0")/../.." || exit 1
lib=${1:-lib}/libmoe.a
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
compiled=0
left_out=""

fail() {
    echo "FAILED: $*"
    exit 1
}

compile() { # command... header
    "$@" >"$out/log" 2>&1 || { cat "$out/log"; fail "$*"; }
    compiled=$((compiled + 1))
}

# The compilers of the list that are there, each once whatever its names.
present() { # names
    seen=" "
    for name; do
        path=$(command -v "$name") || continue
        path=$(readlink -f "$path")
        case $seen in *" $path "*) continue ;; esac
        seen="$seen$path "
        echo "$name"
    done
}

c_compilers=$(present gcc clang "${CC:-cc}" cc)
cxx_compilers=$(present g++ clang++ "${CXX:-c++}" c++)
for wanted in gcc clang g++ clang++; do
    command -v $wanted >/dev/null || left_out="$left_out $wanted"
done
strict="-pedantic-errors -Wall -Wextra -Werror -Iinclude -fsyntax-only"

for header in include/moe/*.h; do
    for cc in $c_compilers; do
        for std in c99 c11 c17; do
            compile "$cc" -x c -std=$std $strict "$header"
        done
        compile "$cc" -x c -std=c11 $strict -Wpadded "$header"
    done
    # C++98 has no long long, which <stdint.h> uses for 64 bits on some systems.
    for cxx in $cxx_compilers; do
        for std in c++98 c++11 c++14 c++17 c++20; do
            compile "$cxx" -x c++ -std=$std $strict -Wno-long-long "$header"
        done
    done
    name=${header##*/}
    case $name in
    moe.h | cuda.h | nccl.h | mpi.h | io.h | dlpack.h) ;;
    *) grep -q "^#include <moe/$name>" include/moe/moe.h || fail "moe.h does not include $name" ;;
    esac
done

for cxx in $cxx_compilers; do
    test -f "$lib" || fail "$lib is missing; run make"
    compile "$cxx" -std=c++98 -pedantic-errors -Wno-long-long -Iinclude tests/headers/program.cpp "$lib" \
        -lm -pthread -o "$out/program"
    "$out/program" >"$out/log" || { cat "$out/log"; fail "program.cpp built by $cxx"; }
done

# The sizes in this file make a compiler lay every struct out, without which clang sees no hole.
for cc in $c_compilers; do
    compile "$cc" -std=c11 $strict -Wpadded tests/abi/layout.c
done

# Known to be bad: a header that needs another one, one that is not C99, one with a hole.
for bad in 'int32_t moe_bad(void);' 'enum moe_bad : int { MOE_BAD };' \
    'struct bad { char a; double b; }; typedef int size[sizeof(struct bad)];'; do
    printf '%s\n' "$bad" >"$out/bad.h"
    for cc in $c_compilers; do
        "$cc" -x c -std=c99 $strict -Wpadded "$out/bad.h" 2>/dev/null && fail "$cc accepted: $bad"
    done
done
set -- $c_compilers $cxx_compilers
echo "headers: $compiled compilations with $*${left_out:+; not installed:$left_out}"
