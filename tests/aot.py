"""What the Triton kernels need, found without a GPU: record what is launched at large sizes, then compile exactly that.

    python tests/aot.py                a JSON line for every kernel on sm80, sm90 and sm100
    python tests/aot.py --launches     only what is launched, without compiling

Recording runs the losses, mix_pool and recall on the meta device, where tensors have shapes and no values.
"""

import collections
import importlib
import json
import math
import multiprocessing
import operator
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory a program may use, by compute capability
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
TYPES |= {torch.int32: "*i32", torch.int64: "*i64"}


def record(chip):
    """[{"file", "kernel", "grid", "types", "constants", "options", "divisible"}] of all that one chip is given."""
    import losses
    from kernels import mix_pool, mixed, pairwise, recall

    found = []

    def launch(kernel, grid, *arguments, **options):
        constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
        types, divisible = {}, []
        for parameter, value in zip(kernel.params, arguments):
            if isinstance(value, torch.Tensor):
                types[parameter.name] = TYPES[value.dtype]
                divisible.append(parameter.name)
            elif isinstance(value, float):
                types[parameter.name] = "fp32"
            elif value == 1 and not parameter.do_not_specialize:
                constants[parameter.name] = 1
            else:
                types[parameter.name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    divisible.append(parameter.name)
        types |= dict.fromkeys(constants, "constexpr")
        file = kernel.fn.__module__.split(".")[-1]
        grid = [int(n) for n in grid]
        row = dict(file=file, kernel=kernel.__name__, grid=grid, types=types, constants=constants)
        found.append(row | dict(options=options, divisible=divisible))

    for file in (pairwise, mixed, mix_pool, recall):
        file.launch, file.use_triton = launch, lambda *_: True
    pairwise.chip = lambda device: (132, chip // 10)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    def train(sums):
        (sums[0].sum() + sums[1].sum()).backward()

    B, D = 65_536, 512
    contrastive, similarity, proxies = losses.Contrastive(), losses.MultiSimilarity(), losses.ProxyAnchor(1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        x, keys = empty(B, D, dtype=dtype), empty(2, B, dtype=torch.int64)
        train(pairwise.pair_sums(x, None, keys, keys, contrastive.rho))
        train(pairwise.pair_sums(x, None, keys, keys, similarity.rho, similarity.epsilon))
        owners, owner_keys = empty(13_107, D, dtype=dtype), empty(2, 13_107, dtype=torch.int64)
        train(pairwise.pair_sums(owners, x, owner_keys, keys, proxies.rho))
        anchors, anchor_keys = empty(300, D, dtype=dtype), empty(2, 300, dtype=torch.int64)
        for loss in (contrastive, similarity):
            train(pairwise.pair_sums(anchors, x, anchor_keys, keys, loss.rho, mixed=True))
    labels, pairs = empty(1000, dtype=torch.int64), empty(4000, dtype=torch.int64)
    for loss in (contrastive, similarity):
        train(mixed.embed_sums(empty(1000, 1000), empty(1000, 1000), labels, pairs, pairs, 0.4, loss.rho))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for C, side in ((2048, 7), (2048, 16), (100, 7), (1, 7)):
            i = empty(9500, dtype=torch.int64)
            mix_pool.mix_pool(empty(100, C, side, side, dtype=dtype), i, i, 0.4).sum().backward()
    for queries, items in ((60_502, 60_502), (14_218, 12_612)):
        names, bound = empty(queries, dtype=torch.int64), empty(queries)
        gallery = empty(items, D), empty(items, dtype=torch.int64)
        recall._triton_count(empty(queries, D), names, *gallery, bound, queries == items)
    return found


def compile_for(launch, chip):
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"kernels.{launch['file']}"), launch["kernel"])
    place = {name: (n,) for n, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: launch["types"][name] for name in kernel.arg_names},
        {place[name]: value for name, value in launch["constants"].items()},
        {place[name]: [["tt.divisibility", 16]] for name in launch["divisible"]},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(launch["options"]))
    tools = pathlib.Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run([*tool, cubin.name], capture_output=True, text=True, check=True).stdout
            for tool in ([tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm", "-c"])
        )
    pointers = sorted({t for t in launch["types"].values() if t[0] == "*"} & {"*fp32", "*bf16", "*fp16"})
    return dict(
        file=launch["file"],
        chip=chip,
        case=", ".join([launch["kernel"], *pointers, *(f"{k}={v}" for k, v in launch["constants"].items())]),
        grid=launch["grid"],
        triton=triton.__version__,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        warps=launch["options"]["num_warps"],
        tensor_cores=sorted(set(re.findall(r"\bHGMMA\.\w+|\bHMMA\.\w+|\bUTC\w*MMA", code))),
        multiplications=multiplications(code, launch["options"]["num_warps"]),
        bank_conflicts=bank_conflicts(compiled.asm["ptx"]),
        hottest_loop=hottest_loop(code),
    )


def multiplications(code, warps):
    """Multiply-adds of every tensor-core instruction, each run once by all warps: what one tile costs."""
    hopper = [math.prod(map(int, shape.split("x"))) for shape in re.findall(r"\bHGMMA\.(\w+)", code)]
    return warps // 4 * sum(hopper) + warps * 16 * 8 * 16 * len(re.findall(r"\bHMMA\.16816", code))


OPERATIONS = {"mov": lambda a: a, "and": operator.and_, "or": operator.or_, "xor": operator.xor, "sub": operator.sub}
OPERATIONS |= {"shl": operator.lshift, "shr": operator.rshift, "add": operator.add, "mul": operator.mul}
OPERATIONS |= {"mad": lambda a, b, c: a * b + c, "bfe": lambda a, b, c: a >> b & (1 << c) - 1}


def bank_conflicts(ptx):
    """Most words of one bank of shared memory that lanes load at once: 1 is ideal. From the addresses in the PTX.

    The lanes that load 128 bytes are served together. What is not computed from the lane is the same for all: 0.
    """
    definitions = {}
    for name, register, arguments in re.findall(r"^\s+(\w+)\S*\s+(%r\d+), (.*);", ptx, re.M):
        definitions.setdefault(register, (name, arguments.split(", ")))

    def value(x, lane):
        if x == "%tid.x" or x.lstrip("-").isdigit():
            return lane if x == "%tid.x" else int(x)
        name, arguments = definitions.get(x, ("", []))
        return OPERATIONS[name](*(value(a, lane) for a in arguments)) if name in OPERATIONS else 0

    worst = 0
    for words, base, offset in re.findall(r"ld\.shared(?:\.v(\d))?\.b32\s.*\[(%r\d+)\+?(\d*)\]", ptx):
        together = 32 // int(words or 1)
        for first in range(0, 32, together):
            start = [(value(base, lane) + int(offset or 0)) // 4 for lane in range(first, first + together)]
            loaded = {word for at in start for word in range(at, at + int(words or 1))}
            worst = max(worst, *collections.Counter(word % 32 for word in loaded).values())
    return worst


def hottest_loop(code):
    """Instructions of the loop with the most arithmetic on products: how many of each kind, and all."""
    best, labels, instructions = {}, {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9]*)", line):
            instructions.append(instruction[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if target and target[1] in labels:
                body = instructions[labels[target[1]] :]
                count = {name: body.count(name) for name in ("FFMA", "HMMA", "HGMMA", "LDS", "LDGSTS")}
                count["all"] = len(body)
                products = [c.get("FFMA", 0) + c.get("HMMA", 0) + c.get("HGMMA", 0) for c in (count, best)]
                if products[0] > products[1] or products[0] == products[1] and best and count["all"] < best["all"]:
                    best = count
    return best


def main():
    jobs = []
    for chip in SHARED:
        for launch in record(chip):
            if all((launch | dict(grid=0), chip) != (other | dict(grid=0), its) for other, its in jobs):
                jobs.append((launch, chip))
    if sys.argv[1:] == ["--launches"]:
        return print(*(json.dumps(launch | dict(chip=chip)) for launch, chip in jobs), sep="\n")
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for row in pool.starmap(compile_for, jobs, chunksize=1):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
