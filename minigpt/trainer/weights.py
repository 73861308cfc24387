"""What a finished run leaves: float32 masters as a .pth state dict, and a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minigpt.errors import UserError
from minigpt.model.model_minigpt import MiniGPT
from minigpt.system import sync

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def write_state_dict(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A state dict for `torch.load(path, weights_only=True)`; the file is whole or as it was, also after a power cut.

    Errors: UserError when there is no room for it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(weights, partial)
        sync(partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}); make room and run the same command again") from error
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
    return path


def write_language_model(
    folder: Path,
    model: MiniGPT,
    weights: dict[str, torch.Tensor],
    *,
    name: str,
    tokenizer_folder: Path,
    stop_token: str,
    dtype: str,
) -> list[Path]:
    """A language model twice: `<name>_<hidden_size>.pth` for going on, `hf/` for everything else.

    Args:
        folder: The run folder.
        model: Gives the shape; its own weights are not used.
        weights: The float32 masters by name.
        name: Beginning of the .pth file's name.
        tokenizer_folder: Where the tokenizer lies that the model was trained with.
        stop_token: What ends a generated text.
        dtype: Precision of `hf/`: bf16 or fp32.
    """
    if model.config.tie_word_embeddings:
        weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    path = write_state_dict(folder / f"{name}_{model.config.hidden_size}.pth", weights)
    model.save_pretrained(
        folder / "hf",
        dtype=DTYPES[dtype],
        state_dict=weights,
        tokenizer_folder=tokenizer_folder,
        generation_config=generation_config(tokenizer_folder, stop_token),
    )
    return [path, folder / "hf"]


def generation_config(tokenizer_folder: Path, stop_token: str) -> dict[str, Any]:
    """The ids that end a text: of `stop_token` (in the tokenizer's own words) and of the end of a document."""
    from minigpt.dataset.chat import IM_END, ChatEncoder

    encoder = ChatEncoder(tokenizer_folder)
    stop = encoder.im_end_id if stop_token == IM_END else encoder.eos_id
    return {"eos_token_id": list(dict.fromkeys((stop, encoder.eos_id))), "pad_token_id": encoder.pad_id}
