"""PPO: a model learns from its own answers, each token judged by a critic that learns beside it (arXiv:1707.06347).

Four models as in InstructGPT (arXiv:2203.02155): policy, critic, reference, and a reward model or rules. The algorithm
is `minigpt/rl/loop.py`, its formulas `minigpt/rl/algorithms.py`.
"""

from __future__ import annotations

from minigpt.rl.options import PPOOptions

__all__ = ["PPOOptions", "main"]


def main(options: PPOOptions) -> None:
    """Improve a model by rewards for its own answers, with a critic that judges every token (PPO)."""
    from minigpt.rl.run import train

    train(options, "ppo")


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(main, PPOOptions)
