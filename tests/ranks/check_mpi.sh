#!/bin/sh
# check_mpi.sh BUILD MPI RANKS... - runs check_mpi_MPI (openmpi, mpich) on each number of ranks:
# layers of every kind against one rank, what is refused, and a rank that dies or is silent; and
# bench_ranks for the bytes that rows are on the wire. NUMBERS=n layers of each kind.
build=$1
mpi=$2
shift 2
program=$build/tests/check_mpi_$mpi
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
checks=0

fail() {
    echo "FAILED: $*"
    exit 1
}

start() { # ranks program and arguments: with recovery, so that a death is the survivors' to notice
    RECOVER=1 timeout 300 sh "$(dirname "$0")/launch.sh" "$mpi" "$@"
}

for ranks; do
    for word in "equal ${NUMBERS:-2}" refuse; do
        start "$ranks" "$program" $word >"$out/log" 2>&1 || { cat "$out/log"; fail "$word on $ranks ranks"; }
        grep -q '^100%' "$out/log" || { cat "$out/log"; fail "$word on $ranks ranks said nothing"; }
        checks=$((checks + 1))
    done
    # Narrow rows, so that heads of blocks are several rows, and rounds of a few rows.
    start "$ranks" "$build/tests/bench_ranks_$mpi" tokens=37 experts=4 k=3 d=5 o=3 f=2 chunk=9 steps=1 \
        >"$out/log" 2>&1 && grep -q '^100%' "$out/log" || { cat "$out/log"; fail "bytes on $ranks ranks"; }
    checks=$((checks + 1))
    for trouble in before in after silent; do
        # In a shell: MPICH's launcher ends everybody when a child of its own is killed.
        begin=$(date +%s)
        start "$ranks" sh -c 'trap "" USR1; "$0" "$@"; exit $?' "$program" $trouble >"$out/log" 2>&1
        took=$(($(date +%s) - begin))
        ended=$(grep -c '^survivor' "$out/log")
        test "$ended" -eq $((ranks - 1)) || {
            cat "$out/log"
            fail "rank 1 $trouble: $ended of $((ranks - 1)) survivors ended after $took s"
        }
        checks=$((checks + 1))
    done
done
echo "100%: Checks: $checks, Failures: 0, Errors: 0 ($mpi, ranks $*)"
