"""How reinforcement learning looks when it breaks: GRPO on a tiny model, whole or with one fault.

    python examples/rl_failures.py whole|mask|eos|kl|dead

A prompt is one token of sixteen. An answer that repeats it and then ends is worth 1, any other 0. It is one
process without Ray, a few seconds on a CPU, with the engine, packing, advantages and loss of `minigpt train grpo`;
what it prints has the same names.
"""

import sys

import numpy as np
import torch

from minigpt.generation.engine import Engine
from minigpt.generation.sampling import SamplingParams
from minigpt.model.model_minigpt import MiniGPT, MiniGPTConfig
from minigpt.rl.algorithms import group_advantages
from minigpt.rl.batch import RolloutBatch, micro_batches
from minigpt.rl.losses import PolicyLossTerms, policy_objective

VOCAB, END, PROMPTS, SAMPLES, LONGEST = 16, 0, 15, 16, 4
FAULTS = {
    "whole": "nothing is broken",
    "mask": "labels are one token off, so that the loss trains tokens that nobody sampled",
    "eos": "the sampler does not know what ends an answer",
    "kl": "a learning rate 30 times too high, and nothing holds the policy near the reference",
    "dead": "a reward that no answer gets, so that all answers of a group are worth the same",
}
SHOWN = ("reward", "zero_variance_groups", "truncated", "response_length", "kl", "entropy", "sampler_gap", "grad_norm")


def small_model() -> MiniGPT:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    return MiniGPT(MiniGPTConfig(vocab_size=VOCAB, **shape))


def sample(model: MiniGPT, step: int, fault: str) -> RolloutBatch:
    """Answers to every prompt, those to one prompt adjacent."""
    engine = Engine(model, slots=PROMPTS * SAMPLES, max_length=32, prefix_cache_tokens=0)
    params = SamplingParams(max_new_tokens=LONGEST, stop_token_ids=() if fault == "eos" else (END,), seed=step)
    streams = [range(i * SAMPLES, (i + 1) * SAMPLES) for i in range(PROMPTS)]
    requests = [
        engine.submit([1 + i], params, n=SAMPLES, sequence_ids=ids, log_probs=True) for i, ids in enumerate(streams)
    ]
    while engine.has_work:
        engine.step()
    answers = [answer for request in requests for answer in request.completions]
    asked = np.repeat(np.arange(PROMPTS), SAMPLES)
    return RolloutBatch(
        tokens=np.concatenate([[1 + i, *a.ids] for i, a in zip(asked, answers, strict=True)]).astype(np.int32),
        prompt_lens=np.ones(len(answers), dtype=np.int32),
        answer_lens=np.array([len(a.ids) for a in answers], dtype=np.int32),
        sample_ids=np.arange(len(answers)),
        prompt_rows=asked,
        stopped=np.array([a.finish_reason == "stop" for a in answers]),
        behaviour_log_probs=np.concatenate([a.behaviour_log_probs for a in answers]).astype(np.float32),
        versions=np.zeros(sum(len(a.ids) for a in answers), dtype=np.int32),
    )


def judge(batch: RolloutBatch, fault: str) -> torch.Tensor:
    """1 for the prompt's token and the end, else 0; float32 [S]."""
    if fault == "dead":
        return torch.zeros(len(batch))
    wanted = [[1 + row, END] for row in batch.prompt_rows.tolist()]
    answers = [answer.tolist() for answer in batch.answers()]
    return torch.tensor([float(a == w) for a, w in zip(answers, wanted, strict=True)])


def learn(
    model: MiniGPT, reference: MiniGPT, batch: RolloutBatch, rewards: torch.Tensor, optimizer: torch.optim.Optimizer,
    fault: str,
) -> dict[str, float]:  # fmt: skip
    """One step of GRPO; returns what there is to see."""
    advantages = batch.spread(group_advantages(rewards, SAMPLES).numpy()).astype(np.float32)
    columns = {"advantages": advantages, "weights": np.ones_like(advantages)}
    (one,) = micro_batches(batch, row_length=32, rows=len(batch), columns=columns)
    tensors = {name: torch.from_numpy(array) for name, array in one.arrays.items()}
    if fault == "mask":
        tensors["labels"] = torch.where(tensors["labels"] >= 0, tensors["input_ids"], -100)  # the token read, not next
    inputs = {name: tensors[name] for name in ("input_ids", "position_ids", "document_ids", "labels")}
    with torch.no_grad():
        tensors["ref_log_probs"] = reference(**inputs, reduction="none").log_probs
    cost = torch.tensor(0.0 if fault == "kl" else 0.02)
    terms = PolicyLossTerms(max_sequences=len(batch))
    loss, watched = policy_objective(terms)(model, **tensors, kl_coefficient=cost)
    optimizer.zero_grad()
    (loss / len(advantages)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    sums = dict(zip(terms.metrics, watched[: len(terms.metrics)].tolist(), strict=True))
    gap = watched[len(terms.metrics) :].numpy()[one.positions] - batch.behaviour_log_probs[one.answer_tokens]
    return {
        "kl": sums["kl"] / len(advantages),
        "entropy": sums["entropy"] / len(advantages),
        "sampler_gap": float(np.abs(gap).max()),
        "grad_norm": float(norm),
    }


def run(fault: str, steps: int = 61) -> list[dict[str, float]]:
    """Trains with a fault; what there is to see at each step."""
    model, reference = small_model(), small_model().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03 if fault == "kl" else 0.001, weight_decay=0.0)
    history = []
    for step in range(steps):
        batch = sample(model, step, fault)
        rewards = judge(batch, fault)
        groups = rewards.reshape(-1, SAMPLES)
        seen = {
            "reward": float(rewards.mean()),
            "zero_variance_groups": float((groups.amax(1) == groups.amin(1)).float().mean()),
            "truncated": float(1 - batch.stopped.mean()),
            "response_length": float(batch.answer_lens.mean()),
        }
        history.append(seen | learn(model, reference, batch, rewards, optimizer, fault))
    return history


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in FAULTS:
        sys.exit(__doc__)
    fault = sys.argv[1]
    torch.set_num_threads(1)  # so small a model gains nothing by more, and threads that wait for others lose much
    print(f"{fault}: {FAULTS[fault]}\nstep  " + "  ".join(SHOWN))
    for step, seen in enumerate(run(fault)):
        if step % 10 == 0:
            print(f"{step:4}  " + "  ".join(f"{seen[name]:{len(name)}.3f}" for name in SHOWN))


if __name__ == "__main__":
    main()
