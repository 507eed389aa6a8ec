"""Files from strangers: honest ones are read as their own programs read them, hostile and damaged ones are one error."""

import argparse
import collections
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from chatpose_jax.data.readers import untrusted
from chatpose_jax.errors import UserError

PERSON = {
    "keypoints_2d": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">i4"),
    "has_body_pose": np.array(1.0),
    "scalar": np.float32(2.5),
    "flag": np.bool_(True),
    "extra_info": {"fitting_loss": np.array({"reprojection_loss": np.float64(12.5)}, dtype=object)},
    "objects": np.array([[{"a": 1}, None], ["x", np.zeros(2)]], dtype=object),
    "names": np.array(["a", "bc"]),
    "bytes": np.array([b"a", b"bc"]),
    "empty": np.zeros((0, 3)),
    "nothing": None,
    "big number": 2**80,
    "raw": b"\x00\xff",
    "buffer": bytearray(b"ab"),
    "set": {1, 2},
    "frozen": frozenset("ab"),
    "tuple": (1, 2.5, "é", [True, False]),
    "ordered": collections.OrderedDict(a=1),
}


def equal(a, b):
    if isinstance(b, np.ndarray):
        assert isinstance(a, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape
        return all(equal(x, y) for x, y in zip(a.ravel(), b.ravel()))
    if isinstance(b, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in b)
    if isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b and (type(a) is type(b) or isinstance(b, bytearray))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values_of_every_protocol(protocol):
    people = [PERSON, PERSON]
    assert equal(untrusted.load_pickle(pickle.dumps(people, protocol), "x"), [{**PERSON, "ordered": {"a": 1}}] * 2)


def test_python_2_pickle():
    # {"sequence": "caf\xe9", "poses": [array([1., 2.])]} as Python 2.7 with NumPy 1 writes it, protocol 2
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10" + struct.pack("<2d", 1, 2) + b"tb"
    )
    data = b"\x80\x02}(U\x08sequenceU\x04caf\xe9U\x05poses](" + array + b"eu."
    assert equal(pickle.loads(data, encoding="latin1"), {"sequence": "café", "poses": [np.array([1.0, 2.0])]})
    assert equal(untrusted.load_pickle(data, "x"), {"sequence": "café", "poses": [np.array([1.0, 2.0])]})


class Runs:
    """A pickle of this writes a file when it is loaded in the usual way."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile(path):
    return Runs(os.system, f"touch {path}")


@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_runs_nothing(tmp_path, protocol):
    mark = tmp_path / "mark"
    data = pickle.dumps([{"body_pose": hostile(mark)}], protocol)
    with pytest.raises(UserError, match=r"^here: the pickle refers to (posix|nt)\.system.*nothing was run"):
        untrusted.load_pickle(data, "here")
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists()  # so the file was hostile


def test_names_that_read_only_plain_values(tmp_path):
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')"
    for call in (
        Runs(eval, code),
        Runs(exec, code),
        Runs(getattr, "", "join"),
        Runs(open, str(mark), "w"),
        Runs(np.load, "x"),
    ):
        with pytest.raises(UserError, match=r"refers to"):
            untrusted.load_pickle(pickle.dumps(call), "x")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "cut off"),
        (b"\x80\x04]", "cut off"),
        (pickle.dumps(PERSON)[:-20], "cut off"),
        (b"not a pickle", "damaged"),
        (b"c__builtin__\nbytearray\n(J\xff\xff\xff\x7ftR.", "bytes of a int"),
        (b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00.", "cut off"),  # a bytearray of 64 GB
        (b"]q\x00h\x00a.", "contains itself"),
        (b"c__builtin__\nset\n.", "holds a sealed"),
        (pickle.dumps({(1, 2): 3}), "tuple as a key"),
        # lists of twice the same list, 60 deep: 2^60 values in 400 bytes
        (b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(60)) + b".", "more than 10,000,000 values"),
        (b"(" * 5000 + b"l" * 5000 + b".", "recursion"),
        (b"]0" * 80 + b"N.", "more than 100 opcodes"),
        (pickle.dumps(np.zeros(3))[:-3].replace(b"K\x03\x85", b"K\x63\x85") + b"tb.", "shape|damaged"),
    ],
)
def test_damaged_pickles(data, match, monkeypatch):
    if "opcodes" in match:
        monkeypatch.setattr(untrusted, "MAX_VALUES", 100)
    with pytest.raises(UserError, match=match):
        untrusted.load_pickle(data, "x")


def test_a_pickle_is_bounded():
    with pytest.raises(UserError, match="the limit is 100"):
        untrusted.load_pickle(pickle.dumps(np.zeros(100)), "x", limit=100)


def npz(path, compress=True, **arrays):
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_npz_with_objects(tmp_path, compress):
    arrays = {
        "imgname": np.array([b"a.jpg", b"b.jpg"]),
        "scale": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "info": np.array([{"x": np.arange(3)}, {}], dtype=object),
        "alone": np.array({"a": 1}, dtype=object),
        "empty": np.zeros((0, 2)),
    }
    path = npz(tmp_path / "a.npz", compress, **arrays)
    assert equal(untrusted.load_npz(path), arrays)
    assert equal(untrusted.load_npz(path.read_bytes(), ["scale", "absent"], "x"), {"scale": arrays["scale"]})
    untrusted.load_npz(path)["scale"][0] = 0  # can be written to


def test_npz_that_would_run_code(tmp_path):
    mark = tmp_path / "mark"
    path = npz(tmp_path / "a.npz", good=np.zeros(2), bad=np.array([hostile(mark)], dtype=object))
    assert equal(untrusted.load_npz(path, ["good"]), {"good": np.zeros(2)})
    with pytest.raises(UserError, match=r"a\.npz: bad: the pickle refers to"):
        untrusted.load_npz(path)
    assert not mark.exists()


def test_npz_bombs_and_damage(tmp_path):
    path = npz(tmp_path / "bomb.npz", zeros=np.zeros(2**24, np.uint8))
    assert path.stat().st_size < 2**16
    tracemalloc.start()
    with pytest.raises(UserError, match=r"zeros would unpack to 16,777,\d+ bytes; the limit is 1,000,000"):
        untrusted.load_npz(path, limit=10**6)
    # The directory of the zip says that it is small.
    data = path.read_bytes()
    lies = data.replace(struct.pack("<I", 2**24 + 128), struct.pack("<I", 1000))
    assert lies != data
    with pytest.raises(UserError, match=r"bomb|the npz"):
        untrusted.load_npz(lies, limit=10**6)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    with pytest.raises(UserError, match=r"expected an \.npz"):
        untrusted.load_npz(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"expected an \.npz"):
        untrusted.load_npz(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"none\.npz: cannot be read \(No such file"):
        untrusted.load_npz(tmp_path / "none.npz")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(tmp_path / "promise.npz", "w") as file:
        file.writestr("a.npy", header.getvalue() + bytes(8))
    with pytest.raises(UserError, match="promises float64"):
        untrusted.load_npz(tmp_path / "promise.npz")


def test_npz_of_other_packers(tmp_path):
    """LZMA and bzip2 unpack without a bound. NumPy reads them and does not write them."""
    member = io.BytesIO()
    np.save(member, np.zeros(10))
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as file:
            file.writestr("a.npy", member.getvalue())
        assert equal(dict(np.load(tmp_path / "a.npz")), {"a": np.zeros(10)})
        with pytest.raises(UserError, match="a is packed in a way that NumPy does not write"):
            untrusted.load_npz(tmp_path / "a.npz")


def test_text_of_an_npz_is_text(tmp_path):
    for order in "<>":
        text = np.array(["é", "bc"]).astype(f"{order}U2")
        path = npz(tmp_path / "a.npz", False, a=text)
        assert equal(untrusted.load_npz(path), {"a": text})
        member = io.BytesIO()
        np.save(member, text)
        with zipfile.ZipFile(tmp_path / "b.npz", "w") as file:
            contents = bytearray(member.getvalue())
            contents[-16:-12] = b"\xff" * 4
            file.writestr("a.npy", bytes(contents))
        with pytest.raises(UserError, match="no text"):
            untrusted.load_npz(tmp_path / "b.npz")


def test_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"é": [1, 2]}', "utf-8")
    assert untrusted.read_json(path) == {"é": [1, 2]}
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert untrusted.read_json(path) == {"é": [1, 2]}
    for data, match in (
        (b"{", "expected JSON"),
        (b"\xff\xfe\xfa", "expected JSON"),
        (b"[" * 10**6, "nested too deeply"),
        (gzip.compress(b" " * 10**6), "more than 1,000 bytes"),
        (gzip.compress(json.dumps(list(range(1000))).encode())[:-100], "damaged or cut off"),
        (b"1" * 10**5, "more than 1,000 bytes"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=match):
            untrusted.read_json(path, limit=10**7 if "nested" in match else 1000 if "more" in match else 10**6)
    with pytest.raises(UserError, match="No such file"):
        untrusted.read_json(tmp_path / "none.json")


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}')
    for _ in range(2):
        lines = [(number, untrusted.parse_json(line, "x")) for number, line in untrusted.read_lines(path)]
        assert lines == [(1, {"a": 1}), (3, {"a": 2})]
        path.write_bytes(gzip.compress(path.read_bytes()))
    path.write_bytes(gzip.compress(b"x" * 10**6))
    with pytest.raises(UserError, match="line 1 has more than 1,000 bytes"):
        list(untrusted.read_lines(path, limit=1000))


def write_tar(path, *members, end=True):
    with tarfile.open(path, "w") as tar:
        for name, contents in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(contents) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(contents))
    return path


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def test_tar_samples(tmp_path):
    long = "x" * 150  # longer than the field of the header
    path = write_tar(
        tmp_path / "a.tar",
        special("coco", tarfile.DIRTYPE),
        ("coco/a.b/1.jpg", b"1"),
        ("coco/a.b/1.data.pyd", b"2"),
        ("coco/a.b/1.detection.npz", b"3"),
        (f"coco/{long}/2.JPG", b"4"),
        (f"coco/{long}/2.data.pyd", b"5"),
        ("coco/._2.jpg", b"of a Mac"),
        ("coco/.jpg", b"hidden"),
        ("readme", b"6"),
    )
    assert list(untrusted.tar_samples(path, ("jpg", "data.pyd"))) == [
        ("coco/a.b/1", {"jpg": b"1", "data.pyd": b"2"}),
        (f"coco/{long}/2", {"jpg": b"4", "data.pyd": b"5"}),
    ]


@pytest.mark.parametrize(
    "member",
    [
        ("/tmp/x.jpg", b""),
        ("../x.jpg", b""),
        ("a/../../x.jpg", b""),
        ("a\\..\\x.jpg", b""),
        ("C:\\x.jpg", b""),
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("link.jpg", tarfile.LNKTYPE, "a.jpg"),
        special("device.jpg", tarfile.CHRTYPE),
        special("pipe.jpg", tarfile.FIFOTYPE),
        special("sparse.jpg", tarfile.GNUTYPE_SPARSE),
    ],
    ids=lambda member: getattr(member[0], "name", member[0]),
)
def test_tars_that_reach_out_of_their_folder(tmp_path, member):
    path = write_tar(tmp_path / "a.tar", ("a.jpg", b"1"), member)
    samples = untrusted.tar_samples(path, ("jpg",))
    with pytest.raises(UserError, match=r"a\.tar: .*(leads out of the tar|is a link, a device or a sparse file)"):
        list(samples)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


def test_a_tar_cut_anywhere_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar", ("1.jpg", b"1" * 1000), ("2.jpg", b"2" * 700), ("3.jpg", b"3"))
    data = path.read_bytes()
    content = 6 * 512 + 1024  # then come the blocks of zeros
    assert len(list(untrusted.tar_members(path))) == 3
    for size in [*range(0, content, 128), content]:
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"a\.tar: the tar is cut off or damaged"):
            list(untrusted.tar_members(path))
    path.write_bytes(data[:1536] + b"?" * 512 + data[2048:])  # the second header
    with pytest.raises(UserError, match="damaged"):
        list(untrusted.tar_members(path))
    with pytest.raises(UserError, match="No such file"):
        list(untrusted.tar_members(tmp_path / "none.tar"))
    path.write_bytes(gzip.compress(data))
    with pytest.raises(UserError, match="damaged"):
        list(untrusted.tar_members(path))


def test_tars_are_bounded(tmp_path):
    path = write_tar(tmp_path / "a.tar", ("1.jpg", bytes(1000)), ("2.jpg", bytes(700)))
    with pytest.raises(UserError, match=r"1\.jpg would take 1,000 bytes; the limit is 900"):
        list(untrusted.tar_members(path, limit=900))
    with pytest.raises(UserError, match=r"all files together would take 1,700 bytes; the limit is 1,600"):
        list(untrusted.tar_members(path, total=1600))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [-512, 2**17, 2**40])
def test_tar_headers_with_false_sizes(tmp_path, kind, size):
    info = tarfile.TarInfo("1.jpg")
    info.type, info.size = kind, size
    path = tmp_path / "a.tar"
    header = info.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(header + b"\0" * 2**16 if size < 2**18 else header + bytes(4096))
    with pytest.raises(UserError, match=r"a\.tar"):
        list(untrusted.tar_members(path))


def test_names_of_files(tmp_path):
    for name in ("a/b.jpg", b"a/b.jpg", np.str_("a/b.jpg"), np.bytes_(b"a/b.jpg"), "a\\b.jpg", "./a/b.jpg"):
        assert untrusted.inside(tmp_path, name) == tmp_path / "a" / "b.jpg"
    for name in ("/etc/passwd", "../x", b"a/../../x", "a\\..\\..\\x", "C:/x", "a\0b", "", "\\\\host\\x"):
        with pytest.raises(UserError, match="expected the name of a file inside"):
            untrusted.inside(tmp_path, name)


def test_image_size():
    for kind in ("PNG", "JPEG"):
        file = io.BytesIO()
        Image.new("RGB", (30, 20)).save(file, kind)
        assert untrusted.image_size(file.getvalue(), "x") == (30, 20)
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">2I", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UserError, match=r"^x: would unpack to too many pixels"):
        untrusted.image_size(bytes(data), "x")
    for data in (b"", b"GIF", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        with pytest.raises(UserError, match=r"^x: expected an image"):
            untrusted.image_size(data, "x")


def test_objects_of_named_classes_are_their_state_and_others_are_refused() -> None:
    data = pickle.dumps({"args": argparse.Namespace(a=1, b=["x"])})
    assert untrusted.load_pickle(data, "x", classes=("argparse.Namespace",)) == {"args": {"a": 1, "b": ["x"]}}
    with pytest.raises(UserError, match=r"x: the pickle refers to argparse\.Namespace"):
        untrusted.load_pickle(data, "x")
