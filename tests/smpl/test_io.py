"""Every published variant of a body file loads to the same arrays, and no file gets to run anything."""

import io
import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from smpl_jax import BodyFileError, load_body, load_body_arrays, save_body_npz

from .models import PARENTS, python2_pickle, random_arrays

sparse = pytest.importorskip("scipy.sparse")


def dump(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def assert_same(path, source):
    loaded = load_body_arrays(path)
    for name in ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "f"):
        np.testing.assert_array_equal(loaded[name], source[name], err_msg=name)
    assert loaded["parents"].tolist() == [-1, *np.asarray(source["kintree_table"][0, 1:], int)]


VARIANTS = {
    "as it is": lambda a: a,
    "csc regressor": lambda a: a | {"J_regressor": sparse.csc_matrix(a["J_regressor"])},
    "csr regressor": lambda a: a | {"J_regressor": sparse.csr_matrix(a["J_regressor"])},
    "coo regressor": lambda a: a | {"J_regressor": sparse.coo_matrix(a["J_regressor"])},
    "posedirs (3V, P)": lambda a: a | {"posedirs": a["posedirs"].reshape(-1, a["posedirs"].shape[-1])},
    "posedirs (P, 3V)": lambda a: a | {"posedirs": a["posedirs"].reshape(-1, a["posedirs"].shape[-1]).T},
    "unsigned root": lambda a: (
        a | {"kintree_table": np.where(a["kintree_table"] < 0, 2**32 - 1, a["kintree_table"]).astype(np.uint32)}
    ),
    "unsigned 64-bit root": lambda a: a | {"kintree_table": a["kintree_table"].astype(np.uint64)},
    "Fortran order": lambda a: a | {"shapedirs": np.asfortranarray(a["shapedirs"])},
    "big-endian": lambda a: a | {"v_template": a["v_template"].astype(">f8")},
    "more than a body needs": lambda a: a | {"bs_style": "lbs", "J": np.zeros((24, 3)), "part2num": {"head": 3}},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_pickles(variant, tmp_path):
    source = random_arrays()
    for protocol in (2, 4, 5):
        assert_same(dump(tmp_path / f"{protocol}.pkl", variant(source), protocol), source)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_npz(variant, tmp_path):
    """``np.savez`` pickles what is no array (scipy matrices, dictionaries): those are read by the allow-list, or not at
    all.
    """
    source = random_arrays()
    np.savez(tmp_path / "body.npz", **variant(source))
    assert_same(tmp_path / "body.npz", source)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_python2_pickle_with_chumpy_and_scipy(protocol, tmp_path, chumpy):
    """As the official v1.0.0 files are: chumpy nodes, an old scipy matrix, byte strings."""
    source = random_arrays()
    flat = np.concatenate([np.zeros(7), source["posedirs"].ravel()])
    content = source | {
        "v_template": chumpy.Ch(x=source["v_template"]),
        "shapedirs": chumpy.Ch(x=source["shapedirs"]),
        "posedirs": chumpy.Select(
            a=chumpy.Ch(x=flat), idxs=np.arange(7, flat.size), preferred_shape=source["posedirs"].shape
        ),
        "J_regressor": sparse.csc_matrix(source["J_regressor"]),
        "bs_type": "lrotmin",
    }
    data = python2_pickle(content, protocol)
    named = (b"chumpy.ch", b"scipy.sparse.csc\n", b"numpy.core.multiarray", b"__builtin__\nset\n")
    assert [name for name in named if name not in data] == []
    (tmp_path / "body.pkl").write_bytes(data)
    assert_same(tmp_path / "body.pkl", source)


@pytest.mark.parametrize("protocol", [3, 4])
def test_chumpy_pickled_by_python3(protocol, tmp_path, chumpy):
    source = random_arrays()
    content = source | {"v_template": chumpy.Ch(x=source["v_template"]), "J": chumpy.Ch(x=np.zeros((24, 3)))}
    assert_same(dump(tmp_path / "body.pkl", content, protocol), source)


@pytest.mark.parametrize(("kind", "joints"), [("smpl", 24), ("smplh", 52), ("smplx", 55)])
def test_kind_is_told_by_the_file(kind, joints, tmp_path):
    body = load_body(
        dump(tmp_path / "renamed_by_its_owner.pkl", random_arrays(kind, num_shapes=20 if kind == "smplx" else 16))
    )
    assert (body.name, body.num_joints, body.num_betas) == (kind, joints, 10)
    assert body.num_expression == (10 if kind == "smplx" else 0)
    assert body.parents == (-1, *PARENTS[kind][1:])
    assert body.joint_names[:3] == ("pelvis", "left_hip", "right_hip") and len(set(body.joint_names)) == joints
    assert body.joint_names[20:22] == ("left_wrist", "right_wrist")


def test_number_of_shape_directions(tmp_path):
    source = random_arrays(num_shapes=300)
    path = dump(tmp_path / "v1.1.0.pkl", source)
    assert load_body(path).num_betas == 10
    assert load_body(path, num_betas=None).num_betas == 300
    np.testing.assert_allclose(
        load_body(path, num_betas=3).bases[:3], source["shapedirs"][..., :3].transpose(2, 1, 0), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"num_betas must be in \[0, 300\], .*found 301"):
        load_body(path, num_betas=301)


def test_smplx_expression_follows_300_shape_directions(tmp_path):
    source = random_arrays("smplx", num_vertices=60, num_shapes=400)
    body = load_body(dump(tmp_path / "x.pkl", source))
    np.testing.assert_allclose(body.bases[10:20], source["shapedirs"][..., 300:310].transpose(2, 1, 0), rtol=1e-6)


def test_round_trip_with_names_and_regressors(tmp_path):
    arrays = load_body_arrays(dump(tmp_path / "body.pkl", random_arrays()))
    dense = np.random.default_rng(1).random((3, 200))
    arrays |= {
        "model_name": np.array("somebody"),
        "joint_names": np.array([f"bone_{i}" for i in range(24)]),
        "vertex_id_names": np.array(["nose", "left_heel"]),
        "vertex_ids": np.array([7, 100]),
        "regressor_sparse": arrays["J_regressor"][:5],
        "regressor_dense": dense,
    }
    save_body_npz(tmp_path / "a.npz", arrays)
    save_body_npz(tmp_path / "b.npz", arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {"regressor_sparse_indptr.npy", "J_regressor_data.npy", "regressor_dense.npy"} <= set(archive.namelist())
    loaded = load_body_arrays(tmp_path / "a.npz")
    assert loaded.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(loaded[name], value, err_msg=name)
    body = load_body(tmp_path / "a.npz")
    assert body.name == "somebody" and body.joint_names[3] == "bone_3" and body.vertex_id("left_heel") == 100
    np.testing.assert_allclose(body.regressors["dense"], dense, rtol=1e-6)
    with pytest.raises(ValueError, match="no vertex named 'tail'"):
        body.vertex_id("tail")


def test_quantized_arrays(tmp_path):
    arrays = load_body_arrays(dump(tmp_path / "body.pkl", random_arrays()))
    kinds = {"v_template": np.int16, "shapedirs": np.int16, "posedirs": np.int8, "weights": np.uint8}
    save_body_npz(tmp_path / "small.npz", arrays, quantize=kinds)
    assert (tmp_path / "small.npz").stat().st_size < 0.3 * (tmp_path / "body.pkl").stat().st_size
    loaded = load_body_arrays(tmp_path / "small.npz")
    for name, kind in kinds.items():
        step = np.abs(arrays[name]).max() / np.iinfo(kind).max
        error = np.abs(loaded[name] - arrays[name]).max()
        assert 0 < error < (0.51 if name != "weights" else 2) * step, name
    np.testing.assert_allclose(loaded["weights"].sum(1), 1, atol=1e-6)


# hostile and broken files ---------------------------------------------------------------------------------------------

TOUCHED: list[str] = []


def touch(*args):
    TOUCHED.append("run")
    return {}


class Attack:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile(name):
    return random_arrays() | {
        "J_regressor": {"touch": Attack(touch), "system": Attack(os.system, "true"), "eval": Attack(eval, "1")}[name]
    }


@pytest.mark.parametrize(("attack", "asked"), [("touch", "test_io.touch"), ("system", "system"), ("eval", "eval")])
def test_hostile_pickle_is_refused(attack, asked, tmp_path):
    TOUCHED.clear()
    pickle.loads(pickle.dumps(Attack(touch)))
    assert TOUCHED.pop() == "run"  # the attack works on the standard loader
    for protocol in (0, 2, 4):
        with pytest.raises(BodyFileError, match=rf"body.pkl tries to run \S*{asked}, .*Nothing was run"):
            load_body(dump(tmp_path / "body.pkl", hostile(attack), protocol))
    assert not TOUCHED


def test_hostile_npz_is_refused(tmp_path):
    TOUCHED.clear()
    np.savez(tmp_path / "body.npz", **hostile("touch"))
    with pytest.raises(BodyFileError, match=r"tries to run \S*test_io.touch"):
        load_body(tmp_path / "body.npz")
    np.savez(tmp_path / "body.npz", **random_arrays(), part2num=np.array({"x": Attack(touch)}))
    load_body(tmp_path / "body.npz")  # a member that no body needs is not even looked at
    assert not TOUCHED


# ((), ()), of which a tuple of twice that, and so on: 2^100 steps to hash.
NESTED = b"(tq\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(100))
OPCODES = {
    "has a key that takes forever to hash": b"\x80\x02}" + NESTED + b"Ns.",
    "has such keys, many at once": b"\x80\x02}(" + NESTED + b"Nu.",
    "has such a key in text's form": b"(" + NESTED + b"Nd.",
    "has a set of it": b"\x80\x04\x8f(" + NESTED + b"\x90.",
    "has a frozen set of it": b"\x80\x04(" + NESTED + b"\x91.",
    "has a set of it, as Python 2 writes sets": b"c__builtin__\nset\n(](" + NESTED + b"etR.",
    "calls an allowed name with anything": b"cnumpy\ndtype\n(cnumpy\nndarray\ntR.",
    "calls text": b"(Vabc\n(tR.",
    "changes an allowed function": b"c_codecs\nencode\n(dV__class__\nV1\nsb.",
    "changes an allowed class": b"cchumpy.ch\nCh\n(dVstate\nV1\nsb.",
    "reads an attribute by a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93.",
    "uses the extension registry": b"\x80\x02\x82\x01.",
    "uses a persistent id": b"P1\n.",
    "reconstructs another class": b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR.",
    "wants a memo of gigabytes": b"\x80\x02Nr\xff\xff\xff\xff0j\xfe\xff\xff\xff.",
    "promises a terabyte": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "is a dictionary of nothing": b"}.",
    "is a list": b"].",
}


@pytest.mark.parametrize("program", OPCODES.values(), ids=OPCODES.keys())
def test_hostile_opcodes(program, tmp_path):
    (tmp_path / "body.pkl").write_bytes(program)
    with pytest.raises(BodyFileError, match=r"body\.pkl"):
        load_body(tmp_path / "body.pkl")


def test_array_states_are_checked(tmp_path):
    """A pickled array whose shape promises more than its bytes, or whose type is a structure, never reaches numpy's own
    constructor.
    """
    data = pickle.dumps(random_arrays(), 2)
    for honest, lie in ((b"K\xc8K\x03\x86", b"K\xffK\x03\x86"), (b"X\x02\x00\x00\x00f8", b"X\x02\x00\x00\x00V8")):
        assert honest in data
        (tmp_path / "body.pkl").write_bytes(data.replace(honest, lie))
        with pytest.raises(BodyFileError, match=r"bytes for an array|numbers or text"):
            load_body(tmp_path / "body.pkl")


def npy(shape, dtype="<f8", data=b""):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


def test_decompression_bomb(tmp_path, monkeypatch):
    """Zeros that unpack to a thousand times the file, and a header that promises a terabyte."""
    monkeypatch.setattr("smpl_jax.io.MAX_BYTES", 2**23)  # of 2**30: the test writes the zeros too
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("v_template", "posedirs", "shapedirs"):
            archive.writestr(f"{name}.npy", npy((2**19,), data=bytes(2**22)))
    assert (tmp_path / "bomb.npz").stat().st_size < 2e4
    with pytest.raises(BodyFileError, match=r"would unpack to 12,583,\d+ bytes; the limit is 8,388,608"):
        load_body(tmp_path / "bomb.npz")
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        archive.writestr("v_template.npy", npy((2**37,)))
    with pytest.raises(
        BodyFileError, match=r"'v_template' in .*liar.npz: expected 1,099,511,627,776 bytes .*, found 0"
    ):
        load_body(tmp_path / "liar.npz")
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:  # zipfile unpacks it without a bound
        archive.writestr("v_template.npy", npy((2**10,), data=bytes(2**13)))
    with pytest.raises(BodyFileError, match=r"'v_template' in .*lzma.npz is packed in a way that NumPy does not write"):
        load_body(tmp_path / "lzma.npz")


BROKEN = {
    "lacks": (lambda a: {k: v for k, v in a.items() if k not in ("weights", "f")}, "it lacks weights, f"),
    "template": (
        lambda a: a | {"v_template": a["v_template"][:, :2]},
        r"v_template must have shape \(200, 3\); got \(200, 2\)",
    ),
    "posedirs": (
        lambda a: a | {"posedirs": a["posedirs"][..., :200]},
        r"posedirs must have shape \(200, 3, 207\); got \(200, 3, 200\)",
    ),
    "regressor": (
        lambda a: a | {"J_regressor": sparse.coo_matrix((10**9, 10**9))},
        r"shape \(24, 200\); got \(1000000000, 1000000000\)",
    ),
    "nan": (lambda a: a | {"weights": a["weights"] * np.nan}, "weights must be finite numbers"),
    "text": (lambda a: a | {"weights": a["weights"].astype(str)}, "weights must contain numbers"),
    "integers": (lambda a: a | {"weights": a["weights"].astype(int)}, "need a weights_scale"),
    "faces": (lambda a: a | {"f": a["f"] + 200}, r"f must lie in \[0, 200\)"),
    "cycle": (lambda a: a | {"kintree_table": a["kintree_table"][:, ::-1]}, "every joint after its parent"),
    "tree": (lambda a: a | {"kintree_table": a["kintree_table"][0]}, r"kintree_table must have shape \(2, "),
    "names": (lambda a: a | {"joint_names": np.array(["pelvis"])}, "joint_names must be 24 strings"),
    "triple": (lambda a: a | {"J_regressor_indptr": np.zeros(25, int)}, "J_regressor is stored sparse and lacks"),
    "ids": (
        lambda a: a | {"vertex_id_names": np.array(["nose"]), "vertex_ids": np.array([200])},
        r"vertex_ids must lie in \[0, 200\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_arrays_that_do_not_fit(change, message, tmp_path):
    np.savez(tmp_path / "body.npz", **change(random_arrays()))
    with pytest.raises(BodyFileError, match=message):
        load_body(tmp_path / "body.npz")


@pytest.mark.parametrize("suffix", ["pkl", "npz"])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_file(suffix, share, tmp_path):
    path = tmp_path / f"body.{suffix}"
    if suffix == "npz":
        np.savez(path, **random_arrays())
    else:
        dump(path, random_arrays())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(BodyFileError, match=rf"body.{suffix} is (cut off|malformed)"):
        load_body(path)


def test_random_damage_never_escapes_as_another_error(tmp_path):
    data = np.frombuffer(pickle.dumps({k: v[..., :2] for k, v in random_arrays(num_vertices=3).items()}, 4), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = data.copy()
        damaged[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        (tmp_path / "body.pkl").write_bytes(damaged.tobytes())
        with pytest.raises(BodyFileError):
            load_body_arrays(tmp_path / "body.pkl")


def test_no_file(tmp_path):
    with pytest.raises(BodyFileError, match=r"none.pkl: No such file or directory; expected a .npz or .pkl"):
        load_body(tmp_path / "none.pkl")
    with pytest.raises(BodyFileError, match="it is a folder"):
        load_body(tmp_path)


def test_saving_checks_first(tmp_path):
    arrays = load_body_arrays(dump(tmp_path / "body.pkl", random_arrays()))
    with pytest.raises(BodyFileError, match="weights must have shape"):
        save_body_npz(tmp_path / "out.npz", arrays | {"weights": arrays["weights"][:-1]})
    assert not (tmp_path / "out.npz").exists()


def test_dtype(tmp_path):
    assert load_body(dump(tmp_path / "body.pkl", random_arrays()), dtype=jnp.bfloat16).bases.dtype == jnp.bfloat16


def test_a_byte_array_is_read_before_it_is_allocated(tmp_path) -> None:
    """BYTEARRAY8 with a size of 2 GiB in a file of a few bytes; an honest one still arrives."""
    import io as stdlib_io
    import pickle
    import tracemalloc

    from smpl_jax.unpickle import RestrictedUnpickler

    assert RestrictedUnpickler(stdlib_io.BytesIO(pickle.dumps(bytearray(b"abc"), protocol=5)), {}).load() == bytearray(
        b"abc"
    )
    hostile = b"\x80\x05\x96" + (2**31).to_bytes(8, "little") + b"abc."
    tracemalloc.start()
    with pytest.raises(pickle.UnpicklingError, match="cut off"):
        RestrictedUnpickler(stdlib_io.BytesIO(hostile), {}).load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
