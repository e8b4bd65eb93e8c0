"""Files: safetensors, checkpoints of layers, weights of published models.

    with moe.io.File("model.safetensors.index.json") as file:      # or a file, or a directory
        moe.io.import_(layer, file, "mixtral", block=3)
        w = file["lm_head.weight"]                                 # a mapping of names to arrays
    moe.io.save("run.safetensors", {"layers.3.": layer, "step": step}, metadata={"by": "me"})
    moe.io.load("run.safetensors", {"layers.3.": layer, "step": step})

Over libmoe_io, which is loaded by the first call; ImportError says what is missing where it was not
built. docs/checkpoints.md has the formats and the names. On several ranks all of them make a call.
"""

from __future__ import annotations

from ._checkpoint import LoadReport, Values, load, save
from ._constants import Family, FileDType
from ._file import Entry, File
from ._library import io_library_path
from ._models import TensorNames, export, family_names, import_, upcycle

__all__ = [
    "Entry", "Family", "File", "FileDType", "LoadReport", "TensorNames", "Values", "export",
    "family_names", "import_", "library_path", "load", "save", "upcycle",
]  # fmt: skip


def library_path() -> str:
    """The file libmoe_io was loaded from; ImportError if there is none."""
    return io_library_path()
