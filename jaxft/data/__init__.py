"""Rows in, batches out: `formats` reads rows, `chat` tokenizes and masks them, `packing` and `loader` batch them."""
