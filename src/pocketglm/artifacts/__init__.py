"""L0: what lies on disk (checkpoint, export, proof) and how it gets there. No torch, no network."""
