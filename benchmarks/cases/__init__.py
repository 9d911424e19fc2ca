"""All cases. To add one, append it to CASES of its stem."""

from benchmarks.case import Case
from benchmarks.cases import attention, dropins, logits, moments, relation

CASES: tuple[Case, ...] = (*relation.CASES, *moments.CASES, *attention.CASES, *logits.CASES, *dropins.CASES)
