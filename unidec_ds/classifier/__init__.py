"""The one-vs-all classifier: one weight row per label, updated row-sparsely."""
