"""Pictures and masks as numbers: decoding, resizing, what a network is shown, masks as PNG."""
