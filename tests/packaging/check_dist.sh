#!/bin/sh
# check_dist.sh - the archive of make dist is complete: unpacked elsewhere it builds, installs and is used.
cd "$(dirname "$0")/../.." || exit 1
make=${MAKE:-make}
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
$make -s dist >"$out/log" 2>&1 || { cat "$out/log"; exit 1; }
tar -xzf dist/libmoe-*.tar.gz -C "$out" || exit 1
cd "$out"/libmoe-* || exit 1
for file in README.md LICENSE CHANGELOG.md moe.pc.in src/libmoe.map include/moe/moe.h; do
    test -f "$file" || { echo "FAILED: the archive lacks $file"; exit 1; }
done
NO_CUDA=1 # takes minutes; what make dist packs of it is checked by name
# The plain variants, quickly: the others are compiled from the same files.
MAKEFLAGS='VARIANTS=f32_plain\ f64_plain\ bf16_plain\ f16_plain HAVE_X86= CFLAGS=-O1\ -g0'
export NO_CUDA MAKEFLAGS
for file in cuda/device.h cuda/route.cu cuda/libmoe_cuda.map include/moe/cuda.h tests/emulation/emulation.mk; do
    test -f "$file" || { echo "FAILED: the archive lacks $file"; exit 1; }
done
$make -j2 >"$out/log" 2>&1 && sh tests/packaging/check_install.sh >>"$out/log" 2>&1 || { cat "$out/log"; exit 1; }
echo "dist: ${PWD##*/}, $(tail -n 1 "$out/log")"
