#!/bin/sh
# check_runs.sh - run_programs.sh counts what passed and what failed, shows all that a failing command said and its
# end once more; also where every command's shell has the same process number, which comes round in a long run.
cd "$(dirname "$0")/../.." || exit 1
out=$(mktemp) || exit 1
trap 'rm -f "$out"' EXIT

# expect SUM COMMAND...: the last line of the output of COMMAND, which fails exactly if the sum has failures.
expect() {
    sum=$1 status=0
    shift
    "$@" >"$out" 2>&1 || status=1
    case $sum in *' 0 failed') good=0 ;; *) good=1 ;; esac
    [ "$(tail -n 1 "$out")" = "$sum" ] && [ $status -eq $good ] && return
    cat "$out"
    echo "FAILED: status $status and not \"$sum\""
    exit 1
}

many='echo 1; echo 2; echo 3; echo 4; echo 5; echo 6; echo 7; echo 8; echo 9; echo 10; echo 11; echo 12; echo 13'
expect '3 passed, 0 failed' sh tests/run_programs.sh true 'true # again' true
JOBS=2 expect '2 passed, 3 failed' sh tests/run_programs.sh "$many; exit 3" true 'kill -9 $$' false true
[ "$(grep -cx 1 "$out")" -eq 1 ] && [ "$(grep -cx 2 "$out")" -eq 2 ] && [ "$(grep -c '^FAILED: ' "$out")" -eq 3 ] ||
    { cat "$out"; echo 'FAILED: not all that a failing command said is shown, or its end not twice'; exit 1; }

# In a namespace the number of the last process can be set back; not everywhere may one be made.
back='echo 300 >/proc/sys/kernel/ns_last_pid'
if unshare -rpf --mount-proc sh -c "$back" 2>/dev/null; then
    expect '4 passed, 0 failed' unshare -rpf --mount-proc sh tests/run_programs.sh "$back" "$back" "$back" "$back"
    echo 'runs: counted, also where process numbers come round'
else
    echo 'runs: counted; process numbers cannot be set back here'
fi
