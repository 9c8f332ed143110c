"""Which states of a row are kept, and which one a batch goes on from. Positions only, no tensors.

A state stands for all positions before it and cannot be taken back by some. So a block keeps a trail: a few states of
different positions, and the inputs that came since the oldest. To go on from any position of the trail, the last state
at or before it is taken, and the inputs from there on run through the mixer once more. So speculation, which cuts a
row in the middle of a step, costs one short run of the mixer instead of a state for each guess.

Two of the states are needed at any time: the last one at or before the row's floor, to which it may be cut, and the
newest. The third is on the way to becoming the former: it is a state that a batch went on from, and when the floor has
passed it, the oldest is forgotten. So in the usual course no input runs twice.

A batch that fails is run again, block by block from where each block stands. A block may have gone on already, so its
newest state is beyond the row's end; it is dropped, and the one before it is found in the trail.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peerd.compute.kv.state_layout import STATES


@dataclass(frozen=True, slots=True)
class Kept:
    """A state of all positions before `position`, in one of the places for states. The empty row's has no place.

    `begins`: no inputs before it are in the log, so a row is never cut before it.
    """

    position: int
    place: int | None
    begins: bool = False


@dataclass(slots=True)
class Trail:
    """One block's states of one row, oldest first."""

    kept: list[Kept] = field(default_factory=list)

    def go_to(self, start: int, floor: int) -> Kept:
        """Cut the trail at `start`, and forget states that the row's `floor` makes needless. Returns the newest.

        Raises LookupError if there is none, which means that the row was not computed here.
        """
        if not start:
            self.kept = [Kept(0, None)]
        self.kept = [kept for kept in self.kept if kept.position <= start]
        if not self.kept:
            raise LookupError(f"no running state at or before position {start}")
        if self.kept[-1].position == start and self.kept[-1].begins:
            self.kept = [Kept(start, self.kept[-1].place)]
        while len(self.kept) > 1 and self.kept[1].position <= floor:
            del self.kept[0]
        return self.kept[-1]

    @property
    def oldest(self) -> Kept:
        return self.kept[0]

    def drop_oldest(self) -> int:
        """Forget the oldest state, to put one of a later position in its stead. Returns a place for that."""
        place = self._free_place() if self.kept[0].place is None else self.kept[0].place
        del self.kept[0]
        return place

    def put_oldest(self, position: int, place: int) -> None:
        """Note that `place` holds the state of `position` now, which is the oldest."""
        self.kept = [Kept(position, place), *(kept for kept in self.kept if kept.position > position)]

    def place_for_next(self) -> int:
        """A place for the state after the next positions: a free one, else that of the newest state, which is
        forgotten.
        """
        if len(self.kept) == STATES:
            newest = self.kept.pop()
            assert newest.place is not None
            return newest.place
        return self._free_place()

    def add(self, position: int, place: int, *, begins: bool) -> None:
        """Note that `place` holds the state of `position` now."""
        self.kept.append(Kept(position, place, begins))

    def copy(self) -> Trail:
        return Trail(list(self.kept))

    def _free_place(self) -> int:
        return next(place for place in range(STATES) if all(kept.place != place for kept in self.kept))
