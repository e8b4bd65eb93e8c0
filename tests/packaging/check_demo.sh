#!/bin/sh
# check_demo.sh BUILD - the demo learns: after a few steps its held-out bits per byte are well below the
# unigram entropy; nonsense is refused.
cd "$(dirname "$0")/../.." || exit 1
demo=${1:-build}/demo
out=$(mktemp) || exit 1
trap 'rm -f "$out"' EXIT
"$demo" --file include --steps 150 >"$out" 2>&1 || { cat "$out"; exit 1; }
tail -n 1 "$out" | awk '{ if (!($3 + 0 > 0 && $3 < $8 - 1)) { print "not learned: " $0; exit 1 } }' || exit 1
"$demo" --file /nonexistent --steps 1 >/dev/null 2>&1 && { echo "a missing file was accepted"; exit 1; }
"$demo" --steps 0 >/dev/null 2>&1 && { echo "--steps 0 was accepted"; exit 1; }
tail -n 1 "$out"
