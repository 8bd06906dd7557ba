"""``tutelage lineage``: the whole ancestry of an artifact, as a tree, as a picture, and as an answer about another one."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutelage.commands.shared import STORE, AsJson, Where, console, find, near, newest_of, open_store, print_json, seeds_of
from tutelage.spec import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from tutelage.ancestry import Ancestry, Link, Way
    from tutelage.store import Store

To = Annotated[
    str | None,
    typer.Option(
        "--to", metavar="ARTIFACT", help="Does it descend from this one or its data, and how? Exit code 0: yes, 1: no."
    ),
]
Picture = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Draw it: .svg, .png, .pdf or .html.")]
Short = Annotated[bool, typer.Option("--short", help="Only the tree, without specs, content hashes, code and tokens.")]


def lineage(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="NAME, NAME@SEED or the start of a key, each with :PORT.")
    ],
    to: To = None,
    out: Picture = None,
    short: Short = False,
    store: Where = STORE,
    as_json: AsJson = False,
) -> None:
    """Print everything an artifact was made from, back to the first stage.

    With --to, say whether and how it descends from another artifact.
    It does by weights, data, teaching or the choice of a checkpoint;
    it does not by the same data or a bound on its compute.
    """
    from tutelage.ancestry import Ancestry, gather

    if to is not None and (out or short):
        raise UserError(
            f"{'--out' if out else '--short'} shows the whole ancestry and --to answers one question; give one of them"
        )
    home = open_store(store)
    key, port = find(home, artifact)
    of = gather(home, home.meta(key))
    notes = [newest_of(home, artifact.partition(":")[0], key)]
    if to is not None:
        other, other_port = _other(home, of, to)
        theirs = gather(home, home.meta(other)) if other not in of.gone else Ancestry(other, {}, {other: of.gone[other]})
        notes += [newest_of(home, to.partition(":")[0], other)] if other not in of.gone else []
        asked = {other: to.partition(":")[0], key: artifact.partition(":")[0]}
        answer = Answer(of, theirs, other_port, namer(home, {**theirs.names, **of.names}, asked))
        print_json(answer.as_json()) if as_json else answer.show(console(), [n for n in notes if n])
        sys.exit(0 if answer.descends else 1)
    if as_json:
        body = {"key": key, "port": port, "stages": list(of.metas.values()), "gone": of.gone}
        return print_json({**body, "edges": [asdict(link) for link in of]})
    if out:
        from tutelage.report.picture import save

        save(of, out)
    say = console()
    for note in filter(None, notes):
        say.print(note, highlight=False, soft_wrap=True)
    for tree in trees(of, port, say.width, not short):
        say.print(tree, highlight=False)
    say.print(_sum(of, not short), highlight=False, soft_wrap=True)
    if port:
        say.print(f"files: {near(home.path(key, port))}", highlight=False, soft_wrap=True)
    if out:
        say.print(f"picture: {near(out)}", highlight=False, soft_wrap=True)


def _other(home: Store, of: Ancestry, text: str) -> tuple[str, str]:
    """(key, port or nothing) of what ``--to`` names, which may be an ancestor that is gone. Raises `UserError`."""
    name, _, port = text.partition(":")
    for key in of.gone:
        if of.names[key] == name or (len(name) >= 4 and key.startswith(name)):
            return key, port
    key, found = find(home, text)
    return key, found if port else ""


# --- the tree ------------------------------------------------------------------------------------------------------------


def trees(of: Ancestry, port: str, width: int, full: bool = False) -> Iterator[Any]:
    """The ancestry as `rich` trees: each stage once, under the first that was made from it; a new tree where one gets deep."""
    from rich.text import Text
    from rich.tree import Tree

    deepest = max(width // 8 - 2, 3)
    label = _labels(of, width, full)
    roots = deque([of.root])
    shown = {of.root}
    while roots:
        key = roots.popleft()
        top = Tree(label(key, "", of.names[key] + (f":{port}" if port and key == of.root else "")), guide_style="dim")
        stack = [(top, link, 1) for link in reversed(of.links[key])]
        again: dict[int, Text] = {}
        while stack:  # in the order of the lines
            branch, link, depth = stack.pop()
            if link.key in shown:
                _shown_above(branch, link, again)
                continue
            shown.add(link.key)
            if depth == deepest and of.links.get(link.key):
                branch.add(Text.assemble(*_edge(link), ("  (goes on below)", "dim")))
                roots.append(link.key)
                continue
            below = branch.add(label(link.key, *_edge_words(link)))
            stack.extend((below, each, depth + 1) for each in reversed(of.links.get(link.key, [])))
        yield top


def _shown_above(branch: Any, link: Link, again: dict[int, Any]) -> None:
    """One line under a stage for all its edges to what has its own line already."""
    from rich.text import Text

    if id(branch) not in again:
        again[id(branch)] = Text()
        branch.add(again[id(branch)])
    line = again[id(branch)]
    line.right_crop(len("  (shown above)") if line else 0)
    line.append(", " if line else "")
    line.append_text(Text.assemble(*_edge(link)))
    line.append("  (shown above)", "dim")


def _edge_words(link: Link) -> tuple[str, str]:
    detail = f" of {link.detail}" if link.detail and link.detail not in link.name else ""
    return link.role + detail, link.label


def _edge(link: Link) -> tuple[Any, ...]:
    role, name = _edge_words(link)
    return (role, "cyan"), " ", (name, "bold")


def _labels(of: Ancestry, width: int, full: bool) -> Callable[[str, str, str], Any]:
    """What makes a stage's line: (key, role of the edge, name) -> text."""
    from rich.text import Text

    from tutelage.estimate import human_time, si

    same = _same(of)
    varied = [f for f in ("host", "code") if f not in same]

    def label(key: str, role: str, name: str) -> Text:
        head = Text.assemble((role, "cyan"), " " if role else "", (name, "bold"))
        if key in of.gone:
            return head.append(f"  {key[:8]}  ", "dim").append(of.gone[key], "red")
        meta = of.metas[key]
        flops, seconds = meta.get("cost", {}).get("flops"), meta.get("seconds")
        spent = ", ".join(([f"{si(flops)}FLOP"] if flops else []) + ([human_time(seconds)] if seconds is not None else []))
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(meta["finished"])) if "finished" in meta and width >= 100 else ""
        facts = [meta.get("kind", "").rpartition(".")[2], key[:8], spent, made, *(str(meta.get(f, "")) for f in varied)]
        head.append("".join(f"  {f}" for f in facts if f), "dim")
        for line in _details(meta, same) if full else ():
            head.append(f"\n  {line}", "dim")
        return head

    return label


def _details(meta: dict[str, Any], same: dict[str, Any]) -> Iterator[str]:
    """What ``--short`` leaves out, one fact a line."""
    import json

    from tutelage.ancestry import settings

    yield f"key {meta['key']}"
    for port, digest in meta.get("content", {}).items():
        yield f"content {port} {digest}"
    threads = f", {meta['threads']} threads" if meta.get("threads", 1) > 1 else ""
    yield f"code {meta.get('code', 'unknown')} on {meta.get('host', 'unknown')}{threads}"
    if "versions" not in same:
        yield _versions(meta.get("versions", {}))
    tokens = meta.get("cost", {}).get("tokens", {})
    if tokens:
        yield "tokens " + ", ".join(f"{n:,} {what}" for what, n in tokens.items())
    changed = settings(meta.get("record", {}))
    yield "spec, where it differs from the defaults:" if changed else "spec: all defaults"
    for where, value in changed.items():
        text = value if isinstance(value, str) and value.isidentifier() else json.dumps(value, ensure_ascii=False)
        yield f"  {where} = {text if len(text) <= 160 else text[:159] + '…'}"


def _same(of: Ancestry) -> dict[str, Any]:
    """Of host, code and library versions those that are one for the whole ancestry."""
    found = {}
    for name in ("host", "code", "versions"):
        each = [m.get(name) for m in of.metas.values()]
        if each[0] and all(e == each[0] for e in each):
            found[name] = each[0]
    return found


def _versions(versions: dict[str, Any]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items() if version) or "library versions unknown"


def _sum(of: Ancestry, full: bool) -> str:
    """The last lines: how much there is in all, what is the same for all of it, and what is gone."""
    from tutelage.estimate import count, human_time, si

    metas = [m for k, m in of.metas.items() if k in of.flowing]
    flops, seconds = sum(m.get("cost", {}).get("flops", 0) for m in metas), sum(m.get("seconds", 0) for m in metas)
    same = _same(of)
    line = f"{count(len(metas), 'stage')}, {si(flops)}FLOP, {human_time(seconds)} in all"
    line += "".join(f", {word} {same[name]}" for name, word in (("host", "on"), ("code", "code")) if name in same)
    if bounds := len(of.metas) - len(metas):
        line += f"\n{count(bounds, 'stage')} more only {'bounds' if bounds == 1 else 'bound'} its compute"
    if full and "versions" in same:
        line += f"\nwith {_versions(same['versions'])}"
    for key, why in of.gone.items():
        line += f"\n{of.names[key]} {key} is {why}: what it was made from is not known"
    return line


# --- the answer ----------------------------------------------------------------------------------------------------------


class Answer:
    """Whether and how one artifact descends from another, or that one from it, and which data both saw."""

    def __init__(self, of: Ancestry, other: Ancestry, port: str, label: Callable[[str], str]):
        from tutelage.ancestry import data_of, nearest_common, ways

        self.of, self.other, self.port, self.label = of, other, port, label
        self.same = of.root == other.root
        self.ways = ways(of, other.root, port) if not self.same else []
        self.back = ways(other, of.root) if not self.same else []
        self.descends = self.same or any(w.how != "compute" for w in self.ways)
        turned = any(w.how != "compute" for w in self.back)
        read = {link.label: link for link in data_of(of) if link.key == other.root}
        self.beside = sorted(read) if port and not self.ways else []
        self.common = [] if self.descends or turned or self.beside else nearest_common(of, other)
        self.shared: list[tuple[Link, list[Way]]] = []
        self.apart: list[Link] = []
        for link in [] if self.same else data_of(other):
            found = [w for w in ways(of, link.key, link.port) if w.how != "compute"]
            self.shared += [(link, found)] if found else []
            self.apart += [] if found else [link]
        self.names = {**other.names, **of.names}

    def sentence(self) -> str:
        one, two = self.label(self.of.root), self.label(self.other.root) + (f":{self.port}" if self.port else "")
        if self.same:
            return f"yes: {one} and {two} come from the same stage, {self.of.root[:8]}"
        if self.descends:
            return _sentence(self.ways[0], one, two, self.of)
        no = f"no: {one} does not descend from {two}"
        if self.ways:
            no += f", which only bounds its compute: nothing of {two} is in {one}"
        if any(w.how != "compute" for w in self.back):
            return f"no, the other way round: {_sentence(self.back[0], two, one, self.other).partition(': ')[2]}"
        if self.beside:
            return f"{no}, though from {', '.join(self.beside)} of the same stage"
        return no + ("" if self.ways or self.back else f", nor {two} from {one}")

    def show(self, out: Console, notes: list[str]) -> None:
        for note in notes:
            out.print(note, highlight=False, soft_wrap=True)
        say = lambda line: out.print(line, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
        width = out.width if out.is_terminal else 10_000
        path = lambda head, text: say(_filled(head, text, width))  # noqa: E731
        say(self.sentence())
        for way in self.ways or self.back:
            path(f"  {f'by {way.how}:':14}", self._path(self.of if self.ways else self.other, way))
        if self.common:
            say("nearest in common: " + ", ".join(self.label(k) for k in self.common))
            self._show_common(path)
        name = self.label(self.other.root)
        if self.shared:
            say(f"data of {name} that is in {self.label(self.of.root)} too:")
            wide = max(len(link.label) for link, _ in self.shared) + 2
            for link, found in self.shared:
                path(f"  {link.label:{wide}}by {found[0].how}: ", self._path(self.of, found[0]))
        if self.apart and not self.descends:
            say(f"data of {name} that is not: {', '.join(link.label for link in self.apart)}")
        for key, why in {**self.of.gone, **self.other.gone}.items():
            say(f"{self.label(key)} {key} is {why}: there may be more ways through it")

    def _show_common(self, path: Callable[[str, str], None]) -> None:
        from tutelage.ancestry import ways

        for key in self.common:
            for each in (self.of, self.other):
                for way in ways(each, key)[:1]:
                    path("  ", self._path(each, way))

    def _path(self, of: Ancestry, way: Way) -> str:
        """``mopd ← teacher rl-sum ← parent sft ← data tasks:gold``"""
        steps = [f"{link.role} {self._end(of, link)}" for link in way.links]
        more = f"  (and {way.more} more by {way.links[0].role})" if way.more else ""
        return " ← ".join([self.label(of.root), *steps]) + more

    def _end(self, of: Ancestry, link: Link) -> str:
        ports = of.metas.get(link.key, {}).get("outputs", {})
        step = f"@{link.step}" if link.step is not None else ""
        return self.label(link.key) + (f":{link.port}" if len(ports) != 1 or step else "") + step

    def as_json(self) -> dict[str, Any]:
        def way(each: Way) -> dict[str, Any]:
            return {"how": each.how, "more": each.more, "edges": [asdict(link) for link in each.links]}

        return {
            "artifact": {"key": self.of.root, "name": self.names[self.of.root]},
            "to": {"key": self.other.root, "name": self.names[self.other.root], "port": self.port},
            "answer": self.sentence(),
            "descends": self.descends,
            "ways": [way(w) for w in self.ways],
            "back": [way(w) for w in self.back],
            "common": [{"key": k, "name": self.names[k]} for k in self.common],
            "shared_data": [
                {"key": e.key, "name": e.name, "port": e.port, "ways": [way(w) for w in f]} for e, f in self.shared
            ],
            "other_data": [{"key": e.key, "name": e.name, "port": e.port} for e in self.apart],
            "gone": {**self.of.gone, **self.other.gone},
        }


def _sentence(way: Way, one: str, two: str, of: Ancestry) -> str:
    """How ``one``, the root of an ancestry, descends from ``two`` at its strongest."""
    kinds = {o.get("kind") for o in of.metas[of.root]["outputs"].values() if isinstance(o, dict)}
    direct = len(way.links) == 1
    what = two if direct else f"what was made with {two}"
    said = {
        "weights": f"the weights of {one} began as those of {two}",
        "data": f"the weights of {one} were trained on {two}" if "model" in kinds else f"{one} was made from {what}",
        "teaching": f"{one} was written by {what}" if kinds == {"data"} else f"{one} learned from {what}",
        "measuring": f"{one} measures {what}",
        "selection": f"{two} only helped to choose a checkpoint on the way to {one}",
        "compute": f"{two} only bounds the compute of {one}",
    }
    return f"yes, by {way.how}: {said[way.how]}"


def namer(home: Store, names: dict[str, str], asked: dict[str, str]) -> Callable[[str], str]:
    """key -> name; NAME@SEED, or else the start of the key too, where a name stands for several of the keys.

    What was ``asked`` about is called as the user called it.
    """
    several: dict[str, set[str]] = {}
    for key, name in names.items():
        several.setdefault(name, set()).add(key)
    seeds: dict[str, str] = {}
    for name in (n for n, keys in several.items() if len(keys) > 1):
        newest: dict[str, str] = {}
        for seed, key in seeds_of(home, name):
            if newest.setdefault(seed, key) == key:
                seeds.setdefault(key, f"{name}@{seed}")

    def label(key: str) -> str:
        name, alone = names[key], len(several[names[key]]) == 1
        if key in asked and asked[key].partition("@")[0] == name and (alone or "@" in asked[key]):
            return asked[key]
        return name if alone else seeds.get(key, f"{name} ({key[:8]})")

    return label


def _filled(head: str, path: str, width: int) -> str:
    """A path after its head, broken between two steps where it is longer than a line."""
    first, *steps = path.split(" ← ")
    lines = [head + first]
    for step in steps:
        if len(lines[-1]) + len(step) + 3 <= width:
            lines[-1] += f" ← {step}"
        else:
            lines.append(" " * (len(head) + 2) + f"← {step}")
    return "\n".join(lines)
