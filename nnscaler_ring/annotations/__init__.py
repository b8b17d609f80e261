"""How an op may be cut: the spec, one adapter per engine, and policies."""
