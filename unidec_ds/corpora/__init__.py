"""The corpora that ship with the package, in the XMC repository's layout.

Each folder holds the raw files, a README with origin and statistics, and the licence.
"""
