"""Rows of a data set, from the Hugging Face hub or from the user's own files.

A local folder is read as a hub repository lays it out: `<split>.jsonl`, `.json`, `.parquet`, or `<split>-*` shards of
these, in the folder itself, in `data/`, or in a folder with the configuration's name. One file serves every split.
Local files are read where they are: nothing is copied, cached or written.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from . import BadInput, one_line

SUFFIXES = (".jsonl", ".json", ".parquet")
HUB_TIMEOUT_S = 10


def load_rows(
    hub_id: str, split: str, data: str | None = None, config: str | None = None, flag: str = "--data"
) -> list[dict]:
    """The rows of one split, one dict each, column -> value.

    data: None for the hub's `hub_id` (and `config`), else a local file or folder. A folder with other splits alone
    gives []. flag: the one that named `data`, for errors. Raises BadInput for a path that is missing, empty or
    unreadable and for a hub out of reach."""
    if data is None:
        return hub_rows(hub_id, split, config)
    try:
        path = Path(data).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
        folders = [path, path / "data"] + ([path / config] if config else [])
        files = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir())
        files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
    except (OSError, RuntimeError) as error:  # a name too long, no permission, "~nobody"
        raise BadInput(f"cannot read {flag} {data[:100]!r}: {one_line(error)}") from error
    if is_folder:
        if not files:
            raise BadInput(f"{path} holds no data: expected a file such as {split}.jsonl or {split}.parquet")
        of_split = [file for file in files if file.stem == split or file.stem.startswith(f"{split}-")]
        return [row for file in of_split for row in file_rows(file)]
    if not is_file:
        raise BadInput(f"{path} does not exist: {flag} takes a JSONL or Parquet file, or a folder of them")
    if path.suffix not in SUFFIXES:
        raise BadInput(f"{path}: cannot read {path.suffix or 'a file without a suffix'}: use {', '.join(SUFFIXES)}")
    return file_rows(path)


def file_rows(path: Path) -> list[dict]:
    """The rows of one file. Raises BadInput, with the line number where there is one."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
        else:
            rows = json_rows(path)
    except BadInput:
        raise
    except Exception as error:  # pyarrow and the file system raise many types, all of them the file's fault
        raise BadInput(f"{path} cannot be read: {one_line(error)}") from error
    if not rows:
        raise BadInput(f"{path} holds no rows")
    return rows


def json_rows(path: Path) -> list[dict]:
    """The rows of a JSON file: one object per line, or one list of objects."""
    text = path.read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    rows = []
    # not splitlines(): U+2028 may stand inside a JSON string
    for number, row in enumerate(json.loads(text) if is_list else text.split("\n"), start=1):
        if is_list or row.strip():
            try:
                rows.append(row if is_list else json.loads(row))
            except ValueError as error:
                raise BadInput(f"{path}, line {number}: not JSON ({error}); is the file complete?") from error
            if not isinstance(rows[-1], dict):
                where = f"{path}, {'entry' if is_list else 'line'} {number}"
                raise BadInput(f"{where}: expected an object with named columns, got {str(rows[-1])[:40]!r}")
    return rows


def hub_rows(hub_id: str, split: str, config: str | None = None) -> list[dict]:
    """The rows of one split on the Hugging Face hub, or of its local cache when the hub cannot be reached."""
    import datasets  # seconds to import: only for those who need it

    offline, silent = datasets.config.HF_HUB_OFFLINE, unreachable("dataset", hub_id)
    try:
        datasets.config.HF_HUB_OFFLINE = offline or silent is not None
        return list(datasets.load_dataset(hub_id, config, split=split))
    except Exception as error:
        why = one_line(silent or error)
        raise BadInput(f"cannot load {hub_id} from the hub ({why}): give local files with --data PATH") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def unreachable(kind: str, hub_id: str) -> Exception | None:
    """Why the hub does not answer about this "dataset" or "model", or None. Its own libraries retry for minutes."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().repo_info(hub_id, repo_type=kind, timeout=HUB_TIMEOUT_S)
    except huggingface_hub.errors.HfHubHTTPError:
        pass  # the caller's own request will say what is wrong
    except Exception as error:  # no network: HTTP libraries raise many types
        return error


def require_columns(rows: Sequence[dict], columns: Sequence[str], where: str) -> None:
    """Raises BadInput unless every row has every column; "a|b" is satisfied by either. `where`: what was read."""
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if not any(name in row for name in column.split("|"))]
        if missing:
            names = [" or ".join(column.split("|")) for column in missing]
            found = " ".join(", ".join(row).split())[:200] or "none"
            raise BadInput(f"{where}, row {number}: no column {', '.join(names)}; found {found}")
