"""Further inputs that fuzzing has found to end in the wrong error, each once, made small."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from scan_fast.array_files import read_npy
from scan_fast.data.containers import class_numbers, find_files
from scan_fast.data.datasets import source_from
from scan_fast.data.decode import decode
from scan_fast.data.neighbor_files import read_neighbors
from scan_fast.errors import ConfigError, DataError, WeightsError
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import ClusterModel
from scan_fast.models.saved import SavedModel
from scan_fast.models.tensor_files import read_tensors
from scan_fast.predictor import Predictor
from scan_fast.runs.config import parse_override
from tools.fuzz.pictures import pictures


class _LittleMemory(io.BytesIO):
    """A file that is read on a machine without memory for gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > 1 << 30:
            raise MemoryError
        return super().read(size)


def test_a_length_of_gigabytes_in_a_small_file_is_damage() -> None:
    file = io.BytesIO()
    torch.save({"some name": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    name = b"X\x09\0\0\0some name"
    assert name in file.getvalue()
    with pytest.raises(ValueError, match="damaged"):
        read_tensors(_LittleMemory(file.getvalue().replace(name, b"X\xff\xff\xff\xffsome name")))


def test_a_tensor_with_hooks_is_refused() -> None:
    saved, changed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.ones(2)}, saved)
    hooks = b"ccollections\nOrderedDict\nq\n)Rq\x0b"
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(changed, "w") as other:
        for name in archive.namelist():
            data = archive.read(name)
            assert data.count(hooks) == name.endswith("data.pkl")
            other.writestr(name, data.replace(hooks, b"M\xff\xff"))
    with pytest.raises(ValueError, match="its tensor 'a' is said to have hooks"):
        read_tensors(changed)


@pytest.mark.parametrize(
    "header", [b"{'descr': '<i8', 'shape': (", b"{'descr': '<i8', 'shape': (2, 2.0), 'fortran_order': True}"]
)
def test_a_header_that_is_no_notation_of_python_is_refused(header: bytes, tmp_path: Path) -> None:
    data = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
    with pytest.raises(ValueError, match="no array"):
        read_npy(io.BytesIO(data))
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.npy"):
        read_neighbors(path, 2)


def test_a_shape_that_is_empty_and_beyond_64_bits_is_refused() -> None:
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': (0, {2**64})}}".encode()
    with pytest.raises(ValueError, match="damaged"):
        read_npy(io.BytesIO(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header))


def test_a_text_that_a_tag_calls_a_date_is_refused() -> None:
    for value in ("!!timestamp a", "!!int a", "!!float a", "!!bool a", "!!timestamp 2001-99-99"):
        with pytest.raises(ConfigError):
            parse_override(f"name={value}")


def test_a_parquet_column_whose_name_is_no_text_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([{"bytes": b"a"}], kind), "other": [1]}), file)
    names = file.getvalue().rpartition(b"other")
    for data in (b"\xffther".join((names[0], names[2])), file.getvalue().replace(b"other", b"\xffther")):
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(DataError):
            source_from(f"parquet:{tmp_path}/a.parquet")


DAMAGE = """
import sys
from scan_fast.data.datasets import DataConfig, source_from
from scan_fast.errors import DataError
path = sys.argv[1]
data = open(path, "rb").read()
length = int.from_bytes(data[-8:-4], "little")
settings = DataConfig(image_size=8, on_error="skip", workers=1)
for place in range(len(data) - 8 - length, len(data) - 8):
    for change in (1, 6):
        with open(path, "wb") as file:
            file.write(data[:place] + bytes([data[place] ^ change]) + data[place + 1 :])
        try:
            source_from(f"parquet:{path}", settings)
        except DataError:
            pass
print("done")
"""


def test_a_parquet_file_with_any_changed_byte_of_its_footer_is_read_or_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    image = {"bytes": pictures()["plain.png"], "path": None}
    schema = pyarrow.schema([("image", kind)])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": image}] * 3, schema), tmp_path / "a.parquet")
    # Arrow ends the process at some of them, if it is asked for the statistics of their columns.
    words = [sys.executable, "-c", DAMAGE, str(tmp_path / "a.parquet")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout == "done\n"


def test_centres_of_other_features_than_the_network_has_are_refused() -> None:
    model = ModelConfig(backbone="resnet_digits", width=0.25)
    weights, half = ClusterModel(model, 2).state_dict(), (0.5, 0.5, 0.5)
    centers, least = torch.eye(2), torch.ones(2)
    saved = SavedModel("clustering", model, 2, 8, 8, "image", "exact", half, half, weights, "bilinear", centers, least)
    with pytest.raises(WeightsError, match="centers must have the 16 features"):
        Predictor(saved)


def test_texts_of_characters_that_do_not_exist_are_refused() -> None:
    file = io.BytesIO()
    np.save(file, np.array(["ab"]))
    assert read_npy(io.BytesIO(file.getvalue())).tolist() == ["ab"]
    with pytest.raises(ValueError, match="do not exist"):
        read_npy(io.BytesIO(file.getvalue()[:-4] + b"\xff\xff\xff\x7f"))


def test_labels_of_thousands_of_digits_are_names() -> None:
    numbers, names = class_numbers(["9" * 5000, "1", "10"])
    assert numbers is not None and numbers.tolist() == [2, 0, 1] and names == ["1", "10", "9" * 5000]


def test_a_heic_whose_header_states_another_size_is_unreadable() -> None:
    pytest.importorskip("pillow_heif")
    data = pictures()["turned.heic"]
    shift = b"\xff\xff\xff\xf0\0\0\0\2"  # by which the box of the pixels lies above the middle, as a fraction: -16 / 2
    assert data.count(shift) == 1
    assert decode(data)[0][:2] == (64, 48)
    with pytest.raises(ValueError, match="its header states 48 x 64 pixels, it holds 64 x 64"):
        decode(data.replace(shift, b"\xbf" + shift[1:]))


def test_texts_that_no_file_can_be_called_are_refused() -> None:
    with pytest.raises(DataError, match="cannot be the name of a file: surrogates not allowed"):
        find_files("a\ud800.tar", None, (".tar",))
    for pattern in ("a\0/?.tar", "a\0.tar"):
        with pytest.raises(DataError, match="it has a null character"):
            find_files(pattern, None, (".tar",))
