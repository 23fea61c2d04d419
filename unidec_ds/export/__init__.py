"""A trained run in forms that others use."""
