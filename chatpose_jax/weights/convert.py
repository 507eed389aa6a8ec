"""Checkpoint of the PyTorch world → model folder, or straight onto devices."""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
from tqdm import tqdm

from chatpose_jax.errors import UserError
from chatpose_jax.models import sharding
from chatpose_jax.models.chatpose import abstract_params
from chatpose_jax.models.config import DType, ModelConfig
from chatpose_jax.weights import adapters
from chatpose_jax.weights.arrays import Params, write_leaves
from chatpose_jax.weights.folder import (
    PARAMS,
    PASSENGERS,
    TOKENIZER,
    is_model_folder,
    new_folder,
    unwritable,
    write_config,
)
from chatpose_jax.weights.paths import by_path
from chatpose_jax.weights.pictures import describe, write_pictures
from chatpose_jax.weights.placing import Shardings, place
from chatpose_jax.weights.plan import Plan, make_plan, rounded
from chatpose_jax.weights.processes import together
from chatpose_jax.weights.quantized import quantized
from chatpose_jax.weights.readers import SUMS_FILE, Trail, read_sums
from chatpose_jax.weights.sources import Source, changes, demand_there, open_sources
from chatpose_jax.weights.tokens import write_tokenizer
from chatpose_jax.weights.writers import Tensor, copied, write_safetensors

DTYPES: tuple[DType, ...] = get_args(DType)
QUANTIZE = ("none", "int8")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    projector: str | Path | None = None,
    adapter: str | Path | None = None,
    lora_alpha: float | None = None,
    tokenizer: str | Path | None = None,
    layout: str | None = None,
    dtype: str | None = None,
    quantize: str = "none",
    init_missing: Sequence[str] = (),
    pose_head: str = "auto",
    seed: int = 0,
    allow_nonfinite: bool = False,
    image_fit: str | None = None,
    finish: Callable[[Path, ModelConfig], Any] | None = None,
    hashes: bool = True,
    sums: str | Path | None = None,
    compress: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Plan:
    """Converts a checkpoint to a model folder, streaming: memory does not grow with the model.

    In a multi-process run every process calls it with the same arguments, ``out`` on a shared file system; each writes
    its share. What fails in one while it reads or writes tensors ends the conversion in all.

    Args:
        source: folder or file of the main checkpoint; see ``docs/weights.md`` for the layouts.
        out: the model folder to write.
        vision, projector, tokenizer: where CLIP, the projector or the tokenizer stand, if not in ``source``.
        adapter: PEFT folder; its adapters stay adapters, what else it holds replaces the base's.
        lora_alpha: alpha of adapters that no ``adapter_config.json`` describes.
        layout: one of ``layouts.FAMILIES``; default: recognised by tensor names.
        dtype: of the base (``float32``, ``bfloat16``, ``float16``), stored and computed in; default: as stored, which
            loses nothing and computes as PyTorch does with the same file. Added token rows and the pose head are
            always float32.
        quantize: ``"int8"`` stores the projections of the decoder's layers in int8 with a scale an output channel: half
            the memory of bfloat16, for chatting and for training adapters.
        init_missing: parts (``vision``, ``projector``) to initialise at random where no source has them.
        pose_head: ``"auto"`` takes the source's, or starts a new one where it has none; ``"init"`` always starts one.
        seed: of whatever is initialised.
        allow_nonfinite: go on where weights hold NaN or infinities, and count them (``plan.nonfinite``). int8 cannot hold them.
        image_fit: ``"crop"`` or ``"pad"``, instead of what the sources say of it.
        finish: called with the written tokenizer folder and the configuration: the place to check the tokenizer and to
            add the processor's files. What it raises ends the conversion.
        hashes: put SHA-256 of each source file into the provenance, and compare it with ``SHA256SUMS`` in the source's
            folder, where there is one.
        sums: such a list from elsewhere (as ``sha256sum`` writes it), which must name every file of the main checkpoint.
        compress: zstd; smaller for bfloat16, and slower.
        overwrite: replace a model folder at ``out``.
        progress: show a progress bar on standard error.

    Returns:
        The plan that was carried out.

    Raises:
        UserError: everything that is wrong with the sources, in one error, before anything is written; a file with
            another hash than listed, weights that are no numbers, or a full disk: then what was written is removed.
    """
    with together():
        if is_model_folder(source):
            raise UserError(
                f"{source} is a model folder already: chatpose chat takes it, chatpose export writes it for PyTorch"
            )
        demand_there(
            {
                "the source": source,
                "--vision": vision,
                "--projector": projector,
                "--adapter": adapter,
                "--tokenizer": tokenizer,
            }
        )
        sources = open_sources(
            source, vision=vision, projector=projector, adapter=adapter, lora_alpha=lora_alpha, layout=layout
        )
        plan = make_plan(
            sources,
            tokenizer=tokenizer,
            dtype=_dtype(dtype),
            init_missing=init_missing,
            pose_head=pose_head,
            seed=seed,
            allow_nonfinite=allow_nonfinite,
            image_fit=image_fit,
        )
        plan = _quantized(plan, quantize)
        _check_outside(Path(out), plan)
        if sums is not None and not hashes:
            raise UserError("a list of hashes to compare with, and no hashes: leave one of the two out")
        expected = _expected_sums(sources, sums) if hashes else {}
    primary = jax.process_index() == 0
    trail = Trail()
    shown = progress and primary
    share = plan.nbytes // jax.process_count()
    try:
        with (
            new_folder(out, overwrite=overwrite) as partial,
            # In steps of a hundredth: of the first few bytes it would promise days.
            tqdm(
                total=share, miniters=share // 100, unit="B", unit_scale=True, desc="tokenizer", disable=not shown
            ) as bar,
            concurrent.futures.ThreadPoolExecutor(1) as background,
        ):
            digests = background.submit(_provenance, plan, hashes and primary, expected, trail)

            def on_bytes(count: int) -> None:
                bar.update(count)
                if digests.done():
                    digests.result()  # a wrong hash ends the conversion at once

            try:
                with together():
                    if primary:
                        write_tokenizer(plan.vocabulary.tokens, partial / TOKENIZER, plan.vocabulary.added)
                        write_pictures(partial / TOKENIZER, plan.pictures.settings)
                        if finish is not None:
                            finish(partial / TOKENIZER, plan.config)
                bar.set_description("converting")
                bar.reset()  # the clock: what came before says nothing of bytes a second
                write_leaves(
                    partial / PARAMS, plan.leaves, on_bytes=on_bytes, on_read=trail.has_read, compress=compress
                )
                plan.nonfinite.gather()
                if primary:
                    _write_passengers(plan, partial / PASSENGERS)
                trail.finish()
                provenance = digests.result()
                if primary:
                    write_config(partial, plan.config, provenance=provenance)
            finally:
                trail.cut()
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        needs = f"the conversion needs {plan.nbytes / 1e9:.2g} GB"
        if isinstance(error, OSError) and (found := unwritable(out, error, needs)):
            raise found from None
        if "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error):
            raise UserError(f"{out}: the disk is full; {needs}; nothing was left behind") from None
        if "os_error_code" in str(error):  # tensorstore's way to pass on what the system said
            raise UserError(
                f"{out}: cannot be written ({' '.join(str(error).split())}); nothing was left behind"
            ) from None
        raise
    return plan


def load_source(
    source: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    shardings: Shardings | None = None,
    quantize: str = "none",
    **options: Any,
) -> tuple[Plan, Params]:
    """Reads a checkpoint straight onto devices, no folder in between.

    Args:
        source: as in ``convert``.
        mesh: spreads the parameters by ``models.sharding``; default: everything on the first device. Each process
            reads once (int8: twice) the span of what its own devices need; it holds a few blocks of 16 MiB, whatever the size of the model.
        shardings: path and shape of a leaf → its sharding, instead of ``mesh``.
        quantize: as in ``convert``.
        options: ``vision``, ``projector``, ``adapter``, ``lora_alpha``, ``layout`` (see ``open_sources``), and the options of ``make_plan``.
    """
    where = {
        name: options.pop(name)
        for name in ("vision", "projector", "adapter", "lora_alpha", "layout")
        if name in options
    }
    demand_there({"the source": source, "--tokenizer": options.get("tokenizer")})
    plan = make_plan(open_sources(source, **where), **options | {"dtype": _dtype(options.get("dtype"))})
    plan = _quantized(plan, quantize)
    if mesh is not None and shardings is None:
        placed = by_path(sharding.shardings(abstract_params(plan.config), mesh))

        def on_mesh(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
            return placed[path]

        shardings = on_mesh
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return plan, place(plan.leaves, shardings or (lambda path, shape: default))


def _check_outside(out: Path, plan: Plan) -> None:
    """Raises UserError if replacing ``out`` would delete what is read."""
    read = [plan.vocabulary.tokens.folder]
    for source in plan.sources:
        read += [source.checkpoint.folder, *source.checkpoint.files]
    if inside := next((path for path in read if path.resolve().is_relative_to(out.resolve())), None):
        raise UserError(f"{out} holds {inside}, which the conversion reads; choose another folder")


def _quantized(plan: Plan, quantize: str) -> Plan:
    if quantize not in QUANTIZE:
        raise UserError(f"quantize {quantize!r}: expected one of {', '.join(QUANTIZE)}")
    return plan if quantize == "none" else quantized(plan)


def _write_passengers(plan: Plan, folder: Path) -> None:
    """What feeds nothing here, copied bit by bit, so that an export is whole again."""
    for name, entries in plan.passengers.items():
        folder.mkdir(exist_ok=True)
        tensors = [copied(entry, name) for name, entry in entries.items()]
        write_safetensors(folder / f"{name}.safetensors", tensors)
    if changed := changes(plan.sources, plan.config.text.base_vocab_size):
        folder.mkdir(exist_ok=True)
        if originals := _originals(plan):
            write_safetensors(folder / adapters.ORIGINALS, originals)
        (folder / adapters.CHANGES).write_text(
            json.dumps(changed | {"dtype": plan.config.param_dtype}) + "\n", encoding="utf-8"
        )


def _originals(plan: Plan) -> list[Tensor]:
    """What the adapter changed in its base (see ``changes``) and the base's dtype does not hold exactly."""
    base = plan.config.text.base_vocab_size
    tensors = []
    for source, name, path, _ in rounded(plan):
        entry = source.checkpoint.tensors[name]
        if ids := source.token_rows.get(name):
            rows = [row for row, id in enumerate(ids) if id < base]
            tensors.append(copied(entry, adapters.row_module(name) + adapters.TOKEN_ROWS, rows))
        elif source.is_adapter and not plan.leaves[path].stacked and not path.startswith("pose_head/"):
            tensors.append(copied(entry, path))
    return tensors


def _dtype(name: str | None) -> DType | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"dtype {name!r}: expected one of {', '.join(DTYPES)}, or none to keep the stored one")
    return name


def _provenance(plan: Plan, hashes: bool, expected: Mapping[Path, str], trail: Trail) -> dict[str, Any]:
    """What the model folder says of its origin. Runs beside the conversion, whose trail it follows."""
    digests: dict[Path, str] = {}
    for file in sorted({file for source in plan.sources for file in source.checkpoint.files}, key=str):
        if not hashes:
            trail.follow(file)
            continue
        digests[file] = trail.sha256(file)
        if digests[file] != expected.get(file, digests[file]):
            raise UserError(
                f"{file}: its SHA-256 is {digests[file]}, listed is {expected[file]}; the file is damaged or another one: "
                f"fetch it again"
            )
    return {
        "converter": f"chatpose-jax {_version()}",
        "sources": [_source_record(source, digests) for source in plan.sources],
        "initialised": list(plan.fresh),
        "pictures": describe(plan.pictures),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("chatpose-jax")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"


def _source_record(source: Source, digests: Mapping[Path, str]) -> dict[str, Any]:
    files = [
        {"name": file.name, "bytes": file.stat().st_size} | ({"sha256": digests[file]} if digests else {})
        for file in source.checkpoint.files
    ]
    return {"name": source.title, "layout": source.layout.name, "files": files}


def _expected_sums(sources: Sequence[Source], given: str | Path | None) -> dict[Path, str]:
    """The digests that the sources' files must have, from the given list and from the list in each source's folder."""
    expected: dict[Path, str] = {}
    for number, source in enumerate(sources):
        own = source.checkpoint.folder / SUMS_FILE
        lists = [Path(given)] if given is not None else []
        lists += [own] if own.is_file() else []
        for path in lists:
            sums = read_sums(path)
            must = path == own or number == 0
            if must and (unlisted := [file.name for file in source.checkpoint.files if file.name not in sums]):
                raise UserError(f"{path}: does not list {unlisted[0]}; add its sum, or leave the list away")
            found = {file: sums[file.name] for file in source.checkpoint.files if file.name in sums}
            if differing := [file.name for file in found if expected.get(file, found[file]) != found[file]]:
                raise UserError(f"{path} and {lists[0]} list different sums for {differing[0]}")
            expected |= found
    return expected
