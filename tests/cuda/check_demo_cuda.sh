#!/bin/sh
# check_demo_cuda.sh DIRECTORY - the demo on emulated GPUs, one and two, beside the CPU: DIRECTORY has demo and
# demo_cuda. Two GPUs are one with two groups: of the dense twin to the byte, of the MoE but for the order of its
# gate's sums over tokens. Any number of GPUs reads a checkpoint, and a rank that dies takes the others with it.
# LONG=1: so does one that is silent, after two waits of a minute.
cd "$(dirname "$0")/../.." || exit 1
programs=$1
work=$(mktemp -d) || exit 1
pid= # of a run in the background
trap '[ -z "$pid" ] || kill -s KILL $pid; rm -rf "$work"' EXIT
export MOE_EMULATION_SEED="${MOE_EMULATION_SEED:-1}" MOE_EMULATION_QUIET=1

if [ ! -x "$programs/demo_cuda" ]; then
    echo "demo on GPUs: skipped, there is no $programs/demo_cuda: it needs the headers of CUDA and NCCL"
    exit 0
fi

fail() {
    printf 'check_demo_cuda: %s\n' "$1"
    [ ! -f "$work/out" ] || tail -n 5 "$work/out"
    exit 1
}

# A text of 20,000 letters that follow each other by rules.
awk 'BEGIN { for (i = 0; i < 20000; i++) { x = (x * 5 + i % 7 + 3) % 26; printf "%c", 97 + x } }' >"$work/text"

# Lists of words, to be split.
small="--file $work/text --experts 4 --hidden 8 --batch 16 --seed 7 --report 1"
host() { timeout 100 "$programs/demo" $small --groups 2 --threads 1 "$@" >"$work/out" 2>&1; }
one() { timeout 100 "$programs/demo_cuda" $small --groups 2 "$@" >"$work/out" 2>&1; }
two() { timeout 100 "$programs/demo_cuda" --gpus 2 $small "$@" >"$work/out" 2>&1; }

# ---- the same losses, step by step ---------------------------------------------------------------
steps="--steps 6"
for run in host one two; do
    $run $steps --log "$work/$run.csv" --save "$work/$run" || fail "$run failed"
    tail -n 1 "$work/out" >"$work/$run.verdict"
    cut -d, -f1,5- "$work/$run.csv" >"$work/$run.cut" # all but seconds
    cut -d, -f4,5 "$work/$run.cut" >"$work/$run.dense"
    [ "$(wc -l <"$work/$run.cut")" -eq 7 ] || fail "the log of $run has not 6 rows"
done
cmp "$work/one.dense" "$work/two.dense" || fail "the dense twin on two GPUs has other losses than on one"
cmp "$work/one.verdict" "$work/two.verdict" || fail "two GPUs end with other figures than one"
# near RUN RUN TOLERANCE: prints the largest difference of the numbers of two logs.
near() {
    paste -d, "$work/$1.cut" "$work/$2.cut" | awk -F, -v most="$3" '
        NR > 1 { for (i = 2; i <= NF / 2; i++) { d = $i - $(i + NF / 2); if (d < 0) d = -d; if (d > worst) worst = d } }
        END { printf "%.1e", worst; exit !(NR == 7 && worst < most) }'
}
gpus=$(near one two 1e-6) || fail "two GPUs are not near one: $gpus"
cpu=$(near one host 1e-5) || fail "a GPU is not near the CPU: $cpu"

# ---- checkpoints -----------------------------------------------------------------------------------
for run in one host; do
    $run $steps --resume "$work/two" --save "$work/again" --quiet || fail "$run cannot read what two GPUs have saved"
    cmp "$work/two" "$work/again" || fail "a checkpoint read by $run and written again is another"
done
two $steps --resume "$work/one" --save "$work/again" --quiet || fail "two GPUs cannot read what one has saved"
cmp "$work/one" "$work/again" || fail "a checkpoint read by two GPUs and written again is another"

# ---- runs that are ended ---------------------------------------------------------------------------
# begin ARGUMENT...: a long run on two GPUs in the background, when it has made steps.
begin() {
    rm -f "$work/long.csv"
    "$programs/demo_cuda" --gpus 2 $small --log "$work/long.csv" "$@" >"$work/out" 2>&1 &
    pid=$!
    tries=0
    until [ -f "$work/long.csv" ] && [ "$(wc -l <"$work/long.csv")" -gt 2 ]; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || fail "a run in the background made no steps"
        sleep 0.05
    done
}
end() {
    wait $pid
    status=$? pid=
}
begin --steps 5000 --save "$work/cut"
kill -s TERM $pid
end
[ $status -eq 143 ] || fail "after SIGTERM the exit code is $status"
grep -q 'saved: go on with' "$work/out" || fail "no word about the checkpoint after SIGTERM"
one --steps 5000 --resume "$work/one" && fail "a checkpoint of a run of 6 steps was taken for one of 5000"
grep -q 'made with --steps 6' "$work/out" || fail "no word about the number of steps"

begin --steps 5000
children=$(cat /proc/$pid/task/$pid/children 2>/dev/null) || children=
if [ -n "$children" ]; then
    set -- $children
    kill -s KILL "$2"
    from=$(date +%s)
    end
    seconds=$(($(date +%s) - from))
    [ $status -eq 137 ] || fail "after the death of a rank the exit code is $status"
    grep -q 'rank 1 was ended by signal 9' "$work/out" || fail "nobody says which rank died"
    [ $seconds -le 20 ] || fail "a rank died, and the run ended after $seconds s"
else
    kill -s TERM $pid
    end
    seconds='not tried, /proc has no children: 0'
fi

if [ -n "$LONG" ] && [ -n "$children" ]; then
    begin --steps 5000
    set -- $(cat /proc/$pid/task/$pid/children)
    kill -s STOP "$2"
    from=$(date +%s)
    end
    [ $status -eq 1 ] || fail "after a rank was silent the exit code is $status"
    grep -q -e 'did not come to an end in 60 s' -e 'missing ranks: 1' "$work/out" || fail "nobody says what was waited for"
    grep -q '1 still waited after 5 s' "$work/out" || fail "the silent rank was not ended"
    [ $(($(date +%s) - from)) -le 180 ] || fail "a rank was silent, and the run ended after 180 s"
fi

# ---- refusals ----------------------------------------------------------------------------------------
refused() {
    pattern=$1
    shift
    timeout 20 "$programs/demo_cuda" $small "$@" >"$work/out" 2>&1 && fail "accepted: $*"
    [ "$(grep -c -e "$pattern" "$work/out")" -eq 1 ] || fail "not one '$pattern' for: $*"
}
refused '--gpus 3: this machine has 2' --gpus 3
refused '--gpus 0: a whole number' --gpus 0
refused '--gpus : a whole number' --gpus
refused '--groups 3: 2 ranks' --gpus=2 --groups 3
refused 'cannot save' --gpus 2 --save "$work/no/such/checkpoint"

echo "demo on GPUs: two are within $gpus of one, one within $cpu of the CPU; a rank's death ended all in $seconds s; ok"
