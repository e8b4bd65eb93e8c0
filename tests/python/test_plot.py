"""examples/tools/plot_demo.py: draws the log of a real run, and refuses what is no log."""

import subprocess
import sys

import pytest

image = pytest.importorskip("matplotlib.image")


def plot(root, *arguments):
    return subprocess.run(
        [sys.executable, root / "examples/tools/plot_demo.py", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
    )  # fmt: skip


def test_the_log_of_a_run_is_drawn(root, tmp_path):
    demo = root / "build" / "demo"
    if not demo.exists():
        pytest.skip("build/demo is not built: make demo")
    log, png = tmp_path / "run.csv", tmp_path / "run.png"
    subprocess.run([demo, "--file", root / "include", "--steps", "60", "--quiet", "--log", log],
                   check=True, stdout=subprocess.DEVNULL, timeout=120)  # fmt: skip
    done = plot(root, log, png)
    assert done.returncode == 0, done.stdout
    pixels = image.imread(str(png))
    assert pixels.shape[0] >= 300 and pixels.shape[1] >= 800
    red = (pixels[..., 0] > 0.6) & (pixels[..., 1] < 0.4) & (pixels[..., 2] < 0.4)
    blue = (pixels[..., 2] > 0.4) & (pixels[..., 0] < 0.3)
    assert red.sum() > 200 and blue.sum() > 200  # a line of each model


def test_what_is_no_log_is_refused(root, tmp_path):
    log, png = tmp_path / "no.csv", tmp_path / "no.png"
    log.write_text("step,nonsense\n1,2\n")
    for source, says in ((log, "no.csv"), (tmp_path / "absent.csv", "absent.csv")):
        done = plot(root, source, png)
        assert done.returncode != 0 and says in done.stdout and "Traceback" not in done.stdout
        assert not png.exists()
