"""tests/bench: ratios beside targets, plots, counts of callgrind, what the driver refuses."""

import importlib
import subprocess
import sys

import pytest

ROUNDS = """\
libmoe_panels,a,balanced,fwd,2,0,10.0,8589934592
libmoe_panels,a,balanced,fwd,2,1,20.0,8589934592
libmoe_panels,a,balanced,fwd,2,2,14.0,8589934592
fma_peak,a,balanced,fwd,2,0,9.0,8589934592
fma_peak,a,balanced,fwd,2,1,18.0,8589934592
fma_peak,a,balanced,fwd,2,2,9.0,8589934592
dense_openblas,a,balanced,fwd,2,0,20.0,8589934592
dense_openblas,a,balanced,fwd,2,1,40.0,8589934592
dense_openblas,a,balanced,fwd,2,2,10.0,8589934592
read_bandwidth,a,balanced,fwd,2,0,25.0,536870912
read_bandwidth,a,balanced,fwd,2,1,25.0,536870912
read_bandwidth,a,balanced,fwd,2,2,25.0,536870912
libmoe_panels,a,balanced,fwd,2,0,10.0,8589934592
layer,a,balanced,fwd,2,0,10.0,8589934592
layer_routing,a,balanced,fwd,2,0,1.0,0
libmoe_panels,b,balanced,fwd,2,0,50.0,34359738368
dense_openblas,b,balanced,fwd,2,0,40.0,34359738368
"""


@pytest.fixture
def folder(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tests/bench"))
    (tmp_path / "raw.csv").write_text(ROUNDS)
    (tmp_path / "memory.csv").write_text("memory,panels,a,balanced,fwdbwd,105.0,100.0,5.0,0\n")
    return tmp_path


def test_ratios_are_of_rounds_and_beside_their_targets(folder):
    shapes = importlib.import_module("bench_shapes")
    rounds = shapes.read_raw(folder / "raw.csv")
    assert len({key[4] for key in rounds}) == 3  # the second libmoe_panels begins another run
    lines = shapes.target_table(rounds, folder, "panels", None)
    found = {line.split("|")[1].strip(): line for line in lines if line[:1] == "|"}
    assert "| 0.500 | met |" in found["a: forward / dense chain"]
    assert "| 1.250 | not met |" in found["b: forward / dense chain"]
    assert "| 0.900 | met | panels, median 0.90 |" in found["a: share of the FMA peak, best round"]
    assert "not measured" in found["d: forward / dense chain"]
    assert "| 0.100 | not met |" in found["a: forward, gate, plan and combine / layer"]
    assert "| 1.050 | met |" in found["a: peak memory / parameters, gradients, activations"]
    assert "| 0 | met |" in found["a: allocations in three steady steps"]
    part = shapes.target_table(rounds, folder, "panels", None, part=True)
    assert " met, " in lines[-2] and lines[-2] == part[-2]
    assert not any("not measured |" in line for line in part) and len(part) < len(lines)
    assert any(line.startswith("| libmoe_panels | 0.50 |") for line in shapes.peer_tables(rounds))


def test_plots_are_drawn_and_name_no_folder(folder):
    pytest.importorskip("matplotlib")
    shapes, plot = (importlib.import_module(name) for name in ("bench_shapes", "plot_bench"))
    plot.draw(shapes.read_raw(folder / "raw.csv"), folder, "panels")
    for name in ("roofline", "bars"):
        assert (folder / f"{name}.png").stat().st_size > 10000
        assert str(folder) not in (folder / f"{name}.svg").read_text()


def test_own_instructions_are_counted_by_function(folder):
    instructions = importlib.import_module("instructions")
    (folder / "out").write_text(
        "events: Ir\nfn=(1) gemm\n0 10\ncfn=(2) pack\ncalls=3 0\n0 600\n0 5\n"
        "fn=(2)\n0 600\nfi=(3) other.h\n0 1\nfn=(1)\n0 7\n"
    )  # fmt: skip
    assert instructions.count_by_function(folder / "out") == {"gemm": 22, "pack": 601}
    found = {("many", "panels"): {"gemm": 104, "pack": 50, "little": 1}}
    base = {"many panels total": "100", "many panels gemm": "50", "gone panels total": "5"}
    assert instructions.compare(found, base, 3) == 2  # one has grown, one is not measured
    assert instructions.compare(found, {"many panels total": "155"}, 3) == 0


def test_the_driver_refuses_what_is_no_program(root, tmp_path):
    done = subprocess.run(
        [sys.executable, root / "tests/bench/bench_table.py", "--bench", "/bin/false",
         "--out", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "measures nothing" in done.stdout
