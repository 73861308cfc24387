"""The shipped recipes: they parse, their layouts fit the machines that they name and take all of them."""

import re
from pathlib import Path

import pytest

from minigpt.cli import parse_options
from minigpt.rl.layout import ROLES, bundles, choose_layout
from minigpt.rl.options import GRPOOptions, PPOOptions

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "minigpt" / "rl" / "recipes"
GPUS = {"grpo_cpu": 0, "ppo_cpu": 0, "grpo_1gpu": 1, "grpo_8gpu": 8, "grpo_2x8gpu": 16}
WITHOUT_CRITIC = ["policy", "reference", "rollout"]


def options_of(name: str, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # the paths in recipes begin there
    kind = PPOOptions if name.startswith("ppo") else GRPOOptions
    return parse_options(kind, ["--config", str(FOLDER / f"{name}.yaml")])


def test_every_recipe_is_for_a_machine_that_is_named_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} - {"layout_2x8gpu"} == set(GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_a_recipe_is_options_whose_layout_takes_the_machine_and_no_more(name, monkeypatch):
    options = options_of(name, monkeypatch)
    assert options.save_interval
    assert options.eval_interval
    assert options.deepspeed is None or options.deepspeed.exists()
    roles = [*WITHOUT_CRITIC, *(["critic"] if name.startswith("ppo") else [])]
    found = bundles(choose_layout(options.layout, GPUS[name]), roles)
    assert sum(bundle.resources.get("GPU", 0) for bundle in found) == pytest.approx(GPUS[name])
    samplers = sum(role == "rollout" for bundle in found for role, _ in bundle.workers)
    assert options.prompts_per_step % samplers == 0, "some samplers would have a prompt more than others"


@pytest.mark.parametrize("name", ["colocate", "split"])
@pytest.mark.parametrize("roles", [["policy", "rollout"], WITHOUT_CRITIC, list(ROLES)])
def test_no_two_ranks_of_the_policy_fit_on_one_gpu(name, roles):
    """NCCL refuses two ranks on a device, and Ray packs what fits."""
    shares = [b.resources["GPU"] for b in bundles(choose_layout(name, 8), roles) if "policy" in b.roles]
    assert shares == [1.0] * (8 if name == "colocate" else 4)


def test_a_layout_that_is_written_by_hand_gives_each_worker_its_place():
    found = bundles(choose_layout(str(FOLDER / "layout_2x8gpu.yaml"), 16), WITHOUT_CRITIC)
    beside = [bundle.workers for bundle in found if len(bundle.workers) == 2]
    assert beside == [[("policy", rank), ("reference", rank)] for rank in range(4)]
    assert [bundle.workers for bundle in found if len(bundle.workers) == 1] == [[("rollout", r)] for r in range(12)]


def test_the_layouts_in_the_guide_are_layouts(tmp_path):
    pages = [REPOSITORY / "docs" / name for name in ("rl.md", "rl.zh-CN.md")]
    blocks = [re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S) for page in pages]
    assert len(blocks[0]) == 2
    assert blocks[0] == blocks[1]
    for block in blocks[0]:
        (tmp_path / "layout.yaml").write_text(block)
        assert bundles(choose_layout(str(tmp_path / "layout.yaml"), 2), WITHOUT_CRITIC)
