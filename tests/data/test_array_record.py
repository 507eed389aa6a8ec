"""Parts of ArrayRecord files, as their own library reads them."""

import itertools

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from chatpose_jax.data.array_record import offsets_of, records_of, tail_size
from chatpose_jax.data.store import READER, WRITER


def write(file, records, options=WRITER):
    writer = ArrayRecordWriter(str(file), options)
    for record in records:
        writer.write(record)
    writer.close()
    return file.read_bytes()


def tail_of(data, records):
    start = max(0, len(data) - tail_size(records))
    return data[start:], start


@pytest.mark.parametrize("most", [0, 90, 3000, 200_000])
@pytest.mark.parametrize("seed", range(3))
def test_records_are_those_that_array_record_reads(tmp_path, most, seed):
    draw = np.random.default_rng([most, seed])
    records = [draw.bytes(draw.integers(most + 1)) for _ in range(draw.integers(2, 300 if most < 9999 else 40))]
    data = write(tmp_path / "file", records)
    offsets = offsets_of(*tail_of(data, len(records)))
    assert len(offsets) == len(records) + 1
    reader = ArrayRecordReader(str(tmp_path / "file"), READER)
    for number, (start, end) in enumerate(itertools.pairwise(offsets)):
        assert records_of(data[start:end], int(start)) == reader.read([number]) == [records[number]]


def test_records_that_end_near_the_end_of_a_block(tmp_path):
    # Headers of blocks then fall into headers of chunks, and between chunks.
    for first in range(65536 - 24 - 64 - 160, 65536 - 24 - 64 - 60):
        records = [bytes(first), b"second", b"third"]
        data = write(tmp_path / "file", records)
        offsets = offsets_of(*tail_of(data, 3)).tolist()
        assert [records_of(data[a:b], a)[0] for a, b in itertools.pairwise(offsets)] == records, first


@pytest.mark.parametrize(
    ("options", "words"),
    [("group_size:2,uncompressed", "several records are in one chunk"), ("group_size:1,zstd:3", "a compressed one")],
)
def test_other_forms_of_the_file_are_refused(tmp_path, options, words):
    data = write(tmp_path / "file", [bytes(500)] * 8, options)
    with pytest.raises(ValueError, match=words):
        offsets = offsets_of(*tail_of(data, 8))
        records_of(data[offsets[0] : offsets[1]], int(offsets[0]))


def test_any_damage_is_an_error_or_changes_no_record(tmp_path):
    """Hashes are not checked, so a byte inside of a record may change unseen; nothing else does, and nothing else is raised."""
    draw, records = np.random.default_rng(0), [bytes(range(50)), bytes(70_000), b"last"]
    data = write(tmp_path / "file", records)
    refused = 0
    for place in [
        *draw.integers(len(data), size=2000),
        *range(65530, 65700),
        *range(len(data) - 65536, len(data) - 65400),
    ]:
        broken = bytearray(data)
        broken[place] ^= 1 << int(draw.integers(8))
        try:
            offsets = offsets_of(*tail_of(bytes(broken), 3)).tolist()
            found = [records_of(bytes(broken[a:b]), a) for a, b in itertools.pairwise(offsets)]
            assert len(found) < 4
        except ValueError:
            refused += 1
    assert refused > 20
    for cut in (0, 1, 65536, len(data) - 65536, len(data) - 1):
        with pytest.raises(ValueError):
            offsets_of(data[:cut], 0)
