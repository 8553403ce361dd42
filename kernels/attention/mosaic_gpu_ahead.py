"""Mosaic GPU, block attention whose matrix products and softmax overlap: forward alone.

The kernel of `mosaic_gpu.py` multiplies, waits, takes the softmax and multiplies again, so that
the tensor cores idle while exponentials are taken, and the other way round. Here the scores of the
next tile are issued before the softmax of this one and awaited after it; tiles, order, sums and
bits of the results are the same. Compiled for sm_90 (jax 0.11.2) it keeps 168 registers in place of
122, so that three blocks share a multiprocessor in place of four. Whether it is faster has not been
measured, and nothing takes it by default.

The same in the gradients would keep a second [64,64] of scores, 32 registers, and wait for the
other product of each tile too, where dq has 162 and dk, dv have 222 of 255: there, two warpgroups
that share the tiles they stream and take turns at products and softmax are the way to overlap.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import mosaic_gpu
from .mosaic_gpu import _LOG2E, _STAGES, _TILE, block_attention_grad, lacks

__all__ = ["block_attention", "block_attention_grad", "lacks"]


def block_attention(q, k, v, block_indices, log_weights, *, interpret, **sizes):
    """Of one batch axis."""
    del interpret
    return mosaic_gpu._attention(_forward_kernel, q, k, v, [], block_indices, log_weights, **sizes)


def _forward_kernel(outputs, own, stream, scratch, *, causal):
    (out_ref, _), (q,), (weights_smem, _) = outputs, own, scratch
    row = lax.axis_index("row")

    def score(keys, tile, weight, meanwhile):
        def multiply(acc):
            plgpu.wgmma(acc, q, mosaic_gpu._transposed(keys))
            state = meanwhile()
            return acc[...], state

        scores, state = pl.run_scoped(multiply, plgpu.ACC((_TILE, _TILE), jnp.float32))
        logits = scores * _LOG2E + weight
        return mosaic_gpu._causal(logits, row, tile, 0) if causal else logits, state

    def step(state, logits, wait_for_values):
        return mosaic_gpu._add_tile(state, logits, weights_smem, wait_for_values)

    state = _walk_ahead(*stream, score, step, mosaic_gpu._first_state(out_ref))
    mosaic_gpu._store_forward(outputs, stream, scratch, state)


def _walk_ahead(lists, refs, buffers, barriers, score, step, state):
    """Folds step(state, logits, wait_for_values) over the list of this program.

    score(keys, tile, weight, meanwhile) is (logits, meanwhile()): those of the next entry, and the
    step of this one. After the last entry it scores whatever is in the buffer, for nobody.
    """
    start, count, fetch = mosaic_gpu._fetch_first(lists, refs, buffers, barriers)
    (tiles_ref, weights_ref, _, _), batch = lists, lax.axis_index("batch")
    (keys, values), (keys_barrier, values_barrier) = buffers, barriers

    def score_entry(n, meanwhile):
        slot, exists = lax.rem(n, jnp.int32(_STAGES)), n < count
        pl.when(exists)(lambda: plgpu.barrier_wait(keys_barrier.at[slot]))
        entry = jnp.where(exists, start + n, 0)
        return score(keys.at[slot], tiles_ref[batch, entry], weights_ref[batch, entry], meanwhile)

    def body(n, carry):
        logits, state = carry
        slot = lax.rem(n, jnp.int32(_STAGES))

        def wait_for_values():
            plgpu.barrier_wait(values_barrier.at[slot])
            return values.at[slot]

        carry = score_entry(n + 1, lambda: step(state, logits, wait_for_values))
        pl.when(n + _STAGES < count)(functools.partial(fetch, n + _STAGES))
        return carry

    logits, _ = score_entry(jnp.int32(0), lambda: None)
    return lax.fori_loop(0, count, body, (logits, state))[1]
