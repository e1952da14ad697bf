"""The house rules: which file imports which, what must be installed, and that the README's commands are understood."""

import ast
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT

import metrix
from kernels import bench

README = (ROOT / "README.md").read_text()
OURS = {"metrix", "data", "model", "losses", "eval", "kernels"}
PACKAGES = {"torch", "torchvision", "triton", "numpy", "PIL", "scipy"}
PEERS = {"faiss", "pytorch_metric_learning"}  # optional, in the benchmark


def imports(path):
    """Names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            files = {alias.name for alias in node.names} & {path.stem for path in (ROOT / "kernels").glob("*.py")}
            names |= {f"kernels.{name}" for name in files} if node.module == "kernels" and files else {node.module}
    return names


def ours(path):
    return {name for name in imports(path) if name.split(".")[0] in OURS}


def test_arrows_run_one_way():
    assert {name.split(".")[0] for name in ours(ROOT / "metrix.py")} == OURS - {"metrix"}
    for name in ("data", "model", "losses", "eval"):
        assert all(other.split(".")[0] == "kernels" for other in ours(ROOT / f"{name}.py")), name
    for path in (ROOT / "kernels").glob("*.py"):
        if path.stem != "bench":
            assert ours(path) <= {"kernels"}, path.name


def test_nothing_but_the_requirements_is_imported():
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert PACKAGES | {"pytest"} == {re.split(r"[>=;# ]", line)[0].replace("pillow", "PIL") for line in requirements}
    for path in [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        used = {name.split(".")[0] for name in imports(path)} - OURS - set(sys.stdlib_module_names)
        assert used <= PACKAGES | (PEERS if path.stem == "bench" else set()), path.name


def test_the_readme_names_every_file():
    for path in [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        assert f"]({path.relative_to(ROOT)})" in README, path
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


def expand(line):
    """A command for every {a|b} in a line."""
    before, choice, after = [*re.split(r"\{([^{}]+)\}", line, maxsplit=1), "", ""][:3]
    if not choice:
        return [line]
    return [command for word in choice.split("|") for command in expand(before + word + after)]


def test_every_printed_command_is_understood(capsys):
    variables = r"(?:\w+=(?:\"[^\"]*\"|\S+) )*"
    lines = re.findall(rf"^    {variables}\./run\.sh ?(.*?)(?: {{2,}}#.*)?$", README.replace("\\\n", ""), re.M)
    commands = [shlex.split(command) for line in lines for command in expand(line)]
    assert len(commands) > 55
    for words in commands:
        if words[:1] == ["test"]:
            assert words[1:] in ([], ["--slow"])
        elif words[:1] == ["bench"]:
            bench.parse(words[1:])
        elif words[:1] == ["eval"]:
            with pytest.raises(SystemExit):
                metrix.main(words)
            assert "RUN_DIR/config.json: missing" in capsys.readouterr().err
        elif words[:1] == ["all"]:
            at = words.index("--seeds") if "--seeds" in words else len(words)
            metrix.parse(words[1:at] + words[at + 2 :])
        elif words[:1] not in (["[DATASET]"], ["--help"]):
            metrix.parse(words)


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.M | re.S))
def test_printed_python_runs(code):
    torch.manual_seed(0)
    y = torch.arange(30) // 3
    reader_has = dict(model=torch.nn.Linear(12, 16), loader=[(torch.randn(30, 12), y)])
    exec(code, reader_has | dict(test_z=torch.randn(30, 16), test_y=y))
