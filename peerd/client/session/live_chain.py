"""A session's chain as it stands: hops that live, in the order of their blocks, and holes where one died.

Knows places, numbers and epochs; opens nothing and sends nothing. The difficulty is that hops die while holes
are being filled: so neighbouring holes are one, and what fills a hole may leave some of it open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peerd.client.finding.served_by import ServedBy
from peerd.client.session.control_stream import ControlStream
from peerd.protocol.span import Span

# A hop's number travels in a byte, and is used once (spec/session.md).
MAX_NUMBERS = 256
# A bridge costs two links instead of one, and the client's own line: after this long the client looks for another way,
# and after twice as long each time, up to the second figure.
REPLAN_S = 10.0
MAX_REPLAN_S = 300.0


@dataclass(frozen=True, slots=True)
class Route:
    """Where a hop sends its results, since `epoch`.

    is_bridged: they come to the client, which passes them on, since the hop cannot reach its next hop.
    is_bridge_wanted: the client has not tried to end that. replan_after_s: it looks for another way after so long.
    """

    epoch: int
    is_bridged: bool = False
    is_bridge_wanted: bool = False
    replan_after_s: float = REPLAN_S

    def direct(self, epoch: int, *, is_bridged: bool = False) -> Route:
        """A route to the next hop itself, which is to take this one's place.

        is_bridged: until the link stands, what the hop sends is still for the client to carry.
        """
        return replace(self, epoch=epoch, is_bridged=is_bridged, is_bridge_wanted=False)

    def with_longer_pause(self) -> Route:
        """The same, to be looked at again after twice as long."""
        return replace(self, replan_after_s=min(2 * self.replan_after_s, MAX_REPLAN_S))


class LiveChain:
    """Hops over `blocks`; at first one hole."""

    def __init__(self, session: bytes, blocks: Span) -> None:
        self.session = session
        self.epoch = 0
        self._places: list[ControlStream | Span] = [blocks]
        self._next_number = 0
        # Of hops whose route has changed since they were opened.
        self._routes: dict[ControlStream, Route] = {}

    def __repr__(self) -> str:
        places = (f"[{place}]" if isinstance(place, Span) else str(place.hop.span) for place in self._places)
        return f"<LiveChain epoch={self.epoch} {' '.join(places)}>"

    @property
    def controls(self) -> list[ControlStream]:
        """The hops that live."""
        return [place for place in self._places if isinstance(place, ControlStream)]

    @property
    def holes(self) -> list[Span]:
        """Blocks that no hop of the chain runs now."""
        return [place for place in self._places if isinstance(place, Span)]

    @property
    def is_whole(self) -> bool:
        return not self.holes

    @property
    def served_by(self) -> tuple[ServedBy, ...]:
        """Who serves which blocks now, in the order of the blocks; holes are left out."""
        return tuple(ServedBy(control.hop.peer_id, control.hop.span) for control in self.controls)

    def __contains__(self, control: ControlStream) -> bool:
        return control in self._places

    def before(self, block: int) -> ControlStream | None:
        """The hop that ends where `block` begins."""
        return next((control for control in self.controls if control.hop.span.end == block), None)

    def after(self, block: int) -> ControlStream | None:
        """The hop that begins with `block`."""
        return next((control for control in self.controls if control.hop.span.start == block), None)

    def has_numbers(self, count: int) -> bool:
        """Whether so many hops can still be numbered."""
        return self._next_number + count <= MAX_NUMBERS

    def renew(self, session: bytes) -> None:
        """Be another session, whose numbers are all free: only while no hop lives."""
        assert not self.controls
        self.session, self._next_number = session, 0

    def take_numbers(self, count: int) -> list[int]:
        """Numbers for new hops, of which there must be enough."""
        assert self.has_numbers(count)
        first, self._next_number = self._next_number, self._next_number + count
        return list(range(first, first + count))

    def raise_epoch(self) -> int:
        """The next route's number."""
        self.epoch += 1
        return self.epoch

    def route(self, control: ControlStream) -> Route:
        """Where a hop sends its results now."""
        return self._routes.get(control) or Route(control.epoch)

    def set_route(self, control: ControlStream, route: Route) -> None:
        """The hop's results go another way from now on."""
        self._routes[control] = route

    def drop(self, control: ControlStream) -> None:
        """A hop is gone: there is a hole in its place. Its session is ended, if it can still hear that."""
        control.close()
        self._routes.pop(control, None)
        places: list[ControlStream | Span] = []
        for place in self._places:
            now = control.hop.span if place is control else place
            last = places[-1] if places else None
            if isinstance(now, Span) and isinstance(last, Span):
                places[-1] = Span(last.start, now.end)
            else:
                places.append(now)
        self._places = places

    def put(self, span: Span, controls: Sequence[ControlStream]) -> bool:
        """Hops over `span`, in place of what is there: a hole or part of one, or hops, which are then ended.

        False, having changed nothing, where other hops have been put there meanwhile.
        """
        places: list[ControlStream | Span] = []
        replaced = []
        for place in self._places:
            own = place if isinstance(place, Span) else place.hop.span
            if own.end <= span.start or span.end <= own.start:
                places.append(place)
                continue
            if isinstance(place, ControlStream):
                if own.start < span.start or span.end < own.end:
                    return False
                replaced.append(place)
            if own.start < span.start:
                places.append(Span(own.start, span.start))
            if own.start <= span.start:
                places.extend(controls)
            if span.end < own.end:
                places.append(Span(span.end, own.end))
        self._places = places
        for control in replaced:
            control.close()
            self._routes.pop(control, None)
        return True

    def close(self) -> None:
        """End the session on every hop."""
        for control in self.controls:
            control.close()
