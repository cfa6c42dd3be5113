"""Write `smollm2.json`: what transformers, in float32, says about the default model.

Run   python tests/numerics/golden/make_smollm2.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import sys
from pathlib import Path

import torch
import transformers

TOP = 32
TEXT = """The capital of France is Paris, and the river that runs through it is called the Seine. In 1889 the city \
held a world's fair; its iron tower was meant to stand for twenty years. Water boils at 100 degrees Celsius at sea \
level, but only at about 71 degrees on top of Mount Everest, because the air is thinner there.

def fibonacci(n):
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)

Zwei Dinge sind zu unserer Arbeit nötig: Geduld und Humor."""


def main(path: Path) -> None:
    loading = {"gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **loading)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
        **loading,
    ).eval()
    token_ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logprobs = model(input_ids=torch.tensor([token_ids])).logits[0].float().log_softmax(dim=-1)
    top = logprobs.topk(TOP, dim=-1)
    document = {
        "source": f"transformers {transformers.__version__}, float32, {path.name}",
        "token_ids": token_ids,
        "top_ids": top.indices.tolist(),
        "top_logprobs": [[round(value, 5) for value in row] for row in top.values.tolist()],
    }
    target = Path(__file__).with_name("smollm2.json")
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in document.items()]
    target.write_text("{\n" + ",\n".join(lines).replace("],[", "],\n[") + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
