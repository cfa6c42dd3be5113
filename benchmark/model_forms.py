"""Write a GGUF file's model in the forms that other servers read, once, into the cache.

    python benchmark/model_forms.py MODEL.gguf

* a Hugging Face directory in bfloat16, for `transformers serve` and for Weft
* a GGUF file in bfloat16, for llama.cpp

Both hold the numbers of the given file, so every server computes the same model in the same precision. The
directory names no end-of-text token: `transformers serve` cannot be told to ignore it, and answers must have the
same length everywhere. Needs the development environment (torch, transformers, gguf).
"""

import argparse
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ModelForms:
    """One model, three ways."""

    quantized_gguf: Path
    bfloat16_gguf: Path
    bfloat16_directory: Path


def cache_directory() -> Path:
    """Where converted models are kept: `$XDG_CACHE_HOME/weft/benchmark`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft" / "benchmark"


def make_model_forms(gguf: Path) -> ModelForms:
    """Convert what the cache does not hold yet. The cache is keyed by the file's content."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    base = cache_directory() / f"{gguf.stem}-{digest}"
    forms = ModelForms(gguf, base / "bf16.gguf", base / "bf16-endless")
    if not forms.bfloat16_directory.exists():
        _write_directory(gguf, forms.bfloat16_directory)
    if not forms.bfloat16_gguf.exists():
        _write_gguf(gguf, forms.bfloat16_gguf)
    return forms


def _write_directory(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without GgufConfig(dequantize=True) transformers keeps the packed weights, which cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for name in ("config.json", "generation_config.json"):
        file = partial / name
        values = json.loads(file.read_text()) if file.exists() else {}
        values.pop("_name_or_path", None)
        file.write_text(json.dumps({**values, "eos_token_id": None}, indent=2) + "\n")
    partial.rename(target)


def _write_gguf(source: Path, target: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    partial = target.with_name(target.name + ".partial")
    writer = gguf.GGUFWriter(partial, arch=architecture)
    for name, field in reader.fields.items():
        # The header's own counts, and what the writer writes itself.
        if name.startswith("GGUF.") or name in {gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.FILE_TYPE}:
            continue
        element_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], element_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, values)
        else:
            packed = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a GGUF model as bf16 GGUF and as a bf16 directory")
    parser.add_argument("gguf", type=Path)
    print(make_model_forms(parser.parse_args().gguf))
