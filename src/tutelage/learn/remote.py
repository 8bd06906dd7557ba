"""A teacher behind an HTTP server: log-probs of given tokens from a completions endpoint with ``prompt_logprobs`` (vLLM's).

One request a sample: its token ids as the prompt, one token to generate, and for each prompt token the log-probs of itself and
of the k likeliest. They are at temperature 1 whatever the request says, and no other can be made of a few of them.

Leaves out: hidden states (no server sends them), keys and other ways to log in, servers that take text only.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import numpy as np

from tutelage.spec import UserError
from tutelage.types import Sample, Signal

FILE = "remote.json"
AT_ONCE = 8
"""Requests under way."""
REST = 2.0**-24
"""The least mass outside the top-k: what is left of 1 in fp32 is no smaller."""


@dataclass
class Remote:
    """Where a model is served."""

    url: str
    model: str
    params: int
    timeout: float
    retries: int

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> Remote:
        return cls(**json.loads((folder / FILE).read_text("utf-8")))

    def logprobs(self, tokens: Sequence[int], k: int) -> list[dict[int, float]]:
        """For each token but the first: token id -> log-prob, of itself and the k likeliest. Raises `UserError`."""
        body = {"model": self.model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        answer = self._ask("completions", body)
        found = (answer.get("choices") or [{}])[0].get("prompt_logprobs")
        if not found:
            raise UserError(f"{self.url} answers without prompt_logprobs; a teacher needs them, as vLLM's server has")
        rows = [{int(i): float(e["logprob"]) for i, e in row.items()} for row in found[1:]]
        if len(rows) != len(tokens) - 1 or any(t not in row for t, row in zip(tokens[1:], rows, strict=True)):
            raise UserError(f"{self.url} scored other tokens than it was sent; serve {self.model!r} with the same tokenizer")
        return rows

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = Request(f"{self.url.rstrip('/')}/{path}", headers={"Content-Type": "application/json"})
        request.data = json.dumps(body).encode() if body else None
        for attempt in range(self.retries + 1):
            try:
                with urlopen(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except HTTPError as error:
                if error.code < 500:
                    raise self._refusal(error, path) from None
                says = f"status {error.code}"
            except (URLError, OSError, ValueError) as error:
                says = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                time.sleep(min(30.0, 0.1 * 4**attempt))
        raise UserError(f"{request.full_url} does not answer ({says}, asked {self.retries + 1} times); is the server up?")

    def _refusal(self, error: HTTPError, path: str) -> UserError:
        if error.code == 404 and path != "models":
            there = ", ".join(repr(m.get("id")) for m in self._ask("models").get("data", [])) or "none"
            return UserError(f"{self.url} serves no model {self.model!r}; it serves {there}")
        return UserError(f"{self.url} refuses with status {error.code}: {error.read(300).decode('utf-8', 'replace')}")


class RemoteScorer:
    """A served model as a `tutelage.credit.base.Scorer` without hidden states."""

    def __init__(self, name: str, remote: Remote):
        self.name, self.remote, self.params, self.scored = name, remote, remote.params, 0
        self._blind = f"teacher {name!r} is served and sends no hidden states; set want to logp or topk"

    @property
    def head(self) -> Any:
        raise UserError(self._blind)

    def score(self, samples: Sequence[Sample], temperature: float, want: Literal["logp", "hidden"]) -> list[Signal]:
        if want == "hidden":
            raise UserError(self._blind)
        found = self._asked(samples, temperature, 1)
        values = [np.array([row[t] for t, row in zip(s.tokens[s.trained].tolist(), rows, strict=True)]) for s, rows in found]
        return [self._signal(s, v.astype(np.float32), want) for (s, _), v in zip(found, values, strict=True)]

    def topk(self, samples: Sequence[Sample], temperature: float, k: int) -> list[tuple[Signal, Signal]]:
        pairs = []
        for sample, rows in self._asked(samples, temperature, k):
            best = [sorted(row.items(), key=lambda e: -e[1])[:k] for row in rows]
            if any(len(row) < k for row in best):
                raise UserError(f"{self.remote.url} tells fewer than {k} log-probs a token; start it with --max-logprobs {k}")
            ids = np.array([[i for i, _ in row] for row in best], np.int32).reshape(-1, k)
            rest = [math.log(max(REST, 1 - math.fsum(math.exp(x) for _, x in row))) for row in best]
            logps = np.array([[*(x for _, x in row), r] for row, r in zip(best, rest, strict=True)], np.float32).reshape(
                -1, k + 1
            )
            pairs.append((self._signal(sample, ids, "topk"), self._signal(sample, logps, "topk")))
        return pairs

    def _asked(self, samples: Sequence[Sample], temperature: float, k: int) -> list[tuple[Sample, list[dict[int, float]]]]:
        """What the server says at each sample's trained tokens."""
        if temperature != 1:
            raise UserError(f"teacher {self.name!r} is served, at temperature 1 only; sample at 1, not {temperature:g}")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            rows = list(pool.map(lambda s: self.remote.logprobs(s.tokens.tolist(), k), samples))
        self.scored += sum(len(s.tokens) for s in samples)
        return [(s, [said[i - 1] for i in s.trained.tolist()]) for s, said in zip(samples, rows, strict=True)]

    def _signal(self, sample: Sample, values: np.ndarray, kind: str) -> Signal:
        return Signal(values, sample.trained, {"temperature": 1.0, "kind": kind, "model": self.name})
