"""One step of one layer: prepare, read, attend, select, commit."""
