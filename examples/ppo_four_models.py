"""PPO with its four models (policy, critic, reference, reward model) on the quickstart's sums, by one command.

    python examples/ppo_four_models.py [--quickstart out/quickstart] [--save_dir out/ppo4] [OPTIONS OF train ppo]

First `minigpt train reward`: from pairs of which one sum is worked rightly, a model learns to tell such answers from
others. Then `minigpt train ppo`, by the laptop's recipe, with what it has learned added to the rules' rewards. The same
command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from minigpt import cli

RECIPE = Path(cli.__file__).parent / "rl" / "recipes" / "ppo_cpu.yaml"


def main(given: Sequence[str] | None = None) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--quickstart", type=Path, default=Path("out/quickstart"), help="what the quickstart has left")
    parser.add_argument("--save_dir", type=Path, default=Path("out/ppo4"), help="gets a run in reward/ and one in ppo/")
    parser.add_argument("--reward_steps", type=int, default=60, help="of the reward model, with 32 pairs each")
    arguments, options_of_ppo = parser.parse_known_args(given)
    world = arguments.quickstart / "microworld"  # of the quickstart's seed: its held-out sums were never trained on
    pairs = world / "preference.jsonl"
    if not pairs.exists():
        sys.exit(f"error: there is no {pairs}: run minigpt quickstart first, or name its folder by --quickstart")
    start = ["--init", str(arguments.quickstart / "reason_start")]
    judge = arguments.save_dir / "reward"
    learns = ["--max_steps", str(arguments.reward_steps), "--global_batch_size", "32", "--learning_rate", "1e-3"]
    cli.main(["train", "reward", "--data", str(pairs), *start, "--save_dir", str(judge), *learns])
    saved = ["--reward_model", str(judge), "--save_dir", str(arguments.save_dir / "ppo")]
    asked = ["--data", str(world / "prompt.jsonl"), "--eval_data", str(world / "heldout_sums.jsonl")]
    cli.main(["train", "ppo", "--config", str(RECIPE), *asked, *start, *saved, *options_of_ppo])


if __name__ == "__main__":
    main()
