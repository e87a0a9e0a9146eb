"""Compile every kernel for GPUs, without one: the interpreter takes more than the compiler does.

    TRITON_INTERPRET=0 python -m tests.gpu.compile [--arch 80 90] [--tokens 1 64 2048] [--head 128] [--dtype ...]

One line a kernel, with the shared memory that a program of it takes, in bytes.
"""

import argparse
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nr_serve.engine.model import gpu_attention, gpu_operators, gpu_sampler
from nr_serve.engine.model.batch import Table
from nr_serve.neutral import kernels

D, SLOTS, WIDTH, ROWS, PAGES = 4096, 8, 1024, 65, 100
KINDS = {
    torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


class Compiled:
    """In the place of a kernel: a launch compiles it for the arguments and runs nothing."""

    def __init__(self, kernel: Any, arch: int) -> None:
        self.kernel, self.arch = kernel, arch

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *args: Any, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        signature = {name: kind(arg) for name, arg in zip(self.kernel.arg_names, args, strict=False)}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(args) if is_aligned(arg)}
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=aligned)
        shared = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options).metadata.shared
        print(f"sm_{self.arch} {self.kernel.__name__}: {shared}", flush=True)


def kind(arg: Any) -> str:
    if isinstance(arg, torch.Tensor):
        return KINDS[arg.dtype]
    return "fp32" if isinstance(arg, float) else "i32"


def is_aligned(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) or (isinstance(arg, int) and arg % 16 == 0)


def launch_all(T: int, head: int, type_of_stream: torch.dtype) -> None:
    """A step of T tokens of one request, and the attention of T single tokens, on tensors without contents."""

    def empty(*shape: int, dtype: torch.dtype = type_of_stream) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    exact = {"dtype": torch.float32}
    gate = kernels.Gate(
        empty(SLOTS, D, **exact), *(empty(SLOTS, **exact) for _ in range(4)), empty(ROWS, SLOTS, **exact),
        empty(PAGES, SLOTS, **exact), empty(T, SLOTS, dtype=torch.int32), empty(SLOTS, dtype=torch.int64),
        empty(SLOTS, dtype=torch.float64),
    )  # fmt: skip
    of_token, one = empty(T, dtype=torch.int64), empty(1, dtype=torch.int64)
    pieces = kernels.Pieces(one, one, of_token, empty(T, SLOTS, dtype=torch.bool), of_token, longest=T)
    x_Td, width_S = empty(T, D), empty(SLOTS, dtype=torch.int32)
    g_TS = kernels.gates(x_Td, gate, pieces)
    fired = kernels.compact(g_TS)
    u_STH = kernels.hidden(x_Td, g_TS, fired, empty(SLOTS, 2 * WIDTH, D), width_S)
    kernels.add(x_Td, u_STH, fired, empty(SLOTS, WIDTH, D), width_S)
    table = Table(empty(T, PAGES, dtype=torch.int32), empty(T, dtype=torch.int32), page_size=16)
    keys_CKD = empty(PAGES * 16, 8, head)
    gpu_attention.attend_one(empty(T, 32, head), keys_CKD, keys_CKD, table, 0.1)
    gpu_operators.add_rms_norm(empty(1, T, D), empty(1, T, D), empty(D), 1e-5)
    gpu_operators.silu_mul(empty(1, T, 2 * D))
    qkv, turns, norm = empty(1, T, 48 * head), empty(1, T, head), empty(head)
    for norms in ((None, None), (norm, norm)):
        gpu_operators.rotate(qkv, turns, turns, keys_CKD, keys_CKD, of_token, *norms, 1e-5)
    gpu_sampler._exponential[(1,)](of_token, of_token, empty(T, 100, **exact), 100, BLOCK=1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities, without dot")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 2048])
    parser.add_argument("--head", type=int, default=128, help="size of a head")
    parser.add_argument("--dtype", default="bfloat16", help="type of the stream")
    args = parser.parse_args()
    plain = {(m, n): getattr(m, n) for m, names in (
        (kernels, ("_logits", "_carry", "_compact", "_hidden", "_add")),
        (gpu_attention, ("_parts_of_contexts", "_joined")),
        (gpu_operators, ("_rms_norm", "_silu_mul", "_rotate")),
        (gpu_sampler, ("_exponential",)),
    ) for n in names}  # fmt: skip
    for arch in args.arch:
        for (module, name), kernel in plain.items():
            setattr(module, name, Compiled(kernel, arch))
        for tokens in args.tokens:
            launch_all(tokens, args.head, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
