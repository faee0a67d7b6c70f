"""What the meter estimates, compared with all of the attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hipserve import HiPCache, HiPConfig, Offload, hip_attention
from hipserve.attention import Meter
from hipserve.attention import meter as meter_module
from hipserve.attention.meter import STEPS, MeteredRows
from hipserve.errors import ArgumentError, ConfigError
from hipserve.models import Conversation, load
from tiny_models import build

CONFIG = HiPConfig(budget=64, num_sink_tokens=16, sliding_window=32, dense_below=0)
LENGTH = 1600


def tensors(seed: int, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(1, length, heads, 16, generator=random)  # noqa: E731
    return make(4), make(2), make(2)


class Everything(Meter):
    """Meters the last row of every query block, and keeps what it found."""

    def place(self, position: int, count: int, size: int) -> int | None:  # noqa: ARG002
        return count - 1

    def add(self, share: torch.Tensor, rows: MeteredRows) -> None:
        super().add(share, rows)
        self.share, self.rows = share, rows


def unread(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, positions: torch.Tensor, softcap: float
) -> torch.Tensor:
    """`[rows, heads]` in float64: what `lse` `[rows, heads]` leaves out of q `[rows, heads, dim]`
    on k `[keys, heads, dim]`."""
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.arange(k.shape[0]) > positions[:, None]
    everything = scores.masked_fill(hidden, -torch.inf).logsumexp(-1).T
    return 1 - (lse.double() - everything).exp()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("share_group", [True, False])
def test_with_a_draw_for_every_block_the_estimate_is_the_truth(
    monkeypatch: pytest.MonkeyPatch, softcap: float, share_group: bool
) -> None:
    """Each of a row's stretches is a single block then."""
    q, k, v = tensors(0)
    config = CONFIG.replace(share_group=share_group)
    monkeypatch.setattr(meter_module, "DRAWS", (LENGTH - config.sliding_window) // 16 - 1)
    meter = Everything(0)
    _, lse = hip_attention(
        q[:, -1:], k, v, config=config, softcap=softcap, return_lse=True, meter=meter
    )
    truth = unread(q[0, -1:], k[0], lse[0], torch.tensor([LENGTH - 1]), softcap)
    assert 0.1 < float(truth.mean()) < 0.99
    torch.testing.assert_close(meter.share.double(), truth, rtol=1e-4, atol=1e-6)


@given(blocks=st.integers(1, 400), draws=st.integers(1, 64))
def test_every_block_is_drawn_equally_often(blocks: int, draws: int) -> None:
    """Mean over evenly spaced random numbers of how many draws of a row meet each block."""
    steps = 64
    met = torch.zeros(blocks)
    for i in range(steps):
        places = torch.arange(draws) + (i + 0.5) / steps
        drawn = (places * blocks / draws).long().clamp(max=blocks - 1)
        met += torch.bincount(drawn, minlength=blocks)
    expected = draws / blocks
    assert (met / steps - expected).abs().max() <= 2 / steps + 1e-6


def test_means_over_many_rows_are_close() -> None:
    q, k, v = tensors(1)
    meter = Everything(0)
    _, lse = hip_attention(q, k, v, config=CONFIG, return_lse=True, meter=meter)
    rows = meter.rows.position
    truth = unread(q[0, rows], k[0], lse[0, rows], rows, 0.0)
    assert meter.share.shape == truth.shape == (len(meter.rows.row), 4)
    assert len(meter.rows.row) > 20
    assert meter.mass.mean == pytest.approx(float(truth.mean()), rel=0.03)
    assert float((meter.share - truth).abs().mean()) < 0.1


def test_nothing_is_metered_where_everything_is_read() -> None:
    q, k, v = tensors(2)
    for config in (CONFIG.replace(budget=LENGTH), CONFIG.replace(dense_below=2 * LENGTH)):
        meter = Everything(0)
        hip_attention(q, k, v, config=config, return_lse=True, meter=meter)
        assert meter.mass.count == 0
        assert meter.mass.mean == 0


def test_it_changes_nothing_and_repeats_itself() -> None:
    q, k, v = tensors(3)
    meters = [Meter(1), Meter(1), Meter(1)]
    outs = [hip_attention(q, k, v, config=CONFIG, meter=meter) for meter in meters]
    assert torch.equal(outs[0], hip_attention(q, k, v, config=CONFIG))
    assert meters[0].mass == meters[1].mass
    assert meters[0].mass.count > 0


@given(layer=st.integers(0, 99), position=st.integers(0, 10_000))
def test_decode_rows_are_metered_once_in_so_many_steps(layer: int, position: int) -> None:
    meter = Meter(layer)
    metered = [meter.place(position + i, 1, 64) is not None for i in range(STEPS)]
    assert sum(metered) == 1


def model_with(**settings: Any) -> Any:
    return build("llama", {**CONFIG.to_dict(), "decode_dense_below": 0, **settings})


def test_a_cache_meters_each_layer_of_prompts_and_answers() -> None:
    model = model_with(meter="sampled")
    ids = torch.randint(0, model.config.vocab_size, (1, 1100))
    cache = HiPCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        prompt = cache.unread_mass()
        for _ in range(STEPS):
            model(ids[:, :1], past_key_values=cache)
    heads, both = model.config.num_attention_heads, cache.unread_mass()
    assert list(prompt) == list(range(model.config.num_hidden_layers))
    for layer, mass in prompt.items():
        assert mass.count in (heads, 2 * heads)  # of 17 query blocks
        assert 0 < mass.mean < 1
        assert both[layer].since(mass).count == heads
    assert HiPCache(model_with().config).unread_mass() == {}


def test_bad_combinations_are_refused() -> None:
    with pytest.raises(ConfigError, match="meter"):
        HiPConfig(meter="always")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one of off"):
        HiPConfig(meter="sampled", extend="stream", trained_length=8192)
    model = model_with(meter="sampled", code_bits=4)
    with pytest.raises(ArgumentError, match="meter"):
        HiPCache(model.config, offload=Offload(1 << 20))


def test_conversations_say_what_they_left_unread() -> None:
    loaded = load()
    loaded.use(CONFIG.replace(decode_dense_below=0, meter="sampled"))
    talk = Conversation(loaded)
    talk.say("Once upon a time there was a fox. " * 160)
    talk.ask("Who?", max_new_tokens=2)
    assert talk.statistics is not None
    assert len(talk.statistics.unread) > 0
    assert all(0 <= share < 1 for share in talk.statistics.unread.values())
