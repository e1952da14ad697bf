"""Compile the Triton kernels for A100, H100 and B200 without a GPU, and report registers and spills.

    python tests/aot.py                a JSON line for every kernel on sm80, sm90 and sm100
    python tests/aot.py --launches     only the launches at large sizes, without compiling

The launches are recorded on the meta device, where tensors have shapes and no values.
"""

import importlib
import json
import math
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory of a program, by compute capability
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}
TYPES |= {torch.int32: "*i32", torch.int64: "*i64"}


def record(chip):
    """Every launch on one chip: [{"file", "kernel", "grid", "types", "constants", "options", "divisible"}]."""
    import losses
    from kernels import mix_pool, pairwise, recall

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
        row = dict(file=kernel.fn.__module__.split(".")[-1], kernel=kernel.__name__, grid=[int(n) for n in grid])
        found.append(row | dict(types=types, constants=constants, options=options, divisible=divisible))

    for file in (pairwise, mix_pool, recall):
        file.launch, file.use_triton = launch, lambda *_: True
    pairwise.sm_count_and_arch = lambda device: (132, chip // 10)

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    def train(rows, columns, rho, epsilon=None, mixed=False):
        x_keys, v_keys = (empty(2, len(z), dtype=torch.int32) for z in (rows, columns))
        pull, push, *_ = pairwise.TritonPairSums.apply(rows, columns, x_keys, v_keys, rho, epsilon, mixed)
        (pull.sum() + push.sum()).backward()

    B, D = 65_536, 512
    contrastive, similarity, proxy = losses.Contrastive(), losses.MultiSimilarity(), losses.ProxyAnchor(1, 1)
    for dtype in (torch.float32, torch.bfloat16):
        z, proxies, anchors = empty(B, D, dtype=dtype), empty(13_107, D, dtype=dtype), empty(300, D, dtype=dtype)
        train(z, z, contrastive.rho)
        train(z, z, similarity.rho, similarity.epsilon)
        train(proxies, z, proxy.rho)
        for loss in (contrastive, similarity):
            train(anchors, z, loss.rho, mixed=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for C, side in ((2048, 7), (2048, 16), (100, 7), (1, 7)):
            i = empty(9500, dtype=torch.int64)
            mix_pool.mix_pool(empty(100, C, side, side, dtype=dtype), i, i, 0.4).sum().backward()
    for queries, items in ((60_502, 60_502), (14_218, 12_612)):
        query, labels = empty(queries, D), empty(queries, dtype=torch.int64)
        gallery = (query, labels) if queries == items else (empty(items, D), empty(items, dtype=torch.int64))
        recall.triton_count(recall.ByLabel(query, labels, *gallery, labels, labels), empty(queries))
    return found


def compile_for(launch, chip):
    """The launch with what its compiled code needs."""
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        cuobjdump = pathlib.Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        command = [cuobjdump, "--dump-resource-usage", "--dump-sass", cubin.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return launch | dict(
        chip=chip,
        triton=triton.__version__,
        registers=int(re.search(r"REG:(\d+)", code)[1]),
        spilled=int(re.search(r"STACK:(\d+)", code)[1]),
        shared=compiled.metadata.shared,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
        tensor_cores=sorted(set(re.findall(r"\bHGMMA\.\w+|\bHMMA\.\w+|\bUTC\w*MMA", code))),
        multiplications=multiplications(code, launch["options"]["num_warps"]),
    )


def multiplications(code, warps):
    """Multiply-adds that the code of a tile holds: of tensor cores where it uses them, else of float32."""
    hopper = [math.prod(map(int, shape.split("x"))) for shape in re.findall(r"\bHGMMA\.(\w+)", code)]
    ampere = 16 * 8 * 16 * len(re.findall(r"\bHMMA\.16816", code))
    return warps // 4 * sum(hopper) + warps * ampere or warps * 32 * len(re.findall(r"\bFFMA\b", code))


def main():
    jobs = {}
    for chip in SHARED:
        for launch in record(chip):
            jobs.setdefault(json.dumps([launch | dict(grid=0), chip]), (launch, chip))  # one job for each binary
    if sys.argv[1:] == ["--launches"]:
        return print(*(json.dumps(launch | dict(chip=chip)) for launch, chip in jobs.values()), sep="\n")
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for row in pool.starmap(compile_for, jobs.values(), chunksize=1):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
