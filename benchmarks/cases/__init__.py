"""Every case: a new one is an entry in its stem's CASES."""

from benchmarks.case import Case
from benchmarks.cases import attention, logits, moments, relation

CASES: tuple[Case, ...] = (*relation.CASES, *moments.CASES, *attention.CASES, *logits.CASES)
