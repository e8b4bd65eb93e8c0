#!/bin/sh
# check_options.sh - docs/numerics.md names every field of the configs of gate, experts and layer, and every
# preset; a field that is not there must be found.
cd "$(dirname "$0")/../.." || exit 1
page=docs/numerics.md

# fields HEADER STRUCT: the names of its fields, but size and reserves.
fields() {
    sed -n "/^typedef struct $2 {/,/^} $2;/p" "$1" | sed 's|/\*.*||' |
        sed -n 's/^    [a-z].*[ *]\([a-z_0-9]*\);.*/\1/p' | grep -v -e struct_size -e '^reserved'
}

missing() {
    for name in $1; do
        grep -q "\`$name\`" "$2" || echo "$name"
    done
}

all=$(fields include/moe/gate.h moe_gate_config
      fields include/moe/experts.h moe_experts_config
      fields include/moe/layer.h moe_layer_config
      sed -n 's/^    {"\([a-z0-9_]*\)",.*/\1/p' src/preset.c)
count=$(echo "$all" | wc -l)
[ "$count" -gt 80 ] || { echo "FAILED: only $count options were read"; exit 1; }
left=$(missing "$all" "$page")
[ -z "$left" ] || { echo "FAILED: $page does not name:"; echo "$left"; exit 1; }
[ -n "$(missing nonesuch "$page")" ] || { echo 'FAILED: a missing option was not found'; exit 1; }
echo "options: $count fields and presets are in $page"
