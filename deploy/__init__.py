"""What a tuned retriever is put into: the search page, exported files."""
