"""A slow, plain-Python check of everything that must hold between two verbs. For tests and for the simulation.

It shares no code with the compiled tables but SipHash, reads every row, and takes time in proportion to the store.

    audit_look.py      what is looked at, taken once
    audit_tables.py    the tables against themselves
    audit_holders.py   the tables against whoever holds, writes, reads or pins
"""

from kvstore.audit_holders import HolderChecks
from kvstore.audit_tables import EXACT_ORDER, TableChecks
from kvstore.store import Store

__all__ = ["EXACT_ORDER", "audit"]


def audit(store: Store) -> None:
    """Raise AssertionError with what is wrong, if anything. Owner thread, between two verbs."""
    _Audit(store).run()


class _Audit(TableChecks, HolderChecks):
    """One look at a store."""

    def run(self) -> None:
        """Every check, the foundations first."""
        self.check_rows()
        self.check_positions()
        self.check_slots()
        self.check_open_lists()
        self.check_census()
        for tenant in self.store.tenants.values():
            self.check_index(tenant)
        self.check_tree()
        self.check_leaf_lists()
        self.check_holds()
        self.check_tickets()
        self.check_writers()
        self.check_leases()
        self.check_pins()
        self.check_sessions()
        self.check_holders()
