"""Tiny random embedding models in the layout of sentence-transformers, and what transformers makes of their texts."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.numerics.families import SMALL
from tests.unit.text.vocabularies import BYTE_LEVEL_TOKENS, byte_level_tokenizer

from weft.core.request import Pooling

SWITCHES = {
    Pooling.LAST: "pooling_mode_lasttoken",
    Pooling.MEAN: "pooling_mode_mean_tokens",
    Pooling.CLS: "pooling_mode_cls_token",
}


def write_embedding_model(
    directory: Path,
    *,
    config_class: str = "Qwen3Config",
    mode: Pooling = Pooling.LAST,
    normalizes: bool = True,
    max_seq_length: int | None = None,
    **changes: Any,
) -> torch.nn.Module:
    """Write a model without output layer, as `AutoModel` saves it; returns it."""
    vocab_size = len(BYTE_LEVEL_TOKENS) + 1
    values = SMALL | {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1} | changes
    config = getattr(transformers, config_class)(**values)
    model = transformers.AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager")
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            scale, centre = (0.3, 1.0) if name.endswith("norm.weight") else (parameter.shape[-1] ** -0.5, 0.0)
            parameter.copy_(scale * noise + centre)
    model.eval().save_pretrained(directory)
    byte_level_tokenizer()._backend.save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", {"eos_token": "<|end|>", "add_eos_token": True})
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalizes else [])]
    modules = [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}" if place else "", "type": f"a.package.{kind}"}
        for place, kind in enumerate(kinds)
    ]
    _write(directory / "modules.json", modules)
    _write(directory / "1_Pooling" / "config.json", {switch: key is mode for key, switch in SWITCHES.items()})
    if max_seq_length is not None:
        _write(directory / "sentence_bert_config.json", {"max_seq_length": max_seq_length})
    return model


def reference_vector(model: torch.nn.Module, token_ids: list[int], mode: Pooling) -> torch.Tensor:
    """[E] float32, not normalised, by one pass over the whole text."""
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([token_ids]), use_cache=False).last_hidden_state[0]
    return {Pooling.LAST: hidden[-1], Pooling.MEAN: hidden.mean(0), Pooling.CLS: hidden[0]}[mode]


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
