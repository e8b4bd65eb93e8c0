#!/bin/sh
# check_examples.sh [BUILD [WORD]] - runs every numbered example that was built (those with WORD in their
# name) and compares what it prints with examples/expected. C examples must be there; C++ ones and those of
# libmoe_io may be left out where their compiler or library is, and are named; so are those for GPUs, which
# check-cuda runs. At the end a spoiled expectation must be found.
cd "$(dirname "$0")/../.." || exit 1
build=${1:-build}
word=${2:-}
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
ran=0
left_out=

# compare NAME EXPECTED: runs the example and shows how its output differs.
compare() {
    "$build/examples/$1" >"$out/got" 2>"$out/error" || {
        echo "FAILED: $1 ended with status $?"
        cat "$out/got" "$out/error"
        return 1
    }
    test ! -s "$out/error" || { echo "FAILED: $1 wrote to stderr:"; cat "$out/error"; return 1; }
    diff -u "$2" "$out/got" || { echo "FAILED: $1 prints something else than $2"; return 1; }
}

for source in examples/[0-9]*.c examples/[0-9]*.cpp; do
    test -f "$source" || continue
    name=${source#examples/}
    name=${name%.*}
    case $name in *"$word"*) ;; *) continue ;; esac
    if [ ! -x "$build/examples/$name" ] || grep -q 'example_cuda\.h' "$source"; then
        case $source in
        *.cpp) ;;
        *) grep -qE '(moe/io|example_cuda)\.h' "$source" || { echo "FAILED: $build/examples/$name was not built"; exit 1; } ;;
        esac
        left_out="$left_out $name"
        continue
    fi
    test -f "examples/expected/$name.txt" || { echo "FAILED: no examples/expected/$name.txt"; exit 1; }
    compare "$name" "examples/expected/$name.txt" || exit 1
    ran=$((ran + 1))
    last=$name
done
[ "$ran" -gt 0 ] || { echo "FAILED: no example was run"; exit 1; }
for expected in examples/expected/*.txt; do
    name=$(basename "$expected" .txt)
    ls "examples/$name".* >/dev/null 2>&1 || { echo "FAILED: $expected is of no example"; exit 1; }
done

sed '1s/.$//' "examples/expected/$last.txt" >"$out/spoiled"
compare "$last" "$out/spoiled" >/dev/null 2>&1 && { echo 'FAILED: a spoiled expectation was not found'; exit 1; }
echo "examples: $ran run and compared${left_out:+; not built:$left_out}"
