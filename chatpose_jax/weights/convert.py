"""Converts a PyTorch checkpoint to a model folder, or loads it directly onto devices."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from chatpose_jax import __version__
from chatpose_jax.errors import UserError
from chatpose_jax.models import sharding
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.processes import all_or_none
from chatpose_jax.processing.processor import Processor
from chatpose_jax.storage import Location, is_bucket, location, staged
from chatpose_jax.weights.arrays import Params
from chatpose_jax.weights.devices import Shardings, onto_devices
from chatpose_jax.weights.folder import PARAMS, PASSENGERS, TOKENIZER, is_model_folder
from chatpose_jax.weights.hashes import Follower, expected_hashes
from chatpose_jax.weights.images import write_image_settings
from chatpose_jax.weights.passengers import write_passengers
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.plan import Conversion, plan_conversion
from chatpose_jax.weights.save import explained, new_folder, write_config
from chatpose_jax.weights.sources import Source
from chatpose_jax.weights.spec import SourceSpec
from chatpose_jax.weights.stream import write_leaves
from chatpose_jax.weights.templates import write_template
from chatpose_jax.weights.tokenizer_writer import write_tokenizer


def convert(
    source: SourceSpec | str | Path,
    out: str | os.PathLike[str],
    *,
    hashes: bool | str | Path = True,
    compress: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Converts a checkpoint to a model folder, block by block: memory does not grow with the model.

    In a run of several processes every process calls it with the same arguments, with ``out`` on a shared file system or in an object store, and
    writes its share. An error in one of them, while it reads or writes tensors, ends the conversion in all.

    Args:
        source: what to read; a path means ``SourceSpec(path)``.
        out: the model folder to write, on a disk or in an object store ("gs://…", "s3://…"). ``source`` is on a disk.
        hashes: store the SHA-256 of each source file in the provenance, and compare it with ``SHA256SUMS`` beside the source, if that exists. A path:
            compare also with that list, in the format of ``sha256sum``; it must name every file of the main checkpoint. ``False``: neither.
        compress: compress with zstd; smaller for bfloat16, and slower. int4 always is compressed.
        overwrite: replace a model folder at ``out``. On a disk the old one stays until the new one is complete; a store has no renames, so there it
            is removed first.
        progress: show a progress bar on standard error.

    Returns:
        The plan that was carried out.

    Raises:
        UserError: one error for everything that is wrong with the sources, before anything is written; a file whose hash differs from the list,
            weights that are not finite, or a full disk: then the partial output is removed.
    """
    out = location(out)
    with all_or_none():
        spec = SourceSpec.of(source)
        if is_model_folder(spec.path):
            raise UserError(
                f"{spec.path} is already a model folder; chatpose chat reads it, and chatpose export writes it for PyTorch"
            )
        plan = plan_conversion(spec)
        _check_outside(out, plan)
        expected = expected_hashes(plan.sources, None if hashes is True else hashes) if hashes else {}
    primary = jax.process_index() == 0
    files = sorted({file for source in plan.sources for file in source.checkpoint.files}, key=str)
    share = plan.nbytes // jax.process_count()
    # Updates in steps of one percent: an estimate from the first few bytes would be days.
    shown = {"total": share, "miniters": share // 100, "unit": "B", "unit_scale": True, "desc": "tokenizer"}
    with (
        explained(out, f"the conversion needs {plan.nbytes / 1e9:.2g} GB"),
        new_folder(out, overwrite=overwrite) as partial,
        tqdm(**shown, disable=not (progress and primary)) as bar,
        Follower(files, expected, bool(hashes) and primary) as follower,
    ):
        with all_or_none():
            if primary:
                with staged(partial / TOKENIZER) as tokenizer:
                    write_processor(plan, tokenizer)
        bar.set_description("converting")
        bar.reset()  # restarts the clock: the time so far says nothing about bytes per second
        # A wrong hash ends the conversion at once.
        write_leaves(partial / PARAMS, plan.leaves, on_bytes=bar.update, on_read=follower.has_read, compress=compress)
        plan.nonfinite.gather()
        provenance = _provenance(plan, follower.result())
        if primary:
            write_passengers(plan, partial / PASSENGERS)
            write_config(partial, plan.config, provenance=provenance)
    return plan


def load_source(
    source: SourceSpec | str | Path, *, mesh: jax.sharding.Mesh | None = None, shardings: Shardings | None = None
) -> tuple[Conversion, Params]:
    """Reads a checkpoint directly onto devices, without a model folder.

    Args:
        source: as in ``convert``.
        mesh: shards the parameters by ``models.sharding``; default: everything on the first device. Each process reads the part that its own devices
            need, once (quantised: twice), and holds a few blocks of 16 MiB, whatever the size of the model.
        shardings: a function from path and shape of a leaf to its sharding, instead of ``mesh``.
    """
    plan = plan_conversion(SourceSpec.of(source))
    if shardings is None and mesh is not None:
        placed = by_path(sharding.shardings(abstract_params(plan.config), mesh))
        return plan, onto_devices(plan.leaves, lambda path, shape: placed[path])
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return plan, onto_devices(plan.leaves, shardings or (lambda path, shape: first))


def write_processor(plan: Conversion, folder: Path) -> Processor:
    """Writes the tokenizer and the processor's settings of a plan, then reads them back and checks them against the model."""
    write_tokenizer(plan.vocabulary.tokens, folder, plan.vocabulary.added)
    write_image_settings(folder, None if plan.images is None else plan.images.settings)
    write_template(folder, plan.vocabulary.template.template)
    processor = Processor.load(folder, plan.config)
    processor.save(folder)
    return processor


def _check_outside(out: Location, plan: Conversion) -> None:
    """Raises UserError if replacing ``out`` would delete a source."""
    if is_bucket(out):
        return
    read = [plan.vocabulary.tokens.folder]
    for source in plan.sources:
        read += [source.checkpoint.folder, *source.checkpoint.files]
    if inside := next((path for path in read if path.resolve().is_relative_to(out.resolve())), None):
        raise UserError(f"{out} contains {inside}, which the conversion reads; choose another folder")


def _provenance(plan: Conversion, digests: Mapping[Path, str]) -> dict[str, Any]:
    """The provenance that the model folder stores."""
    return {
        "converter": f"chatpose-jax {__version__}",
        "sources": [_source_record(source, digests) for source in plan.sources],
        "initialised": list(plan.fresh),
        "images": plan.images and plan.images.describe(),
    }


def _source_record(source: Source, digests: Mapping[Path, str]) -> dict[str, Any]:
    files = [
        {"name": file.name, "bytes": file.stat().st_size} | ({"sha256": digests[file]} if digests else {})
        for file in source.checkpoint.files
    ]
    formats = source.checkpoint.formats
    return {"name": source.title, "layout": source.layout.name, "files": files, "formats": formats}
