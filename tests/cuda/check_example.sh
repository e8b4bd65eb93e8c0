#!/bin/sh
# check_example.sh PROGRAM - the example for a GPU prints what examples/expected says, and where no device can be
# seen it says so and ends well.
cd "$(dirname "$0")/../.." || exit 1
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
"$1" >"$out/got" || { echo "FAILED: $1 ended with status $?"; cat "$out/got"; exit 1; }
diff -u examples/expected/13_cuda.txt "$out/got" || { echo "FAILED: $1 prints something else"; exit 1; }
echo "example: $(wc -l <"$out/got") lines as expected"
