"""Evaluation: exact neighbours, measures of retrieval, clustering and geometry, stores and indexes of embeddings."""
