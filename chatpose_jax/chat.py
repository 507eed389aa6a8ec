"""The Python API: load a model, chat with it, use the poses of its answers.

::

    model = chatpose_jax.load()  # the toy model that comes with the package; load(FOLDER) for another
    reply = model.chat([{"role": "user", "content": "Show me someone who kneels."}])
    print(reply.text)
    reply.poses[0].save("kneel.glb")
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from chatpose_jax.engine import Completion, Engine, Request
from chatpose_jax.errors import UserError
from chatpose_jax.generate import STEPS, Returning, Sampling
from chatpose_jax.models.arithmetic import available_memory, fast_dtype
from chatpose_jax.models.chatpose import Params, abstract_params, unstack_layers
from chatpose_jax.models.config import ModelConfig
from chatpose_jax.models.heads import head_class, head_output
from chatpose_jax.models.heads.base import PoseHead
from chatpose_jax.models.sharding import on_mesh, place
from chatpose_jax.processing.processor import Encoded, Processor
from chatpose_jax.settings import did_you_mean, flag, instance, whole
from chatpose_jax.storage import Location
from smpl_jax import io
from smpl_jax.body import BodyModel
from smpl_jax.pose import for_body
from smpl_jax.posed import PosedBody

Message = Mapping[str, Any]
Messages = Sequence[Message]

FORCED_ANSWER = "It is <POSE>."
DTYPES = ("float32", "bfloat16", "float16")
DEMO = Path(__file__).parent / "demo_model"
"""The model folder that comes with the package; ``tools/demo_model.py`` makes it."""
TOY = (
    "no model was named, so this is the toy that comes with the package: one million parameters, which know generated descriptions and drawings of "
    "bodies, no photographs and no other talk. `chatpose pretrained` makes one that talks, `chatpose convert` takes the released weights."
)
"""Said wherever ``DEMO`` answers because no model was named."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reply:
    """An answer.

    text: the answer; a pose token appears as ``<POSE>``. poses: one for each pose token, in order. ids: the generated ids, without the end of
    sequence. finish_reason: "stop", or "length" if ``max_new_tokens`` cut the answer off. samples: for each pose, the list of its samples; the
    first one is the pose in ``poses``.
    """

    text: str
    poses: list[PosedBody]
    ids: np.ndarray
    finish_reason: str
    samples: list[list[PosedBody]]

    def __repr__(self) -> str:
        poses = f"{len(self.poses)} pose{'' if len(self.poses) == 1 else 's'}"
        return f"Reply({self.text!r:.200}, {poses}, {len(self.ids)} ids, finish_reason={self.finish_reason!r})"

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a message to append to the conversation. It contains the exact ids, so that the history keeps the pose token itself."""
        return {"role": "assistant", "content": self.text, "ids": self.ids.tolist()}


class Stream(Iterator[str]):
    """An answer that is generated piece by piece: an iterator over pieces of text. After the last one, ``reply`` is the complete answer.

    From the first piece on, the answer takes one of the model's rows: until the last piece, ``close()``, the end of a ``with`` block, or until the
    stream is garbage collected. Other questions wait if there is no other row. ``yield from`` returns the ``Reply`` too.
    """

    def __init__(self, pieces: Generator[str, None, Reply]):
        self._answer = Returning(pieces)
        self._pieces = iter(self._answer)

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def reply(self) -> Reply:
        """The complete answer. Raises UserError before the last piece, or if the stream was closed before it."""
        if not hasattr(self._answer, "value"):
            raise UserError("the answer is not complete: read the stream to its last piece before you use reply")
        return self._answer.value

    def close(self) -> None:
        """Stops the answer, so that the model can answer another question."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_settings(
    *,
    max_new_tokens: Any = 128,
    temperature: Any = 0.0,
    top_p: Any = 1.0,
    seed: Any = 0,
    force_pose: Any = False,
    samples: Any = 1,
) -> dict[str, Any]:
    """The validated settings of an answer. Raises UserError for the first invalid one."""
    return {
        "max_new_tokens": whole("max_new_tokens", max_new_tokens, 1),
        "sampling": Sampling(temperature, top_p, seed),
        "force_pose": flag("force_pose", force_pose),
        "samples": whole("samples", samples, 1),
    }


class ChatPose:
    """A loaded model. ``chat`` answers questions. Configuration, parameters, processor and body are attributes.

    Calls may come from several threads. Each conversation takes a row of one KV cache, and a call that continues one computes only its new tokens.
    ``engine`` holds the rows: one at first, and as many as the conversations of a batch.
    """

    def __init__(self, config: ModelConfig, params: Params, processor: Processor, body: BodyModel | None = None):
        """params: with stacked layers if ``config.scan_layers`` is True, else with unrolled layers, which decode faster."""
        instance("config", config, ModelConfig, "a chatpose_jax.models.config.ModelConfig")
        instance("params", params, Mapping, "a nested dict of arrays")
        instance("processor", processor, Processor, "a chatpose_jax.processing.processor.Processor")
        instance("body", body, (BodyModel, type(None)), "a smpl_jax.BodyModel, as smpl_jax.load_body gives it")
        self.config, self.params, self.processor = config, params, processor
        self.body = io.load_body() if body is None else body
        # A forced answer follows other words. LLaMA's tokenizer writes the space before it in any case.
        self.engine = Engine(config, params, [*processor.answer_ids(f" {FORCED_ANSWER}"), config.eos_token_id])
        self._check_body()

    def _check_body(self) -> None:
        """Raises UserError for a body that cannot show the poses of the pose head, before the first answer."""
        given = head_output(self.config.head, self.config.text.hidden_size)
        try:
            for_body(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), given), self.body)
        except ValueError as error:
            raise UserError(f"the pose head {self.config.head.name!r} needs another body: {error}") from None

    def __repr__(self) -> str:
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"ChatPose({size:,} parameters, {self.config.param_dtype}, context {self.processor.ids.context}, body {self.body.name!r})"

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        force_pose: bool = False,
        samples: int = 1,
    ) -> Any:
        """Answer a conversation, or a batch of them.

        Args:
            messages: dicts with ``role`` ("system", "user", "assistant") and ``content``: a string, or a list of ``{"type": "text", "text": …}`` and
                ``{"type": "image", "image": path | PIL image | (H, W, 3) array}``. A list of such lists is a batch.
            max_new_tokens: length of the answer at most, a whole number of at least 1.
            temperature, top_p, seed: temperature 0 is greedy decoding; otherwise nucleus sampling, repeatable by its seed. A pose head that draws
                samples uses a key from the same seed. ``Sampling`` lists the allowed values.
            force_pose: True adds a pose at the end of an answer that contains none.
            samples: samples of each pose. More than 1 needs a head that draws. The first sample does not depend on this number.

        Returns:
            A ``Reply``; for a batch, a list of them.

        Raises:
            UserError for malformed messages, files that are not images, settings that are out of range, and conversations that exceed the context.
        """
        batched = isinstance(messages, Sequence) and bool(messages) and not isinstance(messages[0], Mapping)
        settings = self.settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            force_pose=force_pose,
            samples=samples,
        )
        requests = [self.request(each, **settings) for each in (messages if batched else [messages])]  # type: ignore[arg-type]
        for request in requests:
            self.engine.check(request)
        with self.engine.lock:
            self.engine.resize(len(requests))
            answers = [self.engine.submit(request) for request in requests]
        self.engine.finish(answers)
        replies = [self.reply(answer) for answer in answers]
        return replies if batched else replies[0]

    def stream(
        self,
        messages: Messages,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        force_pose: bool = False,
        samples: int = 1,
        every: int = 1,
    ) -> Stream:
        """``chat`` for one conversation, with an answer that comes piece by piece.

        ::

            stream = model.stream(messages)
            for piece in stream:
                print(piece, end="", flush=True)
            stream.reply.poses

        Args:
            every: tokens in each piece, a whole number of at least 1.
            messages, max_new_tokens, temperature, top_p, seed, force_pose, samples: see ``chat``.

        Raises:
            UserError immediately for everything that ``chat`` refuses.
        """
        every = whole("every", every, 1)
        settings = self.settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            force_pose=force_pose,
            samples=samples,
        )
        if isinstance(messages, list | tuple) and messages and isinstance(messages[0], list | tuple):
            raise UserError("messages: stream answers one conversation, found a batch of them; chat answers a batch")
        request = self.request(messages, every=every, **settings)
        self.engine.check(request)
        return Stream(self._pieces(request))

    def _pieces(self, request: Request) -> Generator[str, None, Reply]:
        decoder, begun, told = self.processor.stream(), False, 0
        with self.engine.lock:
            self.engine.resize(1)
            answer = self.engine.submit(request)
        try:
            while not answer.done or told < len(answer.tokens):
                if told == len(answer.tokens):
                    self.engine.work(answer)
                new, told = answer.tokens[told:], len(answer.tokens)
                piece = "".join(decoder.push(i) for i in new if i not in self.config.end_token_ids)
                if piece := piece if begun else piece.lstrip(" "):
                    begun = True
                    yield piece
            if answer.error is not None:
                raise answer.error
            if rest := decoder.flush():
                yield rest
            return self.reply(answer)
        finally:
            if not answer.done:
                self.engine.cancel(answer)

    @property
    def draws(self) -> bool:
        """Whether samples of a pose differ."""
        return head_class(self.config.head.name).draws

    def settings(self, **settings: Any) -> dict[str, Any]:
        """The settings of ``request``, from those of ``chat``. Raises UserError for the first invalid one."""
        checked = check_settings(**settings)
        if checked["samples"] > 1 and not self.draws:
            raise UserError(
                f"samples={checked['samples']}: the pose head {self.config.head.name!r} does not draw samples, so only samples=1 is possible"
            )
        return checked

    def forget(self) -> None:
        """Drops the KV cache of the last conversations."""
        self.engine.forget()

    def request(
        self,
        messages: Messages,
        *,
        sampling: Sampling,
        max_new_tokens: int = 128,
        force_pose: bool = False,
        samples: int = 1,
        every: int = STEPS,
    ) -> Request:
        """What the engine is asked for an answer to a conversation; settings as ``check_settings`` gives them."""
        row = self.processor.encode(messages)
        return Request(row.input_ids, self._keys(row), sampling, row.images, max_new_tokens, force_pose, samples, every)

    def reply(self, answer: Completion) -> Reply:
        """A complete answer."""
        tokens = np.asarray(answer.tokens, np.int32)
        stopped = len(tokens) > 0 and int(tokens[-1]) in self.config.end_token_ids
        ids = tokens[:-1] if stopped else tokens
        samples = [[PosedBody(pose[i], self.body) for i in range(answer.request.samples)] for pose in answer.poses]
        text = self.processor.decode(ids).lstrip(" ")  # a forced answer may stand alone
        return Reply(text, [first for first, *_ in samples], ids, "stop" if stopped else "length", samples)

    def _keys(self, row: Encoded) -> np.ndarray:
        """(T,) int64 prefix-cache keys: the token id, or, at image tokens, a hash of the image."""
        keys = row.input_ids.astype(np.int64)
        if not row.images:
            return keys
        places = np.flatnonzero(row.input_ids == self.config.image_token_id)
        for spots, image in zip(places.reshape(len(row.images), -1), row.images):
            digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=7).digest()
            keys[spots] = -(1 << 32) - int.from_bytes(digest, "little")
        return keys


def load(
    folder: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    body: str | os.PathLike[str] | BodyModel | None = None,
    mesh: jax.sharding.Mesh | None = None,
    head: str | type[PoseHead] | None = None,
    **source: Any,
) -> ChatPose:
    """Load a model folder of ``chatpose train`` or ``chatpose convert``, or PyTorch weights without conversion.

    Args:
        folder: a model folder (with ``config.json``, ``tokenizer/`` and ``params/``), on a disk or in a bucket ("gs://…", "s3://…"); or a folder of a
            training run or demo, which contains one as ``model``; or a checkpoint that ``chatpose convert`` reads. A checkpoint is converted while
            it is read onto the devices, in each call; nothing is written. None: the toy model that comes with the package, with a warning that it
            is one.
        dtype: "float32", "bfloat16" or "float16" for storage and compute; by default that of the folder. But on a CPU that cannot multiply bfloat16
            numbers, a bfloat16 model folder is loaded in float32, which is faster there and takes twice the memory, if that is at most half of what
            is available.
        body: an SMPL, SMPL-H or SMPL-X file (``.npz`` or ``.pkl``); by default the body that comes with the package.
        mesh: devices to shard the model over (``models.sharding``); each reads only its shard. By default one device.
        head: "package.module:Class" or the class, if the pose head is from a package of your own: a folder alone never imports code.
            By default the folder's head, which must be in this package or an entry point of an installed one.
        source: for PyTorch weights, the fields of ``weights.spec.SourceSpec``: ``vision``, ``projector``,
            ``tokenizer``, ``layout``, ``init_missing``, ….

    Raises:
        UserError or ``smpl_jax.errors.BodyFileError``, which say what is missing or wrong, and what to do.
    """
    from chatpose_jax.weights.folder import (
        TOKENIZER,
        another_head,
        find_model,
        is_model_folder,
        is_source,
        load_model_config,
        load_params,
    )

    path = (str, os.PathLike)
    instance("folder", folder, (*path, type(None)), "a path, or None for the toy model of the package")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype must be {', '.join(DTYPES)} or None, found {dtype!r:.100}")
    instance("body", body, (*path, BodyModel, type(None)), "a path, a smpl_jax.BodyModel or None")
    instance("mesh", mesh, (jax.sharding.Mesh, type(None)), "a jax.sharding.Mesh or None")
    instance("head", head, (str, type, type(None)), "'package.module:Class', the class or None")
    _check_options(source)
    if folder is None:
        warnings.warn(TOY, stacklevel=2)
    folder = find_model(DEMO if folder is None else folder)
    shape = body if isinstance(body, BodyModel) else io.load_body(body)
    if source or (is_source(folder) and not is_model_folder(folder)):
        config, params, processor = _load_source(folder, mesh, dtype=dtype, head=head, **source)
    else:
        config = load_model_config(folder, head)
        processor = Processor.load(folder / TOKENIZER, config)
        with another_head(folder, config):
            dtype = _faster_dtype(config, mesh) if dtype is None else dtype
            if dtype is not None:
                config = config.replace(dtype=dtype, param_dtype=dtype)
            abstract = abstract_params(config.replace(scan_layers=True))
            params = load_params(folder, abstract if mesh is None else place(abstract, mesh))
    return ChatPose(config.replace(scan_layers=False), unstack_layers(params, consume=True), processor, shape)


def _faster_dtype(config: ModelConfig, mesh: jax.sharding.Mesh | None) -> str | None:
    """The dtype that these devices compute a model folder's answers faster in, if there is one and memory suffices."""
    with on_mesh(mesh):
        dtype = fast_dtype(config.dtype)
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    return None if dtype == config.dtype or 4 * size > available_memory() / 2 else dtype


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises UserError for an option of ``load`` that is not a field of ``SourceSpec``."""
    from chatpose_jax.weights.spec import SourceSpec

    known = {field.name for field in dataclasses.fields(SourceSpec)} - {"path"} | {"body", "mesh", "head"}
    if unknown := [name for name in options if name not in known]:
        raise UserError(f"load has no option {unknown[0]!r}{did_you_mean(unknown[0], known)}")


def _load_source(
    folder: Location, mesh: jax.sharding.Mesh | None, **options: Any
) -> tuple[ModelConfig, Params, Processor]:
    from chatpose_jax.weights.convert import load_source, write_processor
    from chatpose_jax.weights.folder import is_model_folder
    from chatpose_jax.weights.spec import SourceSpec

    if is_model_folder(folder):
        named = sorted(set(options) - {"dtype", "head"})
        raise UserError(f"{folder} is a complete model folder; {', '.join(named)} is only for PyTorch weights")
    plan, params = load_source(SourceSpec(str(folder), **options), mesh=mesh)
    with tempfile.TemporaryDirectory() as temporary:
        return plan.config, params, write_processor(plan, Path(temporary))
