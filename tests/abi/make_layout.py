#!/usr/bin/env python3
"""make_layout.py [--check FILE]: writes layout.c, which locks size and offsets of every public struct.

With --check it says which structs and fields of the headers FILE does not mention."""
import re
import subprocess
import sys
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
            for line in body.split(";"):
                match = re.search(r"(\w+)\s*(\[[^]]*\])?\s*$", line)
                if match:
                    fields.append(match.group(1))
            found[name] = fields
    return found


def numbers(found):
    """Values of sizeof and offsetof, by compiling a program."""
    lines = ['#include <moe/moe.h>', '#include <stddef.h>', '#include <stdio.h>', 'int main(void) {']
    for name, fields in found.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        lines += [f'printf("%zu\\n", offsetof({name}, {field}));' for field in fields]
    with tempfile.TemporaryDirectory() as where:
        source, program = Path(where) / "p.c", Path(where) / "p"
        source.write_text("\n".join(lines + ["return 0; }"]))
        subprocess.run(["cc", f"-I{ROOT}/include", str(source), "-o", str(program)], check=True)
        return iter(subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split())


def main():
    found = structs()
    if sys.argv[1:2] == ["--check"]:
        text = Path(sys.argv[2]).read_text()
        missing = [name for name in found if f"SIZE({name}," not in text]
        missing += [f"{name}.{field}" for name, fields in found.items() for field in fields
                    if f"OFFSET({name}, {field}," not in text]
        print("not locked:", ", ".join(missing)) if missing else None
        sys.exit(bool(missing))
    values = numbers(found)
    print("/* layout.c - locks the layout of every public struct on LP64. Made by make_layout.py; a line that")
    print(" * has to change is a break of the ABI. */")
    print("#include <moe/moe.h>\n\n#include <stddef.h>\n")
    print("#define SIZE(type, size) _Static_assert(sizeof(type) == (size), \"size of \" #type)")
    print("#define OFFSET(type, field, at) _Static_assert(offsetof(type, field) == (at), #type \".\" #field)\n")
    print("#if defined(__LP64__)")
    for name, fields in found.items():
        print(f"SIZE({name}, {next(values)});")
        for field in fields:
            print(f"OFFSET({name}, {field}, {next(values)});")
    print("#endif")


main()
