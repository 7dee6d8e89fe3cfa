"""A guard that judges as ever but has every chunk learned: a measured text is learned whatever it holds.

What random and greedy models write repeats itself; left unlearned it would cost less than a user's text does.
"""

from typing import Any

from templora.guard import Guard, Verdict


class Willing(Guard):
    """Does the guard's work, and neither skips nor goes back."""

    def judge(self, *args: Any) -> Verdict:
        """Learn it, after all."""
        super().judge(*args)
        return Verdict()

    def must_go_back(self, adapted: float, base: float) -> bool:
        """No, after all."""
        super().must_go_back(adapted, base)
        return False


def willing(session: Any) -> Any:
    """The session, with such a guard."""
    session.study.guard = Willing()
    return session
