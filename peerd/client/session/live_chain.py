"""A session's chain as it is now: open hops in the order of their blocks, and holes where a hop died.

These are only data: parts, numbers and epochs. Hops may die while holes are being filled. So neighbouring holes are
merged into one, and new hops may fill only a part of a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from peerd.client.finding.served_by import ServedBy
from peerd.client.session.hops.control_stream import ControlStream
from peerd.protocol.span import Span

# A hop's number is sent as one byte, and is used once (spec/sessions/session.md).
MAX_NUMBERS = 256
# A bridge costs two transfers instead of one, over the client's own line. So after this long the client looks for
# another route; each next pause is twice as long, up to MAX_REPLAN_S.
REPLAN_S = 10.0
MAX_REPLAN_S = 300.0


@dataclass(frozen=True, slots=True)
class HopRoute:
    """Where a hop sends its results since `epoch`.

    is_bridged: to the client, which passes them on, because the hop cannot reach its next hop.
    is_bridge_wanted: the client has not tried to end the bridge.
    replan_after_s: after this long the client looks for another route.
    """

    epoch: int
    is_bridged: bool = False
    is_bridge_wanted: bool = False
    replan_after_s: float = REPLAN_S

    def direct(self, epoch: int, *, is_bridged: bool = False) -> HopRoute:
        """A route straight to the next hop, to replace this one.

        is_bridged: whether the client carries the hop's results until the link is up.
        """
        return replace(self, epoch=epoch, is_bridged=is_bridged, is_bridge_wanted=False)

    def with_longer_pause(self) -> HopRoute:
        """This route with a pause twice as long before the client looks for another one."""
        return replace(self, replan_after_s=min(2 * self.replan_after_s, MAX_REPLAN_S))


class LiveChain:
    """The hops over `blocks`. At first there is one hole."""

    def __init__(self, session: bytes, blocks: Span) -> None:
        self.session = session
        self.epoch = 0
        self._parts: list[ControlStream | Span] = [blocks]
        self._next_number = 0
        # The routes of hops whose route has changed since they were opened.
        self._routes: dict[ControlStream, HopRoute] = {}

    def __repr__(self) -> str:
        parts = (f"[{part}]" if isinstance(part, Span) else str(part.hop.span) for part in self._parts)
        return f"<LiveChain epoch={self.epoch} {' '.join(parts)}>"

    @property
    def controls(self) -> list[ControlStream]:
        """The open hops, in order."""
        return [part for part in self._parts if isinstance(part, ControlStream)]

    @property
    def holes(self) -> list[Span]:
        """The blocks that no hop of the chain runs now."""
        return [part for part in self._parts if isinstance(part, Span)]

    @property
    def is_whole(self) -> bool:
        return not self.holes

    @property
    def served_by(self) -> tuple[ServedBy, ...]:
        """Which peers serve which blocks now, in the order of the blocks; holes are left out."""
        return tuple(ServedBy(control.hop.peer_id, control.hop.span) for control in self.controls)

    def __contains__(self, control: ControlStream) -> bool:
        return control in self._parts

    def before(self, block: int) -> ControlStream | None:
        """The hop that ends where `block` begins, or None."""
        return next((control for control in self.controls if control.hop.span.end == block), None)

    def after(self, block: int) -> ControlStream | None:
        """The hop that begins with `block`, or None."""
        return next((control for control in self.controls if control.hop.span.start == block), None)

    def has_numbers(self, count: int) -> bool:
        """Whether `count` more hops can be numbered."""
        return self._next_number + count <= MAX_NUMBERS

    def renew(self, session: bytes) -> None:
        """Start over under a new session id, with all numbers free. Call it only when no hop is open."""
        assert not self.controls
        self.session, self._next_number = session, 0

    def take_numbers(self, count: int) -> list[int]:
        """Take numbers for `count` new hops. Call `has_numbers` first."""
        assert self.has_numbers(count)
        first, self._next_number = self._next_number, self._next_number + count
        return list(range(first, first + count))

    def raise_epoch(self) -> int:
        """Increase the epoch by one, and return it as the number of a new route."""
        self.epoch += 1
        return self.epoch

    def route(self, control: ControlStream) -> HopRoute:
        """The hop's current route."""
        return self._routes.get(control) or HopRoute(control.epoch)

    def set_route(self, control: ControlStream, route: HopRoute) -> None:
        """Set the hop's route."""
        self._routes[control] = route

    def drop(self, control: ControlStream) -> None:
        """Remove a hop, which leaves a hole in its place, and end its session if the stream still works."""
        control.close()
        self._routes.pop(control, None)
        parts: list[ControlStream | Span] = []
        for part in self._parts:
            now = control.hop.span if part is control else part
            last = parts[-1] if parts else None
            if isinstance(now, Span) and isinstance(last, Span):
                parts[-1] = Span(last.start, now.end)
            else:
                parts.append(now)
        self._parts = parts

    def put(
        self,
        span: Span,
        controls: Sequence[ControlStream],
        close: Callable[[ControlStream], None] = ControlStream.close,
    ) -> bool:
        """Put hops over `span`, in place of a hole, of a part of one, or of hops, on which `close` is then called.

        Returns False and changes nothing if other hops were put there meanwhile.
        """
        parts: list[ControlStream | Span] = []
        replaced = []
        for part in self._parts:
            own = part if isinstance(part, Span) else part.hop.span
            if own.end <= span.start or span.end <= own.start:
                parts.append(part)
                continue
            if isinstance(part, ControlStream):
                if own.start < span.start or span.end < own.end:
                    return False
                replaced.append(part)
            if own.start < span.start:
                parts.append(Span(own.start, span.start))
            if own.start <= span.start:
                parts.extend(controls)
            if span.end < own.end:
                parts.append(Span(span.end, own.end))
        self._parts = parts
        for control in replaced:
            close(control)
            self._routes.pop(control, None)
        return True

    def close(self) -> None:
        """End the session on every hop."""
        for control in self.controls:
            control.close()
