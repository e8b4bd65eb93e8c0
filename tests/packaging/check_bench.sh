#!/bin/sh
# check_bench.sh BUILD - bench measures a tiny shape, its peers agree, its lines are well formed, and what it
# does not understand is refused with the offending value and status 2.
cd "$(dirname "$0")/../.." || exit 1
bench=$1/bench/bench
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT
fail() {
    echo "FAILED: $*"
    exit 1
}

# measure ARGUMENT...: lines of a small shape in $folder/lines, with all peers that are C.
measure() {
    "$bench" --rounds 2 --threads 2 --check --peer fma_peak --peer dense_openblas --peer loop_openblas \
        --peer omp_openblas --peer loop_onednn --peer layer --peer one_thread --peer balanced "$@" \
        >"$folder/lines" 2>"$folder/notes" || fail "$* ended with $?: $(cat "$folder/notes")"
    grep -q '^libmoe_rowmajor,' "$folder/lines" || fail "$*: no line of libmoe"
    number='[0-9]+\.[0-9]+'
    if grep -Evq "^[a-z_]+,[a-z0-9]+,[a-z]+,(fwd|fwdbwd),$number,$number,$number,$number\$" "$folder/lines"; then
        fail "$*: $(cat "$folder/lines")"
    fi
}
measure --shape 33,24,40,5,2,swiglu --pass fwdbwd
measure --shape 33,24,40,5,2,relu --pass fwdbwd --routing zipf
measure --shape 1,24,40,9,3,swiglu --pass fwd
measure --shape 40,8,8,64,2,relu --pass fwd --isa plain --seed 7

"$bench" --memory --shape 33,24,40,5,2,relu --pass fwdbwd >"$folder/lines" || fail "--memory ended with $?"
grep -Eq '^memory,rowmajor,33x24x40x5x2xrelu,balanced,fwdbwd,[0-9.]+,[0-9.]+,[0-9.]+,0$' "$folder/lines" ||
    fail "--memory: $(cat "$folder/lines")"

printf '0 2\n1 0\n' >"$folder/routing"
"$bench" --shape 2,8,8,3,2,relu --rounds 1 --routing "$folder/routing" >"$folder/lines" 2>&1 || fail 'a routing of a file'
printf '0 2\n1 3\n' >"$folder/routing"

# refuse WORD ARGUMENT...: status 2 and a message with the word.
refused=0
refuse() {
    word=$1
    shift
    "$bench" "$@" >"$folder/lines" 2>"$folder/notes"
    status=$?
    [ "$status" -eq 2 ] || fail "$* ended with $status"
    grep -qe "$word" "$folder/notes" || fail "$*: $(cat "$folder/notes")"
    [ ! -s "$folder/lines" ] || fail "$* printed $(cat "$folder/lines")"
    refused=$((refused + 1))
}
refuse q --shape q
refuse 'K = 5' --shape 1,2,3,4,5,relu
refuse gelu --shape 1,2,3,4,2,gelu
refuse 0,2 --shape 0,2,3,4,2,relu
refuse large --shape 10000000,8,8,4000,2000,relu
refuse nowhere --routing "$folder/nowhere"
refuse 'token 1' --shape 2,8,8,3,2,relu --routing "$folder/routing"
refuse up --pass up
refuse 0 --threads 0
refuse two --threads two
refuse 9999999 --rounds 9999999
refuse packed --weights packed
refuse 'twice' --weights panels --weights panels
refuse bf16 --dtype bf16
refuse nobody --peer nobody
refuse -1 --seed -1
refuse sse --isa sse
refuse nonsense --nonsense
refuse rounds --rounds
refuse stray stray
echo "bench: peers agree, $refused bad command lines refused"
