"""The contenders that more than one question compares with."""
