r"""`MathVerify`: is an answer mathematically equal to the gold answer? Parsing and comparison are math-verify's
(https://github.com/huggingface/Math-Verify): fractions, radicals, sets, intervals and expressions, in LaTeX or plain.

The library guards itself with SIGALRM, which works in main threads only and cannot stop a long integer power. So it runs
in worker processes that are shared by all verifiers: spawned when first needed, each owned by one thread, and killed and
replaced when an answer takes too long. Such an answer is an error, not a zero: nobody knows whether it was right.

Text without LaTeX delimiters must be one expression as a whole. Left to itself the library searches the text and takes the
last number, so that ``43, 42`` would pass for 42.

Leaves out: several gold answers, answers in words ("twelve"), and the form of an answer: where the question is itself an
expression, repeating it is equal to the gold answer, and another verifier is needed. A reply in prose marks its answer:
``\boxed{}``, ``$...$``, or ``answer_after``.
"""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, ClassVar

from pydantic import Field

from tutelage.types import Score, Task
from tutelage.verify.text import Marked, no_gold

START_S = 120.0
"""How long a worker may take to import its library."""
MEMORY_BYTES = 4 << 30
"""What a worker may allocate: ``9^{9^9}`` is a short reply and a long number."""


class MathVerify(Marked):
    """1.0 where the answer equals ``task.gold`` as mathematics."""

    library: ClassVar[str] = "math-verify"
    timeout_s: float = Field(5.0, gt=0)
    """How long one comparison may take, in seconds; a later one is an error."""

    async def __call__(self, task: Task, reply: str, ctx: Any = None) -> Score:
        if task.gold is None:
            return no_gold(task)
        loop = asyncio.get_running_loop()
        verdict = await loop.run_in_executor(_threads(), _ask, task.gold, self.answer(reply), self.timeout_s)
        return Score(0.0, error=verdict) if isinstance(verdict, str) else Score(float(verdict))


# --- this side: one thread a worker ------------------------------------------------------------------------------------


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1)), thread_name_prefix="math-verify")


_own = threading.local()


def _ask(gold: str, answer: str, timeout_s: float) -> bool | str:
    """The verdict of this thread's worker, or why there is none. A late or dead worker is replaced by the next question's."""
    pipe = getattr(_own, "pipe", None) or _start()
    try:
        pipe.send((gold, answer, timeout_s))
        if pipe.poll(timeout_s):
            return pipe.recv()
        why = f"late: no verdict after {timeout_s:g} s on {answer[:80]!r}"
    except (OSError, EOFError):
        why = f"math-verify's worker died on {answer[:80]!r}"
    _own.process.kill()
    _own.process.join()
    pipe.close()
    _own.pipe = None
    return why


def _start() -> Any:
    """Starts this thread's worker and waits until it has imported its library, so that no answer pays for that."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(theirs,), daemon=True, name="math-verify")
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_S):
            raise RuntimeError(f"math-verify's worker did not start within {START_S:g} s")
        ours.recv()
    except (RuntimeError, OSError, EOFError) as error:
        process.kill()
        raise RuntimeError(f"math-verify's worker did not start ({error}); is math-verify installed?") from None
    _own.process, _own.pipe = process, ours
    return ours


# --- the worker's side ---------------------------------------------------------------------------------------------------


def _serve(pipe: Any) -> None:
    """Answers questions until the other end closes."""
    import logging
    import resource
    import signal

    import math_verify

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to obey
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    pipe.send("ready")
    while True:
        try:
            gold, answer, timeout_s = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(_equal(math_verify, gold, answer, math.ceil(timeout_s) + 1))
        except Exception as error:
            pipe.send(str(error) or type(error).__name__)


def _equal(library: Any, gold: str, answer: str, limit_s: int) -> bool:
    """``limit_s`` stops a worker whose parent has died; a living parent is faster."""
    config = [library.LatexExtractionConfig()]
    right = library.parse(_expression(gold), config, parsing_timeout=limit_s)
    if not right:
        raise ValueError(f"the gold answer {gold!r} is no mathematics; use another verifier or mend the task")
    return library.verify(right, library.parse(_expression(answer), config, parsing_timeout=limit_s), timeout_seconds=limit_s)


def _expression(text: str) -> str:
    """Bare text as one LaTeX expression; empty where it cannot be one."""
    if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")):
        return text
    text = text.strip().rstrip(".")
    if re.search(r"[0-9]\s+[0-9]", text):  # the library reads "40 2" as 42, and "1 1/2" as 1/2
        return ""
    return f"${text}$"
