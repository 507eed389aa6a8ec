"""Checkpoint of the PyTorch world → model folder, or straight onto devices."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
from flax.traverse_util import unflatten_dict
from tqdm import tqdm

from chatpose_jax.errors import UserError
from chatpose_jax.models.config import DType, ModelConfig
from chatpose_jax.weights.arrays import Params, write_leaves
from chatpose_jax.weights.folder import PARAMS, TOKENIZER, new_folder, write_config
from chatpose_jax.weights.plan import Plan, Source, make_plan, open_sources
from chatpose_jax.weights.readers import sha256
from chatpose_jax.weights.tokens import write_tokenizer

DTYPES: tuple[DType, ...] = get_args(DType)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    tokenizer: str | Path | None = None,
    layout: str | None = None,
    dtype: str | None = None,
    init_missing: Sequence[str] = (),
    pose_head: str = "auto",
    seed: int = 0,
    finish: Callable[[Path, ModelConfig], Any] | None = None,
    hashes: bool = True,
    compress: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Plan:
    """Converts a checkpoint to a model folder, streaming: memory does not grow with the model.

    In a multi-process run every process calls it with the same arguments, ``out`` on a shared file system; each writes
    its share.

    Args:
        source: folder or file of the main checkpoint; see ``docs/weights.md`` for the layouts.
        out: the model folder to write.
        vision, projector, tokenizer: where CLIP, the projector or the tokenizer stand, if not in ``source``.
        layout: one of ``layouts.FAMILIES``; default: recognised by tensor names.
        dtype: of the base (``float32``, ``bfloat16``, ``float16``), stored and computed in; default: as stored, which
            loses nothing and computes as PyTorch does with the same file. Added token rows and the pose head are
            always float32.
        init_missing: parts (``vision``, ``projector``) to initialise at random where no source has them.
        pose_head: ``"auto"`` takes the source's, or starts a new one where it has none; ``"init"`` always starts one.
        seed: of whatever is initialised.
        finish: called with the written tokenizer folder and the configuration: the place to check the tokenizer and to
            add the processor's files. What it raises ends the conversion.
        hashes: put SHA-256 of each source file into the provenance.
        compress: zstd; smaller for bfloat16, and slower.
        overwrite: replace a model folder at ``out``.
        progress: show a progress bar on standard error.

    Returns:
        The plan that was carried out.

    Raises:
        UserError: everything that is wrong with the sources, in one error, before anything is written; or a full disk.
    """
    sources = open_sources(source, vision=vision, projector=projector, layout=layout)
    plan = make_plan(
        sources, tokenizer=tokenizer, dtype=_dtype(dtype), init_missing=init_missing, pose_head=pose_head, seed=seed
    )
    _check_outside(Path(out), plan)
    primary = jax.process_index() == 0
    bar = tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="converting", disable=not (progress and primary))
    try:
        with (
            bar,
            new_folder(out, overwrite=overwrite) as partial,
            concurrent.futures.ThreadPoolExecutor(1) as background,
        ):
            digests = background.submit(_provenance, plan, hashes and primary)
            if primary:
                write_tokenizer(plan.vocabulary.tokens, partial / TOKENIZER, plan.vocabulary.added)
                if finish is not None:
                    finish(partial / TOKENIZER, plan.config)
            write_leaves(partial / PARAMS, plan.leaves, on_bytes=bar.update, compress=compress)
            if primary:
                write_config(partial, plan.config, provenance=digests.result())
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(
                f"{out}: the disk is full; the conversion needs {plan.nbytes / 1e9:.1f} GB; nothing was left behind"
            ) from None
        raise
    return plan


def load_source(
    source: str | Path,
    *,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    **options: Any,
) -> tuple[Plan, Params]:
    """Reads a checkpoint straight onto devices, no folder in between.

    Args:
        source: as in ``convert``.
        shardings: path and shape of a leaf → its sharding; default: everything on the first device. Each process
            reads only the byte ranges that its own devices need; host memory peaks at one shard of one leaf.
        options: ``vision``, ``projector``, ``layout`` (see ``open_sources``), and the options of ``make_plan``.
    """
    where = {name: options.pop(name) for name in ("vision", "projector", "layout") if name in options}
    plan = make_plan(open_sources(source, **where), **options | {"dtype": _dtype(options.get("dtype"))})
    return plan, materialise(plan, shardings)


def materialise(plan: Plan, shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None) -> Params:
    """The plan's leaves as jax arrays; see ``load_source``."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arrays = {}
    for path, leaf in plan.leaves.items():
        sharding = shardings(path, leaf.shape) if shardings else default
        arrays[path] = jax.make_array_from_callback(leaf.shape, sharding, leaf.read, dtype=leaf.dtype)  # type: ignore
    return unflatten_dict(arrays, sep="/")


def _check_outside(out: Path, plan: Plan) -> None:
    """Raises UserError if replacing ``out`` would delete what is read."""
    read = [plan.vocabulary.tokens.folder]
    for source in plan.sources:
        read += [source.checkpoint.folder, *source.checkpoint.files]
    if inside := next((path for path in read if path.resolve().is_relative_to(out.resolve())), None):
        raise UserError(f"{out} holds {inside}, which the conversion reads; choose another folder")


def _dtype(name: str | None) -> DType | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}, or none to keep the stored one")
    return name


def _provenance(plan: Plan, hashes: bool) -> dict[str, Any]:
    return {
        "converter": f"chatpose-jax {_version()}",
        "sources": [_source_record(source, hashes) for source in plan.sources],
        "initialised": list(plan.fresh),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("chatpose-jax")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"


def _source_record(source: Source, hashes: bool) -> dict[str, Any]:
    files = [
        {"name": file.name, "bytes": file.stat().st_size} | ({"sha256": sha256(file)} if hashes else {})
        for file in source.checkpoint.files
    ]
    return {"name": source.title, "layout": source.layout.name, "files": files}
