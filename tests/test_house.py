"""The house rules: which file imports which, what must be installed, and that the README's commands and code work."""

import ast
import re
import shlex
import sys

import bench
import pytest
import torch
from conftest import ROOT

import losses
import metrix

README = (ROOT / "README.md").read_text()
PROGRAM = [*ROOT.glob("*.py"), *(ROOT / "kernels").glob("*.py")]
OURS = {"metrix", "data", "model", "losses", "eval", "kernels"}
PACKAGES = {"torch", "torchvision", "triton", "numpy", "PIL", "scipy"}
PEERS = {"faiss", "pytorch_metric_learning"}  # optional, in the benchmark
STANDARD = set(sys.stdlib_module_names)


def imports(path):
    """The modules that a file imports, anywhere in it. Of our packages also the file: kernels.recall."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            files = {alias.name for alias in node.names} & {path.stem for path in (ROOT / "kernels").glob("*.py")}
            names |= {f"kernels.{name}" for name in files} if node.module == "kernels" and files else {node.module}
    return {name if name.split(".")[0] in OURS else name.split(".")[0] for name in names}


def ours(path):
    return {name for name in imports(path) if name.split(".")[0] in OURS}


def test_arrows_run_one_way():
    assert {name.split(".")[0] for name in ours(ROOT / "metrix.py")} == OURS - {"metrix"}
    for name in ("data", "model", "losses", "eval"):
        assert all(other.split(".")[0] == "kernels" for other in ours(ROOT / f"{name}.py")), name
    for path in (ROOT / "kernels").glob("*.py"):
        assert ours(path) <= {"kernels"}, path.name


def test_nothing_but_the_requirements_is_imported():
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert PACKAGES | {"pytest"} == {re.split(r"[>=;# ]", line)[0].replace("pillow", "PIL") for line in requirements}
    for path in PROGRAM:
        assert imports(path) - ours(path) - STANDARD <= PACKAGES, path.name
    assert imports(ROOT / "results" / "table.py") <= STANDARD  # it needs no PyTorch
    bench = ROOT / "tests" / "bench.py"
    assert imports(bench) - ours(bench) - STANDARD <= PACKAGES | PEERS


def test_the_readme_names_every_file():
    for path in PROGRAM:
        assert f"]({path.relative_to(ROOT)})" in README, path
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path


def expand(line):
    """A command for every {a|b} in a line."""
    before, choice, after = [*re.split(r"\{([^{}]+)\}", line, maxsplit=1), "", ""][:3]
    if not choice:
        return [line]
    return [command for word in choice.split("|") for command in expand(before + word + after)]


def test_every_printed_command_is_understood():
    start = r"^    (?:\w+=(?:\"[^\"]*\"|\S+) )*(?:\./run\.sh|torchrun .*? metrix\.py)"
    lines = re.findall(rf"{start} ?(.*?)(?: {{2,}}#.*)?$", README.replace("\\\n", ""), re.M)
    commands = [shlex.split(command) for line in lines for command in expand(line)]
    assert {"all", "eval", "test"} <= {words[0] for words in commands if words}
    for words in commands:
        if words[:1] == ["test"]:
            assert words[1:] in ([], ["--slow"])
        elif words[:1] == ["bench"]:
            bench.parse(words[1:])
        elif words[:1] == ["eval"]:
            metrix.parse(words[2:])
        elif words[:1] == ["all"]:
            metrix.parse(re.sub(r"--seeds[ =]\d+", "", " ".join(words[1:])).split())
        elif words[:1] not in (["[DATASET]"], ["--help"]):
            metrix.parse(words)


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.M | re.S))
def test_printed_python_runs(code):
    """A reader has images, labels and a loader of them, a net, and that net's trunk and head."""
    torch.manual_seed(0)
    images, y, test_z = torch.randn(30, 3, 8, 8), torch.arange(30) // 3, torch.randn(30, 16)
    trunk, head = torch.nn.Conv2d(3, 12, 3), torch.nn.Linear(12, 16)
    model = torch.nn.Sequential(trunk, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), head)
    metric, loader = losses.MultiSimilarity(), [(images, y)]
    reader = dict(images=images, y=y, loader=loader, test_z=test_z, test_y=y, metric=metric)
    exec(code, reader | dict(model=model, trunk=trunk, head=head))
