#!/bin/sh
# check_nccl_links.sh LIBMOE_NCCL LIBNCCL - what libmoe_nccl takes of NCCL is there, is in NCCL 2.18 already, or is
# looked up at run time; and a library that takes more is found out.
module=$1
nccl=$2
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
fail() {
    echo "FAILED: $*"
    exit 1
}
# Of NCCL 2.18 and older.
old="ncclCommAbort ncclCommCount ncclCommCuDevice ncclCommDestroy ncclCommFinalize ncclCommGetAsyncError ncclCommSplit
ncclCommUserRank ncclGetErrorString ncclGetLastError ncclGetVersion ncclGroupEnd ncclGroupStart ncclRecv ncclSend"
echo $old | tr ' ' '\n' | sort >"$out/old"
nm -D --defined-only "$nccl" | awk '{ sub(/@.*/, "", $3); print $3 }' | sort -u >"$out/there"
taken() { nm -D --undefined-only "$1" | awk '$2 ~ /^nccl/ { sub(/@.*/, "", $2); print $2 }' | sort -u; }
check() { # library
    taken "$1" >"$out/taken"
    test -s "$out/taken" || { echo "$1 takes nothing of NCCL"; return 1; }
    comm -23 "$out/taken" "$out/there" >"$out/missing"
    test ! -s "$out/missing" || { echo "not in $nccl:" $(cat "$out/missing"); return 1; }
    comm -23 "$out/taken" "$out/old" >"$out/new"
    test ! -s "$out/new" || { echo "newer than NCCL 2.18:" $(cat "$out/new"); return 1; }
}
check "$module" || fail "$module"
count=$(wc -l <"$out/taken")
grep -q '^ncclCommSplit$' "$out/taken" || fail "ncclCommSplit is not taken"
for call in ncclCommRevoke ncclNotThere; do
    echo "int $call(void); int f(void); int f(void) { return $call(); }" >"$out/bad.c"
    ${CC:-cc} -shared -fPIC "$out/bad.c" -o "$out/bad.so" || fail "bad library"
    check "$out/bad.so" >/dev/null && fail "not noticed: $call"
done
echo "nccl links: $count symbols of NCCL taken, all of 2.18; 2 passed, 0 failed"
