"""Evaluation: exact neighbours, measures of retrieval, clustering and geometry, intervals, comparisons, pictures."""
