"""The pages, one a file; each says by its decorator where it is."""
