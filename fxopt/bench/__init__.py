"""The benchmark harness and its suites."""
