#!/bin/sh
# check_cuda_missing.sh LIBDIR - libmoe_cuda on a machine without a driver: a context on a GPU is refused with
# a message, everything else works, and nothing is left over. With a GPU the program makes a context instead.
cd "$(dirname "$0")/../.." || exit 1
lib=${1:-lib}
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT

fail() {
    echo "FAILED: $*"
    exit 1
}

test -f "$lib/libmoe_cuda.so" || { echo "cuda missing: libmoe_cuda is not built"; exit 0; }
rpath="-Wl,-rpath,$(cd "$lib" && pwd) ${CUDA_LIB:+-Wl,-rpath,$CUDA_LIB -Wl,-rpath-link,$CUDA_LIB}"
${CC:-cc} -std=c11 -g -Wall -Wextra -Iinclude tests/cuda/check_cuda_missing.c -L"$lib" -lmoe_cuda -lmoe $rpath \
    -o "$out/shared" || fail "the program with shared libraries"
${CC:-cc} -std=c11 -g -Wall -Wextra -Iinclude tests/cuda/check_cuda_missing.c "$lib/libmoe_cuda.a" "$lib/libmoe.a" \
    ${CUDA_LIB:+-L$CUDA_LIB} -lcublas -lcudart -lm -pthread $rpath -o "$out/static" || fail "the program with archives"
for program in shared static; do
    "$out/$program" || fail "$program"
done

# No path of this machine, no C++ runtime and CUDA's libraries only.
readelf -d "$lib/libmoe_cuda.so" >"$out/dynamic" || fail readelf
grep -E 'RPATH|RUNPATH' "$out/dynamic" && fail "libmoe_cuda has a path"
grep NEEDED "$out/dynamic" | grep -vE '\[(libmoe\.so|libcudart\.so|libcublas\.so|libc\.so|libpthread\.so|ld-linux)' &&
    fail "libmoe_cuda needs more than it should"
nm -DC --undefined-only "$lib/libmoe_cuda.so" | grep -E ' (std::|operator (new|delete)|__cxa_(throw|begin|guard)|__gxx|_Unwind)' &&
    fail "libmoe_cuda needs a C++ runtime"

memory="valgrind is not installed"
if command -v valgrind >/dev/null; then
    # The loader reads words past the end of a path it has copied.
    printf '{\n loader\n Memcheck:Addr8\n fun:strncmp\n fun:is_dst\n}\n' >"$out/known"
    valgrind -q --suppressions="$out/known" --error-exitcode=9 --leak-check=full --show-leak-kinds=definite,indirect \
        --errors-for-leak-kinds=definite,indirect "$out/shared" >"$out/log" 2>&1 || { cat "$out/log"; fail "valgrind"; }
    memory="clean under valgrind"
fi
echo "cuda missing: shared and static programs, $memory"
