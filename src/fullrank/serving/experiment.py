"""Several bundles side by side: who is answered by which, and what came of it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response

from fullrank.metrics.sequential import always_valid_difference, always_valid_shares, rate_of
from fullrank.serving.arm_counts import GROUPS, ArmCounts, CountedList
from fullrank.serving.bodies import Strict, answer, encoded
from fullrank.serving.errors import NoExperiment, refusals
from fullrank.serving.live import Live
from fullrank.serving.store import Feedback

# The bundle that the server was started with, and what a request says that takes no part.
CONTROL, OPT_OUT = "control", "none"
# About the difference of the rates, as a share of the control's, that the test is best at.
LIFT = 0.05


class ArmResult(Strict):
    """What came of an arm since the server was started.

    Attributes:
        share: of the users.
        users: distinct ones among the first 100,000.
        lists: answers, without those that were forced.
        rewarded: lists with feedback whose reward is 1 and that names them by `impression_id`.
        rate: rewarded of lists.
        difference, low, high: of the rate above the control's, with an interval of 95 % that holds whenever one looks;
            null for the control, and where there is too little.
        p_value: of no difference, likewise.
    """

    arm: str
    share: float
    model_version: str
    users: int
    lists: int
    rewarded: int
    rate: float | None
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None


class ExperimentResult(Strict):
    """Attributes:
    reward: the label that is counted.
    shares_p_value: of users having come by the shares, whenever one looks; below 0.001 something is wrong.
    """

    reward: str
    arms: list[ArmResult]
    shares_p_value: float | None


class Experiment:
    """Splits users among arms by a hash of their ids, in fixed shares: who is in which never changes, in no process,
    unless the salt or the shares do; which bundles they are does not matter.

    Args:
        control: what is served to the rest.
        arms: others by name, each with its share.
        salt: with another one, users are split independently of this.
        reward: the label of feedback that counts.
        counts: file in which the processes of a server count together; None counts in memory.

    Raises:
        ValueError: if a name is that of the control or of no arm, a share is not between 0 and 1, or their sum is 1 or
            more.
    """

    def __init__(
        self,
        control: Live,
        arms: Mapping[str, tuple[Live, float]],
        salt: str,
        reward: str,
        counts: Path | None = None,
    ) -> None:
        for name, (_, share) in arms.items():
            if name in (CONTROL, OPT_OUT) or not name:
                raise ValueError(f'--arm: "{name}" is no name for an arm; {CONTROL} and {OPT_OUT} have a meaning')
            if not 0 < share < 1:
                raise ValueError(f"--arm {name}: the share is {share:g}, expected a number between 0 and 1")
        rest = 1 - sum(share for _, share in arms.values())
        if rest <= 0:
            raise ValueError(f"--arm: the shares have the sum {1 - rest:g}, and nothing is left for the control")
        self.salt, self.reward = salt, reward
        self.arms = {name: live for name, (live, _) in arms.items()} | {CONTROL: control}
        self.shares = {name: share for name, (_, share) in arms.items()} | {CONTROL: rest}
        self._names = list(self.arms)
        self._counts = ArmCounts(len(self._names), counts)

    def arm_of(self, unit: str) -> str:
        """The arm of a user, or of whatever is split."""
        place = int.from_bytes(self._hash(unit)[:8], "big") / 2**64
        for name, share in self.shares.items():
            place -= share
            if place < 0:
                return name
        return CONTROL

    def chosen(self, user: int | str | None, request_id: str, wish: str | None) -> tuple[str, bool]:
        """The arm that answers a request, and whether it counts. Someone without an id is another one in each request.

        Raises:
            ValueError: if an arm is wished for that there is not.
        """
        if wish is None:
            return self.arm_of(_unit(user, request_id)), True
        name = CONTROL if wish == OPT_OUT else wish
        if name not in self.arms:
            raise ValueError(
                f'experiment: there is no arm "{wish[:40]}"; there are {", ".join(self.arms)} and {OPT_OUT}'
            )
        return name, False

    def answered(self, lists: Iterable[tuple[str, int | str | None, str]]) -> None:
        """Count lists, and wait for what comes of them.

        Args:
            lists: the arm that answered, the user and the request's id of each.
        """
        counted = []
        for arm, user, request_id in lists:
            digest = self._hash(_unit(user, request_id))
            group = int.from_bytes(digest[8:12], "big") % GROUPS
            seen = None if user is None else _number(digest)
            counted.append(CountedList(self._request(request_id), self._names.index(arm), group, seen))
        if counted:
            self._counts.answered(counted)

    def rewarded(self, events: Sequence[Feedback]) -> list[str]:
        """Take note of feedback: the arms of lists that are waited for and whose first reward it is."""
        rewards = [
            self._request(each.impression)
            for each in events
            if each.impression is not None and each.event.labels.get(self.reward) == 1
        ]
        return [self._names[arm] for arm in self._counts.rewarded(rewards)] if rewards else []

    def results(self) -> dict[str, Any]:
        """An `ExperimentResult`.

        Raises:
            OSError: if the file of the counts cannot be read.
        """
        counts = dict(zip(self._names, self._counts.totals(), strict=True))
        rates = {name: rate_of(own.rewarded, own.lists) if any(own.lists) else None for name, own in counts.items()}
        control, arms = rates[CONTROL], []
        for name, (lists, rewarded, users) in counts.items():
            rate, found = rates[name], None
            if name != CONTROL and rate is not None and control is not None and control.rate > 0:
                found = always_valid_difference(rate, control, expected=LIFT * control.rate)
            arms.append(
                {
                    "arm": name,
                    "share": self.shares[name],
                    "model_version": self.arms[name].served.version,
                    "users": users,
                    "lists": sum(lists),
                    "rewarded": sum(rewarded),
                    "rate": None if rate is None else rate.rate,
                    **dict.fromkeys(("difference", "low", "high", "p_value")),
                    **({} if found is None else found._asdict()),
                }
            )
        users_A = [own.users for own in counts.values()]
        shares = always_valid_shares(users_A, list(self.shares.values())) if any(users_A) else None
        return {"reward": self.reward, "arms": arms, "shares_p_value": shares}

    def close(self) -> None:
        self._counts.close()

    def _request(self, name: str) -> int:
        return _number(self._hash(_unit(None, name)))

    def _hash(self, unit: str) -> bytes:
        return hashlib.blake2b(f"{self.salt}\0{unit}".encode(), digest_size=16).digest()


def add_experiment(app: FastAPI, experiment: Experiment | None) -> None:
    """The route that says what came of the arms."""

    @app.get("/v1/experiment", response_model=ExperimentResult, tags=["operation"], responses=refusals(404, 500, 503))
    async def results() -> Response:
        """What came of each arm so far. It may be looked at any time, and stopped by what is seen."""
        if experiment is None:
            raise NoExperiment
        return answer(encoded(await asyncio.get_running_loop().run_in_executor(None, experiment.results)))


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big", signed=True)


def _unit(user: int | str | None, request_id: str) -> str:
    return f"request {request_id}" if user is None else f"user {user}"
