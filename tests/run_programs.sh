#!/bin/sh
# run_programs.sh COMMAND... - runs the commands, JOBS at a time (default 1); as each ends prints its last line,
# whether it passed and its seconds, and at last "N passed, M failed". A failing command's output is printed whole,
# and its end once more at the end of all, where the tail of a long log shows it.
if [ "$1" != --one ]; then
    dir=$(mktemp -d) || exit 1
    trap 'rm -rf "$dir"' EXIT
    trap 'exit 1' INT TERM
    # Logs are named by number of the command: process numbers come round within a run of many threads.
    number=1000
    for command; do
        number=$((number + 1))
        printf '%s\0%s\0' "$number" "$command"
    done | xargs -0 -n 2 -P "${JOBS:-1}" sh "$0" --one "$dir"
    passed=$(find "$dir" -name '*.ok' | wc -l)
    failed=$(($# - passed))
    for log in "$dir"/*.FAILED; do
        [ -f "$log" ] || continue
        printf '\nFAILED: %s\n' "$(cat "$log.name")"
        grep -av ':P:' "$log" | tail -n 12 | cut -c1-400
    done
    echo "$passed passed, $failed failed"
    test "$failed" -eq 0
    exit
fi

# --one DIRECTORY NUMBER COMMAND
log=$2/$3
command=$4
word=ok
begin=$(date +%s)
sh -c "$command" >"$log" 2>&1 </dev/null || word=FAILED
end=$(date +%s)
name=$(echo "$command" | sed 's|[^ ]*/tests/||; s|^sh tests/||; s|^valgrind.* ||')
until mkdir "$2/printing" 2>/dev/null; do sleep 0.1; done
if [ $word != ok ]; then
    cat "$log"
    echo "$command" >"$log.$word.name"
fi
printf '%-6s %4ds  %-34s %s\n' $word "$((end - begin))" "$name" "$(tail -n 1 "$log" | cut -c1-110)"
rmdir "$2/printing"
mv "$log" "$log.$word"
