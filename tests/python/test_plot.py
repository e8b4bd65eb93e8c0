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


def test_the_title_names_the_models_that_were_trained(root, tmp_path):
    header = ("step,seconds,moe_seconds,dense_seconds,moe_train_bits,moe_held_bits,"
              "dense_train_bits,dense_held_bits,balance_loss,busiest_over_mean,"
              "load_entropy_nats,idle_experts,learning_rate\n")  # fmt: skip
    log, picture = tmp_path / "run.csv", tmp_path / "run.svg"
    moe, dense, load = ("5,4", ","), ("6,5", ","), ("0.1,1.2,2.7,0", ",,,")
    for with_moe, with_dense, title in (
        (1, 1, "The MoE language model and its dense twin"),
        (1, 0, "<!-- The MoE language model -->"),
        (0, 1, "<!-- The dense language model -->"),
    ):
        cells = f"{moe[1 - with_moe]},{dense[1 - with_dense]},{load[1 - with_moe]},0.004\n"
        log.write_text(header + f"25,1,1,1,{cells}" + f"50,2,2,2,{cells}")
        done = plot(root, log, picture)
        assert done.returncode == 0, done.stdout
        assert title in picture.read_text(encoding="utf-8"), title
    log.write_text(header + "25,1,1,1,,,,,,,,,0.004\n")
    done = plot(root, log, picture)
    assert done.returncode != 0 and "no bits of any model" in done.stdout
