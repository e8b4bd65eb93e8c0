#!/bin/sh
# check_tutorial.sh [--write] - docs/tutorial.md shows what the tests run. After a line
#     <!-- snippet: FILE NAME -->    the fenced block is the region NAME of FILE, between comments
#                                    "snippet: NAME" and "end snippet" (C, C++ or Python), without its
#                                    common indentation;
#     <!-- output: FILE -->          it is the file.
# Without --write every block must be so and every numbered example must be used; with it the blocks are
# made anew.
cd "$(dirname "$0")/../.." || exit 1
page=docs/tutorial.md
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT

# refresh PAGE: PAGE with every block made anew, to stdout.
refresh() {
    awk '
    function fail(text) { print "FAILED: " FILENAME ":" FNR ": " text > "/dev/stderr"; bad = 1; exit 1 }
    function is_end(line) { return line ~ /^[ \t]*(\/\*|\/\/|#) end snippet/ }
    # The region `name` of a file, or all of it, with at least the common indentation taken off.
    function region(file, name,    line, count, lines, indent, least, inside, i, text, seen) {
        least = 1000; inside = name == ""
        while ((got = (getline line < file)) > 0) {
            if (name != "" && line ~ ("(/\\*|//|#) snippet: " name "( |$)")) {
                if (seen++) fail(file " has two snippets " name)
                inside = 1; continue
            }
            if (name != "" && inside && is_end(line)) { inside = 0; ended = 1; continue }
            if (!inside) continue
            lines[++count] = line
            if (line ~ /[^ ]/) { match(line, /^ */); if (RLENGTH < least) least = RLENGTH }
        }
        close(file)
        if (got < 0) fail("there is no " file)
        if (count == 0) fail(file " has no snippet " name)
        if (inside && name != "") fail("snippet " name " of " file " has no end")
        for (i = 1; i <= count; i++)
            text = text (name == "" ? lines[i] : substr(lines[i], least + 1)) "\n"
        return text
    }
    /^<!-- (snippet|output): / {
        print
        if ($2 == "snippet:") { if (NF != 5) fail("a snippet needs a file and a name"); text = region($3, $4) }
        else { if (NF != 4) fail("an output needs a file"); text = region($3, "") }
        if ((getline line) <= 0 || line !~ /^```/) fail("no fenced block follows")
        print line
        printf "%s", text
        while ((more = (getline line)) > 0 && line !~ /^```$/) ;
        if (more <= 0) fail("the block has no end")
        print line
        next
    }
    { print }
    END { exit bad }' "$1"
}

refresh "$page" >"$out/fresh" || exit 1
if [ "${1:-}" = --write ]; then
    cmp -s "$out/fresh" "$page" || cp "$out/fresh" "$page"
else
    diff -u "$page" "$out/fresh" || { echo "FAILED: $page is not what the files say; make tutorial"; exit 1; }
fi
for source in examples/[0-9]*.c examples/[0-9]*.cpp examples/python/[0-9]*.py; do
    test ! -f "$source" || grep -q "^<!-- snippet: $source " "$page" ||
        { echo "FAILED: $page shows nothing of $source"; exit 1; }
done

# What must be found: a changed block, a name that is not there.
sed '/^```c$/,/^```$/s/moe_/mo_/' "$page" >"$out/changed"
refresh "$out/changed" 2>/dev/null | cmp -s - "$out/changed" && { echo 'FAILED: a changed block was not found'; exit 1; }
sed 's/^\(<!-- snippet: [^ ]*\) .*/\1 nowhere -->/' "$page" >"$out/nowhere"
refresh "$out/nowhere" >/dev/null 2>&1 && { echo 'FAILED: a missing snippet was not found'; exit 1; }
echo "tutorial: $(grep -c '^<!-- snippet' "$page") snippets and $(grep -c '^<!-- output' "$page") outputs are those of the files"
