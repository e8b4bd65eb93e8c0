#!/usr/bin/env python3
"""Runs the tests on deliberate mistakes: each must fail one of them.

    run.py [--only NUMBER] [BUILD]

Every mistake of list.txt is made in a copy of the sources under BUILD/mutants, one for each of two
workers, the library is built there for plain C, and the programs below run until one fails. Prints which
one, or SURVIVED. Ends with 0 if every mistake was noticed."""

import argparse
import concurrent.futures
import os
import queue
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
# Fast ones first; run_vectors covers f32 and f64 of every reference case.
SUITES = ["check_family", "check_branches", "check_gate_kinds", "check_expert_kinds", "check_combine",
          "check_half", "check_gradients", "check_ranks", "check_ranks_bounds", "check_storage", "check_export"]
OF_RANKS = ["check_ranks", "check_ranks_bounds"]  # first for mistakes in what only they run
OF_STORAGE = ["check_storage", "check_export"]  # likewise
WORKERS = 2
BUILD_ARGS = ["BUILD=out", "LIB=out/lib", "VARIANTS=f32_plain f64_plain bf16_plain f16_plain",
              "HAVE_X86=", "WERROR=0", "CFLAGS=-O1"]


def read_list():
    """[(file, old, new)] of list.txt."""
    mutants, lines = [], [line.rstrip("\n") for line in open(os.path.join(HERE, "list.txt"))]
    lines = [line for line in lines if line and not line.startswith("#")]
    for file, old, new in zip(lines[0::3], lines[1::3], lines[2::3]):
        if not old.startswith("- ") or not new.startswith("+ "):
            sys.exit(f"list.txt: {file}: not a pair of - and +")
        mutants.append((file, old[2:], new[2:]))
    return mutants


def make(tree, targets):
    return subprocess.run(["make", *BUILD_ARGS, *targets], cwd=tree, capture_output=True, text=True)


def first_failure(tree, file=""):
    """The name of the first program that fails, or None."""
    ranks = "rank" in file or "share" in file or "travel" in file or "second" in file
    storage = "storage" in file or "panels" in file or "parameter" in file or file == "src/experts.c"
    order = (OF_RANKS if ranks else OF_STORAGE if storage else []) + SUITES
    suites = [f"out/tests/{suite}" for suite in dict.fromkeys(order)]
    for target, command in [(s, [s]) for s in suites] + [("out/run_vectors", ["out/run_vectors", "tests/vectors"])]:
        built = make(tree, [target])
        if built.returncode != 0:
            sys.exit(built.stderr[-3000:])
        try:
            ran = subprocess.run([os.path.join(tree, command[0]), *command[1:]], cwd=tree, capture_output=True,
                                 timeout=300, env={**os.environ, "CK_DEFAULT_TIMEOUT": "120"})
        except subprocess.TimeoutExpired:
            return os.path.basename(target) + " (did not end)"
        if ran.returncode != 0:
            return os.path.basename(target)
    return None


def copy_tree(tree):
    """A copy of what a build and the programs need."""
    shutil.rmtree(tree, ignore_errors=True)
    os.makedirs(tree)
    for name in ["include", "src", "tests", "examples", "Makefile", "moe.pc.in"]:
        source = os.path.join(ROOT, name)
        (shutil.copytree if os.path.isdir(source) else shutil.copy)(source, os.path.join(tree, name))
    return tree


def try_mutant(tree, file, old, new):
    path = os.path.join(tree, file)
    text = open(path).read()
    if text.count(old) != 1:
        return f"NOT THERE ONCE but {text.count(old)} times", False
    try:
        with open(path, "w") as out:
            out.write(text.replace(old, new))
        failure = first_failure(tree, file)
    finally:
        with open(path, "w") as out:
            out.write(text)
    return failure or "SURVIVED", failure is not None


def main():
    parser = argparse.ArgumentParser(description="Runs the tests on deliberate mistakes.")
    parser.add_argument("--only", type=int, help="number of the one mistake to try, from 1")
    parser.add_argument("build", nargs="?", default=os.path.join(ROOT, "build"))
    args = parser.parse_args()
    trees = queue.Queue()
    for worker in range(WORKERS):
        trees.put(copy_tree(os.path.join(os.path.abspath(args.build), f"mutants{worker}")))
    def attempt(task):
        number, (file, old, new) = task
        tree = trees.get()
        try:
            result, good = try_mutant(tree, file, old, new) if number else (first_failure(tree), True)
        finally:
            trees.put(tree)
        return number, f"{file}: {old.strip()[:60]}: {result}", result, good

    noticed = 0
    tried = [(i, m) for i, m in enumerate(read_list(), 1) if args.only in (None, i)]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        for _, _, failure, _ in pool.map(attempt, [(0, ("", "", ""))] * WORKERS):
            if failure:
                sys.exit(f"{failure} fails without any mistake")
        for number, line, _, good in pool.map(attempt, tried):
            noticed += good
            print(f"{number:3} {line}", flush=True)
    print(f"{noticed} of {len(tried)} mistakes noticed")
    return noticed != len(tried)


if __name__ == "__main__":
    sys.exit(main())
