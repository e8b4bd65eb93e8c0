#!/bin/sh
# launch.sh MPI [RANKS PROGRAM [ARGUMENT]...] - becomes the launcher of openmpi, mpich or another
# MPI, which starts the program on so many ranks, also more than there are cores. Without a program:
# whether there is such a launcher. MPIRUN= is another command than the MPI's own; with RECOVER=1 a
# rank that dies does not take the others with it.
mpi=$1
root=
[ "$(id -u)" -ne 0 ] || root=--allow-run-as-root
recover=
case $mpi in
openmpi)
    run="mpirun.openmpi $root --oversubscribe"
    [ -z "$RECOVER" ] || recover=--enable-recovery
    ;;
mpich)
    run=mpiexec.mpich
    [ -z "$RECOVER" ] || recover=-disable-auto-cleanup
    ;;
*) run=mpirun ;;
esac
run=${MPIRUN:-$run} # a list of words, to be split
if ! command -v "${run%% *}" >/dev/null 2>&1; then
    echo "there is no ${run%% *}" >&2
    exit 127
fi
[ $# -gt 1 ] || exit 0
ranks=$2
shift 2
exec $run $recover -n "$ranks" "$@"
