"""Time Metrix against the alternatives on this machine: Markdown tables for people, a last line of JSON for programs.

    ./run.sh bench [mix_pool|step|recall|pairwise|mixed|all] [--sizes 100,2048] [--json FILE] [--deadline SECONDS]

Before an implementation is timed, its result is compared with that of plain PyTorch. Then all take turns on rotating
inputs. A cell shows the median time, its ratio to the first column, and the peak memory beyond the inputs. Losses and
pooling run forward and backward. "ours" is what the program picks. "torch" and "triton" are its two backends. A cell of
an implementation that failed says why. A rate is the least work that the problem needs, divided by the time of ours.
Its ceiling is the rate of a large product or copy, measured in the same run.
"""

import argparse
import importlib.metadata
import itertools
import json
import logging
import math
import platform
import re
import statistics
import sys
import time
from ctypes import CDLL
from pathlib import Path
from unittest import mock

START = time.perf_counter()
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the project's root instead of this directory

import torch
import torch.nn.functional as F

import eval
import kernels
import losses
import metrix
from kernels import pairwise
from kernels.mix_pool import mix_pool
from kernels.top_k import top_k

D, LAM = 512, 0.4  # embedding size, weight of a mix
INPUTS = 3  # inputs that take turns, so that no cache holds the next one
SECONDS, REPETITIONS = 2, 30  # an implementation is timed until it reaches either
BF16 = 0.1  # allowed relative error in bfloat16, whose rounding moves maxima and hinges

# ------------------------------------------------------------------------------------------ measuring


def measure(case, given):
    """{implementation: {"ms", "mib", "repetitions"} or {"failed": why}}."""
    results = {name: dict(failed="left out at the deadline") for name in case["functions"]}
    times, expected = {name: [] for name in results}, None
    reference_first = sorted(results, key=lambda name: name != "torch")
    for turn, name in itertools.product(range(REPETITIONS), reference_first):
        if late(given) or sum(times[name]) > SECONDS or (turn > 0 and "failed" in results[name]):
            continue
        run = lambda: call(case["functions"][name], case["inputs"][turn % INPUTS], case.get("parameters"))
        clock = lambda: times[name].append(seconds(run, given.device))
        try:
            if turn == 0:
                tensors = run()  # the first call also compiles
                expected = expected or tensors
                check(tensors, expected, BF16 if "bf16" in name else case["tolerance"])
                results[name] = dict(mib=peak_mib(clock, given.device))
            else:
                clock()
            results[name] |= dict(ms=1000 * statistics.median(times[name]), repetitions=len(times[name]))
        except Exception as error:  # the other implementations go on
            results[name] = dict(failed=last_line(error))
        except KeyboardInterrupt:  # nothing goes on, but the table and the JSON are finished
            results[name], given.deadline = dict(failed="interrupted"), 0
    return results


def late(given):
    return time.perf_counter() - START > given.deadline


def call(function, inputs, parameters):
    """The function's result. With parameters, also its gradients in the first input and in them."""
    if parameters is None:
        return function(*inputs)
    value = function(inputs[0].requires_grad_(), *inputs[1:])
    return [value.detach(), *torch.autograd.grad(value, [inputs[0], *parameters])]


def check(tensors, expected, tolerance):
    """ArithmeticError if the norm of a difference is too large."""
    for one, other in zip(tensors, expected, strict=True) if tensors is not None else ():
        error = ((one - other).double().norm() / other.double().norm().clamp_min(1e-12)).item()
        if not error <= tolerance:
            raise ArithmeticError(f"wrong by {error:.1g}")


def last_line(error):
    """The last line of an error's message, without PyTorch's advice on debugging."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "TORCH" not in line]
    return ": ".join([type(error).__name__, *lines[-1:]])


def seconds(run, device):
    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_mib(run, device):
    """MiB that a call needs beyond what is allocated before it. None where the system does not say."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    mib = lambda field: int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    try:
        CDLL("libc.so.6").malloc_trim(0)  # give back what earlier calls have freed
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    except OSError:
        return run()
    before = mib("VmRSS")
    run()
    return mib("VmHWM") - before


def ceilings(device):
    """GB/s of a large copy, TFLOP/s of a large product."""
    length, side = (2**26, 8192) if device == "cuda" else (2**24, 2048)
    (source, target), (a, b) = torch.randn(2, length, device=device), torch.randn(2, side, side, device=device)
    runs = {"GB/s": (lambda: target.copy_(source), 8e-9 * length)}
    runs["TFLOP/s"] = lambda: kernels.product(a, b), 2e-12 * side**3
    if device == "cuda":
        half_a, half_b = a.bfloat16(), b.bfloat16()
        runs["bf16 TFLOP/s"] = lambda: half_a @ half_b, 2e-12 * side**3
    return {unit: work / min(seconds(run, device) for _ in range(7)) for unit, (run, work) in runs.items()}


# ---------------------------------------------------------------------------------------------- cases


def random_clusters(B, per_class, device):
    """Inputs (z, y): unit embeddings (B, D) and labels (B,). Classes overlap, and hinges are active."""
    y = torch.arange(B, device=device) // per_class
    centres = 8 + torch.randn(INPUTS, B // per_class + 1, D, device=device)
    return [(F.normalize(c[y] + 3 * torch.randn(B, D, device=device), dim=1), y) for c in centres]


def with_backend(function, backend):
    return mock.patch.object(kernels, "backend", backend)(lambda *inputs: function(*inputs))


def ours(function, device, title="{}"):
    """{implementation: function}: as the program picks, and on a GPU also with both backends."""
    backends = ("torch", "triton") if device == "cuda" else ()
    return {title.format("ours"): function} | {title.format(b): with_backend(function, b) for b in backends}


def mix_pool_case(device, B, _):
    C, side, dtype, tolerance = 2048, 7, *((torch.bfloat16, BF16) if device == "cuda" else (torch.float32, 1e-3))
    i, j = losses.full_bank(torch.arange(B, device=device) // 5, "positive-negative")
    maps = [torch.randn(B, C, side, side, device=device).relu_().to(dtype) for _ in range(INPUTS)]
    inputs = [[features.contiguous(memory_format=torch.channels_last)] for features in maps]

    def whole_maps(features):
        mixed = (LAM * features[i] + (1 - LAM) * features[j]).flatten(2)
        return (mixed.mean(2) + mixed.max(2).values).sum()

    functions = ours(lambda features: mix_pool(features, i, j, LAM).sum(), device)
    functions |= {"whole maps": whole_maps, "torch.compile": torch.compile(whole_maps, dynamic=False)}
    title, size = f"{B} maps of {C} x {side} x {side}, {len(i):,} pairs", dtype.itemsize
    work = 2 * size * maps[0].numel() + (2 * size + 3) * len(i) * C  # bytes of maps, pooled maps and argmax
    return dict(title=title, inputs=inputs, functions=functions, parameters=[], tolerance=tolerance, work=work)


def step_case(device, B, loss):
    """Training steps. The modes compute different losses, so no results are compared."""
    net, pixels, precision = ("resnet50", 224, "bf16") if device == "cuda" else ("tiny", 64, "fp32")
    images = torch.randn(INPUTS, B, 3, pixels, pixels, device=device)
    inputs = [(x.contiguous(memory_format=torch.channels_last), torch.arange(B, device=device) // 5) for x in images]

    def training_step(mode):
        settings = dict(net=net, precision=precision, embedding_size=D, device=device)
        config = metrix.Config("toy", loss, mode, **metrix.recipe("toy", loss, mode) | settings)
        model, metric = metrix.make_model(config, "none"), metrix.LOSSES[loss](B // 5 + 1, D).to(device)
        optimizer, pairings = metrix.make_optimizer(model, metric, config), itertools.cycle(metric.pairings)

        def step(images, y):
            with metrix.autocast(config):
                value = metrix.step(model, metric, images, y, config, LAM, next(pairings))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

        return step

    title = f"{loss}, {net} at {pixels} px in {precision}, B={B:,}"
    return dict(title=title, inputs=inputs, functions={mode: training_step(mode) for mode in metrix.MODES}, tolerance=0)


def recall_case(device, N, _):
    ks, most = (1, 10, 100, 1000), min(1001, N)

    def by_topk(z, y):
        return recall(torch.cat([(rows @ z.T).topk(most, dim=1).indices for rows in z.split(1024)]), y)

    def by_faiss(z, y):
        import faiss

        index, z = faiss.IndexFlatIP(D), z.cpu().numpy()
        if device == "cuda":
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.add(z)
        return recall(torch.from_numpy(index.search(z, most)[1]).to(device), y)

    def recall(nearest, y):  # nearest: (N, most), the query itself included
        others = nearest != torch.arange(N, device=device)[:, None]
        right, place = others & (y[nearest] == y[:, None]), others.cumsum(1)
        return [torch.stack([(right & (place <= k)).any(1).double().mean() for k in ks])]

    functions = ours(lambda *zy: [torch.tensor([*eval.recall_at_k(*zy, ks=ks).values()], device=device)], device)
    # The results of these two are not comparable with recall: time only.
    functions["ours, 10 nearest"] = lambda z, y: top_k(z, k=10, exclude_self=True) and None
    functions["ours, MAP@R"] = lambda z, y: eval.map_at_r(z, y) and None
    functions |= {"chunked topk": by_topk, "faiss, exact": by_faiss}
    title, inputs = f"recall@1..1000, N={N:,}", random_clusters(N, 5, device)
    return dict(title=title, inputs=inputs, functions=functions, tolerance=2e-3, work=N * N * D)


def pairwise_case(device, B, loss):
    inputs, metric = random_clusters(B, 4, device), metrix.LOSSES[loss](B // 4 + 1, D).to(device)
    compiled = torch.compile(metric, dynamic=False)

    @mock.patch.object(pairwise, "similarities", lambda a, b: a @ b.T)  # without the guard, which does not compile
    def by_compiled(z, y):
        return compiled(z, y)

    @mock.patch.object(losses, "pair_sums", lambda x, v, *rest: pairwise.pair_sums(x.bfloat16(), v.bfloat16(), *rest))
    def in_bf16(z, y):
        return metric(z, y)

    def by_library(z, y):
        from pytorch_metric_learning import losses, miners

        if loss == "contrastive":
            return losses.ContrastiveLoss(pos_margin=0, neg_margin=metric.neg_margin)(z, y)
        if loss == "multisimilarity":
            mined = miners.MultiSimilarityMiner(metric.ms_epsilon)(z, y)
            return losses.MultiSimilarityLoss(metric.ms_alpha, metric.ms_beta, metric.ms_base)(z, y, mined)
        theirs = losses.ProxyAnchorLoss(*metric.proxies.shape, margin=metric.pa_margin, alpha=metric.pa_alpha)
        theirs.proxies = metric.proxies
        return theirs(z, y)

    functions = ours(metric, device)
    if device == "cuda":
        functions["triton, bf16"] = with_backend(in_bf16, "triton")
    if B * B <= pairwise.PIECE:  # above, plain PyTorch works in pieces
        functions["torch.compile"] = by_compiled
    functions["pytorch-metric-learning"] = by_library
    title, parameters = f"{loss}, B={B:,}", [*metric.parameters()]
    work = 2 * D * B * (3 * len(parameters[0]) if parameters else 2 * B)  # similarities, gradients of z, of proxies
    return dict(title=title, inputs=inputs, functions=functions, parameters=parameters, tolerance=1e-3, work=work)


def mixed_case(device, B, loss):
    """All mixes of two embeddings: from their similarities (embed mode), and built first (as in feature mode)."""
    inputs, metric = random_clusters(B, 5, device), metrix.LOSSES[loss](B // 5 + 1, D).to(device)
    pairing = metric.pairings[0]

    def bank_built(z, y):
        (i, j), z = losses.full_bank(y, pairing), F.normalize(z, dim=1)
        return metric.mixed(z, y, LAM * z[i] + (1 - LAM) * z[j], i, LAM, pairing)

    functions = {"ours": lambda z, y: metric.mixed_embed(z, y, LAM, pairing)}
    functions |= ours(bank_built, device, "bank built, {}")
    title, parameters = f"{loss}, B={B:,}", [*metric.parameters()]
    return dict(title=title, inputs=inputs, functions=functions, parameters=parameters, tolerance=1e-3)


CASES = {  # kernel: how a case is built, its losses, sizes on a CPU and on a GPU, unit of the rate
    "mix_pool": (mix_pool_case, [""], [40], [100], "GB/s"),
    "step": (step_case, metrix.LOSSES, [100], [100], None),
    "recall": (recall_case, [""], [5924, 20000], [5924, 60502], "TFLOP/s"),
    "pairwise": (pairwise_case, metrix.LOSSES, [100, 2048, 8192], [100, 2048, 4096, 8192, 16384, 65536], "TFLOP/s"),
    "mixed": (mixed_case, metrix.LOSSES, [100, 300], [100, 300, 1000], None),
}

# --------------------------------------------------------------------------------------------- output


def machine(device):
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    cpu = f"{cpu[1] if cpu else platform.processor()}, {torch.get_num_threads()} threads"
    packages = ("torch", "triton", "faiss-cpu", "faiss-gpu", "pytorch-metric-learning")
    versions = {each.name: each.version for each in importlib.metadata.distributions() if each.name in packages}
    hardware = torch.cuda.get_device_name() if device == "cuda" else cpu
    return dict(hardware=hardware, date=time.strftime("%Y-%m-%d"), python=platform.python_version()) | versions


def digits(x):
    return "?" if x is None else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def show(row, ceiling, header):
    """Print a row of a Markdown table, after a header if its columns are new. Returns the header."""
    first, unit = next(iter(row["results"].values())).get("ms"), row["unit"]
    cells = {row["kernel"]: row["case"]}
    for name, result in row["results"].items():
        if "failed" in result:
            cells[name] = result["failed"].replace("|", "/")
        else:
            ratio = f" ({digits(result['ms'] / first)} x)" if first else ""
            cells[name] = f"{digits(result['ms'])} ms{ratio}, {digits(result['mib'])} MiB"
    if unit:
        rate = row["work"] / (first or math.nan) / {"GB/s": 1e6, "TFLOP/s": 1e9}[unit]
        cells["rate, share of the ceiling"] = f"{digits(rate)} {unit}, {rate / ceiling[unit]:.0%}" if first else ""
    titles = [[], [*cells], ["---", *["---:"] * (len(cells) - 1)]] if [*cells] != header else []
    for line in [*titles, cells.values()]:
        print(*(f"| {cell:{width}}" for cell, width in zip(line, [48] + [30] * 99)), "|" * bool(line), flush=True)
    return [*cells]


def parse(arguments):
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    parser = argparse.ArgumentParser("bench", usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", nargs="?", default="all", choices=(*CASES, "all"))
    parser.add_argument("--sizes", type=numbers, help="batch sizes, or numbers of embeddings for recall: 100,2048")
    parser.add_argument("--json", type=Path, help="file for the results, written after every row")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which nothing is started")
    parser.add_argument("--device", default=devices[0], choices=devices)
    given = parser.parse_args(arguments)
    if given.json and not given.json.parent.is_dir():
        parser.error(f"--json {given.json}: its directory does not exist")
    return given


def numbers(text):
    return [int(number) for number in text.split(",")]


def main(arguments=None):
    given = parse(arguments)
    torch._logging.set_logs(all=logging.ERROR)  # torch.compile warns of every graph break
    result = dict(machine=machine(given.device), ceilings=ceilings(given.device), rows=[])
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    print("ceilings: " + ", ".join(f"{digits(rate)} {unit}" for unit, rate in result["ceilings"].items()))
    header = None
    for kernel in CASES if given.what == "all" else [given.what]:
        build, of_losses, *sizes, unit = CASES[kernel]
        for size, loss in itertools.product(given.sizes or sizes[given.device == "cuda"], of_losses):
            torch.manual_seed(0)
            torch.compiler.reset()  # a function is compiled for at most eight sizes
            row = dict(kernel=kernel, case=f"{loss} {size}", size=size, unit=unit, work=0)
            try:
                case = build(given.device, size, loss)
                row |= dict(case=case["title"], work=case.get("work", 0), results=measure(case, given))
            except Exception as error:  # inputs that do not fit
                row["results"] = dict(ours=dict(failed=last_line(error)))
            header = show(row, result["ceilings"], header)
            result["rows"].append(row)
            if given.json:
                temporary = given.json.with_suffix(".tmp")
                temporary.write_text(json.dumps(result, indent=1))
                temporary.replace(given.json)  # a run that is killed leaves a whole file
    print("\n" + json.dumps(result | dict(seconds=round(time.perf_counter() - START))))


if __name__ == "__main__":
    main()
