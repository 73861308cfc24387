"""Rewards and values of the answers to a prompt, which is read once and kept in a KV cache for all of them.

Answers stand packed end to end behind the prompt: each token sees the prompt and its own answer so far. The network is
run as the engine runs it (`decoder.py`), on the trunk of a reward model or critic instead of a language model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from minigpt.generation.decoder import Decoder
from minigpt.model.attention import AttentionPattern, attention
from minigpt.model.kv_cache import KVCache
from minigpt.model.model_critic import RewardModel, ValueModel

MAX_TOKENS = 4096  # of answers in one pass


class Judge:
    """A reward model or critic that reads each prompt once.

    Example:
        >>> judge = Judge(reward_model)
        >>> judge.rewards(prompt_ids, [completion.ids for completion in request.completions])

    Args:
        model: Only read. After its weights changed, call `refresh`.
    """

    def __init__(self, model: RewardModel | ValueModel) -> None:
        self.model = model
        self.head = model.score if isinstance(model, RewardModel) else model.value_head
        self.decoder = Decoder(model, model.config.max_position_embeddings, MAX_TOKENS)

    def refresh(self) -> None:
        """Read the weights of the model again, after they changed."""
        self.decoder.refresh()

    @torch.inference_mode()
    def rewards(self, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> torch.Tensor:
        """What the head says at the last token of each answer: float32 [n], as `RewardModel.rewards` of whole texts.

        Raises:
            ValueError: for an empty prompt or answer, or texts longer than the model's context.
        """
        last = [values[-1] for values in self.values(prompt_ids, answers)]
        return torch.stack(last) if last else torch.zeros(0, device=self.decoder.device)

    @torch.inference_mode()
    def values(self, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """What the head says before each token of an answer, and behind its last one: float32 [T + 1] each.

        Raises:
            ValueError: as `rewards`.
        """
        context = self.model.config.max_position_embeddings
        if not len(prompt_ids) or not all(map(len, answers)):
            raise ValueError("an empty prompt or answer has no token to judge; give at least one token of each")
        if answers and len(prompt_ids) + max(map(len, answers)) > context:
            raise ValueError(f"a text is longer than the model's context of {context} tokens; shorten it")
        device, P = self.decoder.device, len(prompt_ids)
        cache = KVCache(self.model.config, 1, P, self.decoder.dtype, device)
        before = self.head(self._read_prompt(prompt_ids, cache)[-1:])
        values = []
        for chosen in passes(answers):
            lengths = torch.tensor([len(ids) for ids in chosen], device=device)
            found = self.head(self._read_answers(chosen, lengths, cache))
            values += [torch.cat((before, own)) for own in found.split(lengths.tolist())]
        return values

    def _read_prompt(self, prompt_ids: Sequence[int], cache: KVCache) -> torch.Tensor:
        """Fills the cache; hidden states [P, E]."""

        def attend(layer: int, q_PHD: torch.Tensor, kv_P2GD: torch.Tensor) -> torch.Tensor:
            cache.kv[layer][:, 0] = kv_P2GD.permute(1, 2, 0, 3)
            out = attention(q_PHD.transpose(0, 1)[None], cache.k[layer], cache.v[layer], AttentionPattern("sdpa"))
            return out[0].transpose(0, 1)

        positions = torch.arange(len(prompt_ids), device=self.decoder.device)
        return self.decoder.hidden(torch.tensor(prompt_ids, device=self.decoder.device), positions, attend)

    def _read_answers(self, answers: Sequence[Sequence[int]], lengths: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Hidden states [N, E] of all tokens of all answers."""
        device, P = self.decoder.device, cache.max_length
        owner_N = torch.arange(len(answers), device=device).repeat_interleave(lengths)
        order_N = torch.cat([torch.arange(len(ids), device=device) for ids in answers])
        own = (owner_N[:, None] == owner_N) & (order_N[:, None] >= order_N)
        visible = torch.cat((own.new_ones(len(owner_N), P), own), dim=1)
        pattern = AttentionPattern("sdpa", mask=visible[None, None])

        def attend(layer: int, q_NHD: torch.Tensor, kv_N2GD: torch.Tensor) -> torch.Tensor:
            k, v = torch.cat((cache.kv[layer][:, 0], kv_N2GD.permute(1, 2, 0, 3)), dim=2)
            return attention(q_NHD.transpose(0, 1)[None], k[None], v[None], pattern)[0].transpose(0, 1)

        ids = torch.tensor([i for answer in answers for i in answer], device=device)
        return self.decoder.hidden(ids, P + order_N, attend)


def passes(answers: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The answers in order, cut into passes of at most MAX_TOKENS tokens or of one answer."""
    chosen: list[Sequence[int]] = []
    for answer in answers:
        if chosen and sum(map(len, chosen)) + len(answer) > MAX_TOKENS:
            yield chosen
            chosen = []
        chosen.append(answer)
    if chosen:
        yield chosen
