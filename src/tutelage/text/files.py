"""A user's own data files as rows: JSON lines, JSON, CSV and Parquet, in the column shapes that TRL and `datasets` take.

    messages              a whole conversation; its last reply is trained, what stands before it is the prompt
    prompt, completion    messages, or texts: then one turn of the user and one of the assistant
    prompt, chosen, rejected    a preference: two replies to one prompt, in the same forms
    prompt                alone: what only a verifier can judge
    text                  a raw document
    id, domain, gold, meta    as in rows.py, all optional; ``answer`` is taken for ``gold``

``messages`` and ``prompt`` exclude each other. All other columns become entries of ``meta``, where a verifier finds them.
Files are UTF-8, with or without a byte order mark. Rows are named as an editor counts: lines from 1, a Parquet file's rows too.

A *bad row* is told apart from a bad file: rows can be skipped and counted, but a file that cannot be read on is an error.

Leaves out: compressed text files, tool turns, parts of messages that are no text, ShareGPT's ``conversations``, and other
delimiters than the comma.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.spec import UserError, suggest

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zip")
OURS = ("messages", "prompt", "completion", "chosen", "rejected", "text", "id", "domain", "gold", "meta")
SHAPES = "messages, or prompt (with completion, where replies are trained, or with chosen and rejected), or text"
OTHER_ENCODINGS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
POINTER = b"version https://git-lfs"
"""How a Git LFS pointer begins: the file that stands where a large one was not fetched."""


class BadRow(Exception):
    """One row that cannot be used. ``reason`` is what such rows are counted under, ``says`` the whole line for the user."""

    def __init__(self, reason: str, says: str):
        super().__init__(says)
        self.reason, self.says = reason, says


@dataclass(frozen=True)
class Shape:
    """Which columns a file has, taken from its first row, and how they are called there."""

    theirs: dict[str, str]
    """our name -> the file's"""
    dropped: frozenset[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of rows.py that its rows will have."""
        has = set(self.theirs) | {"id", "domain", "meta"} | ({"prompt", "completion"} if "messages" in self.theirs else set())
        return tuple(c for c in ("id", "domain", *OURS[1:6], "gold", "meta") if c in has)


def data_files(path: Path) -> list[Path]:
    """The data files at a path: itself, or all in a folder, sorted; hidden ones left out. Raises `UserError`."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give a file or folder of {', '.join(ENDINGS)}")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("[!.]*") if p.is_file())
    found = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    for file in found:
        if file.suffix in PACKED_ENDINGS:
            raise UserError(f"{file} is compressed; unpack it to one of {', '.join(ENDINGS)}")
    data = [p for p in found if p.suffix in ENDINGS]
    if not data:
        what = f"holds {', '.join(sorted(p.name for p in found)[:5]) or 'nothing'}" if path.is_dir() else "is none of these"
        raise UserError(f"{path}: give a file that ends in {', '.join(ENDINGS)}, or a folder of such; it {what}")
    return data


def records(file: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(where, record as it stands in the file) for each row, or why it cannot be parsed.

    Raises `UserError` for a file that is empty, is something else than its name says, or cannot be read on.
    """
    with file.open("rb") as handle:
        head = handle.read(64)
    if head.startswith(POINTER):
        raise UserError(f"{file} is a Git LFS pointer and not the data; run `git lfs pull` where it was cloned")
    if head[:2] in OTHER_ENCODINGS:
        raise UserError(f"{file} is {OTHER_ENCODINGS[head[:2]]}; save it as UTF-8")
    if file.suffix == ".parquet":
        rows = _parquet(file, head)
    elif file.suffix == ".csv":
        rows = _csv(file)
    elif file.suffix == ".json" and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        rows = _json_array(file)
    else:
        rows = _json_lines(file)
    place = None
    for place, found in rows:
        yield f"{file}, {place}", found
    if place is None:
        raise UserError(f"{file} is empty; it must hold rows with {SHAPES}")


def shape_of(where: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> Shape:
    """How a file's columns are ours, ``columns`` (theirs -> ours, or -> nothing to drop one) applied. Raises `UserError`."""
    for name in columns:
        if name not in record:
            raise UserError(f"{where}: there is no column {name!r}, which columns names{suggest(name, record)}")
    theirs = {ours: name for name, ours in columns.items() if ours}
    for name in OURS:
        if name in record and name not in columns:
            if name in theirs:
                raise UserError(
                    f'{where}: {theirs[name]} and {name} would both be {name}; drop one by columns, such as {{"{name}": ""}}'
                )
            theirs[name] = name
    if "gold" not in theirs and "answer" in record and "answer" not in columns:
        theirs["gold"] = "answer"
    if not theirs.keys() & {"messages", "prompt", "text"}:
        has = ", ".join(record) or "no columns"
        raise UserError(f'{where}: has {has}; needs {SHAPES}: rename by columns, such as {{"question": "prompt"}}')
    for other in ("prompt", "completion"):
        if "messages" in theirs and other in theirs:
            raise UserError(f'{where}: has messages and {other}; drop one by columns, such as {{"{theirs[other]}": ""}}')
    for reply in ("completion", "chosen", "rejected"):
        if reply in theirs and "prompt" not in theirs:
            raise UserError(f"{where}: has {reply} and no prompt; a reply needs what it answers")
    if ("chosen" in theirs) != ("rejected" in theirs):
        has, lacks = ("chosen", "rejected") if "chosen" in theirs else ("rejected", "chosen")
        raise UserError(f"{where}: has {has} and no {lacks}; a preference needs both")
    return Shape(theirs, frozenset(name for name, ours in columns.items() if not ours))


def conform(where: str, record: Mapping[str, Any], shape: Shape, domain: str) -> dict[str, Any]:
    """A row in the columns of rows.py; without an id of its own its ``id`` is a hash of what it says. Raises `BadRow`."""
    mine = {ours: record.get(name) for ours, name in shape.theirs.items()}
    names = {**{ours: ours for ours in OURS}, **shape.theirs}
    for ours in OURS[:6]:
        if ours in mine and mine[ours] is None:
            has = ", ".join(k for k, v in record.items() if v is not None) or "nothing"
            raise BadRow(names[ours], f"{where}: has no {names[ours]}; it has {has}")
    row: dict[str, Any] = {"domain": _domain(where, names["domain"], mine.get("domain"), domain)}
    if "messages" in mine:
        turns = _turns(where, names["messages"], mine["messages"], "messages")
        row |= {"prompt": turns[:-1], "completion": turns[-1:]}
    for name in OURS[1:5]:
        if name in mine:
            row[name] = _turns(where, names[name], mine[name], name)
    if "text" in mine:
        row["text"] = _text(where, names["text"], mine["text"])
    if "gold" in mine:
        row["gold"] = _gold(where, names["gold"], mine["gold"])
    used = {*shape.theirs.values(), *shape.dropped}
    rest = {k: v for k, v in record.items() if k not in used and v is not None}
    for name in (*OURS, "answer"):
        if name in rest and not (name == "answer" and "gold" in shape.theirs):
            raise BadRow(name, f"{where}: has {name}, which the first row has not; all rows must have the same columns")
    row["meta"] = {**rest, **_meta(where, names["meta"], mine.get("meta"))}
    made = _hash_of(where, row)
    return {"id": _id(where, names["id"], mine.get("id")) or made, **row}


# --- formats -----------------------------------------------------------------------------------------------------------

Rows = Iterator[tuple[str, dict[str, Any] | BadRow]]
"""(place in the file, record)"""


def _json_lines(file: Path) -> Rows:
    with file.open("rb") as handle:
        for number, raw in enumerate(handle, 1):
            place = f"line {number}"
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield place, _object(f"{file}, {place}", raw.rstrip())


def _object(where: str, raw: bytes) -> dict[str, Any] | BadRow:
    try:
        found = DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        says = f"byte {error.start + 1} of the line (0x{raw[error.start]:02X}) is not UTF-8; save the file as UTF-8"
        return BadRow("not UTF-8", f"{where}: {says}")
    except json.JSONDecodeError as error:
        return BadRow("not JSON", f"{where}: not JSON: {error.msg.removesuffix(' at')} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"{where}: not JSON: {_line(error)}")
    return found if isinstance(found, dict) else _no_object(where, found)


def _no_object(where: str, found: Any) -> BadRow:
    return BadRow("no object", f"{where}: must be a JSON object of columns; got {shown(found)}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no value of JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _json_array(file: Path) -> Rows:
    """Item by item, so that each is known by the line where it begins."""
    text, space = _decoded(file), re.compile(r"\s*")
    at, line, counted = _after(space, text, text.index("[") + 1), 1, 0
    if text[at : at + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        try:
            found, at = DECODER.raw_decode(text, at)
            end = at = _after(space, text, at)
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("expecting ',' or ']'", text, at)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {error.lineno}: not JSON: {error.msg}; the array cannot be read on") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {line}: not JSON: {_line(error)}; the array cannot be read on") from None
        place = f"line {line}"
        yield place, found if isinstance(found, dict) else _no_object(f"{file}, {place}", found)
        if text[end] == "]":
            break
        at = _after(space, text, end + 1)
    if text[end + 1 :].strip():
        raise UserError(f"{file}: more follows after the array's end; give one array, or JSON lines in a .jsonl")


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def _csv(file: Path) -> Rows:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_decoded(file), newline=""), strict=True)
    header: list[str] = []
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, BadRow("not CSV", f"{file}, {place}: not CSV: {error}")
            continue
        if not fields:
            continue
        if not header:
            header = fields
            twice = next((n for n in header if header.count(n) > 1), None)
            if twice is not None:
                raise UserError(f"{file}, {place}: two columns are named {twice!r}; give one another name")
        elif len(fields) != len(header):
            says = f"has {len(fields)} fields, the header has {len(header)}; quote fields that hold commas or line ends"
            yield place, BadRow("wrong number of fields", f"{file}, {place}: {says}")
        else:
            yield place, {name: value or None for name, value in zip(header, fields, strict=True)}


def _parquet(file: Path, head: bytes) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if head and not head.startswith(b"PAR1"):
        raise UserError(f"{file} is no Parquet file: it begins with {head[:8]!r}; name it by what it is ({', '.join(ENDINGS)})")
    if not head:
        return
    number = 0
    try:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(4096):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as Parquet after row {number}: {_line(error)}") from None


def _decoded(file: Path) -> str:
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"byte {error.start + 1} of the file (0x{raw[error.start]:02X})"
        raise UserError(f"{file}, line {line}: {what} is not UTF-8; save the file as UTF-8") from None


# --- values ------------------------------------------------------------------------------------------------------------

ROLES = {"system": "S", "user": "U", "assistant": "A"}
ORDER = {
    "messages": (re.compile("S?(UA)+"), "user and assistant in turn, ending with the assistant's (a system's may come first)"),
    "prompt": (re.compile("S?(UA)*U"), "user and assistant in turn, ending with the user's (a system's may come first)"),
    **dict.fromkeys(("completion", "chosen", "rejected"), (re.compile("A"), "one turn of the assistant")),
}
"""column -> (the order its roles must have, in words)"""


def shown(value: Any) -> str:
    """A value on one line, cut."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _text(where: str, name: str, value: Any, spot: str = "") -> str:
    """A text that is not blank; ``spot`` says where in the column it stands. Raises `BadRow`."""
    if not isinstance(value, str):
        raise BadRow(name, f"{where}: {name}{spot} must be a text; got {shown(value)}")
    if not value.strip():
        raise BadRow(name, f"{where}: {name}{spot} is empty")
    return value


def _turns(where: str, name: str, value: Any, column: str) -> list[dict[str, str]]:
    """Messages with roles in order; a text is one message. Raises `BadRow`."""
    if isinstance(value, str) and column != "messages":
        return [{"role": "user" if column == "prompt" else "assistant", "content": _text(where, name, value)}]
    if not isinstance(value, list):
        or_text = "" if column == "messages" else "a text or "
        raise BadRow(name, f"{where}: {name} must be {or_text}a list of messages {{role, content}}; got {shown(value)}")
    turns = []
    for i, message in enumerate(value):
        at = f"{name}[{i}]"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRow(name, f"{where}: {at} must be an object with role and content; got {shown(message)}")
        if not isinstance(message["role"], str) or message["role"] not in ROLES:
            raise BadRow(name, f"{where}: {at}.role must be one of {', '.join(ROLES)}; got {shown(message['role'])}")
        more = [k for k, v in message.items() if k not in ("role", "content") and v is not None]
        if more:
            raise BadRow(name, f"{where}: {at} has {', '.join(map(str, more))}; only role and content are taken")
        turns.append({"role": message["role"], "content": _text(where, name, message["content"], f"[{i}].content")})
    fits, needed = ORDER[column]
    if not fits.fullmatch("".join(ROLES[m["role"]] for m in turns)):
        got = ", ".join(m["role"] for m in turns) or "no messages"
        raise BadRow(name, f"{where}: {name} must be {needed}; got {got if len(got) <= 80 else got[:77] + '...'}")
    return turns


def _id(where: str, name: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise BadRow(name, f"{where}: {name} must be a text or a whole number; got {shown(value)}")
    return str(value)


def _domain(where: str, name: str, value: Any, default: str) -> str:
    return default if value is None else _text(where, name, value)


def _gold(where: str, name: str, value: Any) -> str | None:
    """A reference answer; numbers are written out. Raises `BadRow` for what is no text, number or null."""
    fits = value is None or isinstance(value, (str, int, float))
    if not fits or isinstance(value, bool) or value != value or value in (float("inf"), float("-inf")):
        raise BadRow(name, f"{where}: {name} must be a text, a number or null; got {shown(value)}")
    return None if value is None else str(value)


def _meta(where: str, name: str, value: Any) -> dict[str, Any]:
    """An object, or one written as JSON text."""
    found = {} if value is None else value
    if isinstance(value, str):
        try:
            found = DECODER.decode(value)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, dict):
        raise BadRow(name, f"{where}: {name} must be a JSON object; got {shown(value)}")
    return found


def _hash_of(where: str, row: dict[str, Any]) -> str:
    """16 hexadecimal digits from a row's content; what JSON or UTF-8 cannot hold is found here."""
    try:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    except UnicodeEncodeError:
        raise BadRow("not UTF-8", f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    except (TypeError, ValueError, RecursionError):
        bad = next((k for k, v in row["meta"].items() if not _is_json(v)), "meta")
        says = f"column {bad!r} holds a {type(row['meta'].get(bad)).__name__} that JSON cannot"
        raise BadRow(bad, f'{where}: {says}; drop it by columns: {{"{bad}": ""}}') from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
