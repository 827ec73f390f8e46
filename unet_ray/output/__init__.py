"""The labelled output: rows, manifest, ledger, published files, masks."""
