"""Random batches in pages, with poison in every place that no kernel may read."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from hipserve.attention import Account, AttentionLayer, HeldKeys, SelectionReuse
from hipserve.attention.crossover import rule_of
from hipserve.config import DEFAULT, HiPConfig, IndexForm, SelectorName
from hipserve.ops import join_runs, write_kv
from hipserve.ops.fp8 import to_pages
from hipserve.ops.rope import pack_rope
from hipserve.ops.write_kv.layout import IndexLayout
from hipserve.plan import BatchLayout
from hipserve.selectors import SELECTORS
from hipserve.types import KeyIndex, KeyPool


def make_rope(head_dim: int, count: int | None = None, *, neighbours: bool = False) -> Tensor:
    """`[2, head_dim]` int32, as `pack_rope` makes it: theta 10,000, `count` pairs of channels (all
    if None), in halves or of neighbours."""
    count = head_dim // 2 if count is None else count
    first, second = torch.arange(count), torch.arange(count) + count
    if neighbours:
        first, second = 2 * first, 2 * first + 1
    frequency = 10000.0 ** -(torch.arange(count).double() / count)
    partner, radians = torch.arange(head_dim), torch.zeros(head_dim, dtype=torch.float64)
    partner[first], partner[second] = second, first
    radians[first], radians[second] = -frequency, frequency
    return pack_rope(partner, radians)


@dataclass(frozen=True)
class Shape:
    """Everything that decides a case; printed by a failing test, it reproduces it."""

    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 64
    page_size: int = 64
    dtype: torch.dtype = torch.float32
    strided: bool = False
    kind: str = "normal"
    softcap: float = 0.0
    seed: int = 0
    page_dtype: torch.dtype | None = None  # fp8, or that of q
    k_scale: float = 1.0
    v_scale: float = 1.0


@dataclass(frozen=True)
class Pages:
    """Keys and values, and the index of the keys."""

    pool: KeyPool
    index: KeyIndex

    def map(self, change: Callable[[Tensor], Tensor]) -> Pages:
        """The same with every tensor, `[num_pages, page_size, ...]` each, changed."""
        k_cache, v_cache = change(self.pool.k_cache), change(self.pool.v_cache)
        pool = replace(self.pool, k_cache=k_cache, v_cache=v_cache)
        changed = {id(x): change(x) for x in self.index.tensors()}
        index = self.index
        return Pages(
            pool,
            replace(
                index,
                codes=changed.get(id(index.codes), pool.k_cache),
                code_scales=changed.get(id(index.code_scales)),
                summaries=changed.get(id(index.summaries)),
                summary_scales=changed.get(id(index.summary_scales)),
            ),
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys, values and what the index holds."""
        return self.pool.k_cache, self.pool.v_cache, *self.index.tensors()


@dataclass
class Case:
    """A batch: packed q, pages (poisoned outside the sequences) and the plain k, v behind them, in
    float64 where pages are in fp8."""

    shape: Shape
    q: Tensor
    ks: list[Tensor]
    vs: list[Tensor]
    kv: Pages
    layout: BatchLayout

    @property
    def pool(self) -> KeyPool:
        return self.kv.pool

    @property
    def index(self) -> KeyIndex:
        return self.kv.index

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another precision."""
        return replace(
            self,
            q=self.q.to(dtype),
            ks=[k.to(dtype) for k in self.ks],
            vs=[v.to(dtype) for v in self.vs],
            kv=self.kv.map(lambda x: x.to(dtype) if x.dtype == self.shape.dtype else x),
        )

    def on(self, device: str) -> Case:
        """What kernels read, on another device; `ks` and `vs` stay where the oracle reads them."""
        layout, kv = self.layout, self.kv.map(lambda x: x.to(device))
        batch = BatchLayout(
            layout.block_table.to(device),
            layout.seq_lens.to(device),
            layout.cu_seqlens_q.to(device),
        )
        return replace(self, q=self.q.to(device), kv=kv, layout=batch)


def random_values(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator
) -> Tensor:
    x = torch.randn(shape, generator=g)
    match kind:
        case "equal":
            x = torch.ones(shape)
        case "large":
            x = x.sign() * 100
        case "small":
            x = x * 1e-4
        case "grid":  # sums of products are exact in any order
            x = (x * 4).round().clamp(-15, 15) / 4
        case _:
            pass
    return x.to(dtype)


def make_case(
    shape: Shape, form: IndexForm = DEFAULT.index_form, backend: str = "reference"
) -> Case:
    g = torch.Generator().manual_seed(shape.seed)
    heads, dim = shape.num_kv_heads, shape.head_dim
    ks = [random_values(shape.kind, (n, heads, dim), shape.dtype, g) for n in shape.seq_lens]
    vs = [random_values("normal", (n, heads, dim), shape.dtype, g) for n in shape.seq_lens]
    tokens = sum(shape.query_lens)
    q = random_values(shape.kind, (tokens, heads * shape.group_size, dim), shape.dtype, g)
    if shape.strided:
        wide = torch.full((tokens, heads * shape.group_size + 3, dim), torch.nan, dtype=shape.dtype)
        wide[:, 2:-1] = q
        q = wide[:, 2:-1]
    kv, layout = in_pages(ks, vs, shape, form, backend)
    if shape.page_dtype is not None:
        ks = [held_in(shape.page_dtype, k, shape.k_scale) for k in ks]
        vs = [held_in(shape.page_dtype, v, shape.v_scale) for v in vs]
    return Case(shape, q, ks, vs, kv, layout)


def held_in(dtype: torch.dtype, x: Tensor, scale: float) -> Tensor:
    """x `[..., head_dim]` as pages in fp8 hold it, times their scale, in float64."""
    return to_pages(x, dtype, scale).double() * scale


def in_pages(
    ks: list[Tensor],
    vs: list[Tensor],
    shape: Shape,
    form: IndexForm = DEFAULT.index_form,
    backend: str = "reference",
    page_seed: int | None = None,
) -> tuple[Pages, BatchLayout]:
    """`ks`, `vs`, each `[seq_len, num_kv_heads, head_dim]`, in shuffled, poisoned pages."""
    size, seed = shape.page_size, shape.seed if page_seed is None else page_seed
    counts = [-(-k.shape[0] // size) for k in ks]
    pool = sum(counts) + 2
    ids = list(range(pool))
    random.Random(seed).shuffle(ids)
    table = torch.full((len(ks), max([*counts, 1])), 2**30, dtype=torch.int32)
    kv = empty_pages(pool, shape, form)
    for i, (k, v, count) in enumerate(zip(ks, vs, counts, strict=True)):
        own, ids = ids[:count], ids[count:]
        table[i, :count] = torch.tensor(own, dtype=torch.int32)
        positions = torch.arange(k.shape[0])
        slots = table[i, positions // size].long() * size + positions % size
        write_kv(k, v, kv.pool, kv.index, slots, backend=backend)
    summaries = kv.index.summaries
    if shape.kind == "grid" and summaries is not None and form.code_bits == 16:
        summaries.mul_(16).round_().div_(16)  # scores of runs are exact too
    join_runs(kv.index, table, shape.seq_lens)
    starts = torch.tensor([0, *shape.query_lens]).cumsum(0).int()
    return kv, BatchLayout(table, torch.tensor(shape.seq_lens, dtype=torch.int32), starts)


def empty_pages(pool: int, shape: Shape, form: IndexForm = DEFAULT.index_form) -> Pages:
    """Poisoned pages: NaN in numbers and scales, and the largest integers in codes."""
    heads, dim = shape.num_kv_heads, shape.head_dim

    def poisoned(count: int, row: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        x = torch.empty((pool, count, heads, *row), dtype=dtype)
        return x.fill_(torch.nan if dtype.is_floating_point else 127)

    dtype = shape.page_dtype or shape.dtype
    k, v = (poisoned(shape.page_size, (dim,), dtype) for _ in range(2))
    keys = pool * shape.page_size
    layout = IndexLayout.of_pages(shape.page_size, dim, dtype, form, keys)
    index = layout.index(k, lambda rows: poisoned(rows.count, rows.shape, rows.dtype))
    return Pages(KeyPool(k, v, k_scale=shape.k_scale, v_scale=shape.v_scale), index)


def random_shape(rng: random.Random, dtypes: tuple[torch.dtype, ...]) -> Shape:
    """An awkward batch: lengths around pages and blocks, empty queries, one long among short."""
    page_size = rng.choice([16, 64, 256])
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, page_size - 1, page_size, page_size + 1, 97, 131, 509]
    seq_lens = [rng.choice(lengths) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.5:
        seq_lens[rng.randrange(len(seq_lens))] = rng.randint(600, 1400)
    query_lens = [rng.choice([n, 1, 0, min(n, 70), rng.randint(1, n)]) for n in seq_lens]
    if sum(query_lens) == 0:
        query_lens[0] = 1
    return Shape(
        tuple(seq_lens),
        tuple(query_lens),
        num_kv_heads=rng.choice([1, 2, 3]),
        group_size=rng.choice([1, 2, 3, 4, 8]),
        head_dim=rng.choice([64, 80, 96, 128, 192, 256]),
        page_size=page_size,
        dtype=rng.choice(dtypes),
        strided=rng.random() < 0.3,
        kind=rng.choice(["normal", "normal", "normal", "equal", "large", "small"]),
        softcap=rng.choice([0.0, 0.0, 30.0]),
        seed=rng.randrange(2**31),
    )


def random_config(rng: random.Random, page_size: int, num_kv_heads: int | None = None) -> HiPConfig:
    """A valid configuration small enough that the cases above are pruned; of layers with so many
    heads, which may have budgets of their own."""
    bound = rng.choice([16, 16, 32]) if page_size > 16 else 16
    key = rng.choice([2, 8, 16])
    query = rng.choice([1, 16, 64, 48])
    config = HiPConfig(
        budget=bound * rng.choice([1, 2, 4, 8]) * 2,
        selector=cast("SelectorName", rng.choice(list(SELECTORS))),
        representative=rng.choice(["middle", "first", "last", "random"]),
        query_block_size=query,
        key_block_size=key,
        query_stride=rng.choice([1, 2, 16]) if query > 1 else 1,
        bound_block_size=bound,
        rerank=rng.choice([0, 1, 2, 4]),
        relative_scores=rng.random() < 0.7,
        share_group=rng.random() < 0.8,
        num_sink_tokens=bound * rng.choice([0, 1, 4]),
        sliding_window=rng.choice([1, 16, 33, 100]),
        dense_below=rng.choice([0, 0, 200]),
        seed=rng.randrange(1000),
        bound_reach=rng.choice([1.0, 0.5, 0.75, 0.0]),
        code_bits=rng.choice([16, 16, 8, 4]),
    )
    if not (num_kv_heads and config.ranks_keys and rng.random() < 0.5):
        return config
    factors = [rng.choice([0.1, 0.5, 1, 1.5, 2, 4]) for _ in range(num_kv_heads)]
    return config.replace(budget_factors=[factors])


def attend(
    q: Tensor,
    kv: Pages,
    layout: BatchLayout,
    config: HiPConfig,
    reuse: SelectionReuse | None = None,
    account: Account | None = None,
    backend: str = "auto",
    rope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer over keys that are written already; `q` `[rows, num_q_heads, head_dim]`.

    rope: `[2, head_dim]`, for a config that streams.
    """
    options: dict[str, Any] = {"backend": backend, "selections": reuse, "account": account}
    rule = rule_of(config, q, kv.pool.num_kv_heads)
    layer = AttentionLayer(config, rule, rope=rope, **options)
    return layer.forward(q, HeldKeys(kv.pool, kv.index, layout))
