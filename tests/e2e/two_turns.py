"""An agent loop of two turns, the words of a tool between them; verl instantiates it by name."""

from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput

TOOL_SAYS = " <answer> 1 </answer> "
"""What looks like an answer and is not the policy's."""


class TwoTurns(AgentLoopBase):
    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        prompt_ids = await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))
        request_id = uuid4().hex
        tool = self.tokenizer.encode(TOOL_SAYS, add_special_tokens=False)
        ids: list[int] = []
        mask: list[int] = []
        logprobs: list[float] = []
        # Half the room for each turn.
        params = {
            **sampling_params,
            "max_tokens": self.rollout_config.response_length // 2 - len(tool),
        }
        for turn in range(2):
            if turn:
                ids, mask, logprobs = (
                    ids + tool,
                    mask + [0] * len(tool),
                    logprobs + [0.0] * len(tool),
                )
            output = await self.server_manager.generate(
                request_id=request_id, prompt_ids=prompt_ids + ids, sampling_params=params
            )
            ids, mask = [*ids, *output.token_ids], mask + [1] * len(output.token_ids)
            logprobs = [*logprobs, *(output.log_probs or [0.0] * len(output.token_ids))]
        # As verl's tool agent does, of the first turn's `extra_fields` all are kept.
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=ids,
            response_mask=mask,
            response_logprobs=logprobs,
            num_turns=4,
            metrics={},
            extra_fields={**output.extra_fields, "turn_scores": [], "tool_rewards": []},
        )
