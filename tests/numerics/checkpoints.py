"""Tiny random checkpoints, written by transformers, with every parameter drawn so that no mistake cancels out."""

import dataclasses
from pathlib import Path

import torch
import transformers
from tests.numerics.families import FamilyRow


def random_model(row: FamilyRow, seed: int = 0) -> torch.nn.Module:
    """A float32 model in evaluation mode; norms, biases and embeddings are as random as matrices."""
    config_class = getattr(transformers, row.config_class)
    config = config_class(**row.values)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() == 2:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            elif name.endswith("norm.weight"):
                # Around the neutral value, which is 0 where the model multiplies by 1 + w.
                parameter.copy_(0.3 * noise + (0.0 if "Gemma" in row.config_class else 1.0))
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def save(model: torch.nn.Module, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def reference_logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """`[T, V]` float32 by one pass over the whole sequence, without a cache."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()


def served(description, row: FamilyRow):
    """The description under the operator's limit of the row."""
    if row.served_positions is None:
        return description
    return dataclasses.replace(description, max_positions=row.served_positions)
