"""Compiles what launchers start, without a GPU: run by test_compiled.py in a process of its own, where Triton does not interpret.

Triton's launch is replaced: the arguments that a launcher passes become the signature of an ahead-of-time compilation for
an H100 or H200 (compute capability 9.0). Prints one line a kernel: its name, its precision where it has one, the bytes of
its stack, to which registers spill, and those of its shared memory.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_instead(kernel: JITFunction, *positional, grid, warmup, **named) -> None:
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    values = dict(zip(kernel.arg_names, positional)) | named
    # What Triton would do when it is called: 1 becomes a constant, multiples of 16 are known as such.
    fixed = {
        p.name: values[p.name] for p in kernel.params if p.is_constexpr or is_number(values[p.name], of=1)
    }
    signature, multiples = {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        signature[name] = "constexpr" if name in fixed else type_of(value)
        if name not in fixed and (isinstance(value, torch.Tensor) or is_number(value, of=16)):
            multiples[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=fixed, attrs=multiples),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    stack = spilled_bytes(compiled.asm["cubin"])
    print(kernel.__name__, values.get("PRECISION", "-"), stack, compiled.metadata.shared)


def is_number(value: object, of: int) -> bool:
    """Whether it is 1, or a whole multiple of another number."""
    return type(value) is int and (value == 1 if of == 1 else value % of == 0)


def type_of(value: torch.Tensor | int | float) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def spilled_bytes(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


def main() -> None:
    from ood_helpers.kernels import group_score, largest_entries, line_head, prototype_cosine, shaped_energy

    JITFunction.run = compile_instead
    samples, classes, feature_dim = 1000, 200, 342
    features, weight = torch.rand(samples, feature_dim), torch.rand(classes, feature_dim)
    bias, mask, factor = torch.rand(classes), weight > 0.5, torch.rand(samples)
    predicted = torch.zeros(samples, dtype=torch.int64)
    for precision in ("ieee", "tf32"):
        line_head.launch(features, weight, bias, weight, mask, bias, 1.0, "energy", precision)
    line_head.launch(features, weight, bias, weight, mask, bias, 1.0, "logits", "ieee")
    largest = largest_entries.launch(features, 34)
    prototype_cosine.launch(features, weight, predicted)
    group_score.launch(features, [(0, 200), (200, 342)])
    head = features, weight, bias
    shaping = shaped_energy.Shaping
    for precision in ("ieee", "tf32"):
        shaped_energy.launch(*head, shaping(1.0, mask, predicted, scale=factor), precision)
    wide = torch.rand(samples, 352), torch.rand(classes, 352), bias
    shaped_energy.launch(*wide, shaping(None, wide[1] > 0.5, predicted), "tf32")
    shaped_energy.launch(*head, shaping(largest=largest, gain=factor))
    shaped_energy.launch(*head, shaping(largest=largest, gain=factor, binary=True))


if __name__ == "__main__":
    main()
