#!/bin/sh
# check_example.sh PROGRAM [WORDS] - an example for GPUs prints what examples/expected says; or WORDS, of what is
# not there.
cd "$(dirname "$0")/../.." || exit 1
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
name=$(basename "$1")
"$1" >"$out/got" || { echo "FAILED: $1 ended with status $?"; cat "$out/got"; exit 1; }
if [ -n "${2:-}" ] && [ "$(cat "$out/got")" = "$2" ]; then
    echo "example $name: $2"
    exit 0
fi
diff -u "examples/expected/$name.txt" "$out/got" || { echo "FAILED: $1 prints something else"; exit 1; }
echo "example $name: $(wc -l <"$out/got") lines as expected"
