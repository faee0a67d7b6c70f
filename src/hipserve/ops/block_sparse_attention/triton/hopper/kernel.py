"""The kernel: roles for warps."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from hipserve.ops.block_sparse_attention.triton.hopper.consumer import consume
from hipserve.ops.block_sparse_attention.triton.hopper.memory import allocate
from hipserve.ops.block_sparse_attention.triton.hopper.producer import produce
from hipserve.ops.block_sparse_attention.triton.hopper.work import Inputs


@gluon.jit(do_not_specialize=["num_blocks", "last_block", "items", "programs"])
def hopper_kernel(
    q_desc,
    k_desc,
    turned_desc,
    v_desc,
    out,
    lse,
    inputs,
    num_blocks,
    last_block,
    items,
    programs,
    scale,
    SHAPE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """What `attention_kernel` computes, for calls that `make_shape` takes.

    scale: sm_scale * log2(e). `inputs` and the counts behind it are the fields of `Inputs`.
    """
    memory = allocate(q_desc, k_desc, v_desc, SHAPE)
    fence_async_shared()
    mbarrier.arrive(memory.turns.index(0), count=1)
    inputs = Inputs(*inputs, num_blocks, last_block, items, programs)
    gl.warp_specialize(
        [
            (consume, (memory, inputs, out, lse, scale, 0, SHAPE)),
            (consume, (memory, inputs, out, lse, scale, 1, SHAPE)),
            (produce, (q_desc, k_desc, turned_desc, memory, inputs, False, SHAPE)),
            (produce, (q_desc, v_desc, v_desc, memory, inputs, True, SHAPE)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
