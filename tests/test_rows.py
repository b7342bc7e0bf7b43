"""verifiers/rows.py: local files in every layout, and one clear line for everything that can be wrong with them."""

import json

import pyarrow.parquet
import pytest

from verifiers import BadInput
from verifiers.rows import load_rows

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "A\u2028B", "answer": "3"}]


def write(path, rows=ROWS):
    """Rows in the format that the file's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, encoding="utf-8")


@pytest.mark.parametrize("name", [
    "train.jsonl", "train.json", "train.parquet", "data/train.parquet", "main/train-00000-of-00001.parquet",
])  # fmt: skip
def test_a_folder_is_read_in_every_layout_and_left_as_it_is(tmp_path, name):
    write(tmp_path / name)
    write(tmp_path / "validation.jsonl", ROWS[:1])
    before = sorted(tmp_path.rglob("*"))
    assert load_rows("unused/id", "train", str(tmp_path), config="main") == ROWS
    assert load_rows("unused/id", "test", str(tmp_path), config="main") == []
    assert sorted(tmp_path.rglob("*")) == before  # no cache beside the user's data


def test_shards_are_joined_in_order_and_one_file_serves_every_split(tmp_path):
    for i, row in enumerate(ROWS):
        write(tmp_path / "data" / f"train-0000{i}-of-00002.jsonl", [row])
    write(tmp_path / "mine.jsonl")
    assert load_rows("unused/id", "train", str(tmp_path)) == ROWS
    assert load_rows("unused/id", "test", str(tmp_path / "mine.jsonl")) == ROWS


@pytest.mark.parametrize("name, contents, message", [
    ("a.jsonl", b'{"a": 1}\n\n{"a": 2\n', "line 3: not JSON"),
    ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2: expected an object"),
    ("a.json", b'[{"a": 1}, 7]', "entry 2: expected an object"), ("a.json", b'[{"a": 1}', "cannot be read: JSONDecode"),
    ("a.jsonl", b"\xff\xfe{}", "cannot be read: UnicodeDecodeError"), ("a.jsonl", b"", "holds no rows"),
    ("a.parquet", b"PAR1 torn", "cannot be read: ArrowInvalid"), ("a.csv", b"a,b\n1,2\n", "cannot read .csv"),
    ("nowhere", None, "does not exist"), ("", None, "holds no data: expected a file such as train.jsonl"),
])  # fmt: skip
def test_what_cannot_be_read_is_told_in_one_line(tmp_path, name, contents, message):
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(BadInput, match=message) as error:
        load_rows("unused/id", "train", str(tmp_path / name))
    assert "\n" not in str(error.value) and name in str(error.value)
