"""vLLM's scheduler, with prefill chunks that end where query blocks end.

How a prompt is cut depends on who else is in the batch. Cut inside a query block, its two halves
would choose their keys apart; cut at its end, a request gets the same answer in any company.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

from hipserve.integrations.vllm import settings

if TYPE_CHECKING:
    from vllm.v1.request import Request


class QueryBlockScheduler(Scheduler):
    """The scheduler that hipserve puts in place where the user names none."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        limits = self.vllm_config.scheduler_config
        size = settings.hip_config(self.vllm_config).query_block_size
        # Decode rows alone must never leave a step less than a query block.
        room = limits.max_num_batched_tokens - limits.max_num_seqs
        self.query_block_size = size if room >= size else 1

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """The hook through which every chunk's length passes; 0 waits for the next step."""
        count = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        end = num_computed_tokens + count
        if end >= request.num_tokens:
            return count
        return max(end - end % self.query_block_size - num_computed_tokens, 0)
