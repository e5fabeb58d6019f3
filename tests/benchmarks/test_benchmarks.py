"""The benchmarks' own machinery: what they check, draw and print. No speed is asserted here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # they are files beside each other, not a package

import command_line
import context_passes
import expressivity
import expressivity_results
import generation_speed
import harness
import operations
import peers
import program_tables
import recurrent
import report
import train_speed
import word_problems
from operations import BF16, F32, SCALING, SEGMENT, Case

BENCHMARKS = Path(report.__file__).parent
LONG = Case("scan", (1, 40 * SEGMENT, 35), F32, series=SCALING)


@pytest.mark.parametrize("operation", ["scan", "gated_scan"])
def test_columns_of_a_series_have_the_truth_of_the_whole(operation):
    case = replace(LONG, operation=operation)
    for direction, wanted in operations.truth(replace(case, series=None)).items():
        pairs = list(zip(operations.truth(case)[direction], operations.checked(case, wanted), strict=True))
        assert pairs[0][0].shape[-1] >= 12
        assert operations.relative_error(pairs, SEGMENT) < 2e-6, direction  # float32 against float64


def test_a_carry_dropped_once_is_seen():
    def forgetful(a, b):
        pieces = zip(a.split(1024, dim=1), b.split(1024, dim=1), strict=True)
        return (torch.cat([peers.loop_scan(*piece)[0] for piece in pieces], dim=1),)

    provider = peers.Provider("forgetful", lambda case: forgetful)
    for direction in operations.DIRECTIONS:
        error, _ = harness.errors_of(forgetful, provider, LONG, direction)
        assert error > 5 * operations.PEERS_TOLERANCES[BF16], direction


@pytest.mark.parametrize("operation", list(peers.PROVIDERS))
def test_every_provider_is_right_or_says_why_it_cannot_take_part(operation):
    case = Case(operation, (1, 64, 16) if "scan" in operation else (8, 16), F32)
    for provider in peers.PROVIDERS[operation]:
        reason = provider.unavailable(case)
        if "compiled" in provider.name or (operation, provider.name) == ("gated_scan_norm", "eager"):
            continue  # compiles for a while; the benchmark checks it
        if reason is not None:
            assert reason == "runs on CUDA tensors only"
            continue
        for direction in operations.DIRECTIONS:
            errors = harness.errors_of(provider.build(case), provider, case, direction)
            assert max(errors) <= operations.TOLERANCES[F32], (provider.name, direction)


def test_a_library_that_cannot_be_imported_is_a_reason():
    assert peers._import_failure("no_such_library.warp") == "no_such_library is not installed"


def test_accelerated_scan_says_which_lengths_it_takes():
    for shape, dtype, words in (((1, 100, 8), F32, "power of two"), ((1, 2**17, 8), F32, "power of two"),
                                ((1, 4096, 8), BF16, "16-bit kernel")):  # fmt: skip
        assert words in peers._warp_16_bit(Case("gated_scan", shape, dtype, "cuda"))


def test_report_draws_every_picture_from_the_file_alone(tmp_path, capsys):
    source = BENCHMARKS / "results" / "nvidia-h100-80gb-hbm3.json"
    content = json.loads(source.read_text())
    like = next(row for row in content["rows"] if row["op"] == "scan")
    shapes = [[1, 4**k, 1024] for k in (5, 6)]
    content["rows"] += [like | {"shape": shape, "provider": name, "series": SCALING} for shape in shapes for name in ("newllm", "fla")]  # fmt: skip
    content["rows"] += [like | {"direction": kind, "shape": [1, 2, 16]} for kind in report.OVERHEADS]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content))
    assert report.main([str(path)]) == 0
    assert {picture.stem for picture in tmp_path.glob("*.png")} == {
        "gpu-roofline", "gpu-speedup", "gpu-scaling", "gpu-overhead",
    }  # fmt: skip
    assert "scaling (GB/s)" in capsys.readouterr().out


def test_report_refuses_another_file_in_one_line(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text("{}")
    assert report.main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_full_cell_on_a_tiny_shape(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recurrent, "DEVICE", "cpu")
    monkeypatch.setattr(recurrent, "SECONDS", 0.0)
    monkeypatch.setitem(recurrent.SHAPES, "cpu", {(2, 40, 16): {torch.float32: [(4, 0, 1e-3)]}})
    path = tmp_path / "recurrent.json"
    assert recurrent.main(["--results", str(path)]) == 0
    rows = json.loads(path.read_text())["recurrent"]
    assert {row["name"] for row in rows} == {"Python loop", "in order", "4 chunks after 0 to 0.001", "auto"}
    assert all(row["forward_us"] > 0 and row["backward_us"] > 0 for row in rows)
    chunks = next(row for row in rows if row["name"].startswith("4"))
    assert chunks["difference"] < 1e-2
    assert len(chunks["passes"]) == 2
    printed = capsys.readouterr().out
    assert report.main([str(path)]) == 0
    assert printed.strip() in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_training_speed_on_a_tiny_model(tmp_path, capsys):
    path = tmp_path / "speed.json"
    options = ["--preset", "tiny", "--batch", "2", "--length", "16", "--steps", "2", "--no-compile", "--profile", "--results", str(path)]  # fmt: skip
    assert train_speed.main(options) == 0
    printed = capsys.readouterr().out
    content = json.loads(path.read_text())
    runs = {(run["model"], run["backend"]): run for run in content["runs"]}
    assert set(runs) == {("newllm", "auto"), ("transformer", "auto"), ("newllm", "reference")}
    assert all(run["tokens_per_s"] > 0 for run in runs.values())
    assert runs["newllm", "auto"]["profile"]["top"]
    assert program_tables.training_table(content) in printed
    assert train_speed.ways("auto", cuda=True, compiled=True) == [(False, False), (True, False), (True, True)]


@pytest.mark.parametrize(
    "options",
    [["--preset", "classic"], ["--config", "wikitext-2-transformer"], ["--config", "none"], ["--vocab-size", "-1"]],
)
def test_training_speed_refuses_in_one_line(capsys, options):
    assert train_speed.main(options) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_training_speed_of_a_recipe():
    options = ["--config", "wikitext-2-hops", "--vocab-size", "33278", "--steps", "7", "--device", "cpu"]
    model, config = train_speed.settings(train_speed.parse(options))
    assert (model.coupling, model.vocab_size, config.segment, config.steps) == ("hops", 33278, 64, 7)


def test_a_slope_is_the_derivative_while_the_row_is_held():
    """By autograd, of the cell with mean and variance as constants."""
    f, i, d, before = torch.randn(4, 3, 7, dtype=torch.float64)
    weight = 1 + torch.randn(7, dtype=torch.float64)
    before.requires_grad_()
    u = torch.sigmoid(f) * before + torch.sigmoid(i) * torch.tanh(d)
    variance, mean = torch.var_mean(u.detach(), -1, unbiased=False, keepdim=True)
    after = (u - mean) * (variance + 1e-5).rsqrt() * weight
    (wanted,) = torch.autograd.grad(after.sum(), before)
    found = context_passes.slopes(f, i, d, before.detach(), after.detach(), weight)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("corrected", [False, True])
def test_passes_end_where_nothing_moves(corrected):
    """A pass makes one chunk more final, whatever the weights; the start after four chunks of five needs five."""
    args = SimpleNamespace(steps=40, columns=16, chunk=8, passes=6)
    found = context_passes.moves(2.0, 0.25, args, corrected)
    assert found[0] > 0.1
    assert found[5] < 1e-6


def test_our_backends_stand_beside_the_fastest_peer():
    def row(provider: str, us: float) -> report.Row:
        return {
            "op": "scan", "provider": provider, "direction": "forward", "shape": [2, 3], "dtype": "float32", "device": "cuda",
            "bytes": 1e6, "median_us": us + 5, "graph_us": us, "gbps": 1e3 / (us + 5), "percent_of_copy": 50.0,
        }  # fmt: skip

    rows = [row("newllm", 10.0), row("cuda", 10.0), row("triton", 12.0), row("fla", 30.0), row("eager", 15.0)]
    line = next(line for line in report.table(rows, 1e3).splitlines() if "15.0 eager" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][5:] == ["15.0 eager", "1.20x", "1.50x"]
    assert "our backends" not in report.table(rows[:1], 1e3)


def test_generation_speed_on_a_tiny_model(tmp_path, capsys):
    path = tmp_path / "speed.json"
    options = ["--presets", "tiny", "--batches", "1", "2", "--contexts", "8", "16", "--blocks", "2", "--device", "cpu"]
    options += ["--long", "1100"]
    assert generation_speed.main([*options, "--results", str(path)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(path.read_text())
    runs = {(run["model"], run["batch"], run["context"]): run for run in content["generation"]}
    transformers = {("transformer", batch, context) for batch in (1, 2) for context in (8, 16)}
    assert set(runs) == {("newllm", 1, None), ("newllm", 2, None)} | transformers
    assert all(run["tokens_per_s"] > 0 for run in runs.values())
    assert [row["tokens"] for row in content["long"]] == [1024, 1100]
    assert all(row["tokens_per_s"] > 0 for row in content["long"])
    assert "1,100" in printed
    # Two layers, each with one context of 256 float32, and recall's tables of 4,096, tokens and counts; or three with keys and values of
    # 15 tokens, 192 wide, and the position.
    assert runs["newllm", 2, None]["state_bytes"] == 2 * (2 * 256 * 4 + 3 * 4096 * 4 * 4 + 3 * 8 + 2048 * 4)
    assert runs["transformer", 1, 16]["state_bytes"] == 3 * 2 * 15 * 192 * 4 + 8
    assert program_tables.generation_table(content) in printed
    assert report.main([str(path)]) == 0
    assert path.with_suffix(".png").stat().st_size > 0


def test_generation_speed_refuses_in_one_line(capsys):
    assert generation_speed.main(["--presets", "tiny", "--long", "5"]) == 2
    assert "--long 5" in capsys.readouterr().err
    assert generation_speed.main(["--presets", "huge"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("problem", "order"), [("parity", 2), ("mod5", 5), ("a5", 60), ("s5", 120)])
def test_word_problems_are_of_groups(problem, order):
    table = word_problems.multiplication_table(problem)
    every = torch.arange(order)
    assert table.shape == (order, order)
    assert torch.equal(table[0], every)  # neutral
    assert torch.equal(table[:, 0], every)
    assert all(torch.equal(row.sort().values, every) for row in table)  # every element has an inverse
    a, b, c = torch.randint(order, (3, 500), generator=torch.Generator().manual_seed(0))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    words, products = word_problems.draw(table, 3, 5, seed=1)
    assert products[0].tolist() == [word_products(table, words[0, : t + 1].tolist()) for t in range(5)]


def word_products(table, word):
    product = 0
    for element in word:
        product = int(table[product, element])
    return product


@pytest.mark.parametrize("elements", [2, 120])
def test_models_of_word_problems_have_equal_size(elements):
    full = expressivity.full_cell(elements, 128, 1)
    sizes = {
        name: sum(p.numel() for p in expressivity.make_model(name, full)[0].parameters())
        for name in expressivity.MODELS
    }
    assert max(sizes.values()) < 1.05 * min(sizes.values()), sizes


def test_the_full_cell_learns_parity_and_others_are_reported(tmp_path, monkeypatch, capsys):
    for name, value in {"TRAINED": 8, "ASKED": (8, 16, 32), "ASKED_WORDS": 32}.items():
        monkeypatch.setattr(expressivity, name, value)
    path = tmp_path / "parity.json"
    options = ["--problems", "parity", "--models", "full", "lstm", "--steps", "160", "--batch", "32", "--width", "32", "--lrs", "0.01", "--seeds", "0", "--device", "cpu", "--results", str(path)]  # fmt: skip
    assert expressivity.main(options) == 0
    full, lstm = json.loads(path.read_text())["expressivity"]
    assert full["accuracy"]["8"] > 0.99
    assert full["length"] == 8
    assert lstm["parameters"] == pytest.approx(full["parameters"], rel=0.1)
    assert report.main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| full | 1 layers of D=32" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = path.read_text()
    monkeypatch.setattr(expressivity, "train", None)
    assert expressivity.main(options) == 0  # nothing is left to do
    assert path.read_text() == before
    monkeypatch.setattr(expressivity, "ASKED_WORDS", 16)
    assert expressivity.main(options) == 2
    assert "has words 32, this would have 16" in capsys.readouterr().err


def test_runs_of_word_problems_are_added_to_a_file_once(tmp_path):
    path, header = (
        tmp_path / "x.json",
        {"device": "one", "precision": "float32", "trained": 8, "words": 32, "date": "d"},
    )
    runs = [{"problem": "a5", "model": "full", "shape": "s", "lr": 0.01, "seed": seed, "steps": 2, "batch": 3} for seed in range(3)]  # fmt: skip
    expressivity_results.add(path, header, "first", runs[:2])
    expressivity_results.add(path, header, "second", runs[1:])
    content = json.loads(path.read_text())
    assert (content["command"], content["expressivity"]) == (["first", "second"], runs)
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json: is not a results file"):
        expressivity_results.load(path, header)


@pytest.mark.parametrize(
    "options", [["--steps", "3"], ["--lrs", "-1"], ["--width", "0"], ["--results", "no/such/x.json"]]
)
def test_expressivity_refuses_in_one_line(capsys, options):
    assert expressivity.main(options) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_results_have_a_line_for_every_row():
    content = {
        "device": "one",
        "ratios": {"a": [1, 2]},
        "rows": [{"op": "scan", "us": 1.5}, {"op": "x", "us": None}],
        "refused": [],
    }
    text = report.as_json(content)
    assert json.loads(text) == content
    assert [line for line in text.splitlines() if '"op"' in line] == [
        '  {"op": "scan", "us": 1.5},',
        '  {"op": "x", "us": null}',
    ]


def test_a_command_is_kept_without_where_its_figures_went(monkeypatch):
    typed = ["--presets", "a b", "--results", "/somewhere/of/mine.json", "--long", "5", "--results=/there.json"]
    kept = "python benchmarks/generation_speed.py --presets 'a b' --long 5"
    assert command_line.typed("generation_speed", typed) == kept
    monkeypatch.setattr("sys.argv", ["/somewhere/generation_speed.py", *typed])
    assert command_line.typed("generation_speed", None) == kept
    assert command_line.typed("generation_speed", []) == "python benchmarks/generation_speed.py"
