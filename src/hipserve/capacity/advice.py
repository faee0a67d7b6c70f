"""Whether a service fits a machine, what would fit, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hipserve.capacity.cards import UTILIZATION, Card
from hipserve.capacity.memory import Parts, Room, Service
from hipserve.capacity.speed import offloaded_tokens_per_second, tokens_per_second
from hipserve.errors import ArgumentError
from hipserve.host import HostMemory

HIT_RATIOS = (0.9, 0.95, 0.99)
"""Shares of the tiles that attention reads which are on the device already."""

ANY_FILE = 2**62
"""Bytes of a file whose size nobody has limited."""

MOST_CARDS = 8
"""Cards of a machine."""

WORTH = 1.5
"""Offload is worth its price where it holds so many times the tokens."""

OFFLOAD_CODE_BITS = 4
"""With offload a search reads codes of the keys; 4 bits lose what 8 lose (docs/quality.md)."""

OFFLOAD_RERANK = 8
"""Codes cost a quarter of the keys, so twice the candidates are ranked, and less is lost."""

STREAM_SHARE = 10
"""A prompt is loaded as fast as it is computed where a chunk is one part in so many of it
(8B shape, one H100's speed and link: arithmetic, not measured)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What computes, and the memory behind it.

    Attributes:
        title: as people know it.
        memory: bytes of the device: of the card, or what a CPU machine has available.
        share: of it that a server takes.
        card: a GPU whose bandwidths are known; None for others and for CPUs.
        on_gpu: it is a GPU.
        host: of the machine around it; None where the kernel does not say.
    """

    title: str
    memory: int
    share: float = UTILIZATION
    card: Card | None = None
    on_gpu: bool = True
    host: HostMemory | None = None

    def room(self, host_kv_memory: int | None = None) -> Room:
        """What a server may take; of the host half of what is available unless said. Beside a CPU
        keys go into a file, which is as large as it has to be."""
        available = self.host.available if self.host else 0
        half = available // 2 if self.on_gpu else ANY_FILE
        return Room(int(self.share * self.memory), host_kv_memory or half)


@dataclass(frozen=True, slots=True)
class Plan:
    """A service on a machine.

    Attributes:
        service: what is to be served.
        machine: where.
        room: the memory that it may take.
    """

    service: Service
    machine: Machine
    room: Room

    @property
    def parts(self) -> Parts:
        return self.service.parts()

    @property
    def fits(self) -> bool:
        return self.room.holds(self.service)

    @property
    def longest_context(self) -> int:
        """Maximum context of as many sequences, by memory only."""
        return self.room.longest_context(self.service)

    @property
    def most_sequences(self) -> int:
        """Maximum number of sequences of this context."""
        return self.room.most_sequences(self.service)

    @property
    def arena(self) -> int:
        """Bytes of tiles on the device: all that is left, and no more than it has keys."""
        parts = self.parts
        left = self.room.device - parts.device + parts.arena
        own = parts.pool // self.service.cards
        return max(min(left, own), parts.arena) if parts.arena else 0

    def speeds(self) -> dict[str, float]:
        """Tokens per second at most, by hit ratio with offload; empty where bandwidths are not
        known."""
        card = self.machine.card
        if card is None:
            return {}
        if not self.service.offload:
            return {"resident": tokens_per_second(self.service, card.bandwidth)}
        speed = (self.service, card.bandwidth, card.link)
        return {f"{hit:g}": offloaded_tokens_per_second(*speed, hit) for hit in HIT_RATIOS}

    def nearest(self) -> Iterator[str]:
        """What is missing where it does not fit, and what would fit instead."""
        parts, room = self.parts, self.room
        if parts.device > room.device:
            missing = parts.device - room.device
            yield f"{readable(missing)} too much for {self.machine.title}"
        if parts.pool > room.host:
            yield f"the pool needs {readable(parts.pool)} and may take {readable(room.host)}"
        context, sequences = self.longest_context, self.most_sequences
        if context:
            yield f"largest context that fits so: --max-model-len {context}"
        if sequences:
            yield f"most sequences of this context: --max-num-seqs {sequences}"
        if not context and not sequences:
            need = replace(self.service, sequences=1).parts().device / self.machine.share
            yield f"one such sequence needs a device of {readable(need)}"
        elsewhere = self._elsewhere()
        if elsewhere is not None and elsewhere.fits:
            place = "on the host" if self.machine.on_gpu else "in a file"
            pool = f": {readable(elsewhere.parts.pool)} {place}" if elsewhere.parts.pool else ""
            yield f"{'with' if elsewhere.service.offload else 'without'} --kv-offload it fits{pool}"
        if cards := self._enough_cards():
            yield f"on {cards} such cards it fits: --tensor-parallel-size {cards}"

    def notes(self) -> Iterator[str]:
        """What to know besides."""
        service = self.service
        yield from service.model.notes
        positions = service.model.positions
        if positions and service.context > positions:
            yield (
                f"the model was made for {positions:,} positions: serve more of them with "
                "--extend stream or --extend yarn (docs/extend.md)"
            )
        if service.offload and self.machine.on_gpu:
            yield from self._offload_notes()

    def _offload_notes(self) -> Iterator[str]:
        service, resident = self.service, self._elsewhere()
        if resident is None or resident.fits:
            yield "everything fits on the card: leave out --kv-offload"
            return
        without, within = resident.longest_context, self.longest_context
        if within < WORTH * without:
            pool = 2 * without * service.sequences * service.kv_token_bytes * service.cards
            yield (
                f"offload buys little here: contexts of {within:,} tokens instead of {without:,}; "
                f"{readable(pool)} on the host would be twice as many"
            )
        chunk = -(-service.context // STREAM_SHARE // 1024) * 1024
        if service.chunk < chunk:
            yield (
                f"prompts wait for the link in chunks of {service.chunk:,} tokens: one pass, or "
                f"chunks of {chunk:,} (a tenth of the context), hide it"
            )

    def _enough_cards(self) -> int:
        """How many cards hold it, twice as many as now or more; 0 for none up to `MOST_CARDS`."""
        service, times = self.service, 2
        while self.machine.on_gpu and service.cards * times <= MOST_CARDS:
            try:
                part = service.model.part(times)
            except ArgumentError:
                return 0
            cards = service.cards * times
            if self.room.holds(replace(service, model=part, cards=cards)):
                return cards
            times *= 2
        return 0

    def _elsewhere(self) -> Plan | None:
        """The same with keys and values on the other side of the link of a GPU."""
        config = self.service.config
        if config is None or self.service.model.cache_dtype.startswith("fp8"):
            return None  # offload has no keys in fp8
        offload = not self.service.offload
        coded = config.replace(code_bits=OFFLOAD_CODE_BITS if offload else 16)
        return replace(self, service=replace(self.service, offload=offload, config=coded))


def readable(value: float) -> str:
    """Bytes as people read them."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**27 else f"{value / 2**20:.1f} MiB"
