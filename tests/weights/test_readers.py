"""Files read by byte range against torch and safetensors; damaged and hostile files refused with one clear error each."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from chatpose_jax.errors import UserError
from chatpose_jax.weights.folder import read_folder
from chatpose_jax.weights.hashes import read_sums
from chatpose_jax.weights.readers import (
    checkpoint,
    open_checkpoint,
    read_json_object,
    read_safetensors_header,
    read_torch_header,
)
from chatpose_jax.weights.tokens import read_tokens

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int8", "uint8", "bool"]


def as_numpy(tensor: Any) -> np.ndarray:
    return (
        tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", ["safetensors", "bin"])
def test_boxes_of_tensors_equal_torch(tmp_path: Path, fmt: str, dtype: str) -> None:
    tensors = {
        "matrix": (torch.randn(17, 9) * 50).to(getattr(torch, dtype)),
        "four": (torch.randn(4, 3, 2, 5) * 50).to(getattr(torch, dtype)),
        "scalar": torch.tensor(3).to(getattr(torch, dtype)),
        "empty": torch.zeros(0, 4).to(getattr(torch, dtype)),
    }
    file = tmp_path / f"model.{fmt}"
    save_file(tensors, file) if fmt == "safetensors" else torch.save(tensors, file)
    checkpoint = open_checkpoint(file)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        found = checkpoint.tensors[name].read()
        assert found.dtype == as_numpy(tensor).dtype
        assert found.shape == tuple(tensor.shape)
        assert found.tobytes() == as_numpy(tensor).tobytes()
    box = (slice(3, 11), slice(2, 7))
    assert checkpoint.tensors["matrix"].read(box).tobytes() == as_numpy(tensors["matrix"])[box].tobytes()
    box4 = (slice(1, 3), slice(0, 3), slice(1, 2), slice(2, 5))
    assert checkpoint.tensors["four"].read(box4).tobytes() == as_numpy(tensors["four"])[box4].tobytes()


def test_views_and_shared_storages_of_torch_files(tmp_path: Path) -> None:
    """Transposed, sliced and tied tensors are stored once, with strides and offsets."""
    base = torch.arange(60.0).reshape(6, 10)
    state = OrderedDict(
        t=base.T, rows=base[2:4], columns=base[:, 3:5], tied=base, parameter=torch.nn.Parameter(base[1])
    )
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in state.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), tensor.detach().numpy())
    np.testing.assert_array_equal(checkpoint.tensors["t"].read((slice(2, 5), slice(1, 4))), base.T[2:5, 1:4].numpy())


def test_wrappers_and_leaves_that_are_no_tensors(tmp_path: Path) -> None:
    state = {"module": {"w": torch.ones(2, 2), "step": 7, "name": "x", "none": None}, "epoch": 3}
    torch.save(state, tmp_path / "m.bin")
    assert set(open_checkpoint(tmp_path / "m.bin").tensors) == {"w"}


def test_reading_maps_only_what_is_asked(tmp_path: Path) -> None:
    """A file that claims one terabyte (sparse) is read at its end without reading the rest."""
    rows, columns = 1 << 20, 1 << 18
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}}
    ).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        try:
            out.truncate(8 + len(header) + 4 * rows * columns)
        except OSError:
            pytest.skip("the file system has no sparse files of this size")
        out.seek(-8, os.SEEK_END)
        out.write(np.array([1.5, 2.5], np.float32).tobytes())
    last = open_checkpoint(file).tensors["w"].read((slice(rows - 1, rows), slice(columns - 2, columns)))
    np.testing.assert_array_equal(last, [[1.5, 2.5]])


def safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        ({}, 1 << 60, "give a header of 1152921504606846976 bytes"),
        (b"{", None, "announce a header of 1 bytes|damaged"),
        (b"not json", None, "header is damaged"),
        (b'{"a": 1, "a": 2}', None, "a name occurs twice"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, None, "cut off: tensor 'w' ends at"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, None, "does not have the size of bytes 0..8"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}, None, "not integers from 0"),
        ({"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, None, "dtype 'F99'"),
        ({"w": {"shape": [1]}}, None, "header is damaged"),
        (b'{"w": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 4]}}', None, "header is damaged"),
        (
            {"w": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 1 << 126]}},
            None,
            "not integers from 0",
        ),
        ({"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}, None, "cut off"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, header: Any, length: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_safetensors_header(safetensors(tmp_path / "m.safetensors", header, length=length))


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 8]} for name, at in (("a", 0), ("b", 4))}
    with pytest.raises(UserError, match="tensors 'a' and 'b' overlap at byte"):
        read_safetensors_header(safetensors(tmp_path / "m.safetensors", header, bytes(12)))
    header["b"]["data_offsets"] = [8, 16]
    assert len(read_safetensors_header(safetensors(tmp_path / "m.safetensors", header, bytes(16)))) == 2


class Hostile:
    """Unpickled naively, it would create the file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path: Path, nested: bool) -> None:
    trap = Hostile(tmp_path / "owned")
    torch.save({"w": torch.ones(2), "x": [trap] if nested else trap}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"refused: the pickle refers to \w+\.mkdir"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def archive(path: Path, data: bytes, *, compress: bool = False, byteorder: bytes = b"little") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as out:
        out.writestr("m/data.pkl", data)
        out.writestr("m/byteorder", byteorder)
        out.writestr("m/data/0", b"\0" * 64)
    return path


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__"])
def test_builtins_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="refused"):
        read_torch_header(archive(tmp_path / "m.bin", f"cbuiltins\n{name}\n.".encode()))


def test_a_pickle_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD writes attributes; it must reach only objects made for this file."""
    poison = b"\x80\x02ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeK\x01sb."
    with pytest.raises(UserError):
        checkpoint = open_checkpoint(archive(tmp_path / "poison.bin", poison))
        assert not checkpoint.tensors
    torch.save({"w": torch.arange(4.0)}, tmp_path / "good.bin")
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "good.bin").tensors["w"].read(), [0, 1, 2, 3])


BOMBS = {
    "LONG_BINPUT of a memo of 2**26 slots": b"\x80\x02}r" + struct.pack("<I", 1 << 26) + b".",
    "BYTEARRAY8 of 1 GiB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b".",
    "BINBYTES8 of 1 GiB": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 30) + b".",
    "FRAME of 1 GiB": b"\x80\x04\x95" + struct.pack("<Q", 1 << 30) + b"}.",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_pickle_cannot_allocate_more_than_it_holds(tmp_path: Path, bomb: bytes) -> None:
    file = archive(tmp_path / "m.bin", bomb)
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):
            assert not read_torch_header(file)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_large_byteorder_is_not_read(tmp_path: Path) -> None:
    """64 MiB of zeros, deflated to 64 kB."""
    file = archive(tmp_path / "m.bin", pickle.dumps({}), compress=True, byteorder=bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="big-endian"):
            read_torch_header(file)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_persistent_ids_are_checked(tmp_path: Path) -> None:
    """Each is ("storage", type, key, device, count): a type that is none, a key that is no text."""
    for kind, key in ((b"ctorch\nSize\n", b"X\x01\0\0\x000"), (b"ctorch\nFloatStorage\n", b"]")):
        pid = b"(X\x07\0\0\0storage" + kind + key + b"X\x03\0\0\0cpuK\x01tQ"
        with pytest.raises(UserError, match="an unknown persistent id"):
            read_torch_header(archive(tmp_path / "m.bin", b"\x80\x02" + pid + b"."))


def test_damaged_torch_files(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "good.bin")
    whole = (tmp_path / "good.bin").read_bytes()
    bad = tmp_path / "bad.bin"
    cases = {
        "not a complete zip archive": whole[: len(whole) // 2],
        "before PyTorch 1.6": pickle.dumps({"w": 1}),
    }
    for message, data in cases.items():
        bad.write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_checkpoint(bad)
    with pytest.raises(UserError, match="the archive is damaged"):
        open_checkpoint(archive(bad, b"\x80\x02garbage"))
    with pytest.raises(UserError, match="big-endian"):
        open_checkpoint(archive(bad, pickle.dumps({}), byteorder=b"big"))
    torch.save({"w": torch.ones(4)}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before PyTorch 1.6"):
        open_checkpoint(tmp_path / "legacy.bin")


def test_tensors_outside_their_storage_are_refused(tmp_path: Path) -> None:
    """A shape that claims more than the storage holds would read the neighbour's bytes."""
    torch.save({"w": torch.ones(16), "secret": torch.full((16,), 7.0)}, tmp_path / "m.bin")
    with zipfile.ZipFile(tmp_path / "m.bin") as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    # BININT1 16 as the first size: claim 32 elements instead.
    members[name] = members[name].replace(b"K\x10\x85", b"K\x20\x85", 1)
    with zipfile.ZipFile(tmp_path / "bad.bin", "w") as out:
        for member, data in members.items():
            out.writestr(member, data)
    with pytest.raises(UserError, match="does not fit its storage of 64 bytes"):
        open_checkpoint(tmp_path / "bad.bin")


FLOATS = b"X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10"


def tensor_of(shape: bytes, strides: bytes) -> bytes:
    """A pickle of one tensor ``w`` over 16 floats; shape and strides as opcodes of a tuple."""
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n((" + FLOATS + b"tQK\0" + shape + strides + b"\x88}tR"
    return b"\x80\x02}X\x01\0\0\0w" + rebuilt + b"s."


GIANT = b"\x8b" + struct.pack("<i", 4000) + b"\x7f" * 4000  # LONG4: 9 600 digits, more than Python prints
NO_SIZES = {
    "(4, 4) by (1,)": (b"K\x04K\x04\x86", b"K\x01\x85"),
    "giant size": (GIANT + b"\x85", b"K\x01\x85"),
    "giant stride": (b"K\x10\x85", GIANT + b"\x85"),
    "2^63": (b"\x8a\x09" + bytes(7) + b"\x80\0\x85", b"K\x01\x85"),
    "negative": (b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
    "text": (b"X\x02\0\0\x0016\x85", b"K\x01\x85"),
    "a fraction": (b"G@0\0\0\0\0\0\0\x85", b"K\x01\x85"),
    "100 axes": (b"(" + b"K\x01" * 100 + b"t", b"(" + b"K\x01" * 100 + b"t"),
}


@pytest.mark.parametrize(("shape", "strides"), NO_SIZES.values(), ids=NO_SIZES)
def test_sizes_that_no_tensor_has_are_refused(tmp_path: Path, shape: bytes, strides: bytes) -> None:
    assert read_torch_header(archive(tmp_path / "m.bin", tensor_of(b"K\x10\x85", b"K\x01\x85")))["w"].shape == (16,)
    with pytest.raises(UserError, match="sizes, strides or offset are not integers from 0"):
        read_torch_header(archive(tmp_path / "m.bin", tensor_of(shape, strides)))


@pytest.mark.parametrize("number", ["9" * 4300, "1" + "0" * 19, "1.5", '"4"', "true", "-1"])
@pytest.mark.parametrize("where", ["shape", "data_offsets"])
def test_sizes_of_safetensors_are_bounded(tmp_path: Path, where: str, number: str) -> None:
    record = {"shape": "4", "data_offsets": "16"} | {where: number}
    header = f'{{"w": {{"dtype": "F32", "shape": [{record["shape"]}], "data_offsets": [0, {record["data_offsets"]}]}}}}'
    with pytest.raises(UserError, match="not integers from 0 to 2\\^63 - 1; the header is damaged"):
        read_safetensors_header(safetensors(tmp_path / "m.safetensors", header.encode(), bytes(16)))


def test_an_expanded_tensor_is_refused_as_such(tmp_path: Path) -> None:
    """torch reads it; here a few bytes would become a file of any size. What its storage has room for is read."""
    state = {"w": torch.arange(4.0).expand(3, 4), "v": torch.arange(4.0)}
    torch.save(state, tmp_path / "m.bin")
    with pytest.raises(
        UserError, match=r"'w' of shape \(3, 4\) and strides \(0, 1\) is expanded.*save tensor.contiguous"
    ):
        open_checkpoint(tmp_path / "m.bin")
    twice = torch.arange(16.0)[:4].expand(3, 4)
    torch.save({"w": twice}, tmp_path / "m.bin")
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "m.bin").tensors["w"].read(), twice.numpy())


def nested_tuple(depth: int) -> bytes:
    """Opcodes of a tuple that holds itself twice, and so on: a few bytes a level, twice the text and the time to hash."""
    return b"(tq\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(depth))


def test_names_of_tensors_are_short_texts(tmp_path: Path) -> None:
    tensor = tensor_of(b"K\x10\x85", b"K\x01\x85")[len(b"\x80\x02}X\x01\0\0\0w") : -len(b"s.")]
    for name, message in (
        (nested_tuple(100), "damaged.*the pickle has a tuple as a key"),
        (b"K\x05", "a tensor has a int as its name; expected text"),
        (b"X" + struct.pack("<I", 2000) + b"w" * 2000, "a tensor's name has 2000 characters; expected 1000 at most"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            read_torch_header(archive(tmp_path / "m.bin", b"\x80\x02}" + name + tensor + b"s."))
        assert len(str(refused.value)) < 1000
    for opcodes in (
        b"\x8f(" + nested_tuple(100) + b"\x90.",
        b"(" + nested_tuple(100) + b"\x91.",
        b"(" + nested_tuple(100) + b"Nd.",
    ):
        with pytest.raises(UserError, match="damaged"):
            read_torch_header(archive(tmp_path / "m.bin", b"\x80\x04" + opcodes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch._neg_view(torch.arange(4.0)), r"the lazy bit 'neg'.*\.resolve_neg\(\)"),
        (lambda: torch.nn.Parameter(torch._neg_view(torch.arange(4.0))), "the lazy bit 'neg'"),
        (lambda: torch.arange(4.0).to(torch.complex64).conj().imag, "the lazy bit 'neg'|a complex tensor"),
        (lambda: torch.arange(4.0).to(torch.complex64).conj(), "a complex tensor"),
        (lambda: torch.arange(4.0).to_sparse(), "a sparse tensor"),
        (lambda: torch.zeros(4, dtype=torch.float8_e4m3fn), "a tensor of a newer dtype"),
        (lambda: torch.zeros(4, dtype=torch.uint16), "a tensor of a newer dtype"),
        (lambda: torch.quantize_per_tensor(torch.arange(4.0), 0.1, 0, torch.qint8), "a quantised tensor"),
        (lambda: torch.empty(4, device="meta"), "a tensor without values"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "a nested tensor"),
        (lambda: with_attribute(torch.nn.Parameter(torch.arange(4.0))), "a parameter with attributes of its own"),
        (lambda: with_attribute(torch.arange(4.0)), "a class, or with attributes, of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_a_tensor_of_torch_may_be_besides_is_refused_by_name(tmp_path: Path, make: Any, message: str) -> None:
    torch.save({"v": torch.ones(2), "w": make()}, tmp_path / "m.bin")
    with pytest.raises(UserError, match=f"contains .*({message}).*, which is not supported"):
        open_checkpoint(tmp_path / "m.bin")


def with_attribute(tensor: Any) -> Any:
    tensor.note = "x"
    return tensor


def test_what_does_not_change_a_tensors_values_is_read_over(tmp_path: Path) -> None:
    """requires_grad, a hook (which torch does not write), a parameter without gradient."""
    leaf = torch.arange(4.0, requires_grad=True)
    hooked = torch.arange(4.0, requires_grad=True)
    hooked.register_hook(lambda gradient: gradient)
    frozen = torch.nn.Parameter(torch.arange(4.0), requires_grad=False)
    with pytest.warns(UserWarning, match="hooks"):
        torch.save({"leaf": leaf, "hooked": hooked, "frozen": frozen}, tmp_path / "m.bin")
    for entry in open_checkpoint(tmp_path / "m.bin").tensors.values():
        np.testing.assert_array_equal(entry.read(), [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (b"\x88}X\x03\0\0\0negI01\ns", "lazy bit 'neg'"),
        (b"\x88}X\x04\0\0\0conjI00\ns", "lazy bit 'conj'"),  # torch asks whether it is there, not what it says
        (b"\x88}X\x05\0\0\0otherI01\ns", "metadata of an unknown kind"),
        (b"\x88K\x01", "metadata of an unknown kind"),
        (b"}X\x01\0\0\0aK\x01s", "backward hooks"),
    ],
)
def test_metadata_of_a_tensor_is_not_passed_over(tmp_path: Path, tail: bytes, message: str) -> None:
    """The arguments behind the strides: requires_grad, hooks, metadata."""
    hooks = b"" if tail.startswith(b"}") else b"}"
    plain = tensor_of(b"K\x10\x85", b"K\x01\x85")
    data = plain.replace(b"\x88}tR", b"\x88" + hooks + tail.removeprefix(b"\x88") + b"tR")
    with pytest.raises(UserError, match=message):
        read_torch_header(archive(tmp_path / "m.bin", data))


def test_a_state_that_holds_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["model"] = state
    with pytest.raises(UserError, match="the archive is damaged"):
        read_torch_header(archive(tmp_path / "m.bin", pickle.dumps(state, 2)))


def test_json_that_is_too_deep_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep.json").write_text('{"a":' * 200_000)
    with pytest.raises(UserError, match=r"deep\.json: not readable as JSON"):
        read_json_object(tmp_path / "deep.json")
    monkeypatch.setattr(checkpoint, "_MAX_SETTINGS", 1000)
    with pytest.raises(UserError, match="too large for a settings file; expected at most 1000 bytes"):
        read_json_object(tmp_path / "deep.json")


def test_sums_of_a_whole_tree(tmp_path: Path) -> None:
    """As ``sha256sum`` over many folders: the file itself wins over its namesakes."""
    one, two = "1" * 64, "2" * 64
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{one}  ./model.safetensors\n{two}  epoch-2/model.safetensors\n{two} *epoch-2/extra.bin\n")
    assert read_sums(sums) == {"model.safetensors": one, "extra.bin": two}


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(16)}, tmp_path / "m.bin")
    with (
        zipfile.ZipFile(tmp_path / "m.bin") as source,
        zipfile.ZipFile(tmp_path / "z.bin", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for info in source.infolist():
            out.writestr(info.filename, source.read(info))
    with pytest.raises(UserError, match="compressed"):
        open_checkpoint(tmp_path / "z.bin")


def index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_folders_and_indices(tmp_path: Path) -> None:
    one, two = torch.ones(2), torch.zeros(3)
    save_file({"a": one}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": two, "a": one}, tmp_path / "model-00002-of-00002.safetensors")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]

    index(tmp_path, {"a": files[0], "b": files[1]})
    with pytest.raises(UserError, match=f"'a' is in both {files[0]} and {files[1]}"):
        open_checkpoint(tmp_path)

    save_file({"b": two}, tmp_path / files[1])
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}

    index(tmp_path, {"a": files[0], "b": "model-00003-of-00003.safetensors"})
    with pytest.raises(
        UserError, match=r"1 of the 2 files that it lists are missing: model-00003-of-00003.safetensors"
    ):
        open_checkpoint(tmp_path)
    index(tmp_path, {"a": files[0], "b": files[1], "c": files[1]})
    with pytest.raises(UserError, match="lists 1 tensors that its files do not contain: c"):
        open_checkpoint(tmp_path)
    index(tmp_path, {"a": "../outside.safetensors"})
    with pytest.raises(UserError, match="outside its folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        open_checkpoint(tmp_path)


def test_one_file_and_an_index_are_two_sets_of_weights(tmp_path: Path) -> None:
    """transformers reads the file, vLLM the index: a merged model that was saved into its base's folder."""
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": torch.zeros(2)}, tmp_path / shards[0])
    save_file({"b": torch.zeros(2)}, tmp_path / shards[1])
    index(tmp_path, dict(zip("ab", shards)))
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"two sets of weights: model\.safetensors.* and the shards of model\.safetensors\.index\.json"
    ):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path / "model.safetensors").tensors["a"].read().tolist() == [1, 1]
    assert open_checkpoint(tmp_path / "model.safetensors.index.json").tensors["a"].read().tolist() == [0, 0]
    index(tmp_path, dict.fromkeys("ab", "model.safetensors"))
    assert open_checkpoint(tmp_path).tensors["a"].read().tolist() == [1, 1], "the index says the same"


@pytest.mark.parametrize("single", [True, False], ids=["one file", "shards"])
def test_safetensors_come_before_bin_as_in_transformers(tmp_path: Path, single: bool) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 8,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.save_pretrained(tmp_path, max_shard_size="5GB" if single else "1KB")
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save(other, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), tensor.numpy())
    assert len(checkpoint.files) == 1 or not single
    assert checkpoint.unread == (tmp_path / "pytorch_model.bin",)


def test_weights_that_config_json_names_are_followed_or_refused(tmp_path: Path) -> None:
    for name in ("model.safetensors", "other.safetensors"):
        save_file({"a": torch.zeros(2)}, tmp_path / name)
    (tmp_path / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
    with pytest.raises(
        UserError, match=r"transformers_weights='other\.safetensors' names other weights than model\.safetensors"
    ):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"transformers_weights": "model.safetensors"}')
    assert open_checkpoint(tmp_path).files == (tmp_path / "model.safetensors",)


def test_two_projectors(tmp_path: Path) -> None:
    for name in ("mm_projector.safetensors", "mm_projector.bin"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"two projectors, mm_projector\.safetensors and mm_projector\.bin; move one"):
        open_checkpoint(tmp_path)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9976578928\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LFS, "a Git LFS pointer, not the file itself; run git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>", "an HTML page instead of the file"),
        (b"<html>" + b"x" * 1000, "an HTML page instead of the file"),
        (
            b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            "an XML page instead of the file",
        ),
        (b"GGUF\x03\0\0\0", "a GGUF file of llama.cpp under another name"),
    ],
)
def test_files_that_are_something_else_are_called_by_name(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: {message}"):
        read_json_object(tmp_path / name) if name == "config.json" else open_checkpoint(tmp_path)


def test_a_tokenizer_that_was_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(LFS)
    with pytest.raises(UserError, match=r"tokenizer\.model: a Git LFS pointer"):
        read_tokens(tmp_path)


def test_a_cache_of_the_hub_names_the_snapshot(tmp_path: Path) -> None:
    root = tmp_path / "models--llava-hf--llava-1.5-7b-hf"
    for revision in ("aaa", "bbb"):
        (root / "snapshots" / revision).mkdir(parents=True)
    for read in (open_checkpoint, read_folder, read_tokens):
        with pytest.raises(
            UserError, match=f"Hugging Face's cache; name {root}/snapshots/aaa or {root}/snapshots/bbb$"
        ):
            read(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("bbb")
    for path in (root, root / "snapshots"):
        with pytest.raises(UserError, match=f"Hugging Face's cache; name {root}/snapshots/bbb$"):
            open_checkpoint(path)
    with pytest.raises(UserError, match="name a snapshot in it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("__0_0.distcp", r"dcp_to_torch .* model\.bin"),
        ("zero_to_fp32.py", r"a DeepSpeed checkpoint: to convert it, run python .*/zero_to_fp32\.py .* OUT"),
        ("model-Q4_K_M.gguf", "model-Q4_K_M.gguf: not a GGUF file"),
    ],
)
def test_folders_of_other_programs_are_called_by_name(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights found"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        open_checkpoint(tmp_path / "absent")
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(UserError, match=r"expected one of .safetensors"):
        open_checkpoint(tmp_path / "model.txt")
