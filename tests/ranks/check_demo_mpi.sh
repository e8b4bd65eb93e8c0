#!/bin/sh
# check_demo_mpi.sh BUILD - the demo on ranks: its log and the checkpoint at its end, parameters and moments
# of all experts, are the bytes of one rank with as many groups. MPI=mpich for another MPI than openmpi,
# MPIRUN= for another way to start it, LONG=1 for 3 ranks, empty ranks and refusals.
cd "$(dirname "$0")/../.." || exit 1
build=${1:-build}
mpi=${MPI:-openmpi}
demo=$build/demo_mpi_$mpi
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

fail() {
    printf 'check_demo_mpi: %s\n' "$1"
    [ ! -f "$work/out" ] || tail -n 5 "$work/out"
    exit 1
}

[ -x "$build/demo" ] || fail "there is no $build/demo"
if [ ! -x "$demo" ]; then
    echo "demo on ranks: skipped, there is no $demo: make demo-mpi builds it where there is an MPI"
    exit 0
fi
if ! missing=$(sh tests/ranks/launch.sh "$mpi" 2>&1); then
    echo "demo on ranks: skipped, $missing"
    exit 0
fi

# Lists of words, to be split. Experts that 2, 3 and 4 ranks share unevenly too.
small="--file include --experts 5 --hidden 16 --seed 7"

# ranks N ARGUMENT...: on N ranks; one NAME N ARGUMENT...: one rank with N groups.
ranks() {
    n=$1
    shift
    timeout 120 sh tests/ranks/launch.sh "$mpi" "$n" "$demo" $small "$@" >"$work/out" 2>&1
}
one() {
    n=$1
    shift
    "$build/demo" $small --groups "$n" "$@" >"$work/out" 2>&1
}

# All of a log but its seconds.
cut_seconds() { cut -d, -f1,5- "$1.csv" >"$1.cut"; }

# equal N ARGUMENT...: log, checkpoint and last line of N ranks and of one rank with N groups.
pairs=0
equal() {
    count=$1
    rm -f "$work"/one* "$work"/several*
    one "$@" --log "$work/one.csv" --save "$work/one" || fail "one rank failed with $*"
    tail -n 1 "$work/out" >"$work/one.verdict"
    ranks "$@" --log "$work/several.csv" --save "$work/several" || fail "ranks failed with $*"
    grep '^held-out bits' "$work/out" >"$work/several.verdict"
    cut_seconds "$work/one"
    cut_seconds "$work/several"
    [ "$(wc -l <"$work/one.cut")" -ge 2 ] || fail "the log is empty"
    for part in .cut .verdict ''; do
        cmp "$work/one$part" "$work/several$part" || fail "$count ranks end in other bytes: $*"
    done
    pairs=$((pairs + 1))
}

steps=20
equal 2 --steps $steps
[ -z "$LONG" ] || equal 3 --steps $steps
equal 4 --steps $steps

# A checkpoint of 4 ranks is read by any number of ranks, and written again as it was.
ranks 4 --steps 12 --quiet --save "$work/four" || fail "saving on 4 ranks failed"
ranks 4 --steps 12 --quiet --resume "$work/four" --save "$work/again" || fail "resuming failed"
cmp "$work/four" "$work/again" || fail "a checkpoint read and written again is another"
ranks 2 --steps 12 --quiet --resume "$work/four" --save "$work/again" || fail "4 to 2 ranks failed"
cmp "$work/four" "$work/again" || fail "a checkpoint read by 2 ranks and written again is another"
one 1 --steps 12 --quiet --resume "$work/four" --save "$work/again" || fail "4 to one rank failed"
cmp "$work/four" "$work/again" || fail "a checkpoint read by one rank and written again is another"

# refused N PATTERN ARGUMENT...: every rank ends, and the reason is said once.
refused() {
    n=$1 pattern=$2
    shift 2
    ranks "$n" --steps 5 "$@" && fail "accepted on $n ranks: $*"
    [ "$(grep -c -e "$pattern" "$work/out")" -eq 1 ] || fail "not one '$pattern' for: $*"
}
refused 4 '--experts 3: each of 4 ranks' --experts 3
refused 2 '--groups 3: 2 ranks' --groups 3

if [ -n "$LONG" ]; then
    # Ranks without a byte, ranks with one expert of which none is met, steps without balancing.
    for n in 2 3 4 5; do
        equal $n --steps 60 --batch 3
        equal $n --steps 60 --batch 7 --only moe
        equal $n --steps 60 --batch 1001 --no-balance
    done
    refused 3 'cannot read' --resume "$work/nothing"
    refused 3 'not a checkpoint' --resume README.md
    refused 3 'cannot save' --save "$work/no/such/checkpoint"
    refused 3 'cannot open' --log "$work/no/such/log"
    refused 3 'No such file' --file "$work/nothing"
    refused 3 'made with --seed 7, this run has 8' --steps 12 --seed 8 --resume "$work/four"
fi

echo "demo on ranks ($mpi): $pairs runs end in the bytes of one rank, any number reads a checkpoint; ok"
