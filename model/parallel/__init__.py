"""One session on several ranks: who has which tokens and rows, and what they exchange. One rank is one process and GPU.

    ranks.py    Ranks: number of ranks, their layout, and `exchange`, the only way in which they talk
    tokens.py   TokenSplit: the student's tokens in ranges; self-attention by heads (Ulysses), by blocks of keys (ring)
    rows.py     RowSplit: the VAE's rows in slabs; the row beyond an edge comes from the neighbour (halo)

The result is that of one rank but for rounding: nothing is padded, masked or approximated.
"""
