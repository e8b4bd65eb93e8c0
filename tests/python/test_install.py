"""The package as a user installs it: wheel, source archive, and what happens without tools.

Everything is built from a copy of the source tree, with the compiler's optimisation off and
without the variants for instruction sets to save time. pip fetches setuptools, as it does for a
user.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

pytestmark = pytest.mark.slow
VARIANTS = r"VARIANTS=f32_plain\ f64_plain\ bf16_plain\ f16_plain HAVE_X86="
QUICK = {"CFLAGS": "-O0 -g0", "MAKEFLAGS": VARIANTS}


def run(*command, ok=True, **environment):
    done = subprocess.run(
        [str(part) for part in command], env={**os.environ, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(root, tmp_path_factory):
    """A copy of what the package is built from, without anything that was ever built."""
    copy = tmp_path_factory.mktemp("tree")
    rules = [path.relative_to(root) for path in (root / "tests").rglob("*.mk")]
    for part in ("Makefile", "moe.pc.in", "LICENSE", *rules):
        (copy / part).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(root / part, copy / part)
    for part in ("include", "src"):
        shutil.copytree(root / part, copy / part)
    shutil.copytree(
        root / "examples/python", copy / "examples/python",
        ignore=shutil.ignore_patterns("build", "*.egg-info", "libmoe*.so", "__pycache__"),
    )  # fmt: skip
    return copy


def files_of(tree):
    found = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    return {name for name in found if ".egg-info" not in name}


def wheel_of(source, to, **environment):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", to, source, **QUICK, **environment)
    (wheel,) = to.glob("*.whl")
    return wheel


def knows_jansson():
    command = ("pkg-config", "--exists", "jansson")
    return shutil.which(command[0]) is not None and subprocess.run(command).returncode == 0


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    before = files_of(tree)
    made = wheel_of(tree / "examples/python", tmp_path_factory.mktemp("wheel"))
    assert files_of(tree) == before, "nothing may be built in the source tree"
    return made


def test_the_wheel_is_for_the_platform_and_any_python(wheel):
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("libmoe", "py3", "none")
    assert platform.startswith("linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert ("moe/libmoe_io.so" in names) == knows_jansson()
        library = archive.getinfo("moe/libmoe.so")
        assert archive.read(library)[:4] == b"\x7fELF"
        assert (library.external_attr >> 16) & 0o170000 in (0, 0o100000), "no symbolic link"
        tags = archive.read(f"libmoe-{version}.dist-info/WHEEL").decode()
    assert "Root-Is-Purelib: false" in tags
    assert "moe/py.typed" in names and "moe/__init__.py" in names
    assert not [name for name in names if "csource" in name or "setup" in name]


def test_an_installed_wheel_works_far_from_the_tree(wheel, tree, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    program = (
        "import array, moe\n"
        "c = moe.Context(threads=1)\n"
        "g = moe.Gate(c, d_model=4, num_experts=4, top_k=2)\n"
        "l = moe.Layer(g, moe.Experts(c, d_model=4, d_hidden=4, num_experts=4))\n"
        "l.init_parameters(1)\n"
        "p = moe.Pass(l)\n"
        "y = l.forward(p, array.array('f', [0.5] * 12))\n"
        "print(moe.library_path(), memoryview(y).shape)\n"
        "try: print(moe.io.library_path())\n"
        "except ImportError as error: print(error)\n"
    )
    first, second = run(python, "-I", "-c", program).splitlines()
    assert str(tmp_path / "venv") in first and first.endswith("moe/libmoe.so (3, 4)")
    if knows_jansson():
        assert str(tmp_path / "venv") in second and second.endswith("moe/libmoe_io.so")
    # A program of the tree finds the tree's package, which nobody built, beside itself.
    shutil.copytree(tree / "examples/python/moe", tmp_path / "program/moe")
    (tmp_path / "program/run.py").write_text(program + "print(moe.__file__)\n")
    shown = run(python, tmp_path / "program/run.py").splitlines()
    assert shown[0] == first and shown[-1] == str(tmp_path / "program/moe/__init__.py")


def test_without_jansson_the_package_says_so(tree, tmp_path):
    wheel = wheel_of(tree / "examples/python", tmp_path, NO_IO="1")
    with zipfile.ZipFile(wheel) as archive:
        assert "moe/libmoe_io.so" not in archive.namelist()
        archive.extractall(tmp_path / "lib")
    code = (
        "import sys\nsys.path.insert(0, sys.argv[1])\nimport moe\nprint(moe.version())\n"
        "from moe import _library\n_library.SYSTEM_NAME = 'libmoe.so.none'\n"
        "try: moe.io.File('x.safetensors')\n"
        "except ImportError as error: print(error)\n"
    )
    text = run(sys.executable, "-I", "-c", code, tmp_path / "lib")
    assert f"libmoe_io not found: it is not beside {tmp_path / 'lib/moe/libmoe.so'}" in text
    assert "libjansson-dev" in text


def test_a_source_archive_is_complete_by_itself(tree, tmp_path):
    code = (
        "import os, sys\nos.chdir(sys.argv[1])\n"
        "import setuptools.build_meta as backend\n"
        "print(backend.build_sdist(sys.argv[2]))\n"
    )
    run(sys.executable, "-c", code, tree / "examples/python", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (source / "csource/src/layer.c").exists()
    with zipfile.ZipFile(wheel_of(source, tmp_path / "wheel")) as made:
        assert "moe/libmoe.so" in made.namelist()
        assert ("moe/libmoe_io.so" in made.namelist()) == knows_jansson()


def test_missing_tools_are_named(tree, tmp_path):
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path,
               tree / "examples/python")  # fmt: skip
    text = run(*command, ok=False, CC="no-such-compiler")
    assert "libmoe: the C compiler no-such-compiler was not found" in text
    compiler = shutil.which("cc")
    os.symlink(compiler, tmp_path / "cc")
    text = run(*command, ok=False, CC="cc", PATH=str(tmp_path))
    assert "libmoe: make was not found" in text


def test_an_editable_install_uses_the_tree(tree, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--no-deps", "-e", tree / "examples/python", **QUICK)
    text = run(python, "-I", "-c", "import moe; print(moe.library_path(), moe.version())")
    assert str(tree / "examples/python/moe/libmoe.so") in text
