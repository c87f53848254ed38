"""Search: images to embeddings, stores, indexes."""
