#!/usr/bin/env python3
"""make_layout.py: writes layout.c, which locks size and offsets of every public struct and
the number of every public constant.

check.sh finds the fields in its own way and compares."""
import os
import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def structs():
    """{struct: [field, ...]} of all public headers."""
    found = {}
    for header in sorted((ROOT / "include/moe").glob("*.h")):
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)
        for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, flags=re.S):
            fields = []
            for line in filter(str.strip, body.split(";")):
                pointer = re.search(r"\(\*(\w+)\)", line)
                parts = [pointer.group(1)] if pointer else line.split(",")
                fields += [re.search(r"(\w+)\s*(\[[^]]*\]\s*)*$", part).group(1) for part in parts]
            found[name] = fields
    return found


def constants():
    """Names of all public enumerators, the status list included."""
    found = []
    for header in sorted((ROOT / "include/moe").glob("*.h")):
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)
        found += re.findall(r"X\((MOE_\w+),", text)
        for body in re.findall(r"enum\s*\{(.*?)\}", text, flags=re.S):
            found += re.findall(r"\b(MOE_[A-Z0-9_]+)\s*=", body)
    return found


def numbers(found, names):
    """Values of sizeof and offsetof and of the constants, by compiling a program."""
    lines = ['#include <moe/cuda.h>', '#include <moe/io.h>', '#include <moe/moe.h>', '#include <moe/mpi.h>', '#include <moe/nccl.h>', '#include <stddef.h>', '#include <stdio.h>', 'int main(void) {']
    for name, fields in found.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        lines += [f'printf("%zu\\n", offsetof({name}, {field}));' for field in fields]
    lines += [f'printf("%d\\n", {name});' for name in names]
    with tempfile.TemporaryDirectory() as where:
        source, program = Path(where) / "p.c", Path(where) / "p"
        source.write_text("\n".join(lines + ["return 0; }"]))
        subprocess.run([os.environ.get("CC", "cc"), f"-I{ROOT}/include", str(source), "-o", str(program)], check=True)
        return iter(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split())


def main():
    found = structs()
    names = constants()
    values = numbers(found, names)
    print("/* layout.c - locks the layout of every public struct on LP64. Made by make_layout.py; a line that")
    print(" * has to change is a break of the ABI. */")
    print("#include <moe/cuda.h>\n#include <moe/io.h>\n#include <moe/moe.h>\n#include <moe/mpi.h>\n#include <moe/nccl.h>\n\n#include <stddef.h>\n")
    print("#define SIZE(type, size) _Static_assert(sizeof(type) == (size), \"size of \" #type)")
    print("#define OFFSET(type, field, at) _Static_assert(offsetof(type, field) == (at), #type \".\" #field)\n")
    print("#define VALUE(name, number) _Static_assert((name) == (number), #name)\n")
    print("#if defined(__LP64__)")
    for name, fields in found.items():
        print(f"SIZE({name}, {next(values)});")
        for field in fields:
            print(f"OFFSET({name}, {field}, {next(values)});")
    print("#endif\n")
    for name in names:
        print(f"VALUE({name}, {next(values)});")


main()
