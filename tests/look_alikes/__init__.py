"""Small models with the names of others' code."""
