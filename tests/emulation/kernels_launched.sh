# kernels_launched.sh - names the kernels that a run never launched, template instances included.
# usage: kernels_launched.sh launched.txt objects-of-cuda... (launched.txt: MOE_EMULATION_KERNELS=file)
# A kernel is what stands after MOE_GLOBAL in the sources of the objects.
launched=$1
shift
[ -f "$launched" ] || { echo "kernels_launched.sh: no $launched"; exit 1; }
missing=0
total=0
names=$(cat cuda/*.cu | tr '\n' ' ' | grep -oE 'MOE_GLOBAL\([^)]*\) *[A-Za-z_0-9]+' | sed 's/.*) *//' | sort -u)
pattern=$(printf '%s\n' $names | paste -sd'|')
nm -C "$@" | sed -nE "s/^[0-9a-f]+ [tTwW] (void )?(($pattern)(\[abi:[^]]*\])?(<.*>)?)\(.*/\2/p" |
    sed 's/\[abi:[^]]*\]//' | sort -u >"$launched.all"
while IFS= read -r kernel; do
    total=$((total + 1))
    grep -qxF -- "$kernel" "$launched" || { missing=$((missing + 1)); echo "never launched: $kernel"; }
done <"$launched.all"
echo "$total kernels, $missing never launched"
rm -f "$launched.all"
[ $missing -eq 0 ]
