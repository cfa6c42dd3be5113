"""Serve a GGUF file with llama.cpp (package `xllamacpp`) on an OpenAI-compatible port, until ended.

    .venv-peers/bin/python benchmark/llamacpp_server.py MODEL.gguf --port 8101 --slots 64 --context 32768

`--context` tokens are divided among the slots, as in llama.cpp's own server.
"""

import argparse
import os
import threading
from pathlib import Path

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a GGUF file with llama.cpp")
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    arguments = parser.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = str(arguments.model)
    params.port = arguments.port
    params.n_parallel = arguments.slots
    params.n_ctx = arguments.context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    params.kv_unified = False
    params.ui = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
