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


def test_the_readmes_program(root, script):
    text = (root / "examples/python/README.md").read_text()
    first = re.search(r"```python\n(import numpy.*?)```", text, re.S).group(1)
    auxiliary, touched = script(first).split()
    assert float(auxiliary) > 0 and float(touched) > 0


def test_the_packages_own_example(root, script):
    import moe

    lines = [line[4:] for line in moe.__doc__.split("\n") if line.startswith("    ")]
    assert script("\n".join(lines) + "\nprint(dx.shape)") == "(100, 64)\n"
