"""examples/tools/moe-cost, the command: what it prints, its CSV, its picture, what it refuses."""

import csv
import io
import re
import subprocess
import sys

import pytest

import moe


@pytest.fixture(scope="module")
def command(root):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, root / "examples/tools/moe-cost", *arguments],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    return run


def printed(done):
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_a_case_is_a_report(command):
    out = printed(command("--model", "deepseek_v3", "--dedup", "node", "--dispatch-bytes", "1"))
    for words in ("D 7168, F 2048, E 256, K 8, from 4 of 8 groups", "64 GPUs, 8 a node", "dispatch",
                  "GEMM of routed experts", "combine", "gradients of gate, shared", "training step",
                  "communication-bound", "memory a rank", "bound by", "42.95 GB at worst",
                  "published figures"):  # fmt: skip
        assert words in out, words
    network = re.search(r"network ([0-9.]+) \(at most ([0-9.]+)\)", out)
    assert (float(network[1]), float(network[2])) == (1.171, 1.29)
    forward = printed(command("--inference"))
    assert "backward" not in forward and "training step" not in forward


def test_lists_give_a_line_for_each_case(command):
    out = printed(command("--gpus", "8,64", "--ep", "4,8", "--tokens", "64,4096")).splitlines()
    assert len(out) == 1 + 2 * 2 * 2
    assert [line.split()[:3] for line in out[1:3]] == [["8", "4", "64"], ["8", "4", "4096"]]


def test_a_row_of_csv_is_the_options_of_its_case(command):
    first = printed(command(
        "--model", "deepseek_v3", "--gpus", "64,512", "--dedup", "node", "--visits", "most",
        "--chunks", "3", "--cluster", "a100", "--accumulate", "4", "--overlap-shared",
        "--gradient-dtype", "bfloat16", "--dispatch-bytes", "1.03125", "--node-limit", "4", "--csv",
    ))  # fmt: skip
    rows = list(csv.DictReader(io.StringIO(first)))
    assert [row["gpus"] for row in rows] == ["64", "512"]
    options = list(rows[0])[: list(rows[0]).index("forward_us")]
    for line, row in zip(first.splitlines()[1:], rows):
        arguments = []
        for name in options:
            flag = "--" + name.replace("_", "-")
            if name in ("overlap_shared", "overlap_gradients", "inference"):
                arguments += [flag] * int(row[name])
            else:
                arguments += [flag, row[name]]
        again = printed(command(*arguments, "--csv")).splitlines()
        assert again == [first.splitlines()[0], line]
    assert float(rows[0]["r_network"]) < float(rows[1]["r_network"])


def test_columns_of_csv_agree(command):
    arguments = ("--model", "deepseek_v3", "--gpus", "16", "--accumulate", "3", "--chunks", "2")
    row = next(csv.DictReader(io.StringIO(printed(command(*arguments, "--csv")))))
    report, both = printed(command(*arguments)), ("forward", "backward")
    at = {name: float(row[name]) for name in row if name.endswith(("_us", "_bytes", "ratio"))}
    assert at["step_us"] == pytest.approx(
        3 * (at["forward_us"] + at["backward_us"]) + at["gradients_us"]
    )
    travel = sum(at[f"{p}_dispatch_us"] + at[f"{p}_combine_us"] for p in both)
    assert at["ratio"] == pytest.approx(travel / sum(at[f"{p}_gemm_us"] for p in both))
    totals = re.search(r"total +([0-9.]+) +([0-9.]+)", report)
    assert [float(v) for v in totals.groups()] == [round(at[f"{p}_us"], 1) for p in both]
    assert f"{at['step_us']:.1f} us a layer" in report
    assert f"parameters {at['parameter_bytes'] / 1e9:.2f} GB" in report


def test_a_configuration_without_a_preset_of_sizes(command):
    out = printed(command("--model", "switch", "--d-model", "512", "--d-hidden", "2048",
                          "--experts", "64", "--top-k", "2", "--activation", "gelu_tanh",
                          "--shared", "1",
                          "--shared-hidden", "256", "--layers", "6"))  # fmt: skip
    assert "D 512, F 2048, E 64, K 2; gelu_tanh, 1 shared of 256; 6 MoE layers" in out


def test_options_of_the_cluster_are_heeded(command):
    out = printed(command("--peak-tflops", "100", "--efficiency", "0.5", "--memory-gbs", "1000",
                          "--node-gbs", "50", "--network-gbs", "5", "--latency-us", "0",
                          "--message-us", "0", "--launch-us", "0", "--gpus-per-node", "4",
                          "--ranks-per-node", "2", "--csv"))  # fmt: skip
    row = next(csv.DictReader(io.StringIO(out)))
    # R of 8 ranks on 4 nodes: 2 * 3/4 copies of 4 bytes, over 6 F B.
    assert float(row["r_network"]) == pytest.approx(0.75 * 4 * 50e12 / (6 * 14336 * 5e9))
    assert float(row["forward_gemm_us"]) == pytest.approx(6 * 8192 * 4096 * 14336 / 50e6)


def test_the_slowest_and_the_fastest_cluster_have_finite_times(command):
    speeds = ("peak-tflops", "memory-gbs", "node-gbs", "network-gbs")
    for speed, micro in (("0.001", "1e6"), ("1e6", "0")):
        arguments = [word for name in speeds for word in (f"--{name}", speed)]
        for name in ("latency-us", "message-us", "launch-us"):
            arguments += [f"--{name}", micro]
        arguments += ["--model", "deepseek_v3", "--tokens", "16777216", "--efficiency", "0.001"]
        row = next(csv.DictReader(io.StringIO(printed(command(*arguments, "--csv")))))
        words = ("model", "cluster", "activation", "gradient_dtype", "dedup", "visits", "bound_by")
        numbers = [float(v) for name, v in row.items() if name not in words and v != ""]
        assert len(numbers) > 40 and all(0 <= number < 1e300 for number in numbers)


def test_help_list_and_published(command):
    text = printed(command("--help"))
    for flag in (
        "--model",
        "--gpus",
        "--dedup",
        "--node-limit",
        "--network-gbs",
        "--plot",
        "--csv",
    ):
        assert flag in text
    names = printed(command("--list"))
    assert all(name in names for name in (*moe.presets(), "a100", "h100"))
    figures = printed(command("--published"))
    assert all(s in figures for s in ("DeepEP", "Tutel", "DeepSpeed-MoE", "Megatron-Core", "0.74"))
    # Each line says where its figure is to be found.
    where = re.compile(r"arXiv \d{4}\.\d{5}|DeepEP docs/legacy\.md")
    assert all(where.search(line) for line in figures.splitlines()[1:])


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--tokens 0", "--tokens: '0': a whole number from 1"),
        ("--tokens 1,,2", "--tokens: '': a whole number"),
        ("--gpus 4097", "'4097': a whole number from 1 to 4096"),
        ("--gpus 2.5", "'2.5': a whole number"),
        ("--gpus 12", "--gpus 12: not a multiple of 8"),
        ("--gpus 64 --gpus-per-node 0", "'0': a whole number"),
        ("--ep 3", "--ep 3: does not divide 64 GPUs"),
        ("--gpus 8 --ep 16", "--ep 16: does not divide 8 GPUs"),
        ("--ep 16", "--ep 16: does not divide 8 experts"),
        ("--ranks-per-node 3", "--ranks-per-node 3: 8 ranks do not lie so on 8 nodes of 8"),
        ("--gpus 16 --ranks-per-node 1", "--ranks-per-node 1: 8 ranks do not lie so on 2 nodes"),
        ("--model gpt5", "--model gpt5: not a model or a preset"),
        ("--model switch", "--d-model is needed"),
        ("--model switch --d-model 8 --d-hidden 8", "--experts is needed"),
        ("--model hierarchical2017 --d-model 8 --d-hidden 8 --experts 4", "two levels"),
        ("--d-model 0", "--d-model: '0'"),
        ("--experts nan", "--experts: 'nan'"),
        ("--top-k 9", "top_k is 9"),
        ("--activation tanh", "--activation tanh: it can be"),
        ("--route-groups 4", "--route-groups and --route-top go together"),
        ("--route-groups 3 --route-top 1", "8 experts do not divide into 3 groups"),
        ("--route-groups 4 --route-top 5", "5 of 4 groups cannot be chosen"),
        ("--route-groups 8 --route-top 1", "1 groups of 1 experts are less than 2"),
        ("--node-limit 2", "--node-limit 2: a group of 8 ranks has 1 nodes"),
        ("--ranks-per-node 1 --node-limit 1", "--node-limit 1: has fewer experts"),
        ("--node-limit 1 --route-groups 1 --route-top 1", "--node-limit does not go with"),
        ("--dispatch-bytes 0", "--dispatch-bytes: '0': a number from 0.0625 to 8 is needed"),
        ("--combine-bytes inf", "--combine-bytes: 'inf'"),
        ("--efficiency 1.5", "--efficiency: '1.5'"),
        ("--network-gbs nan", "--network-gbs: 'nan'"),
        ("--memory-gbs 1e-320", "--memory-gbs: '1e-320': a number from 0.001"),
        ("--peak-tflops -1", "--peak-tflops: '-1'"),
        ("--experts 131072 --d-hidden 16777216 --d-model 16777216", "does not fit in 63 bits"),
        ("--latency-us -1", "--latency-us"),
        ("--cluster v100", "'v100'"),
        ("--dedup all", "'all'"),
        ("--gradient-dtype int8", "'int8'"),
        ("--chunks 0", "--chunks: '0'"),
        ("--accumulate x", "--accumulate: 'x'"),
        ("--nonsense", "--nonsense"),
        ("--token 8", "--token"),
        ("more", "more"),
        ("--list --csv", "--csv: not allowed with argument --list"),
        ("--plot r.svg --published", "--published: not allowed with argument --plot"),
        ("--plot r.svg --model gpt5", "--model gpt5: not a model or a preset"),
        ("--plot r.svg --experts 64", "--experts with --plot needs --model too"),
        ("--plot r.svg --model qwen3 --node-limit 2", "--node-limit does not go with --plot"),
        ("--plot r.svg --gpus 8", "--gpus does not go with --plot"),
        ("--plot run.pdf", "--plot run.pdf: a name that ends in .svg or .png is needed"),
    ],
)
def test_what_is_wrong_is_named(command, arguments, says):
    done = command(*arguments.split())
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_the_picture(command, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    png, svg = tmp_path / "r.png", tmp_path / "r.svg"
    printed(command("--plot", png))
    pixels = image.imread(str(png))
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 1000
    red = (pixels[..., 0] > 0.6) & (pixels[..., 1] < 0.35) & (pixels[..., 2] < 0.35)
    green = (pixels[..., 1] > 0.4) & (pixels[..., 0] < 0.3) & (pixels[..., 2] < 0.5)
    assert red.sum() > 500 and green.sum() > 500
    printed(command("--plot", svg))
    once = svg.read_bytes()
    printed(command("--plot", svg))
    assert svg.read_bytes() == once and b"communication-bound" in once
    printed(command("--plot", svg, "--model", "qwen3", "--top-k", "4", "--network-gbs", "20"))
    own = svg.read_text(encoding="utf-8")
    assert "qwen3: D 2048, F 768, E 128, K 4" in own and "20 GB/s between nodes" in own
    done = command("--plot", tmp_path / "absent" / "r.svg")
    assert done.returncode == 2 and "absent" in done.stderr


def test_a_picture_without_matplotlib_is_refused(command, tmp_path, monkeypatch):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = command("--plot", tmp_path / "r.svg")
    assert done.returncode == 2 and "--plot needs matplotlib: none here" in done.stderr
    assert not (tmp_path / "r.svg").exists()


def test_the_page_has_what_the_command_says(command, root):
    page = (root / "docs/cost-model.md").read_text(encoding="utf-8")
    for line in printed(command("--published")).splitlines()[1:]:
        cells = re.split(r"  +", line)
        assert f"{cells[1]} | {cells[2]} | {cells[3]} |" in page, cells
        number = re.search(r"arXiv [0-9.]+|docs/legacy.md", cells[0])[0]
        assert number in page.split("## Sources")[1], number
    for name in ("a100", "h100", "h800"):
        listed = next(
            line for line in printed(command("--list")).splitlines() if f"  {name} " in line
        )
        for number in re.findall(r"[0-9.]+", listed.split(name, 1)[1]):
            row = next(line for line in page.splitlines() if line.startswith(f"| {name} |"))
            assert number in row, (name, number)
    options = set(re.findall(r"--[a-z-]+", printed(command("--help")))) - {"--help"}
    options.discard("--route-")  # cut at the end of a line
    assert not [flag for flag in options if flag not in page]
