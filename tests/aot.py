"""Compile every Triton kernel as it is launched, for sm80, sm90 and sm100, and print as JSON what each needs. No GPU.

    python tests/aot.py
"""

import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes of shared memory a program may use, by compute capability
FLOATS = "pull_scale pull_base push_scale push_base lam rest".split()
TYPES = {  # of the other arguments, by file; "vectors" have the type of the case, and all others are *fp32
    "pairwise": {"i32": "R N D n m", "*i64": "row column owner_keys other_keys", "vectors": "x v owner other"},
    "mixed": {"i32": "A B", "*i64": "y start partner anchor"},
    "mix_pool": {"i32": "B M S C", "*i32": "order start", "*u8": "argmax", "vectors": "maps pooled grad maps_grad"},
    "recall": {"i32": "Q G D", "*i64": "query_labels gallery_labels", "*i32": "count"},
}


def cases():
    """(file, kernel, constants, options, type of the vectors, arguments not known to be divisible by 16)"""
    from kernels import mix_pool, mixed, pairwise, recall

    for kind in ("*fp32", "*bf16"):
        blocks = dict(sums=pairwise.SUMS[kind != "*fp32"], gradient=pairwise.GRADIENT[kind != "*fp32"])
        for KIND in (0, 1, 2):  # hinge, exponential, the extremes for mining
            common = dict(KIND=KIND, MIXED=False, MINED=KIND == 1, PRECISION=pairwise.PRECISION)
            yield "pairwise", pairwise._sums, common | blocks["sums"], pairwise.LAUNCH, kind, "RN"
            if KIND < 2:
                sides = common | blocks["gradient"] | dict(AS_ROW=True, AS_COLUMN=True)
                yield "pairwise", pairwise._gradient, sides, pairwise.LAUNCH, kind, "nm"
    for KIND in (0, 1):
        common, launch = dict(KIND=KIND, BN=mixed.BN), dict(num_warps=mixed.WARPS, num_stages=3)
        for kernel, more in (
            (mixed._sums, {}),
            (mixed._row_gradient, dict(OF_S=False)),
            (mixed._row_gradient, dict(OF_S=True)),
            (mixed._pair_gradient, {}),
        ):
            yield "mixed", kernel, common | more, launch, "*fp32", "AB"
    for kind, C in (("*bf16", 16), ("*fp16", 16), ("*fp32", 16), ("*fp32", 1)):
        launch = dict(num_warps=mix_pool._warps(C), num_stages=3, enable_fp_fusion=False)
        unaligned = "BMS" + "C" * (C == 1)
        yield "mix_pool", mix_pool._forward, mix_pool.FORWARD, launch, kind, unaligned
        for S in (49, 256):
            yield "mix_pool", mix_pool._backward, mix_pool._backward_blocks(S), launch, kind, unaligned
    for symmetric in (False, True):
        yield "recall", recall._count, dict(SYMMETRIC=symmetric, **recall.META), recall.LAUNCH, "*fp32", "QG"


def type_of(name, file, kind):
    if name in FLOATS:
        return "fp32"
    found = [t for t, names in TYPES[file].items() if name in names.split()]
    return "*fp32" if not found else kind if found == ["vectors"] else found[0]


def compile_case(number, chip):
    import triton
    from triton.backends import nvidia
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    file, kernel, constants, options, kind, unaligned = list(cases())[number]
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else type_of(name, file, kind) for name in names}
    divisible = [name for name, t in types.items() if t == "i32" and name not in unaligned or t.startswith("*")]
    source = ASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(options))
    tools = pathlib.Path(nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, code = (
            subprocess.run([*tool, cubin.name], capture_output=True, text=True, check=True).stdout
            for tool in ([tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm", "-c"])
        )
    return dict(
        file=file,
        chip=chip,
        case=", ".join([kernel.__name__, kind, *(f"{name}={value}" for name, value in constants.items())]),
        triton=triton.__version__,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=compiled.metadata.shared,
        tensor_cores=bool(re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)", code)),
        warps=options["num_warps"],
    )


def main():
    sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
    numbers = range(len(list(cases())))
    with multiprocessing.Pool(os.cpu_count()) as pool:
        for row in pool.starmap(compile_case, [(number, chip) for number in numbers for chip in SHARED], chunksize=1):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
