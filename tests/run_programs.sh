#!/bin/sh
# run_programs.sh COMMAND... - runs each command, prints its last line and whether it passed, and ends
# with "N passed, M failed". A failing command's output is printed whole.
passed=0
failed=0
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
for command in "$@"; do
    begin=$(date +%s)
    if sh -c "$command" >"$log" 2>&1 </dev/null; then
        passed=$((passed + 1))
        word=ok
    else
        failed=$((failed + 1))
        word=FAILED
        cat "$log"
    fi
    end=$(date +%s)
    name=$(echo "$command" | sed 's|[^ ]*/tests/||; s|^sh tests/||; s|^valgrind.* ||')
    printf '%-6s %4ds  %-34s %s\n' "$word" "$((end - begin))" "$name" "$(tail -n 1 "$log" | cut -c1-110)"
done
echo "$passed passed, $failed failed"
test "$failed" -eq 0
