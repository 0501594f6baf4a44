"""The obvious form of each operation in plain torch or numpy: what the tests measure against."""
