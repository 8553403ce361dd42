"""What a user of PyTorch would pick: flex attention over blocks of 128, and `torch.sparse`.

In a suite of its own, so that a process that holds both libraries measures nothing else.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn.attention import flex_attention as flex

from benchmarks import report
from benchmarks.contenders import Contender, value_and_gradients
from benchmarks.timing import compare
from hyperlayer_jax import kernels

# Flex attention refuses smaller blocks.
_BLOCK, _BLOCKS, _WIDTH = 128, 8, 64
_LENGTHS = (2**14, 2**16)
_SMALL = 1024
# As of `benchmarks.kernels`.
_PRODUCTS = ((256, 784, 10, 10000, 64), (512, 784, 10, 10000, 16))
_SMALL_PRODUCT = (2, 32, 4, 64, 8)


def cases(small: bool = False) -> Iterator[dict[str, Any] | str]:
    """On a GPU; small ones anywhere."""
    if not small and jax.default_backend() != "gpu":
        yield "torch: its functions are timed on a GPU alone"
        return
    for length in (_SMALL,) if small else _LENGTHS:
        yield from _flex(length)
    for b, i, p, j, d in (_SMALL_PRODUCT,) if small else _PRODUCTS:
        yield from _sparse(b, i, p, j, d)


class _Pending:
    """A tensor of PyTorch that JAX can wait for, and NumPy can read."""

    def __init__(self, tensor):
        self.tensor = tensor

    def block_until_ready(self):
        if self.tensor.is_cuda:
            torch.cuda.synchronize()
        return self

    def __array__(self, dtype=None, copy=None):
        return self.tensor.detach().to_dense().float().cpu().numpy()


def _contender(function, arguments, differentiated):
    """`function` of tensors; if any are to be differentiated, with its gradients."""
    tensors = [x.requires_grad_() for x in differentiated]

    def run():
        with torch.set_grad_enabled(bool(tensors)):
            out = function(*arguments)
            gradients = torch.autograd.grad(out, tensors, out.detach()) if tensors else ()
        return [_Pending(x.detach()) for x in (out, *gradients)]

    return Contender(run, (), on_host=True)


def _tensor(array):

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(array, np.float32)).to(device, torch.bfloat16)
    return torch.from_numpy(np.array(array)).to(device)


def _flex(length):
    """8 blocks of 128 keys for each 128 queries: its own, and others before it, none twice."""

    on_gpu = jax.default_backend() == "gpu"
    heads, dtype = (8, jnp.bfloat16) if on_gpu else (2, jnp.float32)
    rows = length // _BLOCK
    q, k, v = jax.random.normal(jax.random.key(0), (3, heads, length, _WIDTH), dtype)
    q = q * jnp.asarray(_WIDTH**-0.5, dtype)
    order = np.random.default_rng(0).random((heads, rows, rows))
    order = np.where(np.arange(rows) < np.arange(rows)[:, None], order, 2).argsort(-1)
    counts = np.minimum(np.arange(rows), _BLOCKS - 1)
    own = np.broadcast_to(np.arange(rows)[:, None], (heads, rows, 1))
    present = np.arange(_BLOCKS - 1) < counts[:, None]
    others = np.where(present, order[..., : _BLOCKS - 1], -1)
    indices = jnp.asarray(np.concatenate([own, others], -1), jnp.int32)
    log_weights = jnp.zeros(indices.shape, dtype)

    def ours(q, k, v):
        return kernels.block_attention(q, k, v, indices, log_weights, block=_BLOCK, causal=True)

    def causal(b, h, i, j):
        return i >= j

    # Of the partial blocks, which are the own, and the full ones: how many, and which come first.
    ones = np.ones((1, heads, rows))
    partial = np.concatenate([own, np.zeros((heads, rows, rows - 1))], -1)[None]
    tables = (ones, partial, np.broadcast_to(counts, (1, heads, rows)), order[None])
    mask = flex.BlockMask.from_kv_blocks(
        *(_tensor(np.ascontiguousarray(x, np.int32)) for x in tables),
        BLOCK_SIZE=_BLOCK,
        mask_mod=causal,
    )
    attend = torch.compile(flex.flex_attention) if on_gpu else flex.flex_attention
    attend = functools.partial(attend, block_mask=mask, scale=1.0)
    for way in ("forward", "forward + backward"):
        tensors = [_tensor(x)[None] for x in (q, k, v)]
        differentiated = () if way == "forward" else tensors
        function = ours if way == "forward" else value_and_gradients(ours, 0, 1, 2)
        yield from compare(
            f"block of 128 {way} t={length}",
            {
                "block_attention": Contender(function, (q, k, v)),
                "torch flex_attention": _contender(attend, tensors, differentiated),
            },
            flops=(4 if way == "forward" else 14) * heads * length * _BLOCK * _BLOCKS * _WIDTH,
        )


def _sparse(b, i, p, j, d):
    """One matrix of blocks on its diagonal, as CSR."""

    rng = np.random.default_rng(0)
    # One column out of each of p ranges: in order, and none twice.
    indices = np.arange(p) * (j // p) + rng.integers(0, j // p, (b, i, p))
    values = jnp.asarray(rng.standard_normal((b, i, p)), jnp.float32)
    dense = jnp.asarray(rng.standard_normal((b, j, d)), jnp.float32)
    starts = _tensor(np.arange(b * i + 1, dtype=np.int32) * p)
    columns = _tensor((indices + np.arange(b)[:, None, None] * j).astype(np.int32).ravel())

    def multiply(values, dense):
        matrix = torch.sparse_csr_tensor(starts, columns, values, size=(b * i, b * j))
        return matrix @ dense

    for way in ("", " + backward"):
        arguments = [_tensor(values).ravel(), _tensor(dense).reshape(b * j, d)]
        ours = kernels.ell_spmm if not way else value_and_gradients(kernels.ell_spmm, 1, 2)
        yield from compare(
            f"ell_spmm float32 b={b} i={i} p={p} j={j} d={d}{way}",
            {
                "ell_spmm": Contender(ours, (jnp.asarray(indices, jnp.int32), values, dense)),
                "torch.sparse CSR": _contender(multiply, arguments, arguments if way else ()),
            },
        )


if __name__ == "__main__":
    report.main(torch=cases)
