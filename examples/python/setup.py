"""Builds the library with the Makefile of the source tree and puts it into the package.

The tree is two directories up, or the copy in csource/ that a source archive carries. Everything is
built in temporary directories; CC, CFLAGS and LDFLAGS of the environment are heeded. libmoe_io goes
in where pkg-config knows jansson; NO_IO=1 leaves it out. libmoe_mpi is of one MPI and stays with
the system.
"""

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.command.egg_info import egg_info
from setuptools.command.sdist import sdist
from setuptools.dist import Distribution

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = Path(__file__).resolve().parent
CSOURCE = "csource"
LIBRARIES = ("libmoe.so", "libmoe_io.so")
# What a source archive carries of the tree: all that building the library reads.
PARTS = ["Makefile", "moe.pc.in", "LICENSE*", "include/moe/*.h", "src/**/*", "tests/**/*.mk"]


def tree():
    """The source tree of the library."""
    for root in (HERE / CSOURCE, HERE.parent.parent):
        if (root / "include/moe/moe.h").exists() and (root / "Makefile").exists():
            return root
    sys.exit(f"libmoe: no source tree of the library at {HERE.parent.parent} or {HERE / CSOURCE}")


def version():
    """The version of the library, which is the package's."""
    text = (tree() / "include/moe/version.h").read_text()
    number = dict(re.findall(r"define MOE_VERSION_(MAJOR|MINOR|PATCH) (\d+)", text))
    return ".".join(number[part] for part in ("MAJOR", "MINOR", "PATCH"))


def compiler_of_environment():
    """CC as words, after a look whether it is there."""
    words = os.environ.get("CC", "cc").split()
    if not words or shutil.which(words[0]) is None:
        sys.exit(
            f"libmoe: the C compiler {' '.join(words) or '(empty CC)'} was not found; install one "
            "(Debian: apt-get install gcc) or set CC"
        )
    if shutil.which("make") is None:
        sys.exit("libmoe: make was not found; install it (Debian: apt-get install make)")
    return " ".join(words)


class BuildLibrary(Command):
    """Runs make and copies the libraries into the built package, or into the tree for an editable
    install."""

    description = "build libmoe.so and libmoe_io.so"
    user_options = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def package(self):
        """Where the libraries go."""
        return (HERE if self.editable_mode else Path(self.build_lib)) / "moe"

    def run(self):
        compiler = compiler_of_environment()
        root = tree()
        try:
            self.package().mkdir(parents=True, exist_ok=True)
            self.make(root, compiler)
        except PermissionError as error:
            sys.exit(f"libmoe: cannot write {error.filename}; build from a copy of the source tree")

    def make(self, root, compiler):
        """Build outside the tree. The Makefile wants BUILD relative to its directory."""
        with tempfile.TemporaryDirectory(prefix="libmoe-build-") as place:
            out = Path(os.path.realpath(place))
            relative = os.path.relpath(out, root)
            jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
            command = ["make", "-C", str(root), f"-j{jobs}", f"CC={compiler}", "WERROR=0",
                       "NO_MPI=1", f"BUILD={relative}", f"LIB={relative}/lib",
                       f"{relative}/lib/libmoe.so", "io"]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                sys.stderr.write(done.stdout.decode(errors="replace")[-4000:])
                sys.exit(f"libmoe: building the library with {compiler} failed, see above")
            for name in LIBRARIES:
                self.put(out / "lib" / name)

    def put(self, built):
        """A library into the package; one that was not built goes from there."""
        target = self.package() / built.name
        if not built.exists():
            target.unlink(missing_ok=True)
            return
        # The file itself, not the chain of links, under a new inode: a running program may have
        # the old one mapped.
        fresh = target.with_name(built.name + ".new")
        shutil.copyfile(os.path.realpath(built), fresh)
        fresh.chmod(0o755)
        strip = shutil.which("strip")
        if strip and not os.environ.get("LIBMOE_KEEP_SYMBOLS"):
            subprocess.run([strip, "--strip-debug", str(fresh)], check=False)
        os.replace(fresh, target)

    # What setuptools asks of a step of `build`, for editable installs.
    def get_source_files(self):
        return []

    def get_outputs(self):
        return [str(path) for path in map(self.package().joinpath, LIBRARIES) if path.exists()]

    def get_output_mapping(self):
        return {}


def scratch():
    """A directory that goes at exit: the source tree may be read-only and stays clean."""
    place = tempfile.mkdtemp(prefix="libmoe-setup-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


class Build(build):
    sub_commands = build.sub_commands + [("build_library", None)]

    def initialize_options(self):
        super().initialize_options()
        self.build_base = scratch()


class EggInfo(egg_info):
    def initialize_options(self):
        super().initialize_options()
        if not os.access(HERE, os.W_OK):
            self.egg_base = scratch()


class Sdist(sdist):
    """Adds what the library is built from, so that the archive is complete by itself."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        for name in LIBRARIES:  # of an editable install
            (Path(base_dir) / "moe" / name).unlink(missing_ok=True)
        root = tree()
        for pattern in PARTS:
            for source in sorted(root.glob(pattern)):
                if source.is_file():
                    target = Path(base_dir) / CSOURCE / source.relative_to(root)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)


class Wheel(bdist_wheel):
    """One wheel a platform for every Python 3: the library knows nothing of Python."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class PlatformDistribution(Distribution):
    """Says that the package is not the same everywhere, so that it goes to platlib."""

    def has_ext_modules(self):
        return True


setup(
    version=version(),
    distclass=PlatformDistribution,
    cmdclass={
        "build": Build,
        "build_library": BuildLibrary,
        "egg_info": EggInfo,
        "sdist": Sdist,
        "bdist_wheel": Wheel,
    },
)
