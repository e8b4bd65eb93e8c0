"""bench_table.py - what `make bench` runs: every shape with its peers, ratios beside targets.

    bench_table.py --bench PROGRAM --out FOLDER [--scale PROGRAM] [--python PROGRAM]
                   [--threads N] [--quick] [--only WORD]

Each line of runs() is one process of `bench`, in which libmoe and the peers take turns. FOLDER gets
raw.csv (every round), lines.csv (what bench printed), memory.csv, table.md and, where matplotlib is,
the plots. A ratio is the median over rounds of two times of one round. Standard library only.
"""

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time

import bench_shapes

STORAGES = ("panels", "prepacked", "rowmajor")
PRODUCTS = ("dense_openblas", "loop_openblas", "omp_openblas", "loop_onednn")
LIMITS = ("fma_peak", "read_bandwidth")


def runs(quick):
    """(shape, routing, pass, storage modes, peers, rounds) of each process."""
    few, some = (3, 3) if quick else (5, 9)
    programs = () if quick else ("torch_loop", "ggml")
    for shape in "ad" if quick else "abcd":
        yield shape, "balanced", "fwd", STORAGES, (*LIMITS, *PRODUCTS, *programs), few
        if not (quick and shape == "d"):
            yield shape, "balanced", "fwdbwd", STORAGES, ("fma_peak", *PRODUCTS, *programs[:1]), few
    if quick:
        yield "c", "balanced", "fwd", STORAGES, (*LIMITS, "dense_openblas", "loop_onednn"), few
    decoding = ("e4",) if quick else ("e1", "e4", "e16")
    for shape in decoding:
        peers = (*LIMITS, "omp_openblas", "loop_onednn", *programs)
        yield shape, "balanced", "fwd", STORAGES, peers, some
    peers = (*LIMITS, "copy_bandwidth", "dense_openblas", "loop_onednn")
    yield "f", "balanced", "fwd", STORAGES, peers, some
    if not quick:
        yield "f", "balanced", "fwdbwd", STORAGES, ("read_bandwidth", "dense_openblas"), some
    for shape in ("a",) if quick else ("a", "b", "c", "d", "f"):
        yield shape, "zipf", "fwd", STORAGES[:1], ("balanced",), few
    for shape in () if quick else ("a", "d"):
        yield shape, "zipf", "fwdbwd", STORAGES[:1], ("balanced",), few
    for shape in ("a",) if quick else ("a", "b", "c", "d"):
        yield shape, "balanced", "fwd", STORAGES[:1], ("one_thread", "layer"), few
    for shape in () if quick else ("a", "c", "d"):
        yield shape, "balanced", "fwdbwd", STORAGES[:1], ("layer",), few


def command(options, run):
    shape, routing, direction, storages, peers, rounds = run
    line = [options.bench, "--shape", shape, "--routing", routing, "--pass", direction]
    line += ["--rounds", str(rounds), "--threads", str(options.threads), "--python", options.python]
    line += ["--raw", os.path.join(options.out, "raw.csv")]
    for storage in storages:
        line += ["--weights", storage]
    for peer in peers:
        line += ["--peer", peer]
    return line


def first_storage(options):
    """The fastest mode that this build of the library has."""
    for storage in STORAGES:
        done = subprocess.run([options.bench, "--shape", "2,2,2,2,1,relu", "--rounds", "1",
                               "--weights", storage], capture_output=True)  # fmt: skip
        if done.returncode == 0:
            return storage
    sys.exit(f"{options.bench} measures nothing")


def measure(options, storage):
    """Runs everything; returns what was left out, each with its reason."""
    left_out = {}
    begin = time.time()
    with open(os.path.join(options.out, "lines.csv"), "w") as lines:
        for run in runs(options.quick):
            if options.only and options.only not in "-".join(run[:3]):
                continue
            if run[3] == STORAGES[:1]:
                run = (*run[:3], (storage,), *run[4:])
            print(f"{time.time() - begin:5.0f} s  {' '.join(run[:3])}", file=sys.stderr, flush=True)
            done = subprocess.run(command(options, run), text=True, capture_output=True)
            lines.write(done.stdout)
            for peer, why in re.findall(r"^bench: (\w+) left out: (.*)$", done.stderr, re.M):
                left_out[peer] = why
            for line in re.findall(r"^bench: \w+ differs .*$", done.stderr, re.M):
                print(line, file=sys.stderr)
            if done.returncode != 0:
                sys.exit(f"{' '.join(command(options, run))}\n{done.stderr}")
    return left_out


def measure_memory(options, storage):
    """Peak memory and steady allocations of training steps, each shape in a process of its own."""
    with open(os.path.join(options.out, "memory.csv"), "w") as file:
        for shape in ("a",) if options.quick else ("a", "b", "c", "d", "e1", "e4", "e16", "f"):
            done = subprocess.run([options.bench, "--memory", "--shape", shape, "--pass", "fwdbwd",
                                   "--threads", str(options.threads), "--weights", storage],
                                  text=True, capture_output=True)  # fmt: skip
            if done.returncode != 0:
                sys.exit(done.stderr)
            file.write(done.stdout)


def measure_scale(options):
    """The last line of bench_scale, or None."""
    if options.quick or not options.scale or options.only:
        return None
    print("131,072 experts", file=sys.stderr, flush=True)
    done = subprocess.run([options.scale], text=True, capture_output=True)
    found = re.search(r"large one: ([\d.]+) x", done.stdout)
    return float(found.group(1)) if done.returncode == 0 and found else None


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"model name\s*: (.*)", file.read()).group(1)
    except (OSError, AttributeError):
        return platform.machine()


def read_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--scale")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="runs whose shape-routing-pass has this word")
    return parser.parse_args()


def main():
    options = read_arguments()
    begin = time.time()
    os.makedirs(options.out, exist_ok=True)
    raw = os.path.join(options.out, "raw.csv")
    if os.path.exists(raw):
        os.remove(raw)
    storage = first_storage(options)
    left_out = measure(options, storage)
    measure_memory(options, storage)
    scale = measure_scale(options)
    rounds = bench_shapes.read_raw(raw)
    peaks = [m for (name, *_), m in rounds.items() if name == "fma_peak"]
    text = [f"{options.threads} threads of {cpu_name()}, f32; FMA peak "
            f"{statistics.median(m.rate() for m in peaks) if peaks else 0:.0f} GFLOP/s (median), "
            f"{max(m.best() for m in peaks) if peaks else 0:.0f} (best).", ""]  # fmt: skip
    text += bench_shapes.target_table(
        rounds, options.out, storage, scale, options.quick or bool(options.only)
    )
    text += bench_shapes.peer_tables(rounds)
    text += bench_shapes.memory_table(options.out)
    text += [f"Left out: {peer}: {why}" for peer, why in sorted(left_out.items())]
    with open(os.path.join(options.out, "table.md"), "w") as file:
        file.write("\n".join(text) + "\n")
    print("\n".join(text))
    try:
        import plot_bench

        plot_bench.draw(rounds, options.out, storage)
        print(f"plots: roofline and bars, .svg and .png, in {options.out}")
    except ImportError:
        print("no plots: matplotlib is not installed")
    print(f"{time.time() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
