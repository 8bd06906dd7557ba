"""``tutelage diagnose``: what teachers would say of a student's own replies, before a distillation is paid for.

The question becomes a stage (stages/diagnose.py) over what is in the store, so that it is answered once. An artifact stands in
that graph as the stages it was made by, rebuilt from the records beside it; where these no longer lead to its key (their code
has a newer version, an ancestor or an outside file is gone), it is imported by its folder like any other model.

Leaves out: checkpoints within a series, templates other than the chat template, and rewards: a recipe has them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tutelage.commands.shared import STORE, AsJson, Cores, On, Where, console, find, found_device, load_run, near, print_json
from tutelage.spec import UserError, suggest

if TYPE_CHECKING:
    from tutelage.graph import At, Stage, Type
    from tutelage.stages.diagnose import Diagnose
    from tutelage.store import Store

RECIPE = "diagnose"
"""What the runs of this command are called."""
FORMS = "A Hugging Face folder, or an artifact: NAME, NAME@SEED, RUN:STAGE or the start of a key, each with :PORT"
Teachers = Annotated[
    list[str], typer.Argument(metavar="[DOMAIN=]TEACHER...", help="The same; with DOMAIN= for that domain alone.")
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks", metavar="FILE|ARTIFACT", help="What is asked (default: the development tasks of STUDENT's recipe)."
    ),
]
Picture = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Draw how it goes with the position: .svg, .png, .pdf or .html.")
]


def diagnose(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help=f"{FORMS}.")],
    teachers: Teachers,
    tasks: Tasks = None,
    prompts: Annotated[int, typer.Option(metavar="N", help="Tasks a domain.", min=2)] = 64,
    group: Annotated[int, typer.Option(metavar="N", help="Replies a task.", min=1)] = 1,
    k: Annotated[int, typer.Option("--top-k", metavar="K", help="Likeliest tokens of each that are compared.", min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Of a reply.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(metavar="T", help="Of the sampling, and of all that is compared.", min=0)] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the replies.", min=0)] = 0,
    out: Picture = None,
    store: Where = STORE,
    cores: Cores = None,
    device: On = "auto",
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of bars.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure teachers on a student's own replies: NLL, KL, overlap, advantage, and a verdict in words.

    A verdict is a warning sign, not a proven predictor (docs/methods/diagnose.md). Exit code 1: a teacher has another tokenizer
    or chat template, so that nothing can be compared.
    """
    from tutelage.report import diagnosis
    from tutelage.rollout.base import Sampling
    from tutelage.run import core_count
    from tutelage.stages.diagnose import Diagnose
    from tutelage.store import Store

    if out:
        diagnosis.check_out(out)
    ends = Ends(Store(store, create=False), student, tasks)
    asked = ends.asked(teachers)
    told, comparable = ends.compared(asked)
    found: dict[str, Any] = {"student": student, "key": "", "teachers": told}
    if comparable:
        stage = Diagnose(
            name="diagnosis",
            threads=cores or core_count(),
            model=ends.at(ends.student),
            teachers={label: ends.at(end) for label, end in comparable.items()},
            tasks=ends.at(ends.tasks),
            domains=ends.domains(comparable),
            prompts=prompts,
            group=group,
            k=k,
            sampling=Sampling(temperature=temperature, max_new_tokens=max_new_tokens),
            seed=seed,
        )
        made = answer(stage, store, cores or core_count(), device, plain, as_json)
        found |= {**made, "teachers": [*made["teachers"], *told]}
    if out and comparable:
        diagnosis.save(found, out)
    print_json(found) if as_json else tell(found, ends.home, out if comparable else None)
    raise typer.Exit(1 if told else 0)


def tell(found: dict[str, Any], home: Store, picture: Path | None) -> None:
    """Prints what was found, and where its files are."""
    from tutelage.report import diagnosis

    say = console()
    diagnosis.show(found, say)
    if found["key"]:
        say.print(f"files: {near(home.path(found['key'], 'diagnosis'))}", highlight=False, soft_wrap=True)
    if picture:
        say.print(f"picture: {near(picture)}", highlight=False, soft_wrap=True)


def answer(stage: Diagnose, store: Path, cores: int, device: str, plain: bool, quiet: bool) -> dict[str, Any]:
    """The stage's facts, made first where they are not stored. Ends the command where that fails."""
    import sys

    from rich.console import Console

    from tutelage.estimate import Estimator, summary
    from tutelage.graph import Goals, key, plan
    from tutelage.progress import watch
    from tutelage.run import run
    from tutelage.store import Store

    made = plan([Goals(recipe=RECIPE, stages=(stage.out(),))], Store(store, create=False).has)
    home = Store(store)
    if made.todo:
        say = Console(stderr=True) if quiet else console()
        there = found_device(device, 1, made, say)
        estimator = Estimator(home, there)
        say.print(f"[bold]diagnose[/]: {summary(made, estimator, cores)}", highlight=False, soft_wrap=True)
        with watch(made, estimator, cores, say, plain) as watcher:
            outcome = run(made, home, argv=sys.argv, cores=cores, device=there, watcher=watcher)
        if outcome.state == "stopped":
            say.print("stopped; the same command goes on from the last checkpoint", soft_wrap=True)
        if outcome.state != "done":
            raise typer.Exit(outcome.exit_code)
    return {"key": key(stage), **home.meta(key(stage))["facts"]["diagnosis"]}


# --- what the words name -------------------------------------------------------------------------------------------------


@dataclass
class End:
    """A model or dataset that the user named."""

    text: str
    folder: Path
    key: str = ""
    """of its artifact, where it stands in the graph as the stages it was made by"""
    port: str = ""
    stage: Stage | None = None
    """Else what imports it by its folder."""


class Ends:
    """Student, tasks and teachers of one question. Raises `UserError` for what cannot be found."""

    def __init__(self, home: Store, student: str, tasks: str | None):
        self.home = home
        self._record: dict[str, Any] = {}
        """name -> record of every stage that was rebuilt"""
        self._stages: dict[str, Stage] = {}
        """key -> the same, as stages"""
        self._imports: dict[Path, Stage] = {}
        self.student = self.model(student)
        self.tasks = self._tasks(tasks) if tasks else self._development(student)
        found: Any = self._type(self.tasks)
        if "prompt" not in getattr(found, "columns", ()):
            raise UserError(f"{self.tasks.text} holds no prompts; give --tasks a dataset with a prompt column")
        self.known: tuple[str, ...] = found.domains

    def at(self, end: End) -> At:
        """The edge to what was named."""
        return end.stage.out() if end.stage else self._stages[end.key].out(end.port)

    def asked(self, words: list[str]) -> dict[str, End]:
        """label -> teacher. A label that is a domain's name is measured there alone."""
        found: dict[str, End] = {}
        for word in words:
            domain, equals, text = word.partition("=")
            if not equals or Path(word).exists():
                domain, text = "", word
            elif domain not in self.known:
                raise UserError(f"{word}: the tasks have no domain {domain!r}{suggest(domain, self.known)}")
            label = domain or (text if text not in self.known else f"teacher {text}")
            if label in found:
                what = f"domain {domain!r} is given two teachers" if domain else f"teacher {text!r} is given twice"
                raise UserError(f"{what}; name each once, or ask again for the other")
            found[label] = self.model(text)
        return found

    def domains(self, teachers: dict[str, End]) -> tuple[str, ...]:
        """Those that any of the teachers is measured in."""
        alone = set(teachers) & set(self.known)
        return tuple(d for d in self.known if d in alone or alone != set(teachers))

    def compared(self, teachers: dict[str, End]) -> tuple[list[dict[str, Any]], dict[str, End]]:
        """What is said of teachers that see other ids than the student, and those that see the same."""
        from tutelage.model.differences import difference

        told, same = [], {}
        for label, end in teachers.items():
            says = difference(self.student.folder, end.folder) if self._apart(end) else ("", "")
            if not any(says) and self._apart(end):
                if not (end.stage and self.student.stage):  # a recipe's digest is not that of its files: take both by these
                    for each in (self.student, end):
                        each.stage = each.stage or self._imported(each.text, each.folder)
                    return self.compared(teachers)
                says = "its files differ, though its tokens do not; save both by one version of transformers", ""
            if any(says):
                what, detail = ("tokenizer", says[0]) if says[0] else ("template", says[1])
                words = f"{what} differs, nothing can be compared: {detail}"
                verdict = {"level": f"{what} differs", "words": words, "signs": [], "unsure": []}
                told.append({"teacher": label, "domain": None, "verdict": verdict})
            else:
                same[label] = end
        return told, same

    def _apart(self, end: End) -> bool:
        from tutelage.stages.diagnose import apart

        student, teacher = (self._type(each) for each in (self.student, end))
        return bool(apart(student, teacher))  # type: ignore[arg-type]

    def model(self, text: str) -> End:
        """A model by its folder, or by a name of the store."""
        if Path(text).is_dir():
            return End(text, Path(text), stage=self._imported(text, Path(text)))
        key, port = self._stored(text, "model")
        folder = self.home.path(key, port)
        return End(text, folder, key, port, None if self._made(key, port) else self._imported(text, folder))

    def _imported(self, text: str, folder: Path) -> Stage:
        from tutelage.stages.model import Pretrained

        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise UserError(
                f"{text} is an adapter that cannot be imported by its folder; merge it into its base, and give that"
            )
        folder = folder.resolve()
        return self._imports.setdefault(folder, Pretrained(name=f"import {text}", path=str(folder)))

    def _tasks(self, text: str) -> End:
        from tutelage.stages.files import Files

        path, key, port = Path(text), "", ""
        if not path.exists():
            key, port = self._stored(text, "data")
            path = self.home.path(key, port)
        made = bool(key) and self._made(key, port)
        return End(text, path, key, port, None if made else Files(name="tasks", path=str(path.resolve())))

    def _development(self, student: str) -> End:
        """The development tasks of the newest run that has the student; where none has, of what the student was made from."""
        from tutelage.ancestry import gather
        from tutelage.index import summaries

        fix = "give --tasks a file of tasks, or a dataset of the store"
        if Path(student).is_dir():
            raise UserError(f"{student} is a folder, which knows no tasks; {fix}")
        key, _ = self._stored(student, "model")
        runs = (load_run(self.home, name) for name in reversed(self.home.runs()))
        of_runs = (set(g["keys"].values()) for run in runs if run.get("recipe") != RECIPE for g in run["goals"])
        near = next((keys for keys in of_runs if key in keys), None) or gather(self.home, self.home.meta(key)).metas
        known = summaries(self.home)
        found = [k for k in near if k in known and known[k].outputs.get("dev") == "data"]
        if len(found) != 1:
            raise UserError(f"the recipe of {student} has {len(found) or 'no'} datasets with a port 'dev'; {fix}")
        return self._tasks(f"{found[0]}:dev")

    def _stored(self, text: str, kind: str) -> tuple[str, str]:
        """(key, port) of an artifact. Raises `UserError` where there is none of that kind."""
        home = self.home
        if not (home.root / "format").exists():
            raise UserError(f"{text!r} is no folder, and there is no store in {home.root}; give a folder, or --store DIR")
        run, colon, rest = text.partition(":")
        runs = home.runs()
        if colon and run in {*runs, *(r.rpartition("-")[0] for r in runs), *(["last"] if runs else [])}:
            key, port = find(home, of_run(load_run(home, run), rest))
        else:
            key, port = find(home, text)
        outputs = {p: o.get("kind") for p, o in home.meta(key)["outputs"].items()}
        mine = [p for p, each in outputs.items() if each == kind]
        usual = {"model": "policy", "data": "dev"}[kind]
        port = port or (usual if usual in mine else mine[0] if len(mine) == 1 else "")
        if port not in mine:
            which = f"; name one of its ports: {', '.join(mine)}" if mine else f"; its ports: {', '.join(outputs) or 'none'}"
            raise UserError(f"{text!r} is no {'model' if kind == 'model' else 'dataset'}{which}")
        return key, port

    def _made(self, key: str, port: str) -> bool:
        """Takes an artifact's stages, rebuilt from their records, into the graph; False where they do not lead to its key."""
        from tutelage import graph

        if key in self._stages:
            return True
        try:
            records = {**self._record, **rebuilt(self.home, key)}
            goals = graph.from_record({"recipe": RECIPE, "stages": records, "goals": [{"ref": name} for name in records]})
            stages = {graph.key(at.of): at.of for at in goals.stages}
            if key not in stages:
                return False
            self._plan(stages[key].out(port))
        except UserError:  # what a record names is no more: an outside file, a class, a field
            return False
        self._record, self._stages = records, stages
        return True

    def _type(self, end: End) -> Type:
        return self._plan(self.at(end))

    def _plan(self, at: At) -> Type:
        from tutelage.graph import Goals, key, plan

        return plan([Goals(recipe=RECIPE, stages=(at,))], self.home.has).nodes[key(at.of)].types[at.port]


def of_run(body: dict[str, Any], text: str) -> str:
    """``KEY`` or ``KEY:PORT`` of ``STAGE``, ``STAGE@SEED``, each with ``:PORT``, in a run. Raises `UserError`."""
    stage, colon, port = text.partition(":")
    name, _, seed = stage.rpartition("@")
    goals = body["goals"]
    keys = [g["keys"][stage] for g in goals if stage in g["keys"]]
    keys += [g["keys"][name] for g in goals if name in g["keys"] and str(g.get("seed", 0)) == seed]
    if not keys:
        raise UserError(f"run {body['run']} has no stage {stage!r}{suggest(stage, {n for g in goals for n in g['keys']})}")
    return f"{keys[0]}{colon}{port}"


def rebuilt(home: Store, key: str) -> dict[str, Any]:
    """name -> record of an artifact's stage and of all it was made from, as they lie beside each. Stages are named by their
    keys too, so that seeds do not mix and a bare name goes on meaning what it meant. Raises `UserError` where one is gone."""
    from tutelage.ancestry import gather

    of = gather(home, home.meta(key))
    if of.gone:
        raise UserError(f"{', '.join(of.names[k] for k in of.gone)} is gone")
    names = {k: f"{meta['name']} {k[:8]}" for k, meta in of.metas.items()}
    stages = {}
    for k, meta in of.metas.items():
        mine = {one["name"]: names[one["key"]] for one in meta["inputs"]}
        record = json.loads(json.dumps(meta["record"]), object_hook=partial(renamed, names=mine))
        stages[names[k]] = {**record, "name": names[k]}
    return stages


def renamed(spot: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """An object of a record, its edge going to the new name."""
    return {**spot, "ref": names[spot["ref"]]} if isinstance(spot.get("ref"), str) and spot["ref"] in names else spot
