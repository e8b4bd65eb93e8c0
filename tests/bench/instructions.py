"""instructions.py - instructions of fixed shapes under callgrind, against a baseline.

    instructions.py --bench PROGRAM --library libmoe.a [--write] [--allow PERCENT]

Counts do not depend on what else the machine does. Valgrind knows no AVX-512: the AVX2 kernels run,
on one thread. Counted is what moe_plan_build, moe_experts_forward and moe_experts_backward execute,
by function of the library; a total that has grown by more than --allow (3) fails. Instructions
depend on the compiler: with another one than the baseline's nothing is compared.
"""

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import tempfile

BASELINE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "instructions.txt")
# T,D,F,E,K and activation: many rows an expert, few, gated, one token, tiny experts, odd sizes.
CASES = {
    "many": ("512,96,128,4,2,relu", "fwdbwd"),
    "few": ("128,96,128,32,2,relu", "fwdbwd"),
    "gated": ("128,128,64,8,2,swiglu", "fwdbwd"),
    "gated-forward": ("128,128,64,8,2,swiglu", "fwd"),
    "token": ("1,256,128,16,4,swiglu", "fwd"),
    "tiny": ("512,32,32,256,2,relu", "fwd"),
    "odd": ("97,67,53,7,3,swiglu", "fwdbwd"),
}
MODES = ("rowmajor", "panels", "prepacked")
ENTRIES = ("moe_plan_build", "moe_experts_forward", "moe_experts_backward")


def library_functions(library):
    done = subprocess.run(["nm", "--defined-only", library], text=True, capture_output=True)
    return {line.split()[2] for line in done.stdout.splitlines() if re.match(r"\w+ [tT] ", line)}


def count_by_function(path):
    """Own instructions of each function: costs but those of the line after calls=."""
    names, counts, function, skip = {}, {}, None, False
    with open(path) as file:
        for line in file:
            if line.startswith("fn="):
                number, _, name = line[3:].strip().partition(" ")
                function = names.setdefault(number, name) if name else names[number]
            elif line.startswith("cfn="):
                number, _, name = line[4:].strip().partition(" ")
                if name:
                    names[number] = name
            elif line.startswith("calls="):
                skip = True
            elif re.match(r"[-+*\d]", line) and function:
                if not skip:
                    words = line.split()
                    cost = int(words[1]) if len(words) > 1 else 0
                    counts[function] = counts.get(function, 0) + cost
                skip = False
    return counts


def measure(options, functions, case, mode):
    """{function: instructions}, or None if this build has no such storage mode."""
    shape, direction = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out")
        line = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={out}"]
        line += [f"--toggle-collect={name}" for name in ENTRIES]
        line += [options.bench, "--shape", shape, "--pass", direction, "--weights", mode,
                 "--isa", "avx2", "--threads", "1", "--rounds", "1", "--one-call"]  # fmt: skip
        done = subprocess.run(line, text=True, capture_output=True)
        if "left out" in done.stderr:
            return None
        if done.returncode != 0:
            sys.exit(done.stderr)
        # The compiler's copies of a function count as it.
        counts = {}
        for name, count in count_by_function(out).items():
            if name.split("'")[0] in functions:
                plain = re.sub(r"(\.(part|constprop|isra|cold)(\.\d+)?)+$|'\d+$", "", name)
                counts[plain] = counts.get(plain, 0) + count
        return counts


def measure_all(options):
    functions = library_functions(options.library)
    pairs = [(case, mode) for case in CASES for mode in MODES]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda pair: measure(options, functions, *pair), pairs)
        return {pair: counts for pair, counts in zip(pairs, found) if counts}


def lines_of(found):
    """Total of each case and mode, and the functions that have a hundredth of it."""
    for (case, mode), counts in found.items():
        total = sum(counts.values())
        yield f"{case} {mode} total", total
        for name, count in sorted(counts.items(), key=lambda item: -item[1]):
            if count >= total / 100:
                yield f"{case} {mode} {name}", count


def compiler():
    """gcc:12.2.0:x86_64-linux-gnu, of what CC names."""
    line = [os.environ.get("CC", "cc")]
    name = subprocess.run([*line, "--version"], text=True, capture_output=True).stdout
    words = ["clang" if "clang" in name else "gcc"]
    for question in ("-dumpfullversion", "-dumpmachine"):
        done = subprocess.run([*line, question], text=True, capture_output=True)
        words.append(done.stdout.strip())
    return ":".join(words)


def read_baseline():
    with open(BASELINE) as file:
        words = [line.rsplit(" ", 1) for line in file.read().splitlines()]
    return {key: value for key, value in words if not key.startswith("#")}


def write(found):
    with open(BASELINE, "w") as file:
        file.write("# Instructions by case, storage mode and function: `make instructions`.\n")
        file.write(f"compiler {compiler()}\n")
        for key, count in lines_of(found):
            file.write(f"{key} {count}\n")
    print(f"wrote {os.path.relpath(BASELINE)}: {len(found)} cases")


def compare(found, baseline, allow):
    """Prints each total, and which functions of one have grown; returns how many totals have."""
    failed = 0
    now = dict(lines_of(found))
    for key, count in now.items():
        if not key.endswith(" total"):
            continue
        before = int(baseline.get(key, 0))
        grown = before > 0 and count > before * (1 + allow / 100)
        change = f"{100 * (count / before - 1):+.2f} %" if before else "not in the baseline"
        print(f"{key[:-6]:24} {count:12} {change}{'  TOO MANY' if grown else ''}")
        failed += grown
        prefix = key[: -len("total")]
        for name, own in now.items() if grown else ():
            old = int(baseline.get(name, 0))
            if name.startswith(prefix) and name != key and own > old:
                print(f"    {name[len(prefix):]:50} {old} -> {own}")
    for key in baseline:
        if key.endswith(" total") and key not in now:
            print(f"{key[:-6]:24} is not measured any more")
            failed += 1
    return failed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", required=True)
    parser.add_argument("--library", required=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--allow", type=float, default=3)
    options = parser.parse_args()
    baseline = {} if options.write else read_baseline()
    if baseline and baseline["compiler"] != compiler():
        print(f"skipped: the baseline is of {baseline['compiler']}, this is {compiler()}")
        return
    found = measure_all(options)
    if options.write:
        write(found)
        return
    failed = compare(found, baseline, options.allow)
    print(f"instructions: {len(found)} cases, {failed} with more than {options.allow:g} % more")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
