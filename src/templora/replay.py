"""Computing a moment again from an earlier one: the same passes over the same tokens, one after another.

Floating-point sums depend on how a computation is cut into passes, so it is not enough to see the same
tokens: each that the model wrote is preceded by the pass it was drawn from, and no other.
"""

from templora.events import ChunkScored
from templora.history import OWN, History
from templora.study import Study
from templora.window import Plan, Span


class Replay:
    """A history and what computes it."""

    def __init__(self, history: History, plan: Plan, study: Study) -> None:
        self.history, self.plan, self.study = history, plan, study

    def run(self, start: int, chunk: int) -> tuple[int, bool]:
        """From the state after `start` tokens and `chunk` learned chunks to the end of the history.

        Returns how many chunks are learned there, and whether every score was what it was before.
        """
        history, exact, fed = self.history, True, self.history.ids[:start]
        while True:
            span = self.plan.span(chunk)
            if chunk < len(history.learned) and len(fed) == span.stop:
                exact &= self._learn(span)
                chunk += 1
                continue
            # A saved state has the marks of its last moment in it already.
            if len(fed) > start or start == 0:
                self._repeat_marks(fed, span)
            if len(fed) == len(history.ids):
                return chunk, exact
            if history.kinds[len(fed)] == OWN:
                self.study.passes.decoder.logits(fed, span)
            fed.append(history.ids[len(fed)])

    def _learn(self, span: Span) -> bool:
        learned = self.history.learned[span.chunk]
        written = self.history.own_in(span.start, span.stop)
        events = self.study.finish(self.history.ids, span, written, score_base=learned.base)
        scored = next(event for event in events if isinstance(event, ChunkScored))
        return scored.adapted_nll == learned.adapted_nll

    def _repeat_marks(self, fed: list[int], span: Span) -> None:
        for mark in self.history.marks_at(len(fed)):
            if mark.kind == "look":
                self.study.passes.decoder.logits(fed, span)
            elif mark.kind == "forget":
                self.study.passes.forget()
