"""The house rules: which file imports which, what is installed, and that what the README says is so."""

import ast
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import metrix
from kernels import bench

README = (ROOT / "README.md").read_text()
OURS = {"metrix", "data", "model", "losses", "eval", "kernels"}
PACKAGES = {"torch", "torchvision", "triton", "numpy", "PIL", "scipy"}
OPTIONAL = {"matplotlib", "faiss", "pytorch_metric_learning"}  # by name in the benchmark, or where their absence is told
TIMING = {"bench", "speedrun"}  # which look at both sides


def imports(path):
    """(top-level names, modules of ours in full) that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            of_kernels = {alias.name for alias in node.names if (ROOT / "kernels" / f"{alias.name}.py").exists()}
            names |= {f"kernels.{name}" for name in of_kernels} if node.module == "kernels" and of_kernels else {node.module}
    return names


def ours(path):
    return {name for name in imports(path) if name.split(".")[0] in OURS}


def test_arrows_run_one_way():
    assert {name.split(".")[0] for name in ours(ROOT / "metrix.py")} == OURS - {"metrix"}
    for name in ("data", "model", "losses", "eval"):
        assert all(other.split(".")[0] == "kernels" for other in ours(ROOT / f"{name}.py")), name
    for path in (ROOT / "kernels").glob("*.py"):
        if path.stem not in TIMING:
            assert ours(path) <= {"kernels"}, path.name  # what the package shares: no neighbour, nothing above


def test_nothing_else_is_needed():
    assert PACKAGES | {"pytest"} == {re.split(r"[>=;# ]", line)[0].replace("pillow", "PIL") for line in (ROOT / "requirements.txt").read_text().splitlines()}
    for path in [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        used = {name.split(".")[0] for name in imports(path)} - OURS - set(sys.stdlib_module_names)
        assert used <= PACKAGES | OPTIONAL, path.name


def test_the_reading_order_is_true():
    rows = re.findall(r"^\| \[([\w/]+\.py)\]\(\1\) \| ([\d,]+) \|", README, re.M)
    there = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]}
    assert {name for name, _ in rows} == there
    for name, count in rows:
        there = len((ROOT / name).read_text().splitlines())
        assert there == pytest.approx(int(count), rel=0.1), f"{name}: the README says {count} lines"
    assert not re.search(r"<!-- (\w+).*: begin -->\s*<!--", README), "a table is empty"
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


def expanded(line):
    """The lines that one with {a|b} in it stands for."""
    choice = re.search(r"\{([^{}]+)\}", line)
    if not choice:
        return [line]
    return [one for word in choice[1].split("|") for one in expanded(line[: choice.start()] + word + line[choice.end() :])]


def commands():
    lines = re.findall(r"^    ((?:\w+=\S+ )*(?:\./run\.sh|python eval\.py).*?)(?: {2,}#.*)?$", README, re.M)
    return [one for line in lines for one in expanded(line)]


def test_every_printed_command_is_understood(capsys):
    assert len(commands()) > 60
    for command in commands():
        while re.match(r"\w+=", command):
            command = command.split(" ", 1)[1]
        program, *words = shlex.split(command)
        if program != "./run.sh" or words[:1] in (["[DATASET]"], ["--help"]):
            continue
        if words[:1] == ["test"]:
            assert words[1:] in ([], ["--slow"])
        elif words[:1] == ["bench"]:
            assert words[1:] == ["speedrun"] or bench.parse(words[1:])
        elif words[:1] == ["eval"]:  # the flags are understood, and RUN_DIR is looked for
            with pytest.raises(SystemExit):
                metrix.main(words)
            assert "RUN_DIR/config.json: missing" in capsys.readouterr().err
        elif words[:1] == ["all"]:
            at = words.index("--seeds") if "--seeds" in words else len(words)
            metrix.parse(words[1:at] + words[at + 2 :])
        else:
            metrix.parse(words)


def test_cheap_commands_run_as_printed(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "file.npz", embeddings=rng.standard_normal((40, 8)), labels=np.arange(40) // 4)
    ran = 0
    for command in commands():
        if command.startswith("python eval.py") or command.endswith("--help"):
            command = command.replace("python eval.py", f"{sys.executable} {ROOT}/eval.py").replace("./run.sh", str(ROOT / "run.sh"))
            done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0 and done.stdout, (command, done.stderr)
            ran += 1
    assert ran >= 2


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.M | re.S))
def test_printed_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    y = torch.arange(30) // 3
    given = dict(model=torch.nn.Linear(12, 16), loader=[(torch.randn(30, 12), y)])  # what the reader has
    exec(code, given | dict(test_z=torch.randn(30, 16), test_y=y))
