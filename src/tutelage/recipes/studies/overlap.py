"""Is the sampled token as good as the full vocabulary, and does that change as teacher and student overlap less?

DeepSeek V4 distils over the full vocabulary (arXiv 2606.19348), Nemotron 3 Ultra by the sampled token (arXiv 2606.15007).
Here both learn from teachers of four lineages (studies/diagnose), on the same prompts, each with two learning rates of which
the development split chooses, seed by seed. `Diagnose` says how far the student was from each lineage when it began.
"""

from __future__ import annotations

from tutelage.graph import Goals, Stage
from tutelage.learn.optim import AdamW
from tutelage.recipes.quickstart import GREEDY
from tutelage.recipes.studies.diagnose import EITHER, FORMS, LINEAGES, TAUGHT, Arms
from tutelage.stages.best import Best

RATES = {"full vocabulary": (5e-4, 1e-3), "sampled token": (2.5e-4, 5e-4)}
"""The last of each is the one of studies/diagnose."""


def overlap(seed: int = 0) -> Goals:
    """Sampled token against full vocabulary with teachers of four lineages, two learning rates each."""
    arms = Arms(seed)
    methods: dict[str, tuple[str, Stage]] = {}
    for lineage in LINEAGES:
        for form in FORMS:
            methods[f"{lineage}, {form}"] = lineage, _best(arms, lineage, form)
    return arms.goals("overlap", methods, [arms.diagnosis(lineage) for lineage in LINEAGES])


def _best(arms: Arms, lineage: str, form: str) -> Best:
    """The learning rate that is best on the development split."""
    name = f"mopd {lineage} {form}"
    rates = {lr: arms.student(lineage, form, name=f"{name} lr {lr:g}", optimizer=AdamW(lr=lr)) for lr in RATES[form]}
    return Best(
        name=f"best {name}",
        candidates={f"lr {lr:g}": stage.out() for lr, stage in rates.items()},
        select_on=arms.tasks.out("dev"),
        domains=TAUGHT,
        env=EITHER,
        sampling=GREEDY,
    )
