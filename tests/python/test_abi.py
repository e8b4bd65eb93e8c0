"""The package's picture of the C interface against the headers, a C compiler and the symbol map."""

import ctypes
import os
import re
import shutil
import subprocess

import pytest

import moe
from moe import _abi, _constants, _library
from moe._prototypes import (
    CUDA_PROTOTYPES,
    IO_PROTOTYPES,
    MPI_PROTOTYPES,
    NCCL_PROTOTYPES,
    PROTOTYPES,
)

CC = os.environ.get("CC", "cc").split()
# Headers that are not of libmoe.
MODULES = {"io.h": "io", "mpi.h": "mpi", "cuda.h": "cuda", "nccl.h": "nccl"}
STRUCTS = {"moe": _abi.STRUCTS, "io": _abi.IO_STRUCTS, "mpi": _abi.MPI_STRUCTS,
           "cuda": _abi.CUDA_STRUCTS, "nccl": _abi.NCCL_STRUCTS}  # fmt: skip
TABLES = {"moe": PROTOTYPES, "io": IO_PROTOTYPES, "mpi": MPI_PROTOTYPES,
          "cuda": CUDA_PROTOTYPES, "nccl": NCCL_PROTOTYPES}  # fmt: skip
MAPS = {"moe": "src/libmoe.map", "io": "src/io/libmoe_io.map", "mpi": "src/comm/libmoe_mpi.map",
        "cuda": "cuda/libmoe_cuda.map", "nccl": "src/comm/libmoe_nccl.map"}  # fmt: skip
ALL_STRUCTS = [struct for structs in STRUCTS.values() for struct in structs]
# It takes an MPI_Comm, which is another type in every MPI; moe_comm_create_mpi_f takes a number.
NOT_HERE = "moe_comm_create_mpi"


@pytest.fixture(scope="module")
def headers(root):
    """The public headers of each library, without comments, conditional parts left in."""
    text = dict.fromkeys(STRUCTS, "")
    for path in sorted((root / "include/moe").glob("*.h")):
        text[MODULES.get(path.name, "moe")] += path.read_text()
    return {name: re.sub(r"/\*.*?\*/", " ", text[name], flags=re.S) for name in text}


def test_structs_have_the_layout_of_the_compiler(root, tmp_path):
    if shutil.which(CC[0]) is None:
        pytest.skip(f"no compiler {CC[0]}")
    lines = []
    for struct in ALL_STRUCTS:
        c = _abi.c_name(struct)
        lines.append(f'printf("{c} sizeof %zu %zu\\n", sizeof({c}), (size_t)0);')
        for field, *_ in struct._fields_:
            size = f"sizeof((({c}*)0)->{field})"
            lines.append(f'printf("{c} {field} %zu %zu\\n", offsetof({c}, {field}), {size});')
    body = "\n".join(lines)
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <moe/moe.h>\n#include <moe/io.h>\n#include <moe/mpi.h>\n#include <moe/cuda.h>\n"
        "#include <moe/nccl.h>\n#include <stdio.h>\n#include <stddef.h>\n"
        f"int main(void)\n{{\n{body}\nreturn 0;\n}}\n"
    )
    program = tmp_path / "layout"
    command = [*CC, "-std=c11", f"-I{root / 'include'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    found = {}
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        struct, field, offset, size = line.split()
        found[struct, field] = int(offset), int(size)
    expected = {}
    for struct in ALL_STRUCTS:
        c = _abi.c_name(struct)
        expected[c, "sizeof"] = ctypes.sizeof(struct), 0
        for field, *_ in struct._fields_:
            descriptor = getattr(struct, field)
            expected[c, field] = descriptor.offset, descriptor.size
    assert expected == found
    assert len(found) > 200


@pytest.mark.parametrize("library", STRUCTS)
def test_every_struct_and_field_of_the_headers_is_here(headers, library):
    here = {
        _abi.c_name(s): [field for field, *_ in s._fields_] for s in STRUCTS[library]
    }
    there = {}
    pattern = r"typedef struct moe_\w+ \{(.*?)\} (moe_\w+);"
    for body, name in re.findall(pattern, headers[library], re.S):
        fields = []
        for declaration in body.split(";"):
            for part in declaration.split(","):
                words = re.findall(r"\w+", part.split("[")[0])
                if words:
                    fields.append(words[-1])
        there[name] = fields
    assert here == there


@pytest.mark.parametrize("library", MAPS)
def test_every_function_of_the_map_has_a_prototype(root, library):
    exported = re.findall(r"^\s+(moe_(?!_)\w+);", (root / MAPS[library]).read_text(), re.M)
    assert sorted(set(exported) - {NOT_HERE}) == sorted(TABLES[library])


SCALARS = {
    "void": None, "int32_t": ctypes.c_int32, "moe_status": ctypes.c_int32,
    "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64, "size_t": ctypes.c_size_t,
    "double": ctypes.c_double,
}  # fmt: skip


def _ctypes_of(declaration, is_result):
    """The ctypes type of a C parameter or result as this package writes it."""
    stars = declaration.count("*")
    words = [w for w in re.findall(r"\w+", declaration) if w != "const"]
    base = words[0]
    structs = {_abi.c_name(s): s for s in ALL_STRUCTS}
    if stars == 0:
        return SCALARS[base]
    if stars == 2:
        return ctypes.POINTER(ctypes.c_char_p if base == "char" else ctypes.c_void_p)
    if base in structs:
        return ctypes.POINTER(structs[base])
    if base == "char":
        return ctypes.c_char_p
    pointed = {"float": ctypes.c_float, "double": ctypes.c_double, "int64_t": ctypes.c_int64,
               "uint8_t": ctypes.c_uint8}  # fmt: skip
    if base in pointed:
        return ctypes.POINTER(pointed[base])
    return ctypes.c_void_p


@pytest.mark.parametrize("library", TABLES)
def test_prototypes_are_those_of_the_headers(headers, library):
    pattern = r"MOE_API\s+([\w\s]+?[\s*]+)(moe_\w+)\(([^)]*)\);"
    declared = [found for found in re.findall(pattern, headers[library]) if found[1] != NOT_HERE]
    assert {name for _, name, _ in declared} == set(TABLES[library])
    for result, name, arguments in declared:
        parts = [] if arguments.strip() == "void" else arguments.split(",")
        expected = _ctypes_of(result, True), [_ctypes_of(part, False) for part in parts]
        assert TABLES[library][name] == expected, name


def _enumerated(text):
    """The constants of enumerations, with what is written after them."""
    found = {}
    for body in re.findall(r"enum \{(.*?)\}", text, re.S):
        for part in body.split(","):
            found.update(re.findall(r"^\s*(MOE_[A-Z0-9_]+)\s*=\s*(\S+)", part))
    return found


def test_every_constant_of_the_headers_is_here_with_its_value(headers):
    named = _constants.constants()
    there = set(re.findall(r"X\((MOE_\w+), -?\d+", headers["moe"]))
    there.update(_enumerated(headers["moe"]), ["MOE_STATUS_LAST"])
    assert set(named) == there
    assert {name: moe.constant(name) for name in named} == named


def test_every_constant_of_the_modules_is_here_with_its_value(headers):
    there = {name: int(value) for name, value in _enumerated(headers["io"]).items()}
    assert _constants.io_constants() == there
    assert len(there) > 15
    assert not _enumerated(headers["mpi"]) and not _enumerated(headers["nccl"])
    there = {name: int(value) for name, value in _enumerated(headers["cuda"]).items()}
    assert _constants.CUDA_SINGLES == there


def test_defaults_come_from_the_library(io):
    for struct in _abi.STRUCTS + _abi.IO_STRUCTS:
        if struct not in _abi.FILLED_BY_LIBRARY:
            assert _library.new(struct).struct_size == ctypes.sizeof(struct)
    assert _library.new(_abi.GateConfig).init_std == _library.library().moe_init_default()
    assert _library.new(_abi.ForwardArgs).top_k == moe.FROM_CONFIG
    assert _library.new(_abi.SaveOptions).store_dtype == moe.SAME
    assert _library.new(_abi.UpcycleArgs).noise_fraction == 1


def test_a_status_that_is_unknown_is_an_error_still():
    with pytest.raises(moe.Error) as caught:
        _library.check(-99)
    assert caught.value.status == -99
    assert caught.value.name == "unknown status"


def test_named_results_follow_the_constants():
    assert moe.Losses._fields[1:] == tuple(name.lower() for name in moe.Loss.__members__)
    assert moe.Stats._fields == tuple(name.lower() for name in moe.Stat.__members__)
    for here, there in ((moe.io.TensorNames, _abi.TensorNames), (moe.io.LoadReport, _abi.LoadReport)):
        assert here._fields == tuple(field for field, *_ in there._fields_[1:])


def test_loading_refuses_what_is_no_libmoe(script, tmp_path):
    text = script(
        "import moe\n"
        "for path in ('/nowhere/libmoe.so', 'libm.so.6'):\n"
        "    try: moe.load(path)\n"
        "    except ImportError as error: print(error)\n"
    )
    assert "cannot load the library /nowhere/libmoe.so" in text
    assert "libm.so.6 is no libmoe" in text


def test_loading_a_second_library_is_refused():
    path = moe.library_path()
    assert moe.load(path) is moe.load()
    with pytest.raises(ImportError, match="is loaded already"):
        moe.load("/elsewhere/libmoe.so")


def test_an_old_library_is_refused_with_both_versions(script):
    text = script(
        "import moe\nfrom moe import _library\n_library.NEEDED_VERSION = (99, 0, 0)\n"
        "try: moe.load()\n"
        "except ImportError as error: print(error)\n"
    )
    assert re.search(r"is libmoe \d+\.\d+\.\d+; this package needs 99\.0\.0 or newer", text)
