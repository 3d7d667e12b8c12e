"""Reading back what this host takes for being over there. A thread of the remote tier; no store here.

Look -> nothing that is known of it is believed -> listed, read and compared as for any chain (remote_reading.py)
"""

from typing import Final

from kvstore.tier.remote_orders import Look, Piece
from kvstored.remote_calls import STRANGE
from kvstored.remote_holdings import Holdings
from kvstored.remote_pool import Budget
from kvstored.remote_reading import Reading

UNREAD: Final = "it could not be read"


def look(holdings: Holdings, reading: Reading, budget: Budget, order: Look) -> None:
    """Up to the first block that is not there whole; `why` says what is in the way where that is not plain."""
    seek = order.seek

    def take(piece: Piece) -> None:
        order.whole += len(piece.contents)
        budget.give(piece.taken_bytes)

    holdings.ask_anew(seek.place, holdings.allowed(seek.place, seek.keys)[seek.start :])
    reading.seek(seek, take)
    reason = holdings.far.reading.reason
    if order.whole < len(order.rows) and reason != STRANGE:  # that may lie there: it is written anew
        order.why = reason
