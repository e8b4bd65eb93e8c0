#!/bin/sh
# check_demo.sh BUILD - the demo as a user meets it: it learns, a run that was interrupted and
# resumed ends in the same bytes as one that was not, checkpoints that are damaged or of another run
# are refused with the reason, the log is what it says, nonsense is refused.
cd "$(dirname "$0")/../.." || exit 1
demo=${1:-build}/demo
work=$(mktemp -d) || exit 1
pid= # of a run in the background
trap '[ -z "$pid" ] || kill $pid; rm -rf "$work"' EXIT

fail() {
    printf 'check_demo: %s\n' "$1"
    [ ! -f "$work/out" ] || tail -n 5 "$work/out"
    exit 1
}

# refused PATTERN ARGUMENT...: the demo fails without having started, and its message has PATTERN.
refused() {
    pattern=$1
    shift
    "$demo" --file include --steps 60 "$@" >"$work/out" 2>&1 && fail "accepted: $*"
    grep -q -e "$pattern" "$work/out" || fail "no '$pattern' in the message for: $*"
}

# Lists of words, to be split.
small="--file include --experts 4 --hidden 16 --seed 7"

# ---- it learns: both models well below the unigram ----------------------------------------------
"$demo" $small --steps 100 --rate 0.01 >"$work/out" 2>&1 || fail "a short run failed"
tail -n 1 "$work/out" | awk '
    { for (i = 1; i < NF; i++) if (!($i in bits)) bits[$i] = $(i + 1) + 0 }
    END { moe = bits["MoE"]; dense = bits["dense"]; unigram = bits["unigram"]
          exit !(moe > 0 && dense > 0 && moe < unigram - 0.5 && dense < unigram - 0.5) }' ||
    fail "not learned"
verdict=$(tail -n 1 "$work/out")
awk 'length($0) > 100 { print; bad = 1 } END { exit bad }' "$work/out" ||
    fail "a line is wider than 100 columns"
awk '/^  (MoE|dense) layer/ { cost[$1] = $3 }
    END { more = cost["dense"] - cost["MoE"]
          exit !(cost["MoE"] > 0 && more >= 0 && more < 256) }' "$work/out" ||
    fail "the twin's multiply-adds are not the MoE's"

# ---- interrupted and resumed is the same as not interrupted -------------------------------------
run="$small --steps 100"
"$demo" $run --quiet --log "$work/whole.csv" --save "$work/whole" >"$work/out" 2>&1 ||
    fail "a run failed"
whole_verdict=$(tail -n 1 "$work/out")
rows_of() { if [ -f "$1" ]; then wc -l <"$1"; else echo 1; fi; }
# interrupt SIGNAL CODE RESUME...: stops the run after the next row of its log.
interrupt() {
    signal=$1 code=$2
    shift 2
    rows=$(rows_of "$work/parts.csv")
    "$demo" $run --log "$work/parts.csv" --save "$work/parts" "$@" >"$work/out" 2>&1 &
    pid=$!
    tries=0
    until [ "$(rows_of "$work/parts.csv")" -gt "$rows" ]; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || fail "no row came to interrupt after"
        sleep 0.05
    done
    kill -s "$signal" $pid
    wait $pid
    status=$? pid=
    [ $status -eq "$code" ] || fail "after SIG$signal the exit code is $status, not $code"
    grep -q 'saved: go on with' "$work/out" || fail "SIG$signal: no word about the checkpoint"
}
interrupt INT 130
cp "$work/parts" "$work/first"
interrupt TERM 143 --resume "$work/parts" --threads 1
"$demo" $run --quiet --log "$work/parts.csv" --save "$work/parts" --resume "$work/parts" \
    >"$work/out" 2>&1 || fail "resuming failed"
cmp -s "$work/first" "$work/whole" && fail "the interrupted run was not interrupted"
cmp "$work/whole" "$work/parts" || fail "the resumed run ends in other bytes"
[ "$(tail -n 1 "$work/out")" = "$whole_verdict" ] || fail "the resumed run has another verdict"

# ---- the log -------------------------------------------------------------------------------------
header=step,seconds,moe_seconds,dense_seconds,moe_train_bits,moe_held_bits,dense_train_bits
header=$header,dense_held_bits,balance_loss,busiest_over_mean,load_entropy_nats,idle_experts
header=$header,learning_rate
[ "$(head -n 1 "$work/whole.csv")" = "$header" ] || fail "the log has another header row"
for log in whole parts; do cut -d, -f1,5- "$work/$log.csv" >"$work/$log.cut"; done
cmp "$work/whole.cut" "$work/parts.cut" || fail "the resumed log differs in more than seconds"
awk -F, 'NR > 1 { if (NF != 13 || $1 != 25 * (NR - 1) || $2 < last) bad = 1; last = $2
                  for (i = 2; i <= 8; i++) if ($i <= 0) bad = 1 }
    END { exit bad || NR != 5 }' "$work/parts.csv" || fail "rows of the log are wrong"

# ---- checkpoints that must be refused -----------------------------------------------------------
size=$(wc -c <"$work/first")
head -c $((size / 2)) "$work/first" >"$work/short"
head -c 12 "$work/first" >"$work/stub"
{ cat "$work/short"; printf 'XYZ'; tail -c +$((size / 2 + 4)) "$work/first"; } >"$work/damaged"
{ cat "$work/first"; printf 'x'; } >"$work/long"
resume() { pattern=$1 file=$2; shift 2; refused "$pattern" $run "$@" --resume "$work/$file"; }
resume 'cut short' short
resume 'cut short' stub
resume 'damaged: checksum' damaged
resume 'damaged: checksum' long
resume 'not a checkpoint' whole.csv
resume 'cannot read' nothing
resume 'made with --experts 4, this run has 8' first --experts 8
resume 'made with --rate 0.00.*, this run has 0.01' first --rate 0.01
resume 'made with --steps 100, this run has 60' first --steps 60
resume 'made with --seed 7, this run has 8' first --seed 8
resume 'made with .*text' first --file src

# ---- texts and nonsense -------------------------------------------------------------------------
mkdir "$work/empty"
head -c 100 README.md >"$work/tiny"
head -c 20000 "$work/whole" >"$work/binary"
refused 'at least 4096' --file "$work/empty"
refused 'at least 4096' --file "$work/tiny"
refused 'No such file' --file "$work/nothing"
"$demo" --file "$work/binary" --experts 4 --hidden 16 --steps 2 --quiet >"$work/out" 2>&1 ||
    fail "a binary file was refused"
refused '--steps 0:' --steps 0
refused '--steps 1x:' --steps 1x
refused '--rate nan:' --rate nan
refused '--rate -1:' --rate -1
refused '--top-k 5 is more than --experts 4' --experts 4 --top-k 5
refused '--hidden 0:' --hidden 0
refused '--only both:' --only both
# Of 1.1 TB; a machine that has as much is not asked.
if awk '/^MemTotal/ { exit $2 > 1e9 }' /proc/meminfo; then
    refused '1099.5 GB for training, this machine has' --experts 4096 --hidden 65536
fi
refused '--save-every 5:' --save-every 5
refused 'xyz' xyz
refused '--log' --sweep --log "$work/x.csv"
refused 'not a log' $run --resume "$work/first" --log README.md
refused 'cannot save' --save "$work/no/such/checkpoint"
refused 'cannot save' --save "$work"
cp README.md "$work/notes"
ln "$work/notes" "$work/notes_too"
refused '--save .*: the file of --file' --file "$work/notes" --save "$work/notes"
refused '--log .*: the file of --file' --file "$work/notes" --log "$work/notes_too"
refused '--save .*: the file of --log' --log "$work/new" --save "$work/new"
refused '--log .*: the file of --resume' --resume "$work/first" --log "$work/first"
refused 'no checkpoint' --save "$work/notes"
cmp README.md "$work/notes" || fail "a text was overwritten"
"$demo" $run --steps 1 --quiet --save "$work/short" >"$work/out" 2>&1 ||
    fail "a checkpoint cut short was not replaced"
# No room for the last checkpoint: what was found is said all the same.
(
    trap '' XFSZ
    ulimit -f 64
    "$demo" $run --steps 1 --save "$work/large"
) >"$work/out" 2>&1 && fail "a checkpoint that could not be saved is no failure"
grep -q 'cannot save: File too large' "$work/out" || fail "nobody says why nothing was saved"
grep -q '^held-out bits per byte: MoE' "$work/out" || fail "what a run found is lost with its checkpoint"
[ ! -e "$work/large" ] && [ ! -e "$work/large.new" ] || fail "half a checkpoint is left"
refused 'cannot open' --log "$work/no/such/directory.csv"

printf '%s\n' "demo: $verdict; resumed runs end in the same bytes; ok"
