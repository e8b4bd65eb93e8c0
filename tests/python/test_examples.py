"""The example scripts run, and the README's program does."""

import re

import pytest

pytest.importorskip("numpy")


@pytest.mark.parametrize("name, arguments, expected", [
    ("01_layer.py", (), r"dx\[3,5\] = (-?[\d.]+), by differences "),
    ("02_train.py", ("--steps", "60"), r"loss [\d.]+ -> [\d.]+"),
])  # fmt: skip
def test_example(root, script, name, arguments, expected):
    path = root / "examples/python" / name
    run = f"import runpy, sys\nsys.argv = [{str(path)!r}, *sys.argv[1:]]\n"
    printed = script(run + "runpy.run_path(sys.argv[0], run_name='__main__')", *arguments)
    assert re.search(expected, printed)


def test_the_example_of_a_published_model(io, root, script):
    path = root / "examples/python/04_import.py"
    printed = script(f"import runpy\nrunpy.run_path({str(path)!r}, run_name='__main__')")
    assert printed == (
        "25 tensors; the gate's is (8, 32) bfloat16\n"
        "y[0,0] = 0.045464455, by the equations 0.045464455\n"
        "exported again: the same names and numbers\n"
    )


def test_the_readmes_program(root, script):
    text = (root / "examples/python/README.md").read_text()
    first = re.search(r"```python\n(import numpy.*?)```", text, re.S).group(1)
    auxiliary, touched = script(first).split()
    assert float(auxiliary) > 0 and float(touched) > 0


def test_the_program_about_ranks(root, script):
    text = (root / "examples/python/README.md").read_text()
    (program,) = [p for p in re.findall(r"```python\n(.*?)```", text, re.S) if "moe.World" in p]
    first, second = (line.split() for line in script(program).splitlines())
    assert first[0] == second[0] and float(first[0]) > 0
    assert all(int(rows) > 0 and int(rounds) > 1 for _, rows, rounds, _ in (first, second))


FILES = """
import os, sys
import numpy as np
import moe

os.chdir(sys.argv[1])
context = moe.Context(threads=1)
layer = moe.preset("mixtral", d_model=4, d_hidden=4, num_experts=2).make(context)
layer.init_parameters(1)
m = {name: np.ones_like(p.data) for name, p in layer.parameters.items()}
v, step = dict(m), np.array(7)
os.mkdir("model")
moe.io.export("model/model.safetensors", layer, "mixtral", 3)
moe.io.export("model.safetensors", layer, "mixtral", 3)
moe.io.save("dense.safetensors", {f"mlp.{name}": np.eye(4) for name in ("gate", "up", "down")})
"""


@pytest.mark.parametrize("page, tensors", [
    ("examples/python/README.md", 3 * 7 + 1), ("docs/checkpoints.md", 2 * 7 + 1),
])  # fmt: skip
def test_the_programs_about_files(io, root, script, tmp_path, page, tensors):
    found = re.findall(r"```python\n(.*?)```", (root / page).read_text(), re.S)
    (program,) = [text for text in found if "moe.io.save" in text]
    after = "print(len(moe.io.File('run.safetensors')))"
    assert script(FILES + program + after, str(tmp_path)).splitlines()[-1] == str(tensors)


def test_the_packages_own_example(root, script):
    import moe

    lines = [line[4:] for line in moe.__doc__.split("\n") if line.startswith("    ")]
    assert script("\n".join(lines) + "\nprint(dx.shape)") == "(100, 64)\n"
