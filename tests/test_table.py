"""The table of finished runs: what it holds, and which runs it refuses."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def write_run(tmp_path):
    """write_run(directory, mode, seed, recall, setting=value ..): what a finished run leaves. Returns the directory."""

    def write(name, mode="baseline", seed=0, recall=0.5, logged=60, **settings):
        config = dict(dataset="cub", loss="contrastive", mode=mode, seed=seed, epochs=60, lr=1e-4, net="resnet50")
        last = dict(epoch=logged, recall={"1": recall}, map_at_r=recall / 2)
        last |= dict(alignment=0.1 * seed, uniformity=-1.0, utilization=0.3)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | settings))
        (tmp_path / name / "log.jsonl").write_text(json.dumps(dict(epoch=1)) + "\n" + json.dumps(last) + "\n")
        return name

    return write


@pytest.fixture
def table(tmp_path):
    """table(directories): its standard output by lines, and its error. No package is within reach."""

    def run(*names):
        command = [sys.executable, "-S", ROOT / "results" / "table.py", *names]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (result.returncode, result.stderr.count("\n")) == ((2, 1) if result.stderr else (0, 0)), result.stderr
        return result.stdout.splitlines(), result.stderr

    return run


def test_values_are_means_over_seeds_and_gains_are_paired_by_seed(write_run, table):
    names = [write_run("f3", "feature", seed=3, recall=0.9, lr=0.2)]  # without a baseline, so without a gain
    for seed, gain in enumerate((0.01, 0.02, 0.06)):
        names.append(write_run(f"f{seed}", "feature", seed, 0.5 + 0.1 * seed + gain, lr=0.2))
        names.append(write_run(f"b{seed}", "baseline", seed, 0.5 + 0.1 * seed))
    lines, _ = table(*names, write_run("other", dataset="folder"), write_run("m", loss="multisimilarity"))
    assert lines[0] == "**cub**, last epoch: net resnet50, epochs 60"
    assert lines[2].count("|") == lines[3].count("|") == 12 and lines[2].endswith("| published R@1, % |")
    assert lines[4] == "| contrastive | baseline | 3 | 60.0 ± 5.8 |  | 30.0 ± 2.9 |  | 0.100 | -1.000 | 0.300 | 64.7 |"
    feature = "| 4 | 69.8 ± 8.5 | +3.0 ± 1.5 | 34.9 ± 4.2 | +1.5 ± 0.8 | 0.150 | -1.000 | 0.300 | 67.4 |"
    assert lines[5] == "| contrastive | feature " + feature
    assert lines[6] == "| multisimilarity | baseline | 1 | 50.0 |  | 25.0 |  | 0.000 | -1.000 | 0.300 | 67.8 |"
    assert lines[8:12:2] == ["Rows differ in lr:", "- lr 0.0001: contrastive baseline, multisimilarity baseline"]
    assert lines[11] == "- lr 0.2: contrastive feature"
    assert lines[13] == "**folder**, last epoch: net resnet50, epochs 60, lr 0.0001"
    assert lines[15].endswith("| utilization |") and len(lines) == 20  # none of its rows differ
    rows = {(row["dataset"], row["loss"], row["mode"]): row for row in json.loads(lines[-1])["rows"]}
    assert len(rows) == 4 and rows["cub", "contrastive", "feature"]["seeds"] == [0, 1, 2, 3]
    assert rows["cub", "contrastive", "feature"]["values"]["recall_at_1"] == pytest.approx([0.51, 0.62, 0.76, 0.9])
    assert rows["cub", "contrastive", "feature"]["gains"]["map_at_r"] == pytest.approx([0.005, 0.01, 0.03])


def test_each_mix_weight_has_a_row(write_run, table):
    names = [write_run("b0", mix_weight=0.4), write_run("b1", seed=1, recall=0.6, mix_weight=0.4)]
    for weight, seed, recall in ((0.1, 1, 0.65), (0.4, 0, 0.45), (0.1, 0, 0.51), (0.4, 1, 0.57)):
        names.append(write_run(f"f{weight}-{seed}", "feature", seed, recall, mix_weight=weight))
    lines, _ = table(*names)
    assert [line[:38] for line in lines[4:7]] == [
        "| contrastive | baseline | 2 | 55.0 ± ",
        "| contrastive | feature at 0.4 | 2 | 5",
        "| contrastive | feature at 0.1 | 2 | 5",
    ]
    assert "| -4.0 ± 1.0 |" in lines[5] and "| +3.0 ± 2.0 |" in lines[6]
    assert lines[11] == "- mix_weight 0.1: contrastive feature at 0.1"
    assert [row["mix_weight"] for row in json.loads(lines[-1])["rows"]] == [None, 0.4, 0.1]


@pytest.mark.parametrize(
    "one, two, message",
    [
        (dict(lr=1e-2), dict(seed=1), "lr is 0.01 and 0.0001"),
        (dict(mix_weight=0.4), dict(seed=1, mix_weight=0.1), "mix_weight is 0.4 and 0.1"),
        (dict(), dict(mode="embed", net="tiny"), "net is resnet50 and tiny"),
        (dict(), dict(loss="proxyanchor", train_images=10), "train_images is None and 10"),
        (dict(images_checksum=5), dict(images_checksum=6, seed=1), "images_checksum is 5 and 6"),
        (dict(out="a"), dict(out="b"), "have the same settings and the same seed"),
    ],
)
def test_two_runs_that_do_not_belong_together_are_named(one, two, message, write_run, table):
    lines, error = table(write_run("one", **one), write_run("two", **two))
    assert error.startswith("table: one and two ") and message in error and not lines


def test_runs_may_differ_in_their_machine_and_a_validation_is_not_shown_beside_published_figures(write_run, table):
    machine = dict(data_root="/b", device="cuda", num_workers=9, kernels="triton", out="x", resume=True)
    one = write_run("one", validation=True, data_root="/a", images_checksum=5)
    lines, _ = table(one, write_run("two", seed=1, validation=True, images_checksum=5, **machine))
    assert lines[0] == "**cub**, last epoch: validation True, net resnet50, epochs 60, lr 0.0001"
    assert lines[2].endswith("| utilization |")
    assert lines[4].startswith("| contrastive | baseline | 2 | 50.0 ± 0.0 |") and lines[4].endswith("| 0.300 |")


def test_what_is_no_finished_run_is_named(write_run, table, tmp_path):
    (tmp_path / write_run("torn") / "config.json").write_text("{")
    (tmp_path / write_run("empty") / "log.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    whole = write_run("whole")
    for name in (write_run("half", logged=30), "torn", "empty", "file", "none"):
        assert table(whole, name)[1].startswith(f"table: {name}: not a finished run (")
    assert "epoch 30 of 60" in table("half")[1] and "usage: python results/table.py RUN_DIR" in table()[1]
