"""vLLM's schedulers, with prefill chunks that end where query blocks end.

How a prompt is cut depends on the rest of the batch. Cut inside a query block, its two halves would
select different keys; cut at its end, a request gets the same answer in any batch.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from hipserve.errors import BackendError
from hipserve.integrations.vllm import settings

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

HOOK = "_reserve_prefill_lookahead"


def check_hook(scheduler: type[Any]) -> None:
    """Refuses a vLLM whose scheduler does not ask the hook how long a chunk may be.

    Raises:
        BackendError: naming the hook.
    """
    if HOOK not in scheduler.schedule.__code__.co_names:
        raise BackendError(
            f"the scheduler of vllm {vllm.__version__} does not call {HOOK}, through which "
            "hipserve ends prefill chunks at query blocks",
            "install a version named in docs/serving.md, or name a scheduler with --scheduler-cls",
        )


class QueryBlocks(Scheduler):
    """What both schedulers share: chunks end at multiples of `query_block_size`."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        check_hook(Scheduler)
        super().__init__(*positional, **named)
        self.query_block_size = settings.hip_config(self.vllm_config).query_block_size
        self._round_threshold()
        self._check_budget()

    def _round_threshold(self) -> None:
        """Rounds the threshold up to query blocks: below one, every chunk would be empty."""
        size, threshold = self.query_block_size, self.scheduler_config.long_prefill_token_threshold
        if threshold % size:
            rounded = threshold + size - threshold % size
            self.scheduler_config.long_prefill_token_threshold = rounded
            logger.warning(
                "long_prefill_token_threshold is %d instead of %d: chunks end where query blocks "
                "of %d tokens end",
                rounded,
                threshold,
                size,
            )

    def _check_budget(self) -> None:
        """Warns where decode rows, which come first, leave less than a query block."""
        size, longest = self.query_block_size, self._longest_chunk
        if longest < size:
            self.query_block_size = 1
            logger.warning(
                "a step takes %d prompt tokens, less than a query block of %d: answers depend on "
                "the other requests; raise max_num_batched_tokens, or lower query_block_size",
                longest,
                size,
            )
        elif longest - self.max_num_running_reqs < size:
            logger.warning(
                "a step takes %d tokens, which leaves no query block of %d while %d requests "
                "decode: prompts wait until some of them end; raise max_num_batched_tokens, or "
                "lower max_num_seqs",
                longest,
                size,
                self.max_num_running_reqs,
            )

    @property
    def _longest_chunk(self) -> int:
        spec = self.vllm_config.speculative_config
        drafts = spec.max_num_new_slots_for_drafting if spec is not None else 0
        limits = self.scheduler_config
        return min(self.max_num_scheduled_tokens, limits.max_num_batched_tokens - drafts)

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """The hook through which every chunk's length passes; 0 waits for the next step."""
        count = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        end = num_computed_tokens + count
        if end >= request.num_tokens:
            return count
        whole = max(end - end % self.query_block_size - num_computed_tokens, 0)
        waiting_helps = count == num_new_tokens and not self._cut_elsewhere(request, end)
        return whole if whole or waiting_helps else count

    def _cut_elsewhere(self, request: Request, end: int) -> bool:
        """Something other than the budget of tokens ended the chunk, so waiting makes it no longer.

        vLLM ends chunks in front of an image that has to wait, and where the state of Mamba layers
        is kept.
        """
        keeps_state = self.need_mamba_block_aligned_split and end % self.hash_block_size == 0
        return request.has_encoder_inputs or keeps_state


class QueryBlockScheduler(QueryBlocks):
    """Replaces `Scheduler`."""


class AsyncQueryBlockScheduler(QueryBlocks, AsyncScheduler):
    """Replaces `AsyncScheduler`, which prepares a step while the one before it runs."""
