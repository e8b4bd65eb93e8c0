#!/bin/sh
# check.sh BUILD - the library and its suites compiled for aarch64, whose vectors are NEON's, and run by qemu: the
# reference cases, suites that compare bytes or compute layers, and check_determinism's hashes of whole steps, which
# must be those of this machine's own build in BUILD. Check for arm64 is Debian's check:arm64 where that is
# installed, else fetched and unpacked into build-neon; without it only the vectors run. Says so and ends with 0 where
# compiler or qemu are missing, unless MOE_CHECK_ALL is set.
cd "$(dirname "$0")/../.." || exit 1
host=$1
out=build-neon
cross=${NEON_CC:-aarch64-linux-gnu-gcc}
emulator=${NEON_RUN:-qemu-aarch64 -L /usr/aarch64-linux-gnu}
suites='combine choice determinism experts gate gemm half half_layer layer numeric storage'

for tool in "$cross" "${emulator%% *}"; do
    command -v "$tool" >/dev/null && continue
    echo "neon: skipped, no $tool: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
    test -z "$MOE_CHECK_ALL"
    exit
done

# Into a place of its own with lists of its own: the machine's packages stay as they are.
fetch_check() {
    command -v apt-get >/dev/null || return 1
    mkdir -p "$1/lists/partial" || return 1
    options="-o Dir::State::Lists=$1/lists -o APT::Architecture=arm64 -o APT::Architectures::=arm64"
    (cd "$1" && apt-get $options update && apt-get $options download check libsubunit-dev) >"$1/log" 2>&1 || return 1
    for package in "$1"/*.deb; do dpkg -x "$package" "$1" || return 1; done
}

place=/usr
libraries=lib/aarch64-linux-gnu
if ! test -f $place/$libraries/libcheck.a; then
    place=$PWD/$out/check/usr
    test -f "$place/$libraries/libcheck.a" || fetch_check "$PWD/$out/check"
fi
test -f "$place/$libraries/libcheck.a" || { echo 'neon: no Check for arm64, so only the vectors run'; suites=; }

programs=
for suite in $suites; do programs="$programs $out/tests/check_$suite"; done
${MAKE:-make} CC="$cross" BUILD=$out LIB=$out/lib NO_CUDA=1 NO_MPI=1 NO_IO=1 CHECK_CFLAGS="-I$place/include" \
    CHECK_LIBS="$place/$libraries/libcheck.a $place/$libraries/libsubunit.a -lrt -lm -pthread" \
    $out/run_vectors $programs >$out.log 2>&1 || { cat $out.log; exit 1; }
mv $out.log $out/log

MOE_SANITIZED=1 MOE_VERBOSE=1 CK_DEFAULT_TIMEOUT=900
export MOE_SANITIZED MOE_VERBOSE CK_DEFAULT_TIMEOUT
set -- "$emulator $out/run_vectors tests/vectors"
for program in $programs; do
    test "${program##*_}" = determinism || set -- "$@" "$emulator $program"
done
sh tests/run_programs.sh "$@" || exit 1
test -n "$suites" || exit 0
$emulator $out/tests/check_determinism >$out/steps || { cat $out/steps; exit 1; }
tail -n 1 $out/steps
"$host/tests/check_determinism" >$out/steps.host || { cat $out/steps.host; exit 1; }
for steps in steps steps.host; do grep '^step ' $out/$steps | sort >$out/$steps.sorted; done
cmp $out/steps.sorted $out/steps.host.sorted || exit 1
test -s $out/steps.sorted || { echo 'neon: no steps'; exit 1; }
echo "neon: $(wc -l <$out/steps.sorted) training steps have the bytes of this machine's build"
