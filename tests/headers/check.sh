#!/bin/sh
# check.sh - every public header alone in every language version that an embedding program may use, with
# every compiler found; no implicit padding on a 64-bit machine; a C++ program that uses them all.
cd "$(dirname "$0")/../.." || exit 1
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
compiled=0
used=""

compile() { # compiler language options... header
    for last; do :; done
    if ! "$@" >"$out/log" 2>&1; then
        echo "FAILED: $*"
        cat "$out/log"
        exit 1
    fi
    compiled=$((compiled + 1))
}

for header in include/moe/*.h; do
    for cc in ${CC:-cc} gcc clang; do
        command -v "$cc" >/dev/null || continue
        case " $used " in *" $cc "*) ;; *) used="$used $cc" ;; esac
        for std in c99 c11 c17; do
            compile "$cc" -x c -std=$std -pedantic-errors -Wall -Wextra -Werror -Iinclude -fsyntax-only "$header"
        done
        compile "$cc" -x c -std=c11 -Wpadded -Werror -Iinclude -fsyntax-only "$header"
    done
    for cxx in g++ clang++; do
        command -v "$cxx" >/dev/null || continue
        case " $used " in *" $cxx "*) ;; *) used="$used $cxx" ;; esac
        for std in c++98 c++11 c++14 c++17 c++20; do
            compile "$cxx" -x c++ -std=$std -pedantic-errors -Wall -Wextra -Wno-long-long -Werror -Iinclude \
                -fsyntax-only "$header"
        done
    done
done
for cxx in g++ clang++; do
    command -v "$cxx" >/dev/null || continue
    compile "$cxx" -std=c++98 -pedantic-errors -Wno-long-long -Iinclude tests/headers/program.cpp lib/libmoe.a \
        -lm -pthread -o "$out/program"
    "$out/program" >/dev/null || { echo "FAILED: program.cpp"; exit 1; }
done
echo "headers: $compiled compilations with$used"
