"""The self-test of the verification: injected faults that its checks must catch and locate."""
