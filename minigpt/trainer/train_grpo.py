"""GRPO: a model learns from its own answers, each compared with the others to the same prompt (arXiv:2402.03300).

Two models, policy and reference (one, when the KL costs nothing). The algorithm is `minigpt/rl/loop.py`, its formulas
`minigpt/rl/algorithms.py`.
"""

from __future__ import annotations

from minigpt.rl.options import GRPOOptions

__all__ = ["GRPOOptions", "main"]


def main(options: GRPOOptions) -> None:
    """Improve a model by rewards for its own answers, compared within groups: no critic (GRPO, Dr. GRPO, RLOO)."""
    from minigpt.rl.run import train

    train(options, "grpo")


if __name__ == "__main__":
    from minigpt.cli import run_command

    run_command(main, GRPOOptions)
