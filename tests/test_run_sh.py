"""run.sh: what it starts, what it refuses before anything starts, and what it does where packages are missing.

BASH32=/path/to/bash-3.2 runs these tests in the bash of macOS.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT

LOSSES, MODES = "contrastive multisimilarity proxyanchor", "baseline input feature embed"


def run_sh(*arguments, script=ROOT / "run.sh", cwd=None, **environment):
    environment = os.environ | {"PYTHON": sys.executable} | environment  # never a Python without our packages
    command = [os.environ.get("BASH32", "bash"), script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture
def python(tmp_path):
    """python(lines): a Python that runs these lines of sh. Then it prints its words, unless it looks for packages."""

    def write(lines=""):
        (tmp_path / "python").write_text(f'#!/bin/sh\n{lines}\n[ "$1" = -c ] || echo "$@"\n')
        (tmp_path / "python").chmod(0o755)
        return str(tmp_path / "python")

    return write


@pytest.mark.parametrize(
    "words, variables, starts",
    [
        ("test -x", {}, "-m pytest -q -m not slow tests -x"),
        ("test --slow -x", {}, "-m pytest -q -m slow tests -x"),
        ("bench recall", {}, f"{ROOT}/tests/bench.py recall"),
        ("", {}, f"{ROOT}/metrix.py"),
        ("toy contrastive --lr 1", {}, f"{ROOT}/metrix.py toy contrastive --lr 1"),
        ("toy", dict(NPROC="2"), f"-m torch.distributed.run --standalone --nproc-per-node=2 {ROOT}/metrix.py toy"),
    ],
)
def test_one_program_is_started(words, variables, starts, python):
    result = run_sh(*words.split(), PYTHON=python(), **variables)
    assert (result.returncode, result.stdout, result.stderr) == (0, starts + "\n", "")


@pytest.mark.parametrize(
    "words, losses, modes, seeds, suffix, flags",
    [
        ("toy", LOSSES, MODES, 1, "", ""),
        ("toy --lr 1 --seeds 2", "contrastive", "input embed", 2, "", " --lr 1"),
        ("--seeds=11 toy --validation", "proxyanchor", "feature", 11, "-validation", " --validation"),
    ],
)
def test_all_starts_every_run_and_then_the_table(words, losses, modes, seeds, suffix, flags, python):
    chosen = {} if modes == MODES else dict(LOSSES=losses, MODES=modes)
    expected, table = [], f"{ROOT}/results/table.py"
    for seed, loss, mode in itertools.product(range(seeds), losses.split(), modes.split()):
        out = f"runs/toy-{loss}-{mode}{suffix}-seed{seed}"
        expected.append(f"{ROOT}/metrix.py toy {loss} {mode} --seed {seed} --out {out}{flags}")
        table += f" {out}"
    assert run_sh("all", *words.split(), PYTHON=python(), **chosen).stdout.splitlines() == [*expected, table]


@pytest.mark.parametrize(
    "words, variables, message",
    [
        ("all", {}, "all needs a data set"),
        ("all --lr 1 toy", {}, "all needs a data set"),
        ("all toy --seeds", {}, "--seeds needs a number"),
        ("all toy --seeds=0", {}, "--seeds needs a number"),
        ("all toy --seeds 2x", {}, "--seeds needs a number"),
        ("all toy --lr 1 --out mine", {}, "all sets --out itself"),
        ("all toy --out=mine", {}, "all sets --out itself"),
        ("all toy --seed 3", {}, "all sets --seed itself"),
        ("all toy --seed=3", {}, "all sets --seed itself"),
        ("all toy --resume", {}, "all sets --resume itself"),
        ("all toy", dict(LOSSES="contrastive triplet"), "LOSSES: triplet is none of: contrastive multi"),
        ("all toy", dict(MODES="contrastive"), "MODES: contrastive is none of: baseline input"),
        ("toy", dict(PYTHON="/no/python"), "/no/python: no such Python"),
    ],
)
def test_unusable_words_get_one_line_before_anything_starts(words, variables, message, python):
    result = run_sh(*words.split(), **dict(PYTHON=python("echo started")) | variables)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"run.sh: {message}") and result.stderr.count("\n") == 1


def test_all_ends_with_the_first_run_that_fails(python):
    result = run_sh("all", "toy", PYTHON=python('case "$*" in *feature*) exit 7 ;; esac'))
    assert result.returncode == 7 and len(result.stdout.splitlines()) == 2


def test_a_link_to_run_sh_works(python, tmp_path):
    (tmp_path / "link").symlink_to(os.path.relpath(ROOT / "run.sh", tmp_path))
    result = run_sh("toy", script=f"{tmp_path.name}/link", cwd=tmp_path.parent, PYTHON=python(), CDPATH=tmp_path.parent)
    assert result.stdout == f"{ROOT}/metrix.py toy\n"


def test_a_pytorch_that_cannot_be_imported_is_imported_once_and_says_why(tmp_path):
    (tmp_path / "torch.py").write_text('print("imported")\nraise ImportError("libcudnn.so.9: cannot open")')
    result = run_sh("toy", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1 and result.stdout == "imported\n"
    assert result.stderr.endswith("ImportError: libcudnn.so.9: cannot open\n")


def test_a_python_that_does_not_run_says_why(python):
    result = run_sh("toy", PYTHON=python("echo no encodings >&2; exit 1"))
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "no encodings\n")


def test_an_old_python_is_named(python):
    pretend = "import sys; sys.version_info = (3, 9, 18); exec(sys.argv.pop(1))"
    result = run_sh("toy", PYTHON=python(f"shift; exec '{sys.executable}' -c '{pretend}' \"$@\""))
    message = "run.sh: Python 3.9 is too old: 3.10 or newer is needed\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


def test_missing_packages_are_named_and_installed_once(python, tmp_path):
    path = python(f"""case "$0 $*" in
        *.venv/bin/python\\ -c*) exit ;;
        *\\ -c*) exec '{sys.executable}' -S "$@" ;;  # -S: without installed packages
        *-m\\ venv*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    esac""")
    here, script = tmp_path, shutil.copy(ROOT / "run.sh", tmp_path)
    start = lambda word: run_sh(word, script=script, PYTHON=path).stdout.splitlines()
    message, venv, pip, *others = start("toy")
    assert message.startswith("Missing packages: torch, torchvision, numpy, PIL. ") and venv == f"-m venv {here}/.venv"
    assert pip.startswith("-m pip install") and pip.endswith(f" -r {here}/requirements.txt")
    assert others == start("toy") == [f"{here}/metrix.py toy"]
    shutil.rmtree(here / ".venv")
    assert start("test")[0].startswith("Missing packages: torch, torchvision, numpy, PIL, pytest, scipy. ")


@pytest.mark.parametrize("name, version, needed", [("torch", "2.6.0+cu124", "2.11"), ("Pillow", "9.5.0", "10.1")])
def test_an_old_package_counts_as_missing(name, version, needed, python, tmp_path):
    (tmp_path / f"{name}-{version}.dist-info").mkdir()
    (tmp_path / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    script = shutil.copy(ROOT / "run.sh", tmp_path)
    path = python(f"""[ "$1" = -m ] && exit 9; exec '{sys.executable}' "$@" """)
    result = run_sh("toy", script=script, PYTHON=path, PYTHONPATH=str(tmp_path))
    assert result.returncode == 9 and result.stdout.startswith(f"Missing packages: {name.lower()} {needed} or newer. ")


def test_no_construct_is_newer_than_the_bash_of_macos():
    newer = r"\[-\d|declare -[An]|mapfile|readarray|\$\{\w+(,|\^|@)|\|&|&>>|;&|readlink -"
    assert not re.findall(newer, (ROOT / "run.sh").read_text())


@pytest.mark.slow
def test_all_trains_every_loss_and_mode_and_prints_the_table(write_tree, tmp_path):
    tree = write_tree(tmp_path / "images", {f"class{c}": 5 for c in range(10)})
    flags = f"--data-root {tree} --net tiny --weights none --image-size 32 --embedding-size 16 --num-workers 0"
    flags += " --device cpu --batch-size 8 --images-per-class 2 --epochs 1"
    result = run_sh("all", "folder", *flags.split(), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert [(row["loss"], row["mode"]) for row in rows] == list(itertools.product(LOSSES.split(), MODES.split()))
    assert all(row["seeds"] == [0] and len(row["values"]["recall_at_1"]) == 1 for row in rows)


@pytest.mark.slow
def test_the_toy_baseline_is_neither_hopeless_nor_saturated(tmp_path):
    start = time.perf_counter()
    result = run_sh("toy", "contrastive", "baseline", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert 0.40 < summary["last"]["recall"]["1"] < 0.85 and summary["seconds"] < time.perf_counter() - start
    files = {"best.pt", "config.json", "last.pt", "log.jsonl", "retrieval.png"}
    assert set(os.listdir(tmp_path / summary["out"])) == files
