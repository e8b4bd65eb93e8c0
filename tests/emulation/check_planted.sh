# check_planted.sh - every planted mistake is found, with the message it should give.
# usage: check_planted.sh directory-of-the-flavours
dir=$1
passed=0
failed=0
export MOE_EMULATION_QUIET=1
export ASAN_OPTIONS=detect_leaks=0

# flavour, mistake, what the output must have
check() {
    output=$(timeout 60 "$dir/$1/planted" "$2" 2>&1)
    status=$?
    if [ $status -ne 0 ] && [ $status -ne 124 ] && printf '%s\n' "$output" | grep -q -- "$3"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "check_planted.sh: $1 $2: status $status, wanted '$3' in:"
        printf '%s\n' "$output" | head -12
    fi
}

everywhere() {
    for flavour in plain asan tsan traffic; do check $flavour "$1" "$2"; done
}

check tsan no_barrier 'data race'
check tsan block_race 'data race'
check plain shared_overrun 'shared memory overrun: kernel shared_overrun'
check asan shared_overrun 'use-after-poison'
check traffic shared_overrun 'write outside of device memory: kernel shared_overrun'
check plain global_overrun 'overrun: global_overrun wrote beside'
check asan global_overrun 'use-after-poison'
check traffic global_overrun 'overrun: kernel global_overrun'
check plain unwritten_shared 'noticed: NaN'
check traffic unwritten_shared 'read of shared memory that nobody wrote'
check plain unwritten_device 'noticed: NaN'
check traffic unwritten_device 'read of device memory that nobody wrote'
check plain unwritten_managed 'noticed: NaN'
check traffic unwritten_managed 'read of managed memory that nobody wrote'
everywhere divergent_barrier 'divergent barrier: kernel divergent_barrier'
everywhere early_return 'return before a barrier: kernel early_return'
everywhere divergent_shuffle 'divergent shuffle: kernel divergent_shuffle'
everywhere misaligned 'misaligned 16-byte access: kernel misaligned'
for mistake in 'much_shared too much shared memory: much_shared' 'block_33 block not of whole warps' \
    'block_1056 block over 1024 threads' 'empty_grid empty launch' \
    'missing_wait noticed: stale data' 'missing_synchronise noticed: stale pinned memory' \
    'host_argument points to host memory' 'freed_argument points to freed memory' \
    'freed_while_queued touched freed device memory' 'other_device points to memory of another device' \
    'host_copy source of a copy, .* is host memory' \
    'device_as_host source of a copy, .* is device memory' \
    'host_reads_device host code touched device memory' \
    'captured_synchronise noticed: cudaErrorStreamCaptureUnsupported' \
    'captured_malloc noticed: cudaErrorStreamCaptureUnsupported' \
    'captured_pageable noticed: cudaErrorStreamCaptureUnsupported' \
    'captured_default_stream noticed: cudaErrorStreamCaptureImplicit' \
    'captured_unjoined noticed: cudaErrorStreamCaptureUnjoined' \
    'cublas_host_array array of pointers, .* is host memory' \
    'cublas_types noticed: CUBLAS_STATUS_NOT_SUPPORTED' \
    'cublas_leading noticed: CUBLAS_STATUS_INVALID_VALUE: leading dimensions' \
    'cublas_alignment not aligned to its elements' 'cublas_host_operand operand, .* is host memory' \
    'cublas_workspace not aligned to 256 bytes' 'cublas_grouped_types CUBLAS_STATUS_NOT_SUPPORTED' \
    'cublas_grouped_alignment not aligned as its k asks'; do
    check plain "${mistake%% *}" "${mistake#* }"
done

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
