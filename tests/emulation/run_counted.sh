#!/bin/sh
# run_counted.sh JOBS COMMAND... - runs commands, JOBS at a time, prints the last line and the time of each, and
# ends with "N passed, M failed": the sum of what they count themselves (Check's line, "N passed, M failed",
# "N jobs, M failures"). A command that fails or ends without a count is one failure; its output is printed whole.
# AFTER: a command that is run when all have ended, and counts once; what it prints is printed.
jobs=$1
shift
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
run() {
    begin=$(date +%s)
    sh -c "$2" >"$dir/$1.log" 2>&1 </dev/null
    echo $? >"$dir/$1.status"
    echo $(($(date +%s) - begin)) >"$dir/$1.seconds"
}
number=0
for command in "$@"; do
    number=$((number + 1))
    while [ "$(ls "$dir" | grep -c '\.started$')" -gt $((jobs - 1 + $(ls "$dir" | grep -c '\.seconds$'))) ]; do
        sleep 0.2
    done
    echo "$command" >"$dir/$number.started"
    run "$number" "$command" &
done
wait
passed=0
failed=0
for i in $(seq $number); do
    status=$(cat "$dir/$i.status")
    last=$(grep -E '^[0-9]+%: Checks: |[0-9]+ (passed|jobs|products|vectors), [0-9]+ (failed|failures|differences)' \
        "$dir/$i.log" | tail -n 1)
    counts=$(echo "$last" | sed -nE -e 's/^[0-9]+%: Checks: ([0-9]+), Failures: ([0-9]+), Errors: ([0-9]+).*/\1 \2 \3/p' \
        -e 's/.*[^0-9]([0-9]+) (passed|vectors), ([0-9]+) failed.*/\1 \3 0 more/p' \
        -e 's/^([0-9]+) (passed|vectors), ([0-9]+) failed.*/\1 \3 0 more/p' \
        -e 's/.* ([0-9]+) (jobs|products), ([0-9]+) (failures|differences).*/\1 \3 0/p' | head -n 1)
    set -- ${counts:-0 0 0}
    bad=$(($2 + $3))
    if [ "$bad" -eq 0 ] && { [ "$status" -ne 0 ] || [ -z "$last" ]; }; then bad=1; fi
    good=$1
    if [ -z "$4" ] && [ "$good" -gt 0 ]; then good=$((good - $2 - $3)); fi
    passed=$((passed + good))
    failed=$((failed + bad))
    word=ok
    if [ "$bad" -gt 0 ]; then
        word=FAILED
        cat "$dir/$i.log"
    fi
    name=$(sed -E 's|env ([A-Z_]+=[^ ]* )*||; s|[^ ]*/emulation/||; s|/suites/| |; s|/kernels/| |' "$dir/$i.started")
    printf '%-6s %4ds  %-42s %s\n' "$word" "$(cat "$dir/$i.seconds")" "$(echo "$name" | cut -c1-42)" \
        "$(echo "${last:-no count}" | cut -c1-60)"
done
if [ -n "$AFTER" ]; then
    if sh -c "$AFTER"; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
fi
echo "$passed passed, $failed failed"
test "$failed" -eq 0
