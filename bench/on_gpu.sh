#!/usr/bin/env bash
# Everything that one GPU is asked, in nine minutes: its tests, 13B in training and in decoding, the body, memory beside the plan.
#   bash bench/on_gpu.sh [--out out/on_gpu]            on a machine with one H100 or H200, from the checkout
#   bash bench/on_gpu.sh --preset small --platform cpu  anywhere: shows that every part works
# Needs jax[cuda13], flax, optax, orbax-checkpoint, numpy, pytest and, for the columns beside ours, torch, transformers and peft. Nothing is
# installed: the checkout is what runs. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" bench/on_gpu.py "$@"
