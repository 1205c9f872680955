"""The knowledge-retention experiments behind SECURA's claim: `secura experiment exp0 ... exp5`."""
