"""One tensor."""
