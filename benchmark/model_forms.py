"""Write the measured models in the forms that the servers read, once, into the cache.

    python benchmark/model_forms.py MODEL.gguf

Two models: the one of the given file, and a Llama of 1.07 billion random weights (the shape of TinyLlama with the given
file's tokenizer), which is bound by memory wherever it runs. Of each:

* a Hugging Face directory in bfloat16, for Weft, vLLM, OpenVINO and `transformers serve`
* the same with 8-bit weights by plain rounding, one scale per output, in the format of compressed-tensors, for vLLM
* GGUF files in bfloat16 and in Q4_0, for llama.cpp and for Weft (Q4_0 needs llama.cpp's own tool)
* OpenVINO's graphs in 16 and in 8 bits

All hold the numbers of the given file, so every server computes the same model. The directories name no end-of-text
token: `transformers serve` cannot be told to ignore it, and answers must have the same length everywhere. Needs the
development environment (torch, transformers, gguf).
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weft.benchmark.roofline import ModelShape

TENSOR_FILE = "model.safetensors"
LARGE_SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face's name → GGUF's."""
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


class CannotInstallError(Exception):
    """Why a peer, or a form of a model for it, cannot be had on this machine."""


@dataclass(frozen=True, slots=True)
class ModelForms:
    """Where the forms of one model are, whether they have been written yet or not."""

    base: Path
    original_gguf: Path | None = None

    @property
    def bfloat16_directory(self) -> Path:
        """Hugging Face directory without an end-of-text token."""
        return self.base / "bf16-endless"

    @property
    def int8_directory(self) -> Path:
        """compressed-tensors, W8A8."""
        return self.base / "w8a8"

    @property
    def bfloat16_gguf(self) -> Path:
        """For llama.cpp."""
        return self.base / "bf16.gguf"

    @property
    def q4_0_gguf(self) -> Path:
        """Made by `llama-quantize`: Q4_0, the vocabulary in the finer type that the tool chooses."""
        return self.base / "q4_0.gguf"

    def openvino_directory(self, precision: str) -> Path:
        """`precision`: `bf16` (16-bit weights, computed in bfloat16) or `int8` (weights only)."""
        return self.base / f"openvino-{precision}"

    def shape(self) -> ModelShape:
        """Sizes, read from the configuration of the directory."""
        return ModelShape.from_config(json.loads((self.bfloat16_directory / "config.json").read_text()))


def cache_directory() -> Path:
    """Where converted models and built peers are kept: `$XDG_CACHE_HOME/weft/benchmark`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft" / "benchmark"


def make_small_forms(gguf: Path) -> ModelForms:
    """The file's own model: directory and bfloat16 GGUF. The cache is keyed by the file's content."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    forms = ModelForms(cache_directory() / f"{gguf.stem}-{digest}", gguf)
    if not forms.bfloat16_directory.exists():
        _write_directory(gguf, forms.bfloat16_directory)
    if not forms.bfloat16_gguf.exists():
        _write_gguf(gguf, forms.bfloat16_gguf)
    return forms


def make_large_forms(small: ModelForms) -> ModelForms:
    """The random Llama: directory and bfloat16 GGUF, with the tokenizer of the small model."""
    assert small.original_gguf is not None
    forms = ModelForms(cache_directory() / f"random-llama-1b-{small.base.name}")
    if not forms.bfloat16_directory.exists():
        _write_random_directory(small.bfloat16_directory, forms.bfloat16_directory)
    if not forms.bfloat16_gguf.exists():
        _write_llama_gguf(small.original_gguf, forms.bfloat16_directory, forms.bfloat16_gguf)
    return forms


def make_int8_directory(forms: ModelForms) -> None:
    """W8A8 for vLLM: every matrix but the vocabulary rounded to 8 bits, activations per token as the server runs."""
    if not forms.int8_directory.exists():
        _write_int8_directory(forms.bfloat16_directory, forms.int8_directory)


def make_q4_0_gguf(forms: ModelForms, quantize_tool: Path) -> None:
    """Q4_0 by llama.cpp's tool."""
    if not forms.q4_0_gguf.exists():
        with _completed(forms.q4_0_gguf) as partial:
            run_tool(quantize_tool, forms.bfloat16_gguf, partial, "Q4_0")


def make_openvino_directory(forms: ModelForms, environment: Path, precision: str) -> None:
    """Graph and tokenizer for OpenVINO, by the exporter of its own environment."""
    directory = forms.openvino_directory(precision)
    if directory.exists():
        return
    weights = {"bf16": "fp16", "int8": "int8"}[precision]
    with _completed(directory) as partial:
        options = ("--task", "text-generation-with-past", "--weight-format", weights)
        exporter = environment / "bin" / "optimum-cli"
        run_tool(exporter, "export", "openvino", "--model", forms.bfloat16_directory, *options, partial)
        # The graph holds the model; the configuration is read again to know its sizes and end-of-text token.
        shutil.copy(forms.bfloat16_directory / "config.json", partial / "config.json")


@contextmanager
def _completed(target: Path) -> Iterator[Path]:
    """A path to write to that becomes `target` only when all has been written."""
    partial = target.with_name(target.stem + "-partial" + target.suffix)
    shutil.rmtree(partial, ignore_errors=True)
    partial.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    partial.rename(target)


def run_tool(*command: str | Path) -> None:
    """An installer, compiler or converter, its output on standard error. Raises CannotInstallError when it fails."""
    name = Path(command[0]).name
    try:
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    except OSError as error:
        raise CannotInstallError(f"{name} cannot be started: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise CannotInstallError(f"{name} ended with {error.returncode}") from error


def _remove_end_of_text(directory: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        file = directory / name
        values = json.loads(file.read_text()) if file.exists() else {}
        values.pop("_name_or_path", None)
        file.write_text(json.dumps({**values, "eos_token_id": None}, indent=2) + "\n")


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
    with _completed(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _remove_end_of_text(partial)


def _write_random_directory(tokenizer_directory: Path, target: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(LlamaConfig(**LARGE_SHAPE))
    model = skeleton.to(torch.bfloat16).to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    with _completed(target) as partial:
        model.save_pretrained(partial, max_shard_size="10GB")
        AutoTokenizer.from_pretrained(tokenizer_directory).save_pretrained(partial)
        _remove_end_of_text(partial)


def _write_int8_directory(source: Path, target: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source / TENSOR_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            if not any(matrix in name for matrix in MATRICES):
                tensors[name] = tensor
                continue
            scale = tensor.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-10) / 127
            tensors[name] = torch.round(tensor.float() / scale).clamp(-127, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
    with _completed(target) as partial:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, partial / TENSOR_FILE, metadata={"format": "pt"})
        config = json.loads((partial / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps({**config, "quantization_config": _W8A8}, indent=2) + "\n")


_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def _write_gguf(source: Path, target: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(source)
    with _completed(target) as partial:
        writer = gguf.GGUFWriter(partial, arch=_architecture(reader))
        _copy_fields(reader, writer)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        for tensor in reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
                writer.add_tensor(tensor.name, values)
            else:
                packed = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
                writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.BF16)
        _finish(writer)


def _write_llama_gguf(tokenizer_source: Path, directory: Path, target: Path) -> None:
    """A Llama directory as GGUF; everything about text is taken from another GGUF file."""
    import gguf
    import torch
    from safetensors import safe_open

    config = json.loads((directory / "config.json").read_text())
    with _completed(target) as partial, safe_open(directory / TENSOR_FILE, framework="pt") as tensors:
        writer = gguf.GGUFWriter(partial, arch="llama")
        _copy_fields(gguf.GGUFReader(tokenizer_source), writer, prefix="tokenizer.")
        _add_sizes(writer, config)

        def add(name: str, source: str, heads: int | None = None) -> None:
            tensor = tensors.get_tensor(source)
            if tensor.dim() == 1:
                writer.add_tensor(name, tensor.float().numpy())
                return
            if heads is not None:
                # GGUF rotates neighbours, Hugging Face halves: the rows of a head change places.
                halves = tensor.view(heads, 2, tensor.shape[0] // heads // 2, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
            raw = tensor.view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

        add("token_embd.weight", "model.embed_tokens.weight")
        add("output_norm.weight", "model.norm.weight")
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        for layer in range(config["num_hidden_layers"]):
            for theirs, ours in {**MATRICES, **NORMS}.items():
                add(f"blk.{layer}.{ours}.weight", f"model.layers.{layer}.{theirs}.weight", heads.get(ours))
        _finish(writer)


def _architecture(reader) -> str:  # type: ignore[no-untyped-def]  # noqa: ANN001
    return str(reader.fields["general.architecture"].contents())


def _copy_fields(reader, writer, prefix: str = "") -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    import gguf

    for name, field in reader.fields.items():
        # The header's own counts, and what the writer writes itself.
        is_written = name.startswith("GGUF.") or name in {"general.architecture", "general.file_type"}
        if is_written or not name.startswith(prefix):
            continue
        element_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], element_type)


def _add_sizes(writer, config: dict[str, int]) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    import gguf

    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])


def _finish(writer) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a GGUF model, and a larger random one, in all servers' forms")
    parser.add_argument("gguf", type=Path)
    small_forms = make_small_forms(parser.parse_args().gguf)
    for forms in (small_forms, make_large_forms(small_forms)):
        make_int8_directory(forms)
        print(forms.base)
