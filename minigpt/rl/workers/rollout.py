"""Who samples: a plain copy of the policy in a generation engine."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import ray
import torch

from minigpt.errors import UserError
from minigpt.generation.decoder import PREPARED_BYTES
from minigpt.generation.engine import Engine as GenerationEngine
from minigpt.generation.engine import cache_bytes
from minigpt.model.model_minigpt import MiniGPT
from minigpt.trainer.setup import load_masters

from ..batch import RolloutBatch
from ..publish import Published, data_bytes, is_of_adapter, split, tensors_in, unpack
from ..request import PromptRequest
from ..transport import WeightGroup
from .base import Worker, first_line, loaded, timed
from .policy import PolicyStage

CACHE_SHARE = 0.5  # of a GPU's free memory: while a sampler's cache grows, the old one is there as well


class RolloutWorker(Worker):
    """Samples answers with a plain copy of the policy."""

    version = -1

    def setup(self) -> None:
        """Make the model; its weights, or those of its adapter, come with `load`."""
        self._alone()
        o = self.job.options
        self.adapter_only = o.publish == "adapter"
        network: Any = MiniGPT(self.job.config)
        if self.adapter_only:
            stage = PolicyStage(self.job.name)
            network = stage.network(loaded(load_masters, self.job.init), self.job.torch_options)
        self.network = network.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self.asleep = False
        self._joined: dict[str, np.ndarray] = {}
        self.engine = GenerationEngine(
            self.network,
            slots=self._slots(),
            max_length=self.job.longest,
            batch_invariant=o.batch_invariant,
            prefix_cache_tokens=0,
        )

    def _slots(self) -> int:
        """Answers that are worked on together: as many as come here, or as have room in the GPU's memory.

        Errors: UserError when not even one has.
        """
        o, longest = self.job.options, self.job.longest
        asked, judged = (-(-prompts // self.world_size) for prompts in (o.prompts_per_step, o.eval_prompts))
        wanted = min(o.rollout_slots, max(asked * o.samples_per_prompt, judged))
        free = free_memory(self.device)
        if free is None:
            return wanted
        weights = sum(p.numel() * p.element_size() for p in self.network.parameters())
        free -= weights if weights <= PREPARED_BYTES else 0  # the engine copies them
        one = cache_bytes(self.network, 1, longest)
        fitting = int(CACHE_SHARE * free / one)
        if fitting < 1:
            raise UserError(
                f"the cache of one answer of {longest} tokens takes {one / 1e9:.1f} GB and the GPU has only "
                f"{free / 1e9:.1f} GB left: take shorter prompts and answers, or fewer roles on a GPU"
            )
        if fitting < wanted:
            print(
                f"the GPU has room for {fitting} answers of {longest} tokens at a time, not for {wanted}; they take "
                "turns (--rollout_slots)",
                file=sys.stderr,
                flush=True,
            )
        return min(wanted, fitting)

    def sleep(self) -> None:
        """Leave the device to others until `wake`: no cache, no weights in the order of the kernels."""
        if not self.asleep:
            self.engine.sleep()
            super().sleep()
            self.asleep = True

    def wake(self) -> None:
        """Undo `sleep`; a no-op when awake."""
        if self.asleep:
            super().wake()
            self.engine.wake()
            self.asleep = False

    def _expected(self) -> dict[str, torch.Tensor]:
        """What a version consists of."""
        return {n: p for n, p in self.network.named_parameters() if is_of_adapter(n) or not self.adapter_only}

    @timed
    @torch.no_grad()
    def load(self, published: Published) -> int:
        """Take the weights of a version; a version that is there already is not loaded again."""
        if published.version != self.version:
            self.version = -1  # until all of them are there
            on_cpu = self.device.type == "cpu"  # where what is put together becomes the weights' memory
            weights = unpack(published, ray.get, self._joined if on_cpu else None)
            if self.adapter_only:
                expected = self._expected()
                for name, tensor in weights:
                    expected.pop(name).copy_(tensor)
                assert not expected, f"nobody published {list(expected)}"
                self.engine.refresh()
            else:  # on a CPU the object store's memory becomes the weights': it stays as long as they refer to it
                self.engine.load_weights(weights, adopt=True)
            self.version = published.version
        return self.version

    @timed
    @torch.no_grad()
    def receive(self, version: int) -> str | None:
        """Take the weights of a version that is broadcast, bucket by bucket; what went wrong, if anything did."""
        assert self._transport is not None, "the controller lets nobody receive who has not joined"
        self.version = -1  # until all of them are there
        try:
            self._receive_into_parameters(self._transport)
        except RuntimeError as error:  # among them: no memory left
            self._leave_transport()
            return first_line(error)
        self.version = version
        return None

    def _receive_into_parameters(self, transport: WeightGroup) -> None:
        missing = self._expected()
        for parameter in missing.values():
            if not parameter.untyped_storage().resizable():  # of the object store, where nothing may be written
                parameter.data = torch.empty_like(parameter)
        for entries in self._plan:
            data = self._received[: data_bytes(entries)]
            transport.broadcast(data)
            for name, tensor in tensors_in(entries, split(entries, data)):
                missing.pop(name).copy_(tensor)
        assert not missing, f"nobody sent {list(missing)}"
        self.engine.refresh()

    @timed
    def generate(self, request: PromptRequest) -> RolloutBatch:
        """Answers to this worker's share of the prompts, those to a prompt adjacent, in the order of the request."""
        if request.version != self.version:
            raise RuntimeError(f"answers of weights {request.version} are wanted, these are {self.version}")
        mine = request.share(self.rank, self.world_size)
        ends = np.cumsum(mine.prompt_lens)
        prompts = [mine.tokens[end - n : end] for end, n in zip(ends, mine.prompt_lens, strict=True)]
        requests = [
            self.engine.submit(
                prompt.tolist(),
                mine.params,
                n=mine.samples,
                sequence_ids=range(first, first + mine.samples),
                log_probs=True,
            )
            for prompt, first in zip(prompts, mine.first_sample_ids.tolist(), strict=True)
        ]
        while self.engine.has_work:
            self.engine.step()
        answers = [completion for one in requests for completion in one.completions]
        assert all(set(a.versions or ()) <= {self.engine.version} for a in answers), "weights came amid an answer"
        pieces = [
            piece
            for prompt, one in zip(prompts, requests, strict=True)
            for completion in one.completions
            for piece in (prompt, np.array(completion.ids, dtype=np.int32))
        ]
        batch = RolloutBatch(
            tokens=np.concatenate(pieces).astype(np.int32) if pieces else np.zeros(0, dtype=np.int32),
            prompt_lens=np.repeat(mine.prompt_lens, mine.samples).astype(np.int32),
            answer_lens=np.array([len(a.ids) for a in answers], dtype=np.int32),
            sample_ids=mine.sample_ids,
            prompt_rows=np.repeat(mine.prompt_rows, mine.samples).astype(np.int64),
            stopped=np.array([a.finish_reason == "stop" for a in answers], dtype=bool),
            behaviour_log_probs=_flat((a.behaviour_log_probs for a in answers), np.float32),
            versions=np.full(sum(len(a.ids) for a in answers), self.version, dtype=np.int32),
        )
        return batch


def free_memory(device: torch.device) -> int | None:
    """Bytes that nobody holds on a GPU; None for a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _flat(lists: Any, dtype: type) -> np.ndarray:
    return np.array([x for values in lists for x in values or ()], dtype=dtype)
