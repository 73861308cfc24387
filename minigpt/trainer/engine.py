"""The one module that touches DeepSpeed: initialise, forward, backward, step, checkpoint, weights.

The rest of the trainer sees an `Engine`, and its fellow processes through `Processes`. What DeepSpeed leaves to its
caller is settled here once:

- the loss is a sum that the caller scales by the weight of the *global* batch, so gradients do not depend on
  micro-batch, accumulation or world size (`managed_gradient_accumulation: false`);
- its checkpoints are pickles: they are read with `weights_only=True` and a short list of allowed classes, and only
  after the SHA-256 manifest of `checkpoint.py` was verified;
- a step with a NaN or infinite loss or gradient anywhere is skipped by all ranks together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt.errors import UserError
from minigpt.model.model_critic import ScalarHead
from minigpt.model.model_minigpt import LMHead

from .muon import MUON, MuonWithAdamW
from .sleep import Sleeper, tensors_within

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

# Keys of a DeepSpeed configuration by which a rank's slice is not a part of all parameters laid end to end in order
NOT_END_TO_END = ("offload_optimizer", "round_robin_gradients", "parameter_alignment")
SHIPPED_CONFIGS = "ds_configs/zero0.json, zero1.json, zero2.json, zero3.json and zero3_offload.json"
# Its keys that our own options decide
OURS = (
    *("optimizer", "scheduler", "gradient_clipping", "bf16", "fp16", "data_types"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
)


@dataclass(frozen=True)
class Processes:
    """This process among its fellows.

    Attributes:
        rank: 0 … world_size - 1.
        local_rank: The rank among the processes of this machine, which is the index of its GPU.
        world_size: Processes in all.
        device: Where this process computes.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over all processes, in float64."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return tensor.tolist()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on all of them; it is pickled."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all of them."""
        if self.world_size > 1:
            torch.distributed.barrier()

    @contextmanager
    def errors_said_once(self) -> Iterator[None]:
        """Of processes that find the same thing wrong the first one raises the UserError, the others end with status 1.

        One that is alone with its error always raises it.
        """
        try:
            yield
        except UserError as error:
            if self.world_size > 1 and not self._first_to_say(str(error)):
                raise SystemExit(1) from None
            raise

    @staticmethod
    def _first_to_say(sentence: str) -> bool:
        store = torch.distributed.distributed_c10d._get_default_store()
        try:
            return store.add(f"error: {sentence}", 1) == 1
        except RuntimeError:  # rank 0, which keeps the store, has ended: it was first
            return False


def init_processes() -> Processes:
    """Join the process group that the launcher describes in the environment; alone when there is no launcher."""
    import deepspeed

    alone = "MASTER_PORT" not in os.environ
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)  # DeepSpeed reads them from here
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        # On CPUs DeepSpeed would compile a shared-memory operator at its first start (up to a minute of g++) that only
        # its inference uses. Training communicates by gloo; so nothing is built, and no compiler is needed.
        deepspeed.ops.__compatible_ops__ = {}
        backend = "nccl" if device.type == "cuda" else "gloo"
        if alone:  # no port is opened, and none is left in the environment for programs that are started from here
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return Processes(rank, local_rank, world_size, device)


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        applied: False when a NaN or infinity made all ranks skip the step.
        grad_norm: Global gradient norm before clipping.
    """

    applied: bool
    grad_norm: float


class Engine:
    """A module that computes a loss, its optimizer state, and how both are spread over the processes.

    Parameters that require no gradient are frozen: they have no master, no optimizer state and no place in checkpoints.
    `frozen_hash` is the SHA-256 of their float32 values, None when all are trained.

    Args:
        module: Called with a batch (keyword arguments), returns the *summed* loss: a scalar, or the first entry of a
            vector whose other entries are sums of something else that is to be known.
        processes: From `init_processes`.
        dtype: torch.bfloat16 (with float32 masters and accumulation) or torch.float32.
        learning_rate: First learning rate; `step` sets it anew each time.
        optimizer_name: "adamw", "muon", or "auto": Muon wherever it works, that is up to ZeRO stage 2, unless the
            configuration offloads, reorders or pads what it updates.
        betas: Of AdamW.
        weight_decay: On matrices but not on embeddings, norms and biases.
        grad_clip: Largest global gradient norm; 0: no clipping.
        config: A DeepSpeed JSON file; None: ZeRO stage 1.
        compile: Whether to `torch.compile` the module.
    """

    def __init__(
        self,
        module: nn.Module,
        processes: Processes,
        *,
        dtype: torch.dtype,
        learning_rate: float,
        optimizer_name: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        grad_clip: float = 1.0,
        config: Path | None = None,
        compile: bool = False,
    ) -> None:
        import deepspeed

        self.processes = processes
        self.device, self.world_size = processes.device, processes.world_size
        self.compiled, self.dtype = compile, dtype
        self.config = _deepspeed_config(config, dtype, grad_clip)
        self.zero_stage: int = self.config["zero_optimization"]["stage"]
        module = module.to(self.device)
        masters = {
            name: p.detach().float().cpu().clone()
            for name, p in module.named_parameters()
            if dtype != torch.float32 or not p.requires_grad
        }
        frozen = {name: masters[name] for name, p in module.named_parameters() if not p.requires_grad}
        self.frozen_hash = _hash_of(frozen) if frozen else None
        # In bf16 the compute copy of a frozen weight has lost bits that no master keeps
        self._frozen = frozen if processes.rank == 0 and dtype != torch.float32 else {}
        module = module.to(dtype)
        optimizer = self._make_optimizer(module, optimizer_name, learning_rate, betas, weight_decay, dtype)
        if self.zero_stage == 0:
            self._guard = _Stage0Guard(optimizer, grad_clip)
        with _quiet():
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=self.config, dist_init_required=False
            )
        self._engine.checkpoint_engine = _safe_checkpoint_engine()
        self._set_masters(masters)
        self._sleeper = Sleeper(self.device)
        if compile:
            self._engine.compile()

    def _make_optimizer(
        self,
        module: nn.Module,
        name: str,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
        dtype: torch.dtype,
    ) -> torch.optim.Optimizer:
        zero = self.config["zero_optimization"]
        # Muon takes a rank's slice for a part of all matrices end to end, in their order
        otherwise_sliced = self.zero_stage == 3 or any(zero.get(key) for key in NOT_END_TO_END)
        if name == "muon" and otherwise_sliced:
            raise UserError(
                f"--optimizer muon works with ZeRO stages 0 to 2 without {', '.join(NOT_END_TO_END)}; "
                "take --optimizer adamw"
            )
        groups = parameter_groups(module, weight_decay)
        self.optimizer_name = "adamw" if name == "adamw" or otherwise_sliced else "muon"
        if self.optimizer_name == "adamw":
            return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
        groups[0][MUON] = True
        return MuonWithAdamW(groups, lr=learning_rate, betas=betas, compute_dtype=dtype)

    @property
    def module(self) -> nn.Module:
        """The module that was handed in."""
        return self._engine.module

    def forward_backward(self, batch: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
        """Add the gradient of `scale` · loss to what this window has accumulated.

        Args:
            batch: What the module takes.
            scale: 1 / (weight of the global batch). The mean over ranks that ZeRO takes is undone here.

        Returns:
            What the module returned for this micro-batch, detached and unscaled.
        """
        output = self._engine(**batch)
        loss_sum = output if output.dim() == 0 else output[0]
        # An infinite loss can have finite gradients. Times NaN it cannot, and then every rank skips the step.
        poison = torch.where(torch.isfinite(loss_sum.detach()), 1.0, float("nan"))
        self._engine.backward(loss_sum * poison * (scale * self.world_size), scale_wrt_gas=False)
        return output.detach()

    def training_forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the module returns, computed by the very graph that `forward_backward` trains, and nothing accumulated.

        A graph without gradients rounds otherwise (in bf16 log-probabilities differ by up to 0.009).
        """
        return self._engine(**batch).detach()

    def evaluate(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the module returns, without gradients and dropout, so that no random number is drawn.

        Not compiled: a second graph costs more than it saves here.
        """
        self._engine.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager") if self.compiled else nullcontext():
                return self._engine(**batch)
        finally:
            self._engine.train()

    def step(self, learning_rate: float) -> StepResult:
        """Apply the accumulated gradients, unless one of any rank is not finite: then nothing changes anywhere."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        with _quiet():
            self._engine.step()
        if self.zero_stage == 0:
            return self._guard.result
        return StepResult(self._engine.was_step_applied(), float(self._engine.get_global_grad_norm()))

    def master_weights(self) -> dict[str, torch.Tensor]:
        """The float32 weights by name, on the CPU. All ranks call it; only rank 0 keeps the result (others: empty)."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.module.named_parameters():
            full = parameter.data if self.zero_stage == 0 else safe_get_full_fp32_param(parameter)
            if full is None:  # frozen: it has no master
                full = self._gathered(parameter)
            full = self._frozen.get(name, full)
            if self.processes.rank == 0:
                weights[name] = full.detach().float().cpu().view(self._full_shape(parameter)).clone()
        return weights

    def _set_masters(self, weights: dict[str, torch.Tensor]) -> None:
        """DeepSpeed makes its float32 masters from the module after it was cast: give them their last 16 bits back."""
        from deepspeed.utils import safe_set_full_fp32_param

        if self.zero_stage == 0 or not self._engine.bfloat16_enabled():
            return
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, weights[name].to(self.device))

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it these parameters are whole on every rank, as the forward pass sees them. All ranks enter it."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, enabled=self.zero_stage == 3)

    def share_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """This rank's part of a parameter that ZeRO-3 has spread, flat; those of all ranks end to end are the whole.

        None, on all ranks, where no part is what the forward pass sees: whole, on a disk, or quantized on its way.
        """
        zero = self.config["zero_optimization"]
        on_disk = (zero.get("offload_param") or {}).get("device") == "nvme"
        quantized = zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights")
        if self.zero_stage < 3 or on_disk or quantized:
            return None
        spread: Any = parameter
        part: torch.Tensor = spread.ds_tensor.detach()
        return part[: max(0, spread.ds_numel - self.processes.rank * len(part))]  # the last parts are filled up

    def _gathered(self, parameter: nn.Parameter) -> torch.Tensor:
        with self.gathered([parameter]):
            return parameter.data.clone()

    @staticmethod
    def _full_shape(parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def sleep(self) -> None:
        """Move weights, masters, gradients and optimizer state from the device to CPU memory, until `wake`.

        Between two steps; nothing else may be called before `wake`, which brings every bit back.
        """
        module = self.module
        self._sleeper.sleep(tensors_within([self._optimizer, *module.parameters(), *module.buffers()]))

    def wake(self) -> None:
        """Undo `sleep`."""
        self._sleeper.wake()

    def close(self) -> None:
        """Free DeepSpeed's buffers; the engine cannot be used afterwards."""
        with _quiet():
            self._engine.destroy()

    def save_state(self, folder: Path) -> None:
        """Write the weights, masters and optimizer state of all ranks into `folder`. All ranks call it.

        Frozen weights are left out: they are where they came from, and `frozen_hash` says which they were.
        """
        hook = self.module.register_state_dict_post_hook(_drop_frozen)  # DeepSpeed's own filter forgets tied weights
        try:
            with _quiet():
                self._engine.save_checkpoint(
                    str(folder), tag="engine", save_latest=False, exclude_frozen_parameters=bool(self.frozen_hash)
                )
        finally:
            hook.remove()
        if self.processes.rank == 0:
            for script in folder.glob("zero_to_*.py"):  # DeepSpeed's copy of its own converters; ours is `export`
                script.unlink()

    def load_state(self, folder: Path, written_by: int) -> None:
        """Read what `save_state` wrote. The files must have been verified before. All ranks call it.

        The optimizer's state is the checkpoint's, its hyperparameters are those that this engine was made with.

        Args:
            folder: As for `save_state`.
            written_by: How many processes wrote it; at stages 0 to 2 it may be another number than there are now.

        Errors: UserError when there is no such state, or its layout belongs to that number of processes.
        """
        recut = self.zero_stage > 0 and written_by != self.world_size
        if recut:
            self._check_recuttable(written_by)
        ours = [{name: group[name] for name in ("betas", "weight_decay")} for group in self._optimizer.param_groups]
        with _quiet():
            path, _ = self._engine.load_checkpoint(
                str(folder),
                tag="engine",
                load_optimizer_states=not recut,
                load_module_strict=self.frozen_hash is None,
            )
            if path is None:
                raise UserError(f"{folder} holds no DeepSpeed state; delete the folder or start with --resume never")
            if recut:
                self._load_recut(folder / "engine", written_by)
        for group, values in zip(self._optimizer.param_groups, ours, strict=True):
            group.update(values)
        if self.zero_stage > 0:
            self._optimizer.clip_grad = self.config["gradient_clipping"]

    def _check_recuttable(self, written_by: int) -> None:
        zero = self.config["zero_optimization"]
        layouts = [
            name for name in ("round_robin_gradients", "parameter_alignment", "elastic_checkpoint") if zero.get(name)
        ]
        if self.zero_stage == 3 or layouts:
            what = "ZeRO stage 3" if self.zero_stage == 3 else f"{layouts[0]} in the DeepSpeed configuration"
            raise UserError(
                f"the checkpoint was written by {written_by} processes, now there are {self.world_size}, and {what} "
                "ties it to their number; start as many, or start anew with --overwrite"
            )

    def _load_recut(self, folder: Path, written_by: int) -> None:
        """Masters and optimizer state at stage 1 or 2, from the files of another number of processes.

        Both stages lay the parameters of a group end to end and give each rank an equal part of that line, padded at
        its end. The line is the same for any number of processes, so its parts are cut anew; DeepSpeed then loads
        this rank's as if it had written them.
        """
        zero = self._optimizer  # bf16 at stage 1 has a class of its own
        groups = zero.bit16_groups if hasattr(zero, "bit16_groups") else zero.bf16_groups
        masters, lines = "single_partition_of_fp32_groups", {}
        for rank in range(written_by):  # one file in memory at a time
            (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt")
            saved = _load_safely(path, "cpu")["optimizer_state_dict"]
            moments = saved["base_optimizer_state"]["state"]  # by group: one flat parameter of the inner optimizer each
            for group, parameters in enumerate(groups):
                for name, piece in {masters: saved[masters][group], **moments.get(group, {})}.items():
                    if piece.dim() == 0:  # AdamW's step, the same on every rank
                        lines[group, name] = piece
                        continue
                    if rank == 0:
                        (ours,) = zero.param_groups[group]["params"]
                        total = sum(parameter.numel() for parameter in parameters)
                        lines[group, name] = PartOfLine(total, self.processes.rank, ours.numel(), piece.dtype)
                    lines[group, name].take(piece)
        parts = {key: line.part if isinstance(line, PartOfLine) else line for key, line in lines.items()}
        saved["base_optimizer_state"]["state"] = {
            group: {name: part for (g, name), part in parts.items() if g == group and name != masters}
            for group in moments
        }
        saved[masters] = [parts[group, masters] for group in range(len(groups))]
        zero.load_state_dict([saved] * self.world_size, load_optimizer_states=True, load_from_fp32_weights=True)


class _Stage0Guard:
    """What ZeRO's optimizers do and plain ones do not: clip after the reduction, and skip a step that is not finite."""

    def __init__(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        self.max_norm = grad_clip or float("inf")
        self.result = StepResult(False, float("nan"))
        self.group_count = len(optimizer.param_groups)
        optimizer.register_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if len(optimizer.param_groups) < self.group_count:
            return  # AdamW's step inside Muon's, over some of the groups: this step was settled already
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        applied = bool(torch.isfinite(norm))
        if not applied:
            for p in parameters:
                p.grad = None  # AdamW passes over parameters without a gradient
        self.result = StepResult(applied, float(norm) if applied else float("inf"))


class PartOfLine:
    """One of equal parts of a line of numbers, taken from pieces into which the line was cut otherwise.

    Args:
        total: Elements of the line; what follows, in a part or in a piece, is padding.
        index: Number of the part.
        length: Its elements.
        dtype: Theirs.

    Attributes:
        part: The part, with zeros as padding, once all pieces were taken.
    """

    def __init__(self, total: int, index: int, length: int, dtype: torch.dtype) -> None:
        self.part = torch.zeros(length, dtype=dtype)
        self._first, self._last = index * length, min((index + 1) * length, total)
        self._position = 0

    def take(self, piece: torch.Tensor) -> None:
        """Copy what belongs to the part from the next piece."""
        begin, end = max(self._first, self._position), min(self._last, self._position + len(piece))
        if begin < end:
            self.part[begin - self._first : end - self._first] = piece[begin - self._position : end - self._position]
        self._position += len(piece)


def _hash_of(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().numpy().data)
    return digest.hexdigest()


def _drop_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Take frozen parameters out of a state dict, under all of their names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state_dict.pop(prefix + name, None)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; norms, biases, embeddings and the output layer do not."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, (nn.Embedding, LMHead, ScalarHead))}
    trainable = [p for p in module.parameters() if p.requires_grad]
    decay = [p for p in trainable if p.dim() >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in decay}
    rest = [p for p in trainable if id(p) not in chosen]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def check_deepspeed_config(path: Path | None) -> None:
    """Raises a UserError where a configuration is named that does not exist."""
    if path is not None and not Path(path).exists():
        raise UserError(f"no DeepSpeed configuration at {path}; MiniGPT's own are {SHIPPED_CONFIGS}")


def _deepspeed_config(path: Path | None, dtype: torch.dtype, grad_clip: float) -> dict[str, Any]:
    config: dict[str, Any] = {"zero_optimization": {"stage": 1, "overlap_comm": False, "contiguous_gradients": True}}
    check_deepspeed_config(path)
    if path is not None:
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error})") from None
        if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
            raise UserError(f"{path} is no DeepSpeed configuration; MiniGPT's own are {SHIPPED_CONFIGS}")
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # offloaded states are torch's AdamW's too
    stage = config.setdefault("zero_optimization", {}).setdefault("stage", 1)
    if stage == 0 and dtype != torch.float32:
        raise UserError(
            "ZeRO stage 0 keeps no float32 masters and trains bf16 badly; take ds_configs/zero1.json or --dtype fp32"
        )
    if given := [key for key in OURS if key in config]:
        raise UserError(
            f"{path} sets {', '.join(given)}, which options of the trainer decide; take that out of the file"
        )
    return {
        "train_micro_batch_size_per_gpu": 1,  # batches are cut by our loop; DeepSpeed only counts with this
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU before every forward and after every step
        **config,
        "gradient_clipping": grad_clip if stage else 0.0,  # at stage 0 _Stage0Guard clips
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed logs and prints what it is doing; what matters is raised or returned."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _safe_checkpoint_engine() -> Any:
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class SafeCheckpointEngine(TorchCheckpointEngine):
        """Reads by `_load_safely`."""

        def load(self, path: str, map_location: Any = None) -> Any:
            return _load_safely(path, map_location)

    return SafeCheckpointEngine()


def _load_safely(path: str | Path, map_location: Any) -> Any:
    """Read without running code from the file: tensors, plain containers and three classes of DeepSpeed."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def zero_stage(kind: Any, name: str) -> ZeroStageEnum:
        if kind is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"getattr({kind}, {name!r}) is not allowed")
        return ZeroStageEnum[name]

    # Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) writes a member of an enumeration as getattr(class, name).
    members = (zero_stage, "builtins.getattr")
    with torch.serialization.safe_globals([fragment_address, LossScaler, ZeroStageEnum, members]):
        return torch.load(path, map_location=map_location, weights_only=True)
