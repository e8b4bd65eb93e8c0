#!/bin/sh
# resources.sh BUILD/cuda [--write] - registers, shared memory and stack of every kernel, as ptxas told while
# compiling, against budget.txt: the most of all architectures. A spill is a failure, and so are a kernel over
# its budget, one that the budget does not list, and a line without a kernel. --write makes the budget anew,
# registers rounded up to 8, the unit in which a multiprocessor gives them out.
cd "$(dirname "$0")/../.." || exit 1
build=${1:?usage: resources.sh BUILD/cuda [--write]}
budget=tests/cuda/budget.txt
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT

fail() {
    echo "FAILED: $*"
    exit 1
}

ls "$build"/*.cu.log >/dev/null 2>&1 || fail "no $build/*.cu.log; run make cuda"
command -v c++filt >/dev/null || fail "c++filt (binutils) is missing"

# A line for each kernel and architecture: name, registers, shared bytes, stack bytes, spilled bytes.
awk '
/Compiling entry function/ { split($0, part, "\047"); name = part[2]; architecture = part[4]; stack = spill = 0 }
/bytes stack frame/ { stack = $1; spill = $5 + $9 }
/ Used [0-9]+ registers/ {
    match($0, /Used [0-9]+/); registers = substr($0, RSTART + 5, RLENGTH - 5)
    shared = 0
    if (match($0, /[0-9]+ bytes smem/)) { shared = substr($0, RSTART, RLENGTH); sub(/ .*/, "", shared) }
    if (name != "") print name, registers, shared, stack, spill, architecture
    name = ""
}' "$build"/*.cu.log | sort >"$out/all"
test -s "$out/all" || fail "the logs of $build name no kernel"

# The most of each kernel, by its name in the source.
awk '{ if ($2 > r[$1]) r[$1] = $2; if ($3 > s[$1]) s[$1] = $3; if ($4 > t[$1]) t[$1] = $4; if ($5 > p[$1]) p[$1] = $5 }
    END { for (k in r) print k, r[k], s[k] + 0, t[k] + 0, p[k] + 0 }' "$out/all" | c++filt |
    sed -E 's/^(.*) ([0-9]+ [0-9]+ [0-9]+ [0-9]+)$/\2 \1/; s/^([0-9 ]+)(static )?void /\1/; s/\(.*\)$//; s/ >/>/g' |
    sort -k5 >"$out/kernels"
architectures=$(awk '{ print $6 }' "$out/all" | sort -u | tr '\n' ' ')

if test "$2" = --write; then
    {
        echo "# Registers, bytes of shared memory and of stack that each kernel of cuda/ may use, for the largest of"
        echo "# $architectures. tests/cuda/resources.sh compares; --write makes this file anew."
        awk '{ r = int(($1 + 7) / 8) * 8; name = $0; sub(/^[0-9]+ [0-9]+ [0-9]+ [0-9]+ /, "", name)
            printf "%3d %6d %4d  %s\n", r, $2, $3, name }' "$out/kernels"
    } >"$budget"
fi

spilled=$(awk '$5 > 0' "$out/all" | c++filt)
test -z "$spilled" || {
    echo "$spilled"
    fail "registers of these kernels spill: registers, shared, stack, bytes spilled, architecture"
}

awk -v budget="$budget" '
FNR == NR {
    if ($0 ~ /^#/) next
    name = $0; sub(/^ *[0-9]+ +[0-9]+ +[0-9]+ +/, "", name)
    r[name] = $1; s[name] = $2; t[name] = $3; next
}
{
    name = $0; sub(/^[0-9]+ [0-9]+ [0-9]+ [0-9]+ /, "", name)
    count++
    if (!(name in r)) { print name ": not in " budget; bad = 1; next }
    seen[name] = 1
    if ($1 > r[name] || $2 > s[name] || $3 > t[name]) {
        printf "%s: %d registers, %d bytes shared, %d of stack; the budget has %d, %d, %d\n", name, $1, $2, $3, r[name], s[name], t[name]
        bad = 1
    }
}
END {
    for (name in r) if (!(name in seen)) { print name ": in " budget ", and no kernel"; bad = 1 }
    exit bad
}' "$budget" "$out/kernels" || fail "kernels and $budget differ"
echo "resources: $(wc -l <"$out/kernels") kernels within their budget, no spills, for $architectures"
