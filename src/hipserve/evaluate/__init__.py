"""Quality of pruned attention beside dense attention: perplexity and retrieval."""

from hipserve.evaluate.perplexity import PerplexityReport, evaluate_perplexity
from hipserve.evaluate.retrieval import RetrievalReport, evaluate_retrieval
from hipserve.evaluate.tasks import TASKS, make_sample
from hipserve.evaluate.text import Document, read_documents

__all__ = [
    "TASKS",
    "Document",
    "PerplexityReport",
    "RetrievalReport",
    "evaluate_perplexity",
    "evaluate_retrieval",
    "make_sample",
    "read_documents",
]
