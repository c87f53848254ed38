"""How files are written, checked and locked, for everything that keeps data on disk."""
