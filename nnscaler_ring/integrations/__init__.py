"""Adapters to model libraries; each imports its library when it is used."""
