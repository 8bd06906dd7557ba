"""The model card of a Model artifact: what made it, from what, at what cost, and how to load it.

Markdown with the front matter of Hugging Face's model cards, written into the folder of every model port before it is
published. Content hashes leave cards out, so they may tell of times and hosts.

Leaves out: scores, since a model is evaluated after it is made; cards of data, which `tutelage lineage` prints.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tutelage.ancestry import Ancestry, Link, Meta, gather
from tutelage.estimate import count, human_time, si
from tutelage.store import Store


def card(store: Store, meta: dict[str, Any], port: str) -> str:
    """The card of one port of a stage that has been made, and may not be published yet."""
    of = gather(store, meta)
    adapter = (store.root / "work" / meta["key"] / port / "adapter_config.json").exists()
    parts = [
        *_front(of, port, adapter),
        f"# {_plain(meta['name'])}",
        "",
        f"Port `{port}` of stage `{_plain(meta['name'])}` (`{meta['kind']}`, version {meta['version']}), made by Tutelage.",
        "",
        *_loading(of, port, adapter),
        *_sources(of),
        *_data(of),
        *_making(of),
        "## Spec",
        "",
        "```json",
        json.dumps(meta["record"], indent=1, ensure_ascii=False),
        "```",
        "",
        *_ancestors(of),
    ]
    return "\n".join(parts)


def bases_of(of: Ancestry, port: str, adapter: bool) -> list[str]:
    """The imported folders from which the weights come, as a hub would call them; nothing where all began here.

    An adapter fits one model only: where that is not the import itself, it is named by its stage.
    """
    if adapter and (key := _fits(of, port)[0]):
        return [_imported(of.metas.get(key, {})) or of.names.get(key, key[:8])]
    line = [of.root]
    for key in line:  # grows as it goes: parents, theirs, and so on
        line += [e.key for e in of.links.get(key, ()) if e.role == "parent" and e.key not in line]
    return [name for key in line if (name := _imported(of.metas.get(key, {})))]


def _fits(of: Ancestry, port: str) -> tuple[str, str]:
    """The key and folder of the model that an adapter fits: as its type says, else what it was trained from."""
    output = of.metas[of.root]["outputs"].get(port)
    key, slash, folder = str(output.get("base_key", "") if isinstance(output, dict) else "").partition("/")
    if slash:
        return key, folder
    return next(((e.key, _folder(e)) for e in of.links[of.root] if e.role == "parent"), ("", ""))


def _imported(meta: dict[str, Any]) -> str:
    """The name of the folder that a stage without inputs has imported."""
    path = meta.get("record", {}).get("path")
    keyed = any(isinstance(o, dict) and o.get("base_key") for o in meta.get("outputs", {}).values())
    return hub_name(path) if path and keyed and not meta["inputs"] else ""


def hub_name(folder: str) -> str:
    """``Qwen/Qwen3-0.6B`` for ``models--Qwen--Qwen3-0.6B/snapshots/...`` in the hub's cache; else the folder's own name."""
    cached = re.search(r"models--([^/]+)/snapshots/", folder)
    return cached[1].replace("--", "/", 1) if cached else Path(folder).name


def _front(of: Ancestry, port: str, adapter: bool) -> Iterator[str]:
    """YAML, of which JSON's strings and lists are a part."""
    meta = of.metas[of.root]
    bases = bases_of(of, port, adapter)
    does = "token-classification" if _values(meta, port) else "text-generation"
    body: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": does}
    body |= {"base_model": bases if bases[1:] else bases[0]} if bases else {}
    body |= {"tags": ["tutelage", meta["kind"].rpartition(".")[2].lower(), *(["lora"] if adapter else [])]}
    yield from ("---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in body.items()), "---")


def _values(meta: Meta, port: str) -> bool:
    """Whether a port holds a value model: one number for each token."""
    return bool(meta.get("outputs", {}).get(port, {}).get("head") == "value")


def _loading(of: Ancestry, port: str, adapter: bool) -> Iterator[str]:
    library, cls = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    if _values(of.metas[of.root], port):
        cls = "AutoModelForTokenClassification"
    if of.metas[of.root].get("outputs", {}).get(port, {}).get("head") == "remote":
        yield from ("A server holds this model; `remote.json` says where.", "")
        return
    yield from ("## Load it", "", "With `FOLDER` the folder of this file:", "", "```python")
    yield from (f"from {library} import {cls}" + (", AutoTokenizer" if not adapter else ""),)
    loaded = f"model = {cls}.from_pretrained(FOLDER)"
    yield from (loaded if adapter else f"{loaded}; tokenizer = AutoTokenizer.from_pretrained(FOLDER)", "```", "")
    if adapter:
        key, folder = _fits(of, port)
        content = of.metas.get(key, {}).get("content", {}).get(folder, of.gone.get(key, "not known"))
        base = f"{_plain(of.names.get(key, key[:8]))}:{folder}"
        yield f"It is an adapter of `{base}` (key `{key}`, content `{content}`)."
        yield "Where that does not lie in the place that `adapter_config.json` names, give it, with `BASE` its folder:"
        yield "`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)`."
        yield ""


def _sources(of: Ancestry) -> Iterator[str]:
    """What the stage itself was made from."""
    links = of.links[of.root]
    if not links:
        yield from ("Made from nothing but its spec.", "")
        return
    yield from ("## Made from", "")
    rows = [(e.role + (f" of {e.detail}" if e.detail else ""), e.label, e.key, _content(of, e)) for e in links]
    yield from _table(("role", "artifact", "key", "content"), rows)


def _content(of: Ancestry, link: Link) -> str:
    """The content hash of what an edge names."""
    return of.metas.get(link.key, {}).get("content", {}).get(_folder(link), of.gone.get(link.key, ""))


def _folder(link: Link) -> str:
    return link.port if link.step is None else f"{link.port}@{link.step}"


def _data(of: Ancestry) -> Iterator[str]:
    """Every data port that the model or one of its ancestors has read, and who read it."""
    ports: dict[tuple[str, str], list[Link]] = {}
    for link in of:
        if link.role in ("data", "selection") and link.child in of.flowing:
            ports.setdefault((link.key, link.port), []).append(link)
    if not ports:
        return
    yield from ("## Data that it or an ancestor has read", "")
    rows = []
    for (key, port), links in ports.items():
        outputs = of.metas.get(key, {}).get("outputs", {}).get(port, {})
        readers = dict.fromkeys(of.names[e.child] + (" (to select)" if e.role == "selection" else "") for e in links)
        n = f"{outputs['rows']:,}" if isinstance(outputs, dict) and outputs.get("rows") else ""
        rows.append((links[0].label, n, ", ".join(readers), key, _content(of, links[0])))
    yield from _table(("artifact", "rows", "read by", "key", "content"), rows)


def _making(of: Ancestry) -> Iterator[str]:
    """Cost, code, libraries, place and time."""
    meta, all_of = of.metas[of.root], [m for k, m in of.metas.items() if k in of.flowing]
    cost = meta["cost"]
    tokens = ", ".join(f"{n:,} tokens {what}" for what, n in cost.get("tokens", {}).items())
    spent, took = (sum(m.get("cost", {}).get("flops", 0) for m in all_of), sum(m.get("seconds", 0) for m in all_of))
    versions = ", ".join(f"{package} {version}" for package, version in meta["versions"].items() if version)
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(meta["finished"]))
    yield from ("## How it was made", "")
    yield (
        f"- cost: {si(cost['flops'])}FLOP (algorithmic)"
        + (f", {tokens}" if tokens else "")
        + f", {human_time(meta['seconds'])}"
    )
    yield f"- with all it was made from: {count(len(all_of), 'stage')}, {si(spent)}FLOP, {human_time(took)}"
    for each in all_of:
        if types := each.get("facts", {}).get("dequantised"):
            had = ", ".join(f"{n} tensors of {name}" for name, n in types.items())
            yield f"- `{_plain(each['name'])}` was dequantised to fp32, once, from a file with {had}"
    yield f"- code: {meta['code']}; {versions}"
    yield f"- finished: {made} on {meta['host']}, {count(meta['threads'], 'thread')}"
    yield from (f"- key: {of.root}", "")


def _ancestors(of: Ancestry) -> Iterator[str]:
    """Every stage, ancestors first."""
    rows = []
    for key, meta in of.metas.items():
        made_from = ", ".join(f"{e.role} {e.label}" for e in of.links[key]) or "nothing"
        spent = si(meta.get("cost", {}).get("flops", 0)).strip()
        seconds = human_time(meta.get("seconds", 0))
        rows.append((meta["name"], meta["kind"], key[:12], made_from, spent, seconds, str(meta.get("code", ""))))
    yield from ("## Ancestry", "")
    yield from _table(("stage", "kind", "key", "from", "FLOP", "time", "code"), rows)
    for key, why in of.gone.items():
        yield from (f"{_plain(of.names[key])} `{key}` is {why}: what it was made from is not known.", "")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    for row in (head, tuple("---" for _ in head), *rows):
        yield "| " + " | ".join(map(_plain, row)) + " |"
    yield ""


def _plain(text: str) -> str:
    """A cell of a table on one line."""
    return " ".join(text.split()).replace("|", "\\|")
