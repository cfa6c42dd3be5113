#!/bin/sh
# SageMaker's environment → ours. The platform asks for /ping and /invocations on port 8080.
set -eu
if [ -z "${HF_MODEL_ID:-}" ]; then
    echo "HF_MODEL_ID must name the model to serve, for example organisation/name" >&2
    exit 2
fi
export MODEL_ID="$HF_MODEL_ID"
if [ -n "${HF_MODEL_REVISION:-}" ]; then export REVISION="$HF_MODEL_REVISION"; fi
if [ -n "${HF_MODEL_QUANTIZE:-}" ]; then export QUANTIZE="$HF_MODEL_QUANTIZE"; fi
if [ -n "${HF_MODEL_TRUST_REMOTE_CODE:-}" ]; then export TRUST_REMOTE_CODE="$HF_MODEL_TRUST_REMOTE_CODE"; fi
# 0 on instances without a GPU: then one shard uses the CPU.
if [ "${SM_NUM_GPUS:-0}" != 0 ]; then export NUM_SHARD="$SM_NUM_GPUS"; fi
exec text-generation-launcher --port 8080 "$@"
