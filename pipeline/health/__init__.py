"""What must be right before work starts: on this machine, and on each node of a Ray cluster."""

from pipeline.health.finding import ERROR, OK, SKIPPED, WARNING, Finding, run_checks
from pipeline.health.machine import check_machine

__all__ = ["ERROR", "OK", "SKIPPED", "WARNING", "Finding", "check_machine", "run_checks"]
