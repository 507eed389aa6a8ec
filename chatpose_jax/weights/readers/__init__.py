"""Reads checkpoint files by byte range, without torch and without running code from them.

All formats (safetensors, the zip archives of ``torch.save``, GGUF) give a ``TensorEntry`` for each tensor: a file, a byte offset, a dtype, a shape
and strides or blocks. A ``Checkpoint`` holds all tensors of a folder or of a GGUF file.
"""

from chatpose_jax.weights.readers.checkpoint import (
    ADAPTER_FILES,
    Checkpoint,
    find_projector,
    open_checkpoint,
    parse_json_object,
    read_json_object,
)
from chatpose_jax.weights.readers.entry import Index, TensorEntry, bounded
from chatpose_jax.weights.readers.foreign import demand_native, demand_native_start, describe_folder, fetch_hint
from chatpose_jax.weights.readers.safetensors import SAFETENSORS_DTYPES, read_safetensors_header
from chatpose_jax.weights.readers.torch_zip import read_torch_header, read_torch_objects

__all__ = [
    "ADAPTER_FILES",
    "SAFETENSORS_DTYPES",
    "Checkpoint",
    "Index",
    "TensorEntry",
    "bounded",
    "demand_native",
    "demand_native_start",
    "describe_folder",
    "fetch_hint",
    "find_projector",
    "open_checkpoint",
    "parse_json_object",
    "read_json_object",
    "read_safetensors_header",
    "read_torch_header",
    "read_torch_objects",
]
