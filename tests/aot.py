"""Compile every Triton kernel for chips that are not here and print, as JSON, what each takes of them. Needs no GPU.

    python tests/aot.py

A file of kernels is added to FILES; it says what to compile in its own `ahead_of_time()`: a list of dicts
    kernel, types {argument: "*fp32", "i32", ..}, constants {argument: value}, num_warps, num_stages,
    and if they are not so by default plain=(arguments not known to be divisible by 16), dot=True (tensor cores meant),
    fp_fusion=False (products are rounded before they are added).
"""

import importlib
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

FILES = ("pairwise", "mixed", "mix_pool", "recall", "top_k", "crop")
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory a program may take, by compute capability


def compile_for(chip, kernel, types, constants, num_warps, num_stages, plain=(), dot=False, fp_fusion=True):
    """{"triton" (its version), "registers", "spilled" (bytes), "shared" (bytes), "tensor_cores" (bool), "dot"} of one kernel."""
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    divisible = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if name not in plain and not kind.startswith("fp")
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, divisible)
    options = dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    tools = pathlib.Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([*tool, file.name], capture_output=True, text=True, check=True).stdout
            for tool in ([tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm", "-c"])
        )
    return dict(
        triton=triton.__version__,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        tensor_cores=bool(re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)", code)),
        dot=dot,
    )


def compile_case(file, number, chip):
    case = importlib.import_module(f"kernels.{file}").ahead_of_time()[number]
    title = ", ".join([case["kernel"].__name__, *sorted(set(case["types"].values())), *(f"{k}={v}" for k, v in case["constants"].items())])
    return dict(file=file, chip=chip, case=title, warps=case["num_warps"], stages=case["num_stages"]) | compile_for(chip, **case)


def main():
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    counts = {file: len(importlib.import_module(f"kernels.{file}").ahead_of_time()) for file in FILES}
    cases = [(file, number, chip) for file in FILES for number in range(counts[file]) for chip in SHARED]
    with multiprocessing.Pool(os.cpu_count()) as pool:
        for row in pool.starmap(compile_case, cases, chunksize=1):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
