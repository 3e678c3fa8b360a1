"""Prints the table of injected faults that the documentation contains."""

from __future__ import annotations

from exaone_bridge.verification.self_test.registry import fault_table

if __name__ == "__main__":
    print(fault_table(), end="")
