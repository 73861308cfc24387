"""The shipped recipes: they parse, their layouts fit the machines that they name and take all of them."""

import re
from pathlib import Path

import pytest

from minigpt.cli import parse_options
from minigpt.errors import UserError
from minigpt.rl.layout import ROLES, bundles, choose_layout, sharing, strangers
from minigpt.rl.options import GRPOOptions, PPOOptions

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "minigpt" / "rl" / "recipes"
MACHINES = {"cpu": 0, "1gpu": 1, "8gpu": 8, "2x8gpu": 16}
GPUS = {f"{stage}_{machine}": gpus for stage in ("grpo", "ppo") for machine, gpus in MACHINES.items()}
CPUS_A_GPU = 4  # a machine has more
WITHOUT_CRITIC = ["policy", "reference", "rollout"]


def options_of(name: str, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # the paths in recipes begin there
    kind = PPOOptions if name.startswith("ppo") else GRPOOptions
    return parse_options(kind, ["--config", str(FOLDER / f"{name}.yaml")])


def written(tmp_path: Path, layout: str):
    (tmp_path / "layout.yaml").write_text(layout)
    return choose_layout(str(tmp_path / "layout.yaml"), 2)


def test_every_recipe_is_for_a_machine_that_is_named_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} - {"layout_2x8gpu"} == set(GPUS)


@pytest.mark.parametrize("name", GPUS)
def test_a_recipe_is_options_whose_layout_takes_the_machine_and_no_more(name, monkeypatch):
    options = options_of(name, monkeypatch)
    assert options.save_interval
    assert not options.without_effect()
    assert options.eval_interval
    assert options.deepspeed is None or options.deepspeed.exists()
    roles = [*WITHOUT_CRITIC, *(["critic"] if name.startswith("ppo") else [])]
    found = bundles(choose_layout(options.layout, GPUS[name]), roles)
    assert sum(bundle.resources.get("GPU", 0) for bundle in found) == pytest.approx(GPUS[name])
    assert sum(bundle.resources["CPU"] for bundle in found) <= CPUS_A_GPU * max(1, GPUS[name])
    samplers = sum(role == "rollout" for bundle in found for role, _ in bundle.workers)
    assert options.prompts_per_step % samplers == 0, "some samplers would have a prompt more than others"


@pytest.mark.parametrize("name", ["colocate", "split"])
@pytest.mark.parametrize("roles", [["policy", "rollout"], WITHOUT_CRITIC, list(ROLES)])
def test_no_two_ranks_of_the_policy_fit_on_one_gpu(name, roles):
    """NCCL refuses two ranks on a device, and Ray packs what fits."""
    shares = [b.resources["GPU"] for b in bundles(choose_layout(name, 8), roles) if "policy" in b.roles]
    assert shares == [1.0] * (8 if name == "colocate" else 4)


@pytest.mark.parametrize("name", ["colocate", "split"])
@pytest.mark.parametrize("gpus", [2, 8])
def test_a_named_layout_reserves_a_cpu_for_each_gpu_at_most(name, gpus):
    """A machine with one GPU often has two; roles that take turns need no core each."""
    needed = sum(bundle.resources["CPU"] for bundle in bundles(choose_layout(name, gpus), list(ROLES)))
    assert 0 < needed <= gpus + 1e-6


WRONG = {
    "a number in quotes": ('policy: {gpus: "1"}', "gpus of policy is '1', it must be a number of at least 0"),
    "part of a worker": (
        "rollout: {workers: 1.5}",
        "workers of rollout is 1.5, it must be a whole number of at least 1",
    ),
    "no worker": ("rollout: {workers: 0}", "workers of rollout is 0, it must be a whole number of at least 1"),
    "yes": ("rollout: {workers: yes}", "workers of rollout is True, it must be a whole number"),
    "fewer threads than none": (
        "policy: {threads: -1}",
        "threads of policy is -1, it must be a whole number of at lea",
    ),
    "endless": ("policy: {cpus: .inf}", "cpus of policy is inf, it must be a number of at least 0"),
    "nothing": ("policy: {cpus: }", "cpus of policy is None, it must be a number of at least 0"),
    "one GPU and a half": ("policy: {gpus: 1.5}", "gpus of policy is 1.5, it must be a part of one GPU, or a whole"),
    "beside two": ("critic: {beside: [policy, reward]}", "it must be the name of a role"),
    "a list of needs": ("policy: [1]", "policy takes beside, cpus, gpus, threads, workers, not [1]"),
    "numbers for names": ("policy: {1: 2, workers: 1}", "not 1"),
}


@pytest.mark.parametrize(("layout", "sentence"), WRONG.values(), ids=WRONG)
def test_a_layout_with_a_wrong_value_is_refused_in_one_sentence(tmp_path, layout, sentence):
    with pytest.raises(UserError) as refused:
        written(tmp_path, layout)
    assert str(refused.value).startswith(f"{tmp_path / 'layout.yaml'}: ")
    assert sentence in str(refused.value)


def test_a_layout_that_is_written_by_hand_gives_each_worker_its_place():
    found = bundles(choose_layout(str(FOLDER / "layout_2x8gpu.yaml"), 16), WITHOUT_CRITIC)
    beside = [bundle.workers for bundle in found if len(bundle.workers) == 2]
    assert beside == [[("policy", rank), ("reference", rank)] for rank in range(4)]
    assert [bundle.workers for bundle in found if len(bundle.workers) == 1] == [[("rollout", r)] for r in range(12)]


@pytest.mark.parametrize("engine", ["policy", "critic"])
def test_ranks_of_an_engine_that_fit_on_one_gpu_are_refused(tmp_path, engine):
    """Ray would put them there, and NCCL say `Duplicate GPU` when all is loaded."""
    half = f"{engine}: {{workers: 2, gpus: 0.5}}\n"
    with pytest.raises(UserError) as refused:
        bundles(written(tmp_path, half), list(ROLES))
    assert f"two of the 2 ranks of {engine} could come to lie on one GPU" in str(refused.value)
    assert "they have 0.5 and 0.5 of one: give each more than half" in str(refused.value)
    more = "{workers: 2, gpus: 0.51}"
    beside = f"{half}reward: {{workers: 2, gpus: 0.1, beside: {engine}}}"
    of_one = f"{half}reward: {{gpus: 0.5, beside: {engine}}}"
    for enough in (f"{engine}: {more}", f"{engine}: {{gpus: 0.5}}", f"{engine}: {{workers: 2}}", beside, of_one):
        assert bundles(written(tmp_path, enough), ["policy", "critic", "rollout"])


def test_fractions_of_a_gpu_that_nobody_said_are_shared_are_noticed(tmp_path):
    def found(layout: str):
        return strangers(bundles(written(tmp_path, layout), ["policy", "rollout"]))

    assert found("policy: {gpus: 0.5}\nrollout: {gpus: 0.5}") == ("policy", "rollout")
    assert found("policy: {gpus: 0.5}\nrollout: {gpus: 0.5, beside: policy}") is None
    assert found("policy: {gpus: 0.6}\nrollout: {gpus: 0.5}") is None
    assert found("rollout: {workers: 2, gpus: 0.5}") is None, "they do the same at the same time"


@pytest.mark.parametrize("name", ["laptop", "colocate", "split", str(FOLDER / "layout_2x8gpu.yaml")])
@pytest.mark.parametrize("roles", [["policy", "rollout"], WITHOUT_CRITIC, list(ROLES)])
def test_who_sleeps_for_whom_when_nobody_says(name, roles):
    """All that share a GPU; a sampler with one of its own never does."""
    found = sharing(choose_layout(name, 16), roles, None)
    if name == "laptop":
        assert found == {}
    elif name == "colocate":
        assert found == {role: set(roles) - {role} for role in roles}
    else:
        assert found == {role: set(roles) - {role, "rollout"} if role != "rollout" else set() for role in roles}


def test_the_layouts_in_the_guide_are_layouts(tmp_path):
    pages = [REPOSITORY / "docs" / name for name in ("rl.md", "rl.zh-CN.md")]
    blocks = [re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S) for page in pages]
    assert len(blocks[0]) == 2
    assert blocks[0] == blocks[1]
    for block in blocks[0]:
        assert bundles(written(tmp_path, block), WITHOUT_CRITIC)
