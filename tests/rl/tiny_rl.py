"""A tiny policy, prompts, and the workers of a run as plain objects: what the tests of the RL loop share."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from torch import nn

from data_prep.microworld import MicroWorldOptions, write_microworld
from data_prep.pack import PackOptions, pack
from minigpt import cli
from minigpt.generation.sampling import SamplingParams
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.rl.batch import RolloutBatch
from minigpt.rl.options import GRPOOptions, PPOOptions
from minigpt.rl.request import PromptRequest
from minigpt.rl.workers import Job, PolicyWorker, RolloutWorker
from minigpt.trainer.sleep import Sleeper
from minigpt.trainer.weights import write_language_model

SHIPPED_TOKENIZER = Path(__file__).resolve().parents[2] / "minigpt" / "model"
STOP_IDS = (2, 0)
BETA1 = 0.9
PLAIN: dict[str, Any] = {"dtype": "fp32", "compile": False, "threads": 1, "tensorboard": False, "beta1": BETA1}


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


def write_run(
    folder: Path,
    sharpness: float = 1.0,
    tied: bool = True,
    shape: dict[str, int] | None = None,
    last_gain: float = 1.0,
) -> Path:
    """The folder of a fine-tuned run with random weights. `sharpness` scales all matrices, so that some tokens are
    likelier than others; `last_gain` scales the last norm, so nothing but the logits, and some tokens become sure."""
    torch.manual_seed(0)
    config = MiniGPTConfig(vocab_size=6400, max_position_embeddings=512, tie_word_embeddings=tied, **(shape or TINY))
    model = MiniGPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(sharpness)
        model.model.norm.weight.mul_(last_gain)
    folder.mkdir(parents=True, exist_ok=True)
    write_language_model(
        folder,
        model,
        dict(model.state_dict()),
        name="sft",
        tokenizer_folder=SHIPPED_TOKENIZER,
        stop_token="<|im_end|>",
        dtype="fp32",
    )
    return folder


def pack_prompts(root: Path) -> Path:
    """The micro-world's prompts, packed."""
    prompts = write_microworld(root / "microworld", MicroWorldOptions(seed=0, size="tiny"))["prompt"]
    options = PackOptions(
        stage="prompt", input=[prompts], output=root / "prompts", seq_len=64, workers=1, valid_fraction=0.05
    )
    pack(options)
    return options.output


def write_world(root: Path) -> Path:
    """A fine-tuned run in `sft`, and packed prompts in `prompts`."""
    write_run(root / "sft", sharpness=5.0)
    pack_prompts(root)
    return root


def make_job(init: Path, name: str = "grpo", row_length: int = 64, **options: Any) -> Job:
    """Of 4 prompts with 4 answers each, unless the options say otherwise."""
    kind = PPOOptions if name == "ppo" else GRPOOptions
    sizes = {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 12}
    made = kind(save_dir=init.parent / name, init=init, **{**PLAIN, **sizes, "grad_clip": 0.0, **options})
    config = MiniGPT.from_pretrained(init / "hf").config
    return Job(made, init, row_length, min(row_length, 32), STOP_IDS, SHIPPED_TOKENIZER, name, config)


def make_policy(job: Job) -> PolicyWorker:
    worker = PolicyWorker(0, 1, 1, job)
    worker.setup(None)
    return worker


def make_request(
    prompts: int = 4, samples: int = 4, version: int = 0, seed: int = 0, max_new_tokens: int = 12, **sampling: Any
) -> PromptRequest:
    """Prompts of 3 to 20 random tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 21, prompts).astype(np.int32)
    params = SamplingParams(
        **{"max_new_tokens": max_new_tokens, "temperature": 1.0, "stop_token_ids": STOP_IDS, "seed": 7} | sampling
    )
    ids = rng.integers(10, 6400, int(lengths.sum())).astype(np.int32)
    return PromptRequest(ids, lengths, np.arange(prompts), samples * np.arange(prompts), samples, params, version)


def sample(policy: PolicyWorker, request: PromptRequest | None = None) -> RolloutBatch:
    """Answers by a rollout worker that got its weights from the policy."""
    worker = RolloutWorker(0, 1, 1, policy.job)
    worker.setup()
    worker.load(policy.publish(0).value)
    return worker.generate(request or make_request(temperature=policy.job.options.temperature)).value


def with_columns(batch: RolloutBatch, **columns: np.ndarray) -> RolloutBatch:
    """The batch with these columns; one value a sequence is spread over its answer."""
    spread = {
        name: (batch.spread(values) if len(values) == len(batch) else values).astype(np.float32)
        for name, values in columns.items()
    }
    return RolloutBatch(**{**vars(batch), "columns": spread})


def arrays_of(batch: RolloutBatch) -> dict[str, np.ndarray]:
    return {**{name: value for name, value in vars(batch).items() if name != "columns"}, **batch.columns}


def plain_forward(model: nn.Module, batch: RolloutBatch, temperature: float = 1.0) -> list[tuple[torch.Tensor, ...]]:
    """(log-probabilities, entropies) of each answer's tokens: sequence by sequence, all logits, torch's log_softmax."""
    found = []
    ends = np.cumsum(batch.lengths)
    for end, length, n in zip(ends, batch.lengths, batch.answer_lens, strict=True):
        ids = torch.from_numpy(batch.tokens[end - length : end].astype(np.int64))
        logits = model(ids[None]).logits[0, length - n - 1 : length - 1]
        log_p = (logits / temperature).log_softmax(-1)
        found.append((log_p.gather(1, ids[length - n :, None])[:, 0], -(log_p.exp() * log_p).sum(-1)))
    return found


def metrics_of(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a kind in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


MARK = "MINIGPT_TEST_MARK"  # in the environment, where every process of a run or a cluster inherits it


def marked(mark: str) -> list[str]:
    """The command lines of the processes that carry a mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended while we looked, or is not ours to look at
            if process.environ().get(MARK) == mark:
                found.append(" ".join(process.cmdline()))
    return found


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def run_here(*command: str) -> int:
    """The command in this process; its exit status."""
    threads = torch.get_num_threads()
    try:
        cli.main(list(command))
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        torch.set_num_threads(threads)
    return 0


# --------------------------------------------------------------------------------------- workers without their actors


def arrays_in(value: Any) -> Iterator[np.ndarray]:
    """Every array in arguments: batches, requests, published weights in the object store, dictionaries."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, ray.ObjectRef):
        yield from arrays_in(ray.get(value))
    elif isinstance(value, dict):
        yield from arrays_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from arrays_in(one)
    elif is_dataclass(value):
        for one in fields(value):
            yield from arrays_in(getattr(value, one.name))


def fingerprint(value: Any) -> list[str]:
    """A hash of every array in it."""
    return [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in arrays_in(value)]


def bytes_held(*sleepers: Sleeper) -> int:
    """Of all tensors where this process computes, without what sleepers have put aside and what lies in the object
    store."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor) and not thing.is_meta]
    packed = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_mkldnn)
    storages = {s._cdata: s for s in (tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn)}
    whole = sum(storage.nbytes() for storage in storages.values() if storage.resizable()) + packed
    return whole - sum(sleeper.bytes_on_cpu for sleeper in sleepers)


@dataclass
class Call:
    """What a worker was asked, and what it returned."""

    method: str
    arguments: list[Any]
    value: Any


class InlineGroup:
    """A `WorkerGroup` of one worker that lives in this process, without an actor around it. What goes in and out passes
    through Ray's object store as ever, and what a worker is handed must be unchanged when it is done."""

    def __init__(
        self, worker: type, role: str, layout: Any, needed: Any, placement: Any, arguments: Any, timeout: Any
    ) -> None:
        self.role, self.worker = role, worker(0, 1, 1, *arguments)
        self.workers = [self.worker]
        self.calls: list[Call] = []

    def __len__(self) -> int:
        return 1

    def one(self, rank: int, method: str, *arguments: Any) -> ray.ObjectRef:
        # an actor gets what stands alone in its arguments as a value, and its own copy of everything
        given = [ray.get(a if isinstance(a, ray.ObjectRef) else ray.put(a)) for a in arguments]
        before = fingerprint(given)
        result = getattr(self.worker, method)(*given)
        assert fingerprint(given) == before, f"{self.role}.{method} wrote into what it was handed"
        self.calls.append(Call(method, given, getattr(result, "value", result)))
        return ray.put(result)

    def all(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        return [self.one(0, method, *arguments)]

    def wait(self, references: Sequence[ray.ObjectRef], what: str) -> list[Any]:
        return [self.result(reference, rank, what) for rank, reference in enumerate(references)]

    def result(self, reference: ray.ObjectRef, rank: int, what: str) -> Any:
        return ray.get(reference)

    def kill(self) -> None:
        """It ends with its last reference."""
