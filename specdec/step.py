"""One engine step, whole: schedule -> draft -> verify -> commit."""

from __future__ import annotations

from specdec.commit import commit
from specdec.draft import Drafter
from specdec.scheduler import Scheduler
from specdec.verify import TargetVerifier


def step(scheduler: Scheduler, drafter: Drafter, verifier: TargetVerifier) -> None:
    """Advances every scheduled sequence by a prefill chunk or a verification.

    A sequence contributes a chunk of its prompt, or its last token plus up to K drafts, to one ragged
    target forward; each of those that decode ends the step with 1 to K+1 new tokens.
    """
    scheduled = scheduler.schedule()
    drafts = drafter.draft(scheduled)
    result = verifier.verify(scheduled, drafts)
    commit(scheduled, result)
    scheduler.remove_finished()
